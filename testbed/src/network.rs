use anyhow::Context as _;
use serde_json::Value;

use crate::Host;

/// A network as `weft network inspect` shows it on one host.
#[derive(Clone, Debug)]
pub struct NetworkView {
    pub id: String,
    pub name: String,
    pub vni: u32,
    pub mtu_bytes: u16,
    pub subnets: Vec<String>,
    /// The names of its endpoints on all hosts.
    pub endpoints: Vec<String>,
}

impl NetworkView {
    /// # Errors
    ///
    /// The host knows no such network, or its answer lacks a field.
    pub fn read(host: &Host, name: &str) -> anyhow::Result<Self> {
        let answer = host.weft_json(&format!("network inspect {name}"))?;
        let network = answer.get(0).and_then(|shown| shown.get("Weft"));
        let network = network.with_context(|| format!("no network in {answer}"))?;
        let missing = |field: &str| format!("no {field} in {network}");
        let texts = |list: &str, field: &str| -> anyhow::Result<Vec<String>> {
            let items =
                network.get(list).and_then(Value::as_array).with_context(|| missing(list))?;
            let text = |item: &Value| item.get(field).and_then(Value::as_str).map(str::to_owned);
            items.iter().map(|item| text(item).with_context(|| missing(field))).collect()
        };
        let number = |field: &str| {
            network.get(field).and_then(Value::as_u64).with_context(|| missing(field))
        };
        let id = network.get("id").and_then(Value::as_str).with_context(|| missing("id"))?;
        Ok(Self {
            id: id.to_owned(),
            name: name.to_owned(),
            vni: number("vni")?.try_into()?,
            mtu_bytes: number("mtu")?.try_into()?,
            subnets: texts("pools", "subnet")?,
            endpoints: texts("endpoints", "name")?,
        })
    }

    /// The name of its namespace on each host that uses it, as `ip netns` lists it.
    pub fn namespace(&self) -> String {
        format!("weft-{}", self.id.chars().take(12).collect::<String>())
    }

    /// Runs a shell script in its namespace on `host`.
    ///
    /// # Errors
    ///
    /// The host does not use the network, or the script failed.
    pub fn sh(&self, host: &Host, script: &str) -> anyhow::Result<String> {
        host.exec(&["ip", "netns", "exec", &self.namespace(), "sh", "-ec", script])?.ok()
    }
}
