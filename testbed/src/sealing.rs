use anyhow::Context as _;
use serde_json::Value;

use crate::Host;

/// How a host takes part in encrypted networks, as `weft status` shows it.
#[derive(Clone, Debug)]
pub struct SealingView {
    status: Value,
}

/// How it reaches one other host.
#[derive(Clone, Debug)]
pub struct PeerView {
    /// `direct`, `observed`, `relay` or `down`.
    pub path: String,
    /// The host that relays.
    pub via: Option<String>,
    pub confirmed: bool,
    /// Bytes of the largest packet that the underlay carries there.
    pub path_mtu: Option<u64>,
    pub fault: Option<String>,
}

impl SealingView {
    /// # Errors
    ///
    /// The host's agent does not answer.
    pub fn read(host: &Host) -> anyhow::Result<Self> {
        Ok(Self { status: host.weft_json("status")? })
    }

    /// Why it takes no part, if it does not.
    pub fn reason(&self) -> Option<String> {
        text(&self.status["encryption"]["reason"])
    }

    /// What an operator should look at.
    pub fn findings(&self) -> Vec<String> {
        let findings = self.status["findings"].as_array();
        findings.into_iter().flatten().filter_map(text).collect()
    }

    /// # Errors
    ///
    /// The host knows no peer of that name yet.
    pub fn peer(&self, name: &str) -> anyhow::Result<PeerView> {
        let peers = self.status["encryption"]["peers"].as_array();
        let peer = peers.into_iter().flatten().find(|peer| peer["node"] == name);
        let peer = peer.with_context(|| format!("no peer {name} in {}", self.status))?;
        let missing = || format!("a field is missing in {peer}");
        Ok(PeerView {
            path: text(&peer["path"]).with_context(missing)?,
            via: text(&peer["via"]),
            confirmed: peer["confirmed"].as_bool().with_context(missing)?,
            path_mtu: peer["path_mtu"].as_u64(),
            fault: text(&peer["fault"]),
        })
    }

    /// Whether an encrypted network is carried to other hosts; what is wrong, if it is not.
    ///
    /// # Errors
    ///
    /// The host has no endpoints in such a network.
    pub fn network(&self, name: &str) -> anyhow::Result<Result<(), String>> {
        let networks = self.status["encryption"]["networks"].as_array();
        let network = networks.into_iter().flatten().find(|network| network["network"] == name);
        let network = network.with_context(|| format!("no network {name} in {}", self.status))?;
        match network["carried"].as_bool() {
            Some(true) => Ok(Ok(())),
            _ => Ok(Err(text(&network["fault"]).unwrap_or_else(|| network.to_string()))),
        }
    }
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}
