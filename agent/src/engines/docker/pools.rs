//! Which address range a pool of Docker's stands for. Pure.
//!
//! Docker asks for a pool before it says which network the pool is for, and takes the answer for
//! the network's subnet. Where nobody names a subnet, one is picked: that of the only network of
//! the cluster that this host's Docker has not taken up yet, else a free one. What a network's
//! subnet really is, the cluster decides; containers always get addresses of that one.

use std::collections::{BTreeMap, BTreeSet};

use weft_model::{Driver, Family, Label, Network, NetworkId, Subnet};

use super::{
    protocol::RequestPool,
    registry::{Known, Pool},
    wanted::{Range, network_name},
};
use crate::{
    cluster::Cluster,
    definition::{Carriers, free_subnet, unique_local},
    refusal::{Refusal, RefusalKind, refuse},
};

/// Docker asks again and again, without an end, while the answer overlaps a route of its host. So
/// each call gets another pool, and there is a limit to those that no network uses.
const MOST_UNUSED: usize = 64;
/// Seconds after which a pool that no network uses is given up.
const UNUSED_FOR: u64 = 600;

/// Gives out a pool under a name of its own; `random` is fresh for each call.
///
/// # Errors
///
/// What is asked for cannot be a network's subnet, or too many pools are in no use.
pub(super) fn grant(
    known: &mut Known,
    cluster: &Cluster,
    asked: &RequestPool,
    random: [u8; 16],
    now: u64,
) -> Result<(String, Subnet), Refusal> {
    known.pools.retain(|_, pool| pool.network.is_some() || now < pool.since + UNUSED_FOR);
    let unused = known.pools.values().filter(|pool| pool.network.is_none()).count();
    if unused >= MOST_UNUSED {
        return Err(Refusal::new(
            RefusalKind::Unavailable,
            format!(
                "Docker asked for {unused} pools and uses none of them; does each overlap a route of this host? Give --subnet"
            ),
        ));
    }
    let name = named_network(&asked.options)?;
    let range = match asked.pool {
        Some(net) => {
            let subnet = Subnet::try_from(net)
                .map_err(|error| Refusal::field("subnets", error.to_string()))?;
            range(subnet, false, asked)
        }
        None if asked.sub_pool.is_some() => {
            return refuse("ip_ranges", "--ip-range needs the --subnet that it is a part of");
        }
        None => range(pick(known, cluster, name.as_ref(), asked.v6, random)?, true, asked),
    };
    let id = format!("weft/{}", NetworkId::from(random).short());
    let subnet = range.subnet;
    known.pools.insert(id.clone(), Pool { range, name, network: None, since: now });
    Ok((id, subnet))
}

/// The network of the cluster with just this name.
pub(super) fn by_name<'a>(
    cluster: &'a Cluster,
    name: &Label,
) -> Option<&'a std::sync::Arc<Network>> {
    cluster.find_network(name.as_str()).filter(|network| network.name == *name)
}

/// A subnet that neither the cluster nor a pool of Docker's has.
pub(super) fn fresh(
    known: &Known,
    cluster: &Cluster,
    family: Family,
    random: [u8; 16],
) -> Result<Subnet, Refusal> {
    let pooled: Vec<Subnet> = known.pools.values().map(|pool| pool.range.subnet).collect();
    match family {
        Family::V4 => free_subnet(Carriers::All, cluster, &pooled),
        Family::V6 => Ok(unique_local(NetworkId::from(random))),
    }
}

fn range(subnet: Subnet, picked: bool, asked: &RequestPool) -> Range {
    Range { subnet, picked, part: asked.sub_pool, gateway: None, aux: BTreeMap::new() }
}

fn named_network(options: &BTreeMap<String, String>) -> Result<Option<Label>, Refusal> {
    let mut name = None;
    for (key, value) in options {
        match key.as_str() {
            "weft.network" => name = Some(network_name(value)?),
            _ => {
                return refuse(
                    "options",
                    format!("--ipam-opt {key}={value} is unknown to weft: there is weft.network"),
                );
            }
        }
    }
    Ok(name)
}

fn pick(
    known: &Known,
    cluster: &Cluster,
    name: Option<&Label>,
    v6: bool,
    random: [u8; 16],
) -> Result<Subnet, Refusal> {
    let family = if v6 { Family::V6 } else { Family::V4 };
    let subnet = |network: &Network| network.pool(family).map(|pool| pool.subnet);
    if let Some(network) = name.and_then(|name| by_name(cluster, name)) {
        return subnet(network).ok_or_else(|| {
            let name = &network.name;
            Refusal::field(
                "subnets",
                format!("network {name} has no {family} subnet: ask for none"),
            )
        });
    }
    let bound: BTreeSet<NetworkId> = known.networks.values().filter_map(|n| n.network).collect();
    // A subnet that somebody gave by number says nothing until its network is made.
    let pools = known.pools.values().filter(|pool| pool.range.picked || pool.network.is_some());
    let pooled: BTreeSet<Subnet> = pools.map(|pool| pool.range.subnet).collect();
    let mut open = cluster
        .networks()
        .filter(|network| network.driver == Driver::Overlay && !bound.contains(&network.id))
        .filter(|network| cluster.conflict(network.id).is_none())
        .filter_map(|network| subnet(network))
        .filter(|subnet| !pooled.contains(subnet));
    match (open.next(), open.next()) {
        (Some(only), None) if name.is_none() => Ok(only),
        _ => fresh(known, cluster, family, random),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network};

    fn ask(json: serde_json::Value) -> RequestPool {
        serde_json::from_value(json).unwrap()
    }

    fn any() -> RequestPool {
        ask(
            serde_json::json!({"AddressSpace": "weft", "Pool": "", "SubPool": "", "Options": null, "V6": false}),
        )
    }

    #[test]
    fn a_storm_of_requests_gets_different_pools_and_then_a_refusal() {
        let cluster = Builder::default().node(1).build();
        let mut known = Known::default();
        let mut subnets = BTreeSet::new();
        for n in 0..64 {
            let (_, subnet) = grant(&mut known, &cluster, &any(), [n; 16], 100).unwrap();
            assert!(subnets.insert(subnet), "{subnet} twice");
        }
        let refusal = grant(&mut known, &cluster, &any(), [99; 16], 100).unwrap_err();
        assert!(refusal.message.contains("--subnet"), "{refusal}");
        assert!(grant(&mut known, &cluster, &any(), [99; 16], 701).is_ok());
        assert_eq!(known.pools.len(), 1);
    }

    #[test]
    fn without_a_subnet_the_only_network_that_docker_lacks_is_offered() {
        let (app, db) = (network(1, "app"), network(2, "db"));
        let one = Builder::default().node(1).network(1, &app).build();
        let two = Builder::default().node(1).network(1, &app).network(1, &db).build();
        let mut known = Known::default();
        let first = grant(&mut known, &one, &any(), [1; 16], 0).unwrap().1;
        assert_eq!(first, app.pools[0].subnet);
        // Offered once: two creations at the same time are for two networks.
        let second = grant(&mut known, &one, &any(), [2; 16], 0).unwrap().1;
        assert_ne!(second, first);
        let unsure = grant(&mut Known::default(), &two, &any(), [3; 16], 0).unwrap().1;
        assert!(unsure != app.pools[0].subnet && unsure != db.pools[0].subnet);
        let named = ask(serde_json::json!({"Pool": "", "Options": {"weft.network": "db"}}));
        let told = grant(&mut Known::default(), &two, &named, [4; 16], 0).unwrap().1;
        assert_eq!(told, db.pools[0].subnet);
    }

    #[test]
    fn what_no_network_could_have_is_refused_by_value() {
        let cluster = Builder::default().node(1).build();
        for (json, word) in [
            (serde_json::json!({"Pool": "10.1.0.0/30"}), "10.1.0.0/30"),
            (serde_json::json!({"Pool": "", "SubPool": "10.1.0.0/25"}), "--subnet"),
            (serde_json::json!({"Pool": "", "Options": {"io": "1"}}), "io=1"),
        ] {
            let refusal =
                grant(&mut Known::default(), &cluster, &ask(json), [1; 16], 0).unwrap_err();
            assert!(refusal.message.contains(word), "{refusal}");
        }
    }
}
