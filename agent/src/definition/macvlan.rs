//! What macvlan networks on one parent leave each other.

use std::{collections::BTreeSet, net::IpAddr};

use weft_model::{Macvlan, MacvlanMode, Network, Pool, Subnet};

use crate::{api::types::CreateNetwork, cluster::Cluster, refusal::Refusal};

/// Refuses a network that cannot be beside those that are on its parent already.
///
/// # Errors
///
/// One of the two has the parent for itself, or they have overlapping subnets.
pub(super) fn refuse_neighbours(
    request: &CreateNetwork,
    macvlan: &Macvlan,
    pools: &[Pool],
    cluster: &Cluster,
) -> Result<(), Refusal> {
    let Some(parent) = macvlan.parent else { return Ok(()) };
    let of = |network: &Network| network.options.macvlan.filter(|it| it.parent == Some(parent));
    let beside = cluster.networks().filter_map(|network| Some((network, of(network)?)));
    for (other, has) in beside {
        if [macvlan.mode, has.mode].contains(&MacvlanMode::Passthru) {
            return Err(Refusal::conflict(
                "options",
                format!(
                    "{parent} is in use by network {}, with macvlan_mode={}: a network with macvlan_mode=passthru has its parent for itself, so take another parent for {}, or remove {}",
                    other.name, has.mode, request.name, other.name
                ),
            ));
        }
        for pool in pools {
            let same = other.pools.iter().find(|its| pool.subnet.overlaps(its.subnet.net()));
            if let Some(same) = same {
                return Err(Refusal::conflict(
                    "subnets",
                    format!(
                        "{} overlaps {} of network {}, which is on {parent} too: give another subnet, or use {}",
                        pool.subnet, same.subnet, other.name, other.name
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Sets aside the addresses that the host itself has on the parent, as `host`, `host-2` and so on:
/// no container may get one.
pub(crate) fn set_aside(mut request: CreateNetwork, own: &[IpAddr]) -> CreateNetwork {
    let inside = |ip: &IpAddr| request.subnets.iter().any(|subnet| subnet.contains(*ip));
    let known: BTreeSet<IpAddr> =
        request.aux_addresses.values().chain(&request.gateways).copied().collect();
    let first = |subnet: &Subnet| {
        let given = request.gateways.iter().any(|gateway| subnet.contains(*gateway));
        (!given).then(|| subnet.first_host())
    };
    let gateways: BTreeSet<IpAddr> = request.subnets.iter().filter_map(first).collect();
    let own = own.iter().filter(|ip| inside(ip) && !known.contains(ip) && !gateways.contains(ip));
    for ip in own.copied().collect::<Vec<_>>() {
        let mut names = (1..).map(|n| if n == 1 { "host".into() } else { format!("host-{n}") });
        let free = names.find(|name| !request.aux_addresses.contains_key(name)).expect("endless");
        request.aux_addresses.insert(free, ip);
    }
    request
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use weft_model::Driver;

    use super::*;
    use crate::{
        definition::define,
        fixture::{Builder, network, network_id, node_id},
    };

    #[test]
    fn networks_share_a_parent_unless_one_has_it_for_itself() {
        let on = |mode| {
            let mut lan = network(1, "lan");
            lan.driver = Driver::Macvlan;
            lan.options.macvlan = Some(Macvlan { parent: Some("eth0".parse().unwrap()), mode });
            let view = Builder::default().node(1).view();
            Cluster::resolve(view, &BTreeMap::from([(lan.id, lan)]), &BTreeSet::new())
        };
        let create = |cluster: &Cluster, parent: &str, mode: &str, subnet: &str| {
            let request = serde_json::from_value(serde_json::json!({
                "name": "new", "driver": "macvlan", "subnets": [subnet],
                "options": {"parent": parent, "macvlan_mode": mode},
            }))
            .unwrap();
            define(&request, network_id(9), node_id(1), cluster, 0)
        };
        let shared = on(MacvlanMode::Bridge);
        let new = create(&shared, "eth0", "private", "10.9.0.0/24").unwrap();
        assert!(!new.internal);
        assert_eq!(new.options.macvlan.unwrap().mode, MacvlanMode::Private);
        let overlap = create(&shared, "eth0", "bridge", "10.1.0.0/16").unwrap_err();
        assert!(overlap.message.contains("10.1.0.0/24 of network lan"), "{overlap}");
        assert!(create(&shared, "eth1", "bridge", "10.1.0.0/16").is_ok());
        for (cluster, mode) in [(&shared, "passthru"), (&on(MacvlanMode::Passthru), "bridge")] {
            let taken = create(cluster, "eth0", mode, "10.9.0.0/24").unwrap_err();
            assert!(taken.message.contains("eth0") && taken.message.contains("lan"), "{taken}");
            assert!(create(cluster, "eth1", mode, "10.9.0.0/24").is_ok());
        }
    }

    #[test]
    fn no_container_gets_an_address_that_the_host_has_on_the_parent() {
        let aux = |json: serde_json::Value, own: &[&str]| {
            let own: Vec<_> = own.iter().map(|ip| ip.parse().unwrap()).collect();
            let request = serde_json::from_value(json).unwrap();
            let aux = set_aside(request, &own).aux_addresses;
            aux.iter().map(|(name, ip)| format!("{name}={ip}")).collect::<Vec<_>>()
        };
        let lan = serde_json::json!({"name": "lan", "subnets": ["10.9.0.0/24", "fd00:9::/64"],
            "gateways": ["10.9.0.254"], "aux_addresses": {"host": "10.9.0.5", "nas": "10.9.0.6"}});
        let own = [
            "10.9.0.1",
            "10.9.0.5",
            "10.9.0.254",
            "192.0.2.1",
            "fd00:9::1",
            "fd00:9::2",
            "fe80::1",
        ];
        assert_eq!(
            aux(lan, &own),
            ["host=10.9.0.5", "host-2=10.9.0.1", "host-3=fd00:9::2", "nas=10.9.0.6"]
        );
        let picked = serde_json::json!({"name": "lan"});
        assert!(aux(picked, &own).is_empty());
    }

    #[test]
    fn a_macvlan_network_may_have_a_subnet_that_its_host_routes_and_no_parent_means_internal() {
        let cluster = Builder::default()
            .node(1)
            .change_node(1, |node| node.routes = vec!["10.9.0.0/24".parse().unwrap()])
            .build();
        let create = |json: serde_json::Value| {
            let request = serde_json::from_value(json).unwrap();
            define(&request, network_id(9), node_id(1), &cluster, 0)
        };
        let lan = serde_json::json!({"name": "lan", "driver": "macvlan",
            "subnets": ["10.9.0.0/24"], "options": {"parent": "eth0"}});
        assert!(create(lan).is_ok());
        let alone = serde_json::json!({"name": "alone", "driver": "macvlan"});
        assert!(create(alone).unwrap().internal);
        for (driver, options, words) in [
            ("macvlan", serde_json::json!({"parent": "a b"}), ["a b", "eth0"]),
            ("macvlan", serde_json::json!({"macvlan_mode": "source"}), ["source", "vepa"]),
            ("macvlan", serde_json::json!({"icc": "false"}), ["icc", "bridge"]),
            ("macvlan", serde_json::json!({"multicast": ""}), ["multicast", "new"]),
            ("bridge", serde_json::json!({"parent": "eth0"}), ["parent=eth0", "-d macvlan"]),
        ] {
            let refusal = create(serde_json::json!({
                "name": "new", "driver": driver, "options": options,
            }));
            let refusal = refusal.unwrap_err();
            assert_eq!(refusal.field, Some("options"), "{refusal}");
            assert!(words.iter().all(|word| refusal.message.contains(word)), "{refusal}");
        }
    }
}
