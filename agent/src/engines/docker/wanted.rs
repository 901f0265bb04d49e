//! What a Docker network is to be: read from `docker network create`, turned into a network of the
//! cluster, or held against one that is there. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use weft_model::{Driver, Family, Label, Network, Subnet};

use crate::{
    api::types,
    refusal::{Refusal, RefusalKind, refuse},
};

/// Where what `-o` gave is among the options of a network.
pub(super) const GENERIC: &str = "com.docker.network.generic";

/// One network as `docker network create` described it.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Wanted {
    /// The cluster's network; Docker's name for it when absent.
    pub(super) name: Option<Label>,
    /// Whether the containers' default route leads through weft, not through Docker's own bridge.
    pub(super) gateway: bool,
    pub(super) internal: bool,
    pub(super) encrypted: bool,
    pub(super) multicast: bool,
    /// Whether it was made because all hosts shall have it.
    pub(super) wished: bool,
    /// Bytes.
    pub(super) mtu: Option<u16>,
    pub(super) ranges: Vec<Range>,
}

/// One of its address ranges.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub(super) struct Range {
    pub(super) subnet: Subnet,
    /// Whether the subnet was picked here, because nobody asked for one.
    pub(super) picked: bool,
    /// Where addresses that nobody asked for by number come from.
    pub(super) part: Option<IpNet>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) aux: BTreeMap<String, IpAddr>,
}

impl Wanted {
    /// Reads the options of `CreateNetwork`; those of drivers are what `-o` gave.
    ///
    /// # Errors
    ///
    /// An option is unknown, or its value is of no use.
    pub(super) fn read(
        options: &BTreeMap<String, Value>,
        ranges: Vec<Range>,
    ) -> Result<Self, Refusal> {
        let mut wanted = Self { ranges, ..Self::default() };
        let internal = options.get("com.docker.network.internal").and_then(Value::as_bool);
        wanted.internal = internal.unwrap_or(false);
        let given = options.get(GENERIC).and_then(Value::as_object);
        for (key, value) in given.into_iter().flatten() {
            let Some(value) = value.as_str() else {
                return refuse("options", format!("option {key}={value}: give a text"));
            };
            match key.as_str() {
                "weft.network" => wanted.name = Some(network_name(value)?),
                "weft.gateway" => wanted.gateway = switch(key, value)?,
                "weft.multicast" => wanted.multicast = switch(key, value)?,
                "weft.wished" => wanted.wished = switch(key, value)?,
                "encrypted" => wanted.encrypted = switch(key, value)?,
                "com.docker.network.driver.mtu" => {
                    let mtu = value.parse().map_err(|_| {
                        Refusal::field(
                            "options",
                            format!("{key}={value}: give bytes, such as 1400"),
                        )
                    })?;
                    wanted.mtu = Some(mtu);
                }
                _ => {
                    return refuse(
                        "options",
                        format!(
                            "option {key}={value} is unknown to weft: there are weft.network, weft.gateway, weft.multicast, encrypted and com.docker.network.driver.mtu"
                        ),
                    );
                }
            }
        }
        match wanted.gateway && wanted.internal {
            true => refuse("options", "weft.gateway contradicts --internal: give one of them"),
            false => Ok(wanted),
        }
    }

    /// The request for a network called `name` that is not there yet.
    pub(super) fn definition(&self, name: Label) -> types::CreateNetwork {
        let mut options = BTreeMap::new();
        if let Some(mtu) = self.mtu {
            options.insert("mtu".into(), mtu.to_string());
        }
        if self.multicast {
            options.insert("multicast".into(), "true".into());
        }
        types::CreateNetwork {
            name,
            driver: Driver::Overlay,
            subnets: self.ranges.iter().map(|range| range.subnet).collect(),
            gateways: self.ranges.iter().filter_map(|range| range.gateway).collect(),
            ip_ranges: self.ranges.iter().filter_map(|range| range.part).collect(),
            aux_addresses: self.ranges.iter().flat_map(|range| range.aux.clone()).collect(),
            internal: self.internal,
            encrypted: self.encrypted,
            ipv6: false,
            labels: BTreeMap::new(),
            options,
        }
    }

    /// Refuses to take `network` for what was asked for, if it is something else.
    ///
    /// What was not asked for is taken as it is, unless Docker must know of it.
    pub(super) fn check_same(&self, network: &Network) -> Result<(), Refusal> {
        let mut differences = self.differences(network);
        if differences.is_empty() {
            return Ok(());
        }
        let first = differences.remove(0);
        let rest: String = differences.iter().map(|other| format!("; {other}")).collect();
        Err(Refusal::new(
            RefusalKind::Conflict,
            format!("the cluster's network {} differs: {first}{rest}", network.name),
        ))
    }

    fn differences(&self, network: &Network) -> Vec<String> {
        let mut found = Vec::new();
        if network.driver != Driver::Overlay {
            let driver = network.driver;
            found.push(format!(
                "its driver is {driver}, and Docker's network is for all hosts: take another name, or let docker network create -d {driver} make one of Docker's own"
            ));
        }
        for family in [Family::V4, Family::V6] {
            let range = self.ranges.iter().find(|range| range.subnet.family() == family);
            match (range, network.pool(family)) {
                (None, None) => {}
                (None, Some(pool)) => {
                    let option = if family == Family::V6 { "--ipv6 --subnet" } else { "--subnet" };
                    found.push(format!("it has the subnet {0} too: add {option} {0}", pool.subnet));
                }
                (Some(range), None) => {
                    let option = if family == Family::V6 { "--ipv6" } else { "the subnet" };
                    found.push(format!(
                        "it has no {family} subnet, not {}: leave {option} out",
                        range.subnet
                    ));
                }
                (Some(range), Some(pool)) => found.extend(range.differences(pool)),
            }
        }
        let on_off = |on| if on { "with" } else { "without" };
        if self.internal != network.internal {
            let with = on_off(network.internal);
            found.push(format!("create it {with} --internal here as well"));
        }
        if self.encrypted && !network.encrypted {
            found.push("it is not encrypted: leave -o encrypted out".into());
        }
        if self.multicast && !network.options.multicast {
            found.push("it carries no multicast: leave -o weft.multicast out".into());
        }
        if let Some(mtu) = self.mtu.filter(|mtu| network.options.mtu != Some(*mtu)) {
            let has = network
                .options
                .mtu
                .map_or_else(|| "what fits the underlay".into(), |mtu| mtu.to_string());
            found.push(format!(
                "its MTU is {has}, not {mtu}: leave -o com.docker.network.driver.mtu out"
            ));
        }
        found
    }
}

impl Range {
    fn differences(&self, pool: &weft_model::Pool) -> Vec<String> {
        // What was picked here is no more than what Docker shows.
        if self.picked {
            return Vec::new();
        }
        if self.subnet != pool.subnet {
            return vec![format!(
                "its subnet is {0}, not {1}: give --subnet {0}",
                pool.subnet, self.subnet
            )];
        }
        let mut found = Vec::new();
        if let Some(gateway) = self.gateway.filter(|gateway| *gateway != pool.gateway) {
            found.push(format!(
                "its gateway is {0}, not {gateway}: give --gateway {0}",
                pool.gateway
            ));
        }
        if let Some(part) = self.part.filter(|part| Some(*part) != pool.range) {
            let remedy = match pool.range {
                Some(range) => format!("give --ip-range {range}"),
                None => "leave --ip-range out".into(),
            };
            found.push(format!("its range is not {part}: {remedy}"));
        }
        let reserved: BTreeSet<_> = pool.aux.values().collect();
        for (name, ip) in self.aux.iter().filter(|(_, ip)| !reserved.contains(ip)) {
            found.push(format!("{ip} is not reserved in it: leave --aux-address {name}={ip} out"));
        }
        found
    }
}

/// Reads the name of a network of the cluster.
pub(super) fn network_name(text: &str) -> Result<Label, Refusal> {
    text.parse().map_err(|error| {
        Refusal::field(
            "options",
            format!("{error}; name the cluster's network with -o weft.network=NAME"),
        )
    })
}

/// Reads an option that is on or off. Its name alone switches it on.
fn switch(key: &str, value: &str) -> Result<bool, Refusal> {
    match value {
        "" | "true" => Ok(true),
        "false" => Ok(false),
        _ => refuse("options", format!("{key}={value}: give true or false")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fixture;

    fn range(subnet: &str) -> Range {
        Range {
            subnet: subnet.parse().unwrap(),
            picked: false,
            part: None,
            gateway: None,
            aux: BTreeMap::new(),
        }
    }

    fn read(generic: Value) -> Result<Wanted, Refusal> {
        let options = BTreeMap::from([("com.docker.network.generic".to_owned(), generic)]);
        Wanted::read(&options, vec![range("10.1.0.0/24")])
    }

    #[test]
    fn options_are_read_and_unknown_ones_refused_by_name() {
        let wanted = read(json!({
            "weft.network": "app", "encrypted": "", "weft.multicast": "true",
            "com.docker.network.driver.mtu": "1400",
        }))
        .unwrap();
        let request = wanted.definition("app".parse().unwrap());
        assert_eq!((wanted.name, wanted.mtu), (Some("app".parse().unwrap()), Some(1400)));
        assert!(request.encrypted);
        assert_eq!(request.options["multicast"], "true");
        for (generic, word) in [
            (json!({"weft.netwrok": "app"}), "weft.netwrok"),
            (json!({"weft.network": "a.b"}), "a.b"),
            (json!({"weft.gateway": "perhaps"}), "perhaps"),
            (json!({"com.docker.network.driver.mtu": "big"}), "big"),
        ] {
            let refusal = read(generic).unwrap_err();
            assert!(refusal.message.contains(word), "{refusal}");
        }
    }

    #[test]
    fn a_network_that_differs_is_refused_with_what_to_give_instead() {
        let mut app = fixture::network(1, "app");
        let same = Wanted { ranges: vec![range("10.1.0.0/24")], ..Wanted::default() };
        assert!(same.check_same(&app).is_ok());
        app.internal = true;
        app.pools[0].gateway = "10.1.0.254".parse().unwrap();
        let mut wanted = same.clone();
        wanted.ranges[0].gateway = Some("10.1.0.1".parse().unwrap());
        wanted.mtu = Some(1300);
        let refusal = wanted.check_same(&app).unwrap_err();
        for word in ["app", "--gateway 10.1.0.254", "--internal", "mtu"] {
            assert!(refusal.message.contains(word), "{refusal}");
        }
        let other =
            Wanted { ranges: vec![range("10.9.0.0/24")], internal: true, ..Wanted::default() };
        assert!(other.check_same(&app).unwrap_err().message.contains("--subnet 10.1.0.0/24"));
        let picked = Range { picked: true, ..range("10.9.0.0/24") };
        assert!(
            Wanted { ranges: vec![picked], internal: true, ..Wanted::default() }
                .check_same(&app)
                .is_ok()
        );
    }

    #[test]
    fn a_network_of_one_host_is_not_taken_for_one_of_all() {
        let mut app = fixture::network(1, "app");
        app.driver = Driver::Bridge;
        let wanted = Wanted { ranges: vec![range("10.1.0.0/24")], ..Wanted::default() };
        assert!(wanted.check_same(&app).unwrap_err().message.contains("bridge"));
    }

    #[test]
    fn a_second_family_must_be_known_to_docker_too() {
        let mut dual = fixture::network(1, "dual");
        let subnet: Subnet = "fd00:1::/64".parse().unwrap();
        let pool =
            weft_model::Pool { subnet, gateway: subnet.first_host(), ..dual.pools[0].clone() };
        dual.pools.push(pool);
        let wanted = Wanted { ranges: vec![range("10.1.0.0/24")], ..Wanted::default() };
        assert!(wanted.check_same(&dual).unwrap_err().message.contains("--ipv6"));
        let both = vec![range("10.1.0.0/24"), range("fd00:1::/64")];
        let wanted = Wanted { ranges: both, ..Wanted::default() };
        assert!(wanted.check_same(&dual).is_ok());
        assert!(wanted.check_same(&fixture::network(1, "app")).is_err());
    }
}
