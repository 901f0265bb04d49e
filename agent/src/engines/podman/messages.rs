//! What podman and netavark send and want to hear (netavark's plugin API, version 1.0.0).

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};
use weft_model::{Family, MacAddr, Subnet};

use super::Failure;
use crate::{
    api::types::{Attached, PortRequest},
    config,
    engines::{mapping::PortMapping, wanted::WantedNetwork},
};

/// A network as podman keeps it; what is not read here is left as it is.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Network {
    pub(super) name: String,
    #[serde(default)]
    subnets: Option<Vec<SubnetGiven>>,
    #[serde(default)]
    internal: bool,
    #[serde(default)]
    ipv6_enabled: bool,
    #[serde(default)]
    dns_enabled: bool,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
    #[serde(default)]
    ipam_options: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SubnetGiven {
    subnet: Subnet,
    #[serde(default)]
    gateway: Option<IpAddr>,
}

/// The input of `setup` and `teardown`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct NetworkSetup {
    pub(super) container_id: String,
    #[serde(default)]
    pub(super) container_name: Option<String>,
    #[serde(default)]
    port_mappings: Option<Vec<PortMapped>>,
    pub(super) network: Network,
    pub(super) network_options: NetworkOptions,
}

#[derive(Clone, Debug, Deserialize)]
struct PortMapped {
    #[serde(default)]
    host_ip: String,
    host_port: u16,
    container_port: u16,
    #[serde(default)]
    protocol: String,
    #[serde(default = "one")]
    range: u16,
}

fn one() -> u16 {
    1
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct NetworkOptions {
    #[serde(default)]
    pub(super) aliases: Option<Vec<String>>,
    pub(super) interface_name: String,
    #[serde(default)]
    pub(super) static_ips: Option<Vec<IpAddr>>,
    #[serde(default)]
    pub(super) static_mac: Option<MacAddr>,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

/// The answer to `setup`.
#[derive(Clone, Debug, Serialize)]
pub(super) struct StatusBlock {
    dns_search_domains: Vec<String>,
    dns_server_ips: Vec<IpAddr>,
    interfaces: BTreeMap<String, InterfaceMade>,
}

#[derive(Clone, Debug, Serialize)]
struct InterfaceMade {
    mac_address: MacAddr,
    subnets: Vec<AddressMade>,
}

#[derive(Clone, Debug, Serialize)]
struct AddressMade {
    ipnet: ipnet::IpNet,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
}

/// The metric of a default route for which nobody gave one (netavark's own).
const METRIC: i32 = 100;

/// What `-o` says of a network.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Options {
    pub(super) socket: PathBuf,
    pub(super) default_route: bool,
    /// Of a container's networks, the one of the highest has its default route.
    pub(super) gateway_priority: i32,
    /// Who publishes a container's ports, if anybody has said so.
    ports: Option<Ports>,
    network: Option<String>,
    encrypted: Option<bool>,
    mtu: Option<u16>,
}

/// Who publishes the ports of containers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ports {
    /// Weft does.
    Here,
    /// Another network of the container's does.
    Elsewhere,
}

impl Network {
    /// # Errors
    ///
    /// An option is not known, or has a value that does not fit.
    pub(super) fn options(&self) -> Result<Options, Failure> {
        let mut options = Options {
            socket: config::DEFAULT_SOCKET.into(),
            default_route: true,
            gateway_priority: 0,
            ports: None,
            network: None,
            encrypted: None,
            mtu: None,
        };
        for (key, value) in self.options.iter().flatten() {
            match key.as_str() {
                "weft.network" => options.network = Some(value.clone()),
                "agent_socket" => options.socket = value.into(),
                "encrypted" => options.encrypted = Some(switch(key, value)?),
                "no_default_route" => options.default_route = !switch(key, value)?,
                "metric" => {
                    let metric: i32 =
                        value.parse().ok().filter(|metric| *metric >= 0).ok_or_else(|| {
                            Failure(format!("option metric={value}: give a number, such as 100"))
                        })?;
                    options.gateway_priority = METRIC - metric;
                }
                "ports" if value == "here" => options.ports = Some(Ports::Here),
                "ports" if value == "elsewhere" => options.ports = Some(Ports::Elsewhere),
                "mtu" => {
                    let mtu = value.parse().map_err(|_| {
                        Failure(format!("option mtu={value}: give a number of bytes"))
                    })?;
                    options.mtu = Some(mtu);
                }
                _ => {
                    return Err(Failure(format!(
                        "option {key}={value} is not known: give weft.network=NAME, mtu=BYTES, encrypted, metric=NUMBER, no_default_route, ports=here, ports=elsewhere or agent_socket=PATH"
                    )));
                }
            }
        }
        Ok(options)
    }

    /// The cluster's network behind podman's; made by `create` where it is not there.
    pub(super) fn wanted(&self, options: &Options) -> WantedNetwork {
        let given = || self.subnets.iter().flatten();
        let subnets: Vec<Subnet> = given().map(|given| given.subnet).collect();
        let has_v6 = subnets.iter().any(|subnet| subnet.family() == Family::V6);
        WantedNetwork {
            name: options.network.clone().unwrap_or_else(|| self.name.clone()),
            create: true,
            gateways: given().filter_map(|given| given.gateway).collect(),
            internal: self.internal.then_some(true),
            encrypted: options.encrypted,
            ipv6: self.ipv6_enabled && !has_v6,
            mtu: options.mtu,
            subnets,
        }
    }

    /// Whether containers are to ask weft for names. Podman switches its own resolver off where it
    /// gives out no addresses, and nobody asked for that.
    fn has_names(&self) -> bool {
        let driver = self.ipam_options.as_ref().and_then(|options| options.get("driver"));
        self.dns_enabled || driver.is_some_and(|driver| driver == "none")
    }
}

impl NetworkSetup {
    /// # Errors
    ///
    /// The container wants what nobody would do.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match self.network_options.options.iter().flatten().next() {
            Some((key, value)) => Err(Failure(format!(
                "option {key}={value} of network {} is not known: leave it out",
                self.network.name
            ))),
            None => Ok(()),
        }
    }

    /// The ports of the host that shall lead to the container by this network.
    ///
    /// # Errors
    ///
    /// One cannot be published, or nobody has said by whom.
    pub(super) fn ports(&self, options: &Options) -> Result<Vec<PortRequest>, Failure> {
        let mut ports = Vec::new();
        for mapped in self.port_mappings.iter().flatten() {
            match options.ports {
                Some(Ports::Here) => {}
                Some(Ports::Elsewhere) => return Ok(Vec::new()),
                None => return Err(self.unpublished(mapped)),
            }
            let PortMapped { host_ip, host_port, container_port, protocol, range } = mapped.clone();
            let count = range.max(1);
            let mapping = PortMapping { host_ip, host_port, container_port, protocol, count };
            let requests = mapping.requests();
            ports.extend(requests.map_err(|error| Failure(format!("port_mappings: {error}")))?);
        }
        Ok(ports)
    }

    fn unpublished(&self, mapped: &PortMapped) -> Failure {
        let PortMapped { host_port, container_port, .. } = mapped;
        Failure(format!(
            "port_mappings: nobody has said who publishes port {host_port} for port {container_port} on network {name}: create {name} with -o ports=here, and set enable_port_reservation = false in containers.conf; or with -o ports=elsewhere, and give the container a bridge network too",
            name = self.network.name
        ))
    }

    /// Says what became of the container.
    pub(super) fn answer(&self, attached: &Attached) -> StatusBlock {
        let gateway = |family| attached.gateways.iter().find(|ip| Family::of(**ip) == family);
        let subnets = attached.endpoint.addresses.iter().map(|net| AddressMade {
            ipnet: *net,
            gateway: gateway(Family::of(net.addr())).copied(),
        });
        let made = InterfaceMade { mac_address: attached.endpoint.mac, subnets: subnets.collect() };
        let (domains, servers) = match self.network.has_names() {
            true => (vec![attached.domain.to_string()], attached.resolvers.clone()),
            false => (Vec::new(), Vec::new()),
        };
        StatusBlock {
            dns_search_domains: domains,
            dns_server_ips: servers,
            interfaces: BTreeMap::from([(self.network_options.interface_name.clone(), made)]),
        }
    }
}

fn switch(key: &str, value: &str) -> Result<bool, Failure> {
    match value {
        "" | "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(Failure(format!("option {key}={value}: give true or false"))),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const RECORDED: &str = include_str!("../../../tests/engines/podman-5.4.jsonl");

    fn recorded(call: &str) -> (Value, Value) {
        let mut lines = RECORDED.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let line = lines.find(|line| line["argv"][0] == call).unwrap();
        (line["stdin"].clone(), line["out"].clone())
    }

    #[test]
    fn what_podman_5_4_sent_is_understood() {
        let network: Network = serde_json::from_value(recorded("create").0).unwrap();
        let options = network.options().unwrap();
        let wanted = network.wanted(&options);
        assert_eq!((wanted.name.as_str(), wanted.create), ("shop", true));
        assert_eq!(wanted.subnets, ["10.93.0.0/24".parse().unwrap()]);
        for call in ["setup", "teardown"] {
            let setup: NetworkSetup = serde_json::from_value(recorded(call).0).unwrap();
            assert_eq!(setup.container_name.as_deref(), Some("nv1"));
            assert_eq!(setup.network_options.static_ips, Some(vec!["10.93.0.2".parse().unwrap()]));
            setup.check().unwrap();
            let refused = setup.ports(&options).unwrap_err();
            assert!(refused.0.contains("8077") && refused.0.contains("ports=here"), "{refused}");
            let with = |ports| setup.ports(&Options { ports: Some(ports), ..options.clone() });
            let here = with(Ports::Here).unwrap();
            assert_eq!((here[0].host_port, here[0].container_port), (Some(8077), 80));
            assert!(with(Ports::Elsewhere).unwrap().is_empty());
        }
    }

    #[test]
    fn the_answer_has_the_shape_that_podman_5_4_took() {
        let (input, taken) = recorded("setup");
        let setup: NetworkSetup = serde_json::from_value(input).unwrap();
        let attached: Attached = serde_json::from_value(json!({
            "id": "01".repeat(16), "name": "nv1", "aliases": [], "network": "shop",
            "network_id": "02".repeat(16), "node": "h1", "node_id": "03".repeat(16),
            "mac": "ee:b3:42:08:d9:e3", "addresses": ["10.93.0.2/24"], "ifname": "eth0",
            "reachable": true, "gateways": ["10.93.0.1"], "resolvers": ["10.93.0.1"], "mtu": 1450,
            "domain": "weft.internal", "default_route": true, "sandbox": "7",
        }))
        .unwrap();
        let answer = serde_json::to_value(setup.answer(&attached)).unwrap();
        assert_eq!(answer["interfaces"], taken["interfaces"]);
        assert_eq!(answer["dns_server_ips"], json!(["10.93.0.1"]));
        assert_eq!(answer["dns_search_domains"], json!(["weft.internal"]));

        let mut silent = setup;
        silent.network.dns_enabled = false;
        let answer = serde_json::to_value(silent.answer(&attached)).unwrap();
        assert_eq!(answer["dns_server_ips"], json!([]));
        silent.network.ipam_options = Some(BTreeMap::from([("driver".into(), "none".into())]));
        let answer = serde_json::to_value(silent.answer(&attached)).unwrap();
        assert_eq!(answer["dns_server_ips"], json!(["10.93.0.1"]));
    }

    #[test]
    fn options_that_are_not_known_are_refused_by_name() {
        for (key, value) in
            [("colour", "red"), ("mtu", "big"), ("encrypted", "maybe"), ("ports", "x")]
        {
            let network = json!({"name": "app", "options": {key: value}});
            let network: Network = serde_json::from_value(network).unwrap();
            let refused = network.options().unwrap_err();
            assert!(refused.0.contains(key) && refused.0.contains(value), "{refused}");
        }
    }
}
