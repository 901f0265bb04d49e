//! A plugin's configuration, as the runtime puts it on standard input.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use weft_model::{MacAddr, Subnet};

use super::{
    environment::{address, interface_name, is_name},
    failure::{Code, Failure},
    result::Dns,
    version::SpecVersion,
};
use crate::{
    api::types::PortRequest,
    config,
    engines::{
        mapping::{MappingError, PortMapping},
        wanted::WantedNetwork,
    },
};

/// What one network wants of this plugin.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conf {
    pub(super) version: SpecVersion,
    /// What the runtime calls the network.
    pub(super) name: String,
    pub(super) socket: PathBuf,
    pub(super) network: WantedNetwork,
    /// What the interface is called, where that is not the runtime's own choice: after a plugin that
    /// has made an interface of that name.
    pub(super) ifname: Option<String>,
    /// Whether the default route leads through the network; the first one that can has it if
    /// nothing is said.
    pub(super) default_gateway: Option<bool>,
    /// Of a container's networks, the one of the highest has its default route.
    pub(super) gateway_priority: i32,
    pub(super) dns: Dns,
    pub(super) aliases: Vec<String>,
    pub(super) ips: Vec<IpAddr>,
    pub(super) mac: Option<MacAddr>,
    /// Those of the host that shall lead to the container.
    pub(super) ports: Vec<PortRequest>,
    pub(super) prev_result: Option<Value>,
    /// Each a container's id and an interface; absent where the runtime gave no list.
    pub(super) valid: Option<Vec<(String, String)>>,
}

/// As it is written.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    network: Option<String>,
    #[serde(rename = "agent_socket")]
    agent_socket: Option<PathBuf>,
    #[serde(default)]
    create: bool,
    #[serde(default, deserialize_with = "one_or_many")]
    subnet: Vec<Subnet>,
    #[serde(default)]
    ipv6: bool,
    internal: Option<bool>,
    encrypted: Option<bool>,
    mtu: Option<u16>,
    ifname: Option<String>,
    is_default_gateway: Option<bool>,
    gateway_priority: Option<i32>,
    #[serde(default)]
    dns: Dns,
    #[serde(default)]
    runtime_config: RuntimeConfig,
    #[serde(default)]
    args: ConfArgs,
}

/// Only what was declared under `capabilities` arrives here.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RuntimeConfig {
    aliases: BTreeMap<String, Vec<String>>,
    ips: Vec<String>,
    mac: Option<MacAddr>,
    port_mappings: Option<Vec<PortMapped>>,
    bandwidth: Value,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PortMapped {
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(rename = "hostIP", default)]
    host_ip: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ConfArgs {
    cni: CniArgs,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CniArgs {
    ips: Vec<String>,
    mac: Option<MacAddr>,
}

#[derive(Deserialize)]
struct ValidAttachment {
    #[serde(rename = "containerID")]
    container: String,
    ifname: String,
}

const VALID: &str = "cni.dev/valid-attachments";

/// Keys that are understood, or that say nothing to a plugin. Others are refused, but for those of
/// somebody's own domain, which hold a dot or a slash.
const KEYS: [&str; 23] = [
    "cniVersion",
    "cniVersions",
    "name",
    "type",
    "network",
    "agent_socket",
    "create",
    "subnet",
    "ipv6",
    "internal",
    "encrypted",
    "mtu",
    "ifname",
    "isDefaultGateway",
    "gatewayPriority",
    "dns",
    "capabilities",
    "runtimeConfig",
    "args",
    "prevResult",
    "ipam",
    "disableCheck",
    "disableGC",
];

/// The version that an input asks for, for answers to whatever it is.
pub(super) fn version_in(input: &[u8]) -> Option<String> {
    let json: Value = serde_json::from_slice(input).ok()?;
    Some(json.get("cniVersion")?.as_str()?.to_owned())
}

impl Conf {
    /// Reads what stood on standard input.
    ///
    /// # Errors
    ///
    /// It is no JSON (6), of a version that is not spoken (1), says what is not supported (2), or
    /// something that cannot be (7).
    pub(super) fn parse(input: &[u8]) -> Result<Self, Failure> {
        let json: Map<String, Value> = serde_json::from_slice(input).map_err(|error| {
            Failure::new(Code::Decode, format!("the network configuration is no JSON: {error}"))
        })?;
        let text = |key: &str| json.get(key).and_then(Value::as_str).unwrap_or_default();
        let version: SpecVersion =
            text("cniVersion").parse().map_err(|error: super::version::UnknownVersion| {
                Failure::new(Code::Version, error.to_string())
            })?;
        let name = text("name").to_owned();
        if !is_name(&name) {
            return Err(wrong(format!(
                "name is {name:?}: it must begin with a letter or digit and go on with these, dots, hyphens or underscores"
            )));
        }
        refuse_foreign(&json)?;
        let raw: Raw = serde_path_to_error::deserialize(Value::Object(json.clone()))
            .map_err(|error| wrong(format!("{} does not fit: {}", error.path(), error.inner())))?;
        refuse_bandwidth(&raw.runtime_config.bandwidth)?;
        let valid = json.get(VALID).map(valid_attachments).transpose()?;
        let prev_result = json.get("prevResult").filter(|prev| !prev.is_null()).cloned();
        raw.into_conf(version, name, prev_result, valid)
    }
}

impl Raw {
    fn into_conf(
        self,
        version: SpecVersion,
        name: String,
        prev_result: Option<Value>,
        valid: Option<Vec<(String, String)>>,
    ) -> Result<Conf, Failure> {
        let RuntimeConfig { mut aliases, ips, mac, port_mappings, .. } = self.runtime_config;
        let mut ports = Vec::new();
        for mapped in port_mappings.into_iter().flatten() {
            ports.extend(mapped.requests()?);
        }
        let ifname = self.ifname.map(|name| interface_name("ifname", name)).transpose();
        let ifname = ifname.map_err(|Failure { message, .. }| wrong(message))?;
        let asked = [("runtimeConfig.ips", ips), ("args.cni.ips", self.args.cni.ips)];
        let mut addresses: Vec<IpAddr> = Vec::new();
        for (key, texts) in asked {
            for text in texts {
                let ip = address(key, &text).map_err(|Failure { message, .. }| wrong(message))?;
                if !addresses.contains(&ip) {
                    addresses.push(ip);
                }
            }
        }
        Ok(Conf {
            version,
            socket: self.agent_socket.unwrap_or_else(|| config::DEFAULT_SOCKET.into()),
            network: WantedNetwork {
                name: self.network.unwrap_or_else(|| name.clone()),
                create: self.create,
                subnets: self.subnet,
                gateways: Vec::new(),
                internal: self.internal,
                encrypted: self.encrypted,
                ipv6: self.ipv6,
                mtu: self.mtu,
            },
            ifname,
            default_gateway: self.is_default_gateway,
            // Who says so goes before who says nothing.
            gateway_priority: self
                .gateway_priority
                .unwrap_or_else(|| i32::from(self.is_default_gateway == Some(true))),
            dns: self.dns,
            aliases: aliases.remove(&name).unwrap_or_default(),
            ips: addresses,
            mac: mac.or(self.args.cni.mac),
            ports,
            prev_result,
            valid,
            name,
        })
    }
}

/// Refuses keys that nobody would follow.
fn refuse_foreign(json: &Map<String, Value>) -> Result<(), Failure> {
    let foreign = |key: &&String| !KEYS.contains(&key.as_str()) && !key.contains(['.', '/']);
    if let Some(key) = json.keys().find(foreign) {
        return Err(unsupported(format!(
            "{key}: {} is not supported: take it out",
            json[key.as_str()]
        )));
    }
    match json.get("ipam") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(ipam)) if ipam.is_empty() => Ok(()),
        Some(ipam) => Err(unsupported(format!(
            "ipam: {ipam} is not supported: take it out; weft gives out addresses that no two hosts give out twice"
        ))),
    }
}

fn refuse_bandwidth(value: &Value) -> Result<(), Failure> {
    let empty = match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    };
    match empty {
        true => Ok(()),
        false => Err(unsupported(format!(
            "runtimeConfig.bandwidth: {value} is not supported: declare the capability with the plugin bandwidth, after weft-cni, and not here"
        ))),
    }
}

impl PortMapped {
    fn requests(self) -> Result<Vec<PortRequest>, Failure> {
        let Self { host_port, container_port, protocol, host_ip } = self;
        let mapping = PortMapping { host_ip, host_port, container_port, protocol, count: 1 };
        mapping.requests().map_err(|error| {
            let message = format!("runtimeConfig.portMappings: {error}");
            match error {
                MappingError::Protocol { .. } => unsupported(message),
                MappingError::Address(_) | MappingError::Beyond { .. } => wrong(message),
            }
        })
    }
}

fn valid_attachments(value: &Value) -> Result<Vec<(String, String)>, Failure> {
    let list: Option<Vec<ValidAttachment>> = serde_path_to_error::deserialize(value.clone())
        .map_err(|error| {
            wrong(format!("{VALID}{} does not fit: {}", error.path(), error.inner()))
        })?;
    Ok(list.unwrap_or_default().into_iter().map(|valid| (valid.container, valid.ifname)).collect())
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Subnet>, D::Error> {
    let subnets = match Value::deserialize(deserializer)? {
        Value::Array(subnets) => subnets,
        one => vec![one],
    };
    let parse = |subnet| serde_json::from_value(subnet).map_err(serde::de::Error::custom);
    subnets.into_iter().map(parse).collect()
}

fn wrong(message: String) -> Failure {
    Failure::new(Code::Configuration, message)
}

fn unsupported(message: String) -> Failure {
    Failure::new(Code::UnsupportedField, message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(more: Value) -> Result<Conf, Failure> {
        let mut conf = json!({"cniVersion": "1.0.0", "name": "app", "type": "weft-cni"});
        for (key, value) in more.as_object().unwrap() {
            conf[key] = value.clone();
        }
        Conf::parse(conf.to_string().as_bytes())
    }

    #[test]
    fn a_configuration_needs_no_more_than_its_name() {
        let conf = with(json!({})).unwrap();
        assert_eq!(conf.network.name, "app");
        assert!(conf.network.is_only_named());
        assert_eq!(conf.socket, PathBuf::from(config::DEFAULT_SOCKET));
        assert_eq!(conf.valid, None);
    }

    #[test]
    fn what_the_runtime_adds_is_taken_for_this_network_alone() {
        let conf = with(json!({
            "network": "shop", "agent_socket": "/run/other.sock", "subnet": "10.5.0.0/24",
            "create": true, "isDefaultGateway": false, "ipam": {},
            "io.podman.something": 1, "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}],
            "capabilities": {"aliases": true, "portMappings": true},
            "runtimeConfig": {
                "aliases": {"app": ["al1"], "other": ["al2"]}, "ips": ["10.5.0.9/24"],
                "mac": "02:00:00:00:00:01",
                "portMappings": [
                    {"hostPort": 8080, "containerPort": 80},
                    {"hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "127.0.0.1"},
                ],
            },
            "args": {"cni": {"ips": ["10.5.0.9"]}},
        }))
        .unwrap();
        assert_eq!(conf.aliases, ["al1"]);
        assert_eq!(conf.ips, ["10.5.0.9".parse::<IpAddr>().unwrap()]);
        assert_eq!(conf.network.name, "shop");
        assert_eq!(conf.network.subnets.len(), 1);
        let ports: Vec<_> =
            conf.ports.iter().map(|port| (port.host_port, port.container_port)).collect();
        assert_eq!(ports, [(Some(8080), 80), (Some(53), 5353)]);
        assert!(with(json!({"runtimeConfig": {"portMappings": null}})).unwrap().ports.is_empty());
        assert_eq!(conf.default_gateway, Some(false));
        assert_eq!(conf.valid, Some(vec![("a".into(), "eth0".into())]));
        assert!(
            with(json!({"runtimeConfig": {"aliases": {"other": ["x"]}}}))
                .unwrap()
                .aliases
                .is_empty()
        );
    }

    #[test]
    fn no_list_is_told_from_an_empty_one() {
        assert_eq!(with(json!({VALID: []})).unwrap().valid, Some(vec![]));
        assert_eq!(with(json!({VALID: null})).unwrap().valid, Some(vec![]));
        assert_eq!(with(json!({})).unwrap().valid, None);
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name_and_code() {
        let mapping = |key: &str, value: Value| {
            let mut mapping = json!({"hostPort": 80, "containerPort": 80, "protocol": "tcp"});
            mapping[key] = value;
            json!({"runtimeConfig": {"portMappings": [mapping]}})
        };
        for (more, code, word) in [
            (json!({"cniVersion": "2.0.0"}), Code::Version, "2.0.0"),
            (json!({"cniVersion": "0.2.0"}), Code::Version, "0.3.1"),
            (json!({"cniVersion": 1}), Code::Version, "cniVersion"),
            (json!({"name": ""}), Code::Configuration, "name"),
            (json!({"name": "a b"}), Code::Configuration, "a b"),
            (json!({"colour": "red"}), Code::UnsupportedField, "colour: \"red\""),
            (json!({"ipam": {"type": "host-local"}}), Code::UnsupportedField, "host-local"),
            (mapping("protocol", json!("sctp")), Code::UnsupportedField, "80/sctp"),
            (mapping("hostIP", json!("lo")), Code::Configuration, "lo"),
            (mapping("hostPort", json!(70000)), Code::Configuration, "portMappings[0].hostPort"),
            (
                json!({"runtimeConfig": {"bandwidth": {"ingressRate": 1}}}),
                Code::UnsupportedField,
                "bandwidth",
            ),
            (
                json!({"runtimeConfig": {"ips": ["10.0.0"]}}),
                Code::Configuration,
                "runtimeConfig.ips",
            ),
            (json!({"runtimeConfig": {"mac": "x"}}), Code::Configuration, "runtimeConfig.mac"),
            (json!({"subnet": "10.0.0.0/99"}), Code::Configuration, "subnet"),
            (json!({"ifname": "a/b"}), Code::Configuration, "ifname"),
            (json!({"create": "yes"}), Code::Configuration, "create"),
            (json!({VALID: [{"ifname": "eth0"}]}), Code::Configuration, "containerID"),
        ] {
            let failure = with(more.clone()).unwrap_err();
            assert_eq!(failure.code, code, "{more}: {failure}");
            assert!(failure.message.contains(word), "{more}: {failure}");
        }
        for input in ["", "{", "[]", "\"x\"", "null"] {
            assert_eq!(Conf::parse(input.as_bytes()).unwrap_err().code, Code::Decode, "{input}");
        }
    }
}
