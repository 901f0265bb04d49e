use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Family, Label, Labels, Macvlan, NetworkId, NodeId, Subnet, Vni};

/// The definition of a network. It never changes once the network is created.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "unchecked::Network")]
pub struct Network {
    pub id: NetworkId,
    pub name: Label,
    #[serde(default, skip_serializing_if = "Driver::is_overlay")]
    pub driver: Driver,
    /// On the wire of an overlay that is not encrypted only.
    pub vni: Vni,
    /// One pool a family, IPv4 first; at least one.
    pub pools: Vec<Pool>,
    /// No egress, no upstream DNS.
    #[serde(default)]
    pub internal: bool,
    /// Traffic between hosts is sealed, or there is none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    #[serde(default)]
    pub options: NetworkOptions,
    pub creator: NodeId,
    /// The nodes that lend this network's address space, each its own share of the blocks.
    pub lenders: Vec<NodeId>,
    /// When the creator made it, seconds since the Unix epoch. For people; decides nothing.
    #[serde(default)]
    pub created: u64,
}

impl Network {
    /// Returns the network if a node can carry it.
    ///
    /// # Errors
    ///
    /// There is no pool, two pools of one family, or no lender; or others would have a part in what
    /// is one host's alone.
    pub fn checked(self) -> Result<Self, InvalidNetwork> {
        let families: BTreeSet<_> = self.pools.iter().map(|pool| pool.subnet.family()).collect();
        let why = match () {
            () if self.pools.is_empty() => "it has no subnet",
            () if families.len() < self.pools.len() => "it has two subnets of one family",
            () if self.lenders.is_empty() => "no node lends its addresses",
            () if self.driver.is_local() && self.lenders != [self.creator] => {
                "its driver is for one host, but another one lends its addresses"
            }
            () if self.driver.is_local() && self.encrypted => {
                "nothing of it goes between hosts, so nothing can be encrypted"
            }
            () if (self.driver == Driver::Macvlan) != self.options.macvlan.is_some() => {
                "its driver and its options do not fit each other"
            }
            () => return Ok(self),
        };
        Err(InvalidNetwork { name: self.name, why })
    }

    pub fn pool(&self, family: Family) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.subnet.family() == family)
    }

    pub fn pool_of(&self, ip: IpAddr) -> Option<&Pool> {
        self.pools.iter().find(|pool| pool.subnet.contains(ip))
    }
}

/// What carries a network.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// All hosts of the cluster.
    #[default]
    Overlay,
    /// The host that made it, alone.
    Bridge,
    /// The link of an interface of the host that made it.
    Macvlan,
}

impl Driver {
    /// The name in records, commands and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Overlay => "overlay",
            Self::Bridge => "bridge",
            Self::Macvlan => "macvlan",
        }
    }

    /// Whether its networks are of no concern to other hosts.
    pub fn is_local(self) -> bool {
        match self {
            Self::Overlay => false,
            Self::Bridge | Self::Macvlan => true,
        }
    }

    /// Whether the gateway of its networks is weft's. If not it is a machine that weft knows nothing
    /// of.
    pub fn has_gateway(self) -> bool {
        match self {
            Self::Overlay | Self::Bridge => true,
            Self::Macvlan => false,
        }
    }

    /// Docker's word for where its networks are known.
    pub fn scope(self) -> &'static str {
        if self.is_local() { "local" } else { "global" }
    }

    fn is_overlay(&self) -> bool {
        *self == Self::Overlay
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One subnet of a network and how it is used. Gateway, range and auxiliary addresses lie in it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "unchecked::Pool")]
pub struct Pool {
    pub subnet: Subnet,
    pub gateway: IpAddr,
    /// Where addresses that nobody asked for by number come from; the whole subnet when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<IpNet>,
    /// Addresses in use by machines outside weft, by name (`--aux-address`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub aux: BTreeMap<String, IpAddr>,
}

impl Pool {
    /// Returns the pool if its parts fit each other.
    ///
    /// # Errors
    ///
    /// The gateway or an auxiliary address is no host address of the subnet, or the range is not
    /// inside it.
    pub fn checked(self) -> Result<Self, InvalidPool> {
        let invalid =
            |part: String, value: String| InvalidPool { part, value, subnet: self.subnet };
        if !self.subnet.is_host(self.gateway) {
            return Err(invalid("gateway".into(), self.gateway.to_string()));
        }
        if let Some(range) = self.range.filter(|range| !self.subnet.net().contains(range)) {
            return Err(invalid("ip-range".into(), range.to_string()));
        }
        if let Some((name, ip)) = self.aux.iter().find(|(_, ip)| !self.subnet.is_host(**ip)) {
            return Err(invalid(format!("aux-address {name}"), ip.to_string()));
        }
        Ok(self)
    }

    /// Addresses that no endpoint may have: the gateway and the auxiliary ones.
    pub fn reserved(&self) -> BTreeSet<IpAddr> {
        self.aux.values().copied().chain([self.gateway]).collect()
    }
}

/// Knobs of one network (`--opt KEY=VALUE`).
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct NetworkOptions {
    /// Bytes; derived from the underlay when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Replicate broadcast and multicast to the hosts that have endpoints in the network.
    #[serde(default)]
    pub multicast: bool,
    /// Its containers cannot reach each other, only what is outside; `icc=false` in Docker.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub isolated: bool,
    /// With [`Driver::Macvlan`], and with no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub macvlan: Option<Macvlan>,
}

/// What a node says about a network that it carries.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum NetworkRecord {
    Defined(Network),
    /// It was removed. Wins over every definition, for good.
    Removed,
}

#[derive(Debug, thiserror::Error)]
#[error("network {name} cannot be carried: {why}")]
pub struct InvalidNetwork {
    name: Label,
    why: &'static str,
}

#[derive(Debug, thiserror::Error)]
#[error("{part} {value} is not usable in subnet {subnet}: give one inside it")]
pub struct InvalidPool {
    part: String,
    value: String,
    subnet: Subnet,
}

/// The same fields before their check; what serde reads.
mod unchecked {
    use super::*;

    #[derive(Deserialize)]
    pub(super) struct Network {
        id: NetworkId,
        name: Label,
        #[serde(default)]
        driver: Driver,
        vni: Vni,
        pools: Vec<super::Pool>,
        #[serde(default)]
        internal: bool,
        #[serde(default)]
        encrypted: bool,
        #[serde(default)]
        labels: Labels,
        #[serde(default)]
        options: NetworkOptions,
        creator: NodeId,
        lenders: Vec<NodeId>,
        #[serde(default)]
        created: u64,
    }

    impl TryFrom<Network> for super::Network {
        type Error = InvalidNetwork;

        fn try_from(raw: Network) -> Result<Self, InvalidNetwork> {
            let Network { id, name, driver, vni, pools, internal, encrypted, .. } = raw;
            let Network { labels, options, creator, lenders, created, .. } = raw;
            let network = Self {
                id,
                name,
                driver,
                vni,
                pools,
                internal,
                encrypted,
                labels,
                options,
                creator,
                lenders,
                created,
            };
            network.checked()
        }
    }

    #[derive(Deserialize)]
    pub(super) struct Pool {
        subnet: Subnet,
        gateway: IpAddr,
        #[serde(default)]
        range: Option<IpNet>,
        #[serde(default)]
        aux: BTreeMap<String, IpAddr>,
    }

    impl TryFrom<Pool> for super::Pool {
        type Error = InvalidPool;

        fn try_from(Pool { subnet, gateway, range, aux }: Pool) -> Result<Self, InvalidPool> {
            Self { subnet, gateway, range, aux }.checked()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MacvlanMode;

    #[test]
    fn a_network_that_no_node_could_carry_is_not_read_from_the_wire() {
        let pool = serde_json::json!({"subnet": "10.32.0.0/24", "gateway": "10.32.0.1"});
        let good = serde_json::json!({
            "id": "00".repeat(16), "name": "app", "vni": 5000, "pools": [pool],
            "creator": "01".repeat(16), "lenders": ["01".repeat(16)], "unknown": 1,
        });
        assert!(serde_json::from_value::<Network>(good.clone()).is_ok());

        for (field, value) in [
            ("pools", serde_json::json!([])),
            ("pools", serde_json::json!([pool, pool])),
            ("pools", serde_json::json!([{"subnet": "10.32.0.0/24", "gateway": "10.33.0.1"}])),
            ("lenders", serde_json::json!([])),
            ("driver", serde_json::json!("overlap")),
            ("vni", serde_json::json!(0)),
        ] {
            let mut bad = good.clone();
            bad[field] = value;
            assert!(serde_json::from_value::<Network>(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_a_macvlan_network_is_made_of_goes_with_its_driver() {
        let read = |driver: &str, options: serde_json::Value| {
            let network = serde_json::json!({
                "id": "00".repeat(16), "name": "lan", "vni": 5000, "driver": driver,
                "pools": [{"subnet": "10.32.0.0/24", "gateway": "10.32.0.1"}],
                "creator": "01".repeat(16), "lenders": ["01".repeat(16)], "options": options,
            });
            serde_json::from_value::<Network>(network)
        };
        let lan = serde_json::json!({"macvlan": {"parent": "eth0", "mode": "vepa"}});
        let macvlan = read("macvlan", lan.clone()).unwrap().options.macvlan.unwrap();
        assert_eq!((macvlan.parent.unwrap().as_str(), macvlan.mode), ("eth0", MacvlanMode::Vepa));
        assert!(read("macvlan", serde_json::json!({})).is_err());
        assert!(read("bridge", lan).is_err());
    }

    #[test]
    fn a_network_of_one_host_has_no_other_lender_and_nothing_to_encrypt() {
        let read = |lender: u8, encrypted: bool| {
            let network = serde_json::json!({
                "id": "00".repeat(16), "name": "app", "vni": 5000, "driver": "bridge",
                "pools": [{"subnet": "10.32.0.0/24", "gateway": "10.32.0.1"}],
                "creator": "01".repeat(16), "lenders": [format!("{lender:02}").repeat(16)],
                "encrypted": encrypted,
            });
            serde_json::from_value::<Network>(network)
        };
        assert_eq!(read(1, false).unwrap().driver, Driver::Bridge);
        assert!(read(2, false).is_err());
        assert!(read(1, true).is_err());
    }

    #[test]
    fn what_is_said_of_an_overlay_is_what_was_always_said() {
        let network = serde_json::json!({
            "id": "00".repeat(16), "name": "app", "vni": 5000,
            "pools": [{"subnet": "10.32.0.0/24", "gateway": "10.32.0.1"}],
            "creator": "01".repeat(16), "lenders": ["01".repeat(16)],
        });
        let network: Network = serde_json::from_value(network).unwrap();
        let said = serde_json::to_string(&network).unwrap();
        assert!(!said.contains("driver") && !said.contains("isolated"), "{said}");
    }
}
