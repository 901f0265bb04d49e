//! What ADD answers, and what CHECK and chained plugins bring back.

use std::{collections::BTreeSet, net::IpAddr, path::Path};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use weft_model::Family;

use super::{
    failure::{Code, Failure},
    version::SpecVersion,
};
use crate::api::types::Attached;

/// A result in the shape of any version; [`render`](Self::render) gives it that of one.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub(super) struct CniResult {
    pub(super) interfaces: Vec<Interface>,
    pub(super) ips: Vec<Address>,
    pub(super) routes: Vec<Route>,
    pub(super) dns: Dns,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(super) struct Interface {
    pub(super) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mac: Option<String>,
    /// Bytes. Since 1.1.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) mtu: Option<u32>,
    /// Absent, or empty, for an interface of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) sandbox: Option<String>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Address {
    /// `4` or `6`. Until 1.0.0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    pub(super) address: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gateway: Option<IpAddr>,
    /// An index into the interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) interface: Option<usize>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Route {
    pub(super) dst: IpNet,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) gw: Option<IpAddr>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

/// The resolver's settings.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub(super) struct Dns {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) nameservers: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) domain: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) search: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) options: Vec<String>,
}

impl CniResult {
    /// Reads a `prevResult`.
    ///
    /// # Errors
    ///
    /// It is none.
    pub(super) fn parse(prev: &Value) -> Result<Self, Failure> {
        let wrong = |why: String| Failure::new(Code::Configuration, why);
        // A list would be read as one of fields.
        if !prev.is_object() {
            return Err(wrong(format!("prevResult is {prev}: it must be an object")));
        }
        serde_path_to_error::deserialize(prev.clone()).map_err(|error| {
            wrong(format!("prevResult.{} does not fit: {}", error.path(), error.inner()))
        })
    }

    /// Adds what was attached to what plugins before have made. Default routes are told for
    /// `families` alone.
    pub(super) fn add(
        mut self,
        attached: &Attached,
        (netns, ifname): (&Path, &str),
        families: &BTreeSet<Family>,
    ) -> Self {
        let index = self.interfaces.len();
        self.interfaces.push(Interface {
            name: ifname.to_owned(),
            mac: Some(attached.endpoint.mac.to_string()),
            mtu: Some(attached.mtu.into()),
            sandbox: Some(netns.display().to_string()),
            more: Map::new(),
        });
        for net in &attached.endpoint.addresses {
            let family = Family::of(net.addr());
            let gateway = attached.gateways.iter().find(|ip| Family::of(**ip) == family).copied();
            self.ips.push(Address {
                version: None,
                address: *net,
                gateway,
                interface: Some(index),
                more: Map::new(),
            });
            if families.contains(&family) {
                let dst = IpNet::new(any(family), 0).expect("no length is too long");
                self.routes.push(Route { dst, gw: gateway, more: Map::new() });
            }
        }
        self
    }

    /// Adds the network's resolver, with what the configuration wants beside it.
    pub(super) fn resolve_with(mut self, attached: &Attached, wanted: &Dns) -> Self {
        let dns = &mut self.dns;
        let resolvers = attached.resolvers.iter().map(ToString::to_string);
        extend(&mut dns.nameservers, resolvers.chain(wanted.nameservers.iter().cloned()));
        let domain = [attached.domain.to_string()];
        extend(&mut dns.search, domain.into_iter().chain(wanted.search.iter().cloned()));
        extend(&mut dns.options, wanted.options.iter().cloned());
        dns.domain = dns.domain.take().or_else(|| wanted.domain.clone());
        self
    }

    /// Writes the result as `version` has it.
    pub(super) fn render(mut self, version: SpecVersion) -> Value {
        for ip in &mut self.ips {
            ip.version =
                (version < SpecVersion::V1_0_0).then(|| match Family::of(ip.address.addr()) {
                    Family::V4 => "4".to_owned(),
                    Family::V6 => "6".to_owned(),
                });
        }
        if version < SpecVersion::V1_1_0 {
            for interface in &mut self.interfaces {
                interface.mtu = None;
            }
        }
        let mut json = serde_json::to_value(&self).expect("a result is plain data");
        json["cniVersion"] = version.as_str().into();
        json
    }

    /// What was answered of one interface of a container.
    pub(super) fn inside(&self, ifname: &str) -> Option<(&Interface, BTreeSet<IpNet>)> {
        let in_sandbox = |interface: &Interface| {
            interface.name == ifname && interface.sandbox.as_ref().is_some_and(|s| !s.is_empty())
        };
        let index = self.interfaces.iter().position(in_sandbox)?;
        let ips = self.ips.iter().filter(|ip| ip.interface == Some(index));
        Some((&self.interfaces[index], ips.map(|ip| ip.address).collect()))
    }
}

/// The address that stands for all of a family.
pub(super) fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    }
}

fn extend(list: &mut Vec<String>, more: impl Iterator<Item = String>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn attached() -> Attached {
        serde_json::from_value(json!({
            "id": "01".repeat(16), "name": "web", "aliases": [], "network": "app",
            "network_id": "02".repeat(16), "node": "h1", "node_id": "03".repeat(16),
            "mac": "02:00:00:00:00:01", "addresses": ["10.5.0.2/24", "fd00::2/64"],
            "ifname": "eth0", "reachable": true, "gateways": ["10.5.0.1", "fd00::1"],
            "resolvers": ["10.5.0.1", "fd00::1"],
            "mtu": 1450, "domain": "weft.internal", "default_route": true, "sandbox": "7",
        }))
        .unwrap()
    }

    fn rendered(version: SpecVersion) -> Value {
        let both = BTreeSet::from([Family::V4, Family::V6]);
        CniResult::default()
            .add(&attached(), (Path::new("/run/netns/x"), "eth0"), &both)
            .resolve_with(&attached(), &Dns { search: vec!["corp".into()], ..Dns::default() })
            .render(version)
    }

    #[test]
    fn each_version_has_its_own_shape() {
        let ips = |version: Option<[&str; 2]>| {
            let mut ips = json!([
                {"address": "10.5.0.2/24", "gateway": "10.5.0.1", "interface": 0},
                {"address": "fd00::2/64", "gateway": "fd00::1", "interface": 0},
            ]);
            for (n, version) in version.iter().flatten().enumerate() {
                ips[n]["version"] = json!(version);
            }
            ips
        };
        let interface =
            json!({"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"});
        let mut with_mtu = interface.clone();
        with_mtu["mtu"] = json!(1450);
        for (version, interface, ips) in [
            (SpecVersion::V0_3_1, &interface, ips(Some(["4", "6"]))),
            (SpecVersion::V0_4_0, &interface, ips(Some(["4", "6"]))),
            (SpecVersion::V1_0_0, &interface, ips(None)),
            (SpecVersion::V1_1_0, &with_mtu, ips(None)),
        ] {
            assert_eq!(
                rendered(version),
                json!({
                    "cniVersion": version.as_str(),
                    "interfaces": [interface],
                    "ips": ips,
                    "routes": [{"dst": "0.0.0.0/0", "gw": "10.5.0.1"}, {"dst": "::/0", "gw": "fd00::1"}],
                    "dns": {"nameservers": ["10.5.0.1", "fd00::1"], "search": ["weft.internal", "corp"]},
                })
            );
        }
    }

    #[test]
    fn what_plugins_before_made_stays_and_indices_follow() {
        let prev = json!({
            "cniVersion": "1.1.0",
            "interfaces": [{"name": "lo", "sandbox": "/run/netns/x", "socketPath": "/s"}],
            "ips": [{"address": "127.0.0.1/8", "interface": 0}],
            "routes": [{"dst": "10.9.0.0/16", "mtu": 1400}],
            "dns": {"nameservers": ["9.9.9.9"]},
        });
        let result = CniResult::parse(&prev)
            .unwrap()
            .add(&attached(), (Path::new("/run/netns/x"), "eth0"), &BTreeSet::new())
            .resolve_with(&attached(), &Dns::default())
            .render(SpecVersion::V1_1_0);
        assert_eq!(result["interfaces"][0], prev["interfaces"][0]);
        assert_eq!(result["routes"], prev["routes"]);
        assert_eq!(result["ips"][1]["interface"], 1);
        assert_eq!(result["dns"]["nameservers"][0], "9.9.9.9");
        let read = CniResult::parse(&result).unwrap();
        let (interface, ips) = read.inside("eth0").unwrap();
        assert_eq!((interface.mtu, ips.len()), (Some(1450), 2));
        assert!(read.inside("eth1").is_none());
    }

    #[test]
    fn what_is_no_result_is_refused_with_its_place() {
        let bad = json!({"ips": [{"address": "10.0.0"}]});
        let failure = CniResult::parse(&bad).unwrap_err();
        assert!(failure.message.contains("prevResult"), "{failure}");
        assert!(CniResult::parse(&json!([])).is_err());
    }
}
