//! From what a user asks for to the definition of a network. Pure.

mod macvlan;
pub(crate) use macvlan::set_aside;
mod options;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
};

use ipnet::{IpNet, Ipv4Net};
use weft_model::{Driver, Family, Network, NetworkId, NodeId, Pool, Subnet, Vni};

use crate::{
    api::types::CreateNetwork,
    bulk::{label_bytes, refuse_bulk},
    cluster::Cluster,
    refusal::{Refusal, refuse},
};
use options::options;

/// Where IPv4 subnets that nobody asked for by number come from, a /24 each. Those of one host alone
/// have a range of their own: other hosts do not know which are taken.
const DEFAULT_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 32, 0, 0), 12);
const LOCAL_POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 48, 0, 0), 12);
const DEFAULT_PREFIX: u8 = 24;
/// How many nodes share the lending of a network's addresses.
const LENDERS: usize = 5;

/// Defines the network that `request` asks for.
///
/// `now` is in seconds since the Unix epoch and is only shown.
///
/// # Errors
///
/// A name that is taken, or values that do not fit each other or some node's host routes. Each
/// refusal names the field.
pub fn define(
    request: &CreateNetwork,
    id: NetworkId,
    me: NodeId,
    cluster: &Cluster,
    now: u64,
) -> Result<Network, Refusal> {
    if let Some(what) = predefined(request.name.as_str()) {
        return Err(Refusal::conflict(
            "name",
            format!("{} is predefined, {what}: take another name", request.name),
        ));
    }
    define_any(request, id, me, cluster, now)
}

/// The name of the network of this host that is made when it is first asked for.
pub(crate) const DEFAULT_BRIDGE: &str = "bridge";

/// What a name stands for that no network may be given.
fn predefined(name: &str) -> Option<&'static str> {
    match name {
        DEFAULT_BRIDGE => Some("a network of each host alone"),
        "host" => Some("the host's own network"),
        "none" => Some("no network at all"),
        _ => None,
    }
}

/// Defines this host's network [`DEFAULT_BRIDGE`].
///
/// # Errors
///
/// As [`define`].
pub fn define_default_bridge(
    id: NetworkId,
    me: NodeId,
    cluster: &Cluster,
    now: u64,
) -> Result<Network, Refusal> {
    let request = CreateNetwork {
        name: DEFAULT_BRIDGE.parse().expect("a label"),
        driver: Driver::Bridge,
        subnets: Vec::new(),
        gateways: Vec::new(),
        ip_ranges: Vec::new(),
        aux_addresses: BTreeMap::new(),
        internal: false,
        encrypted: false,
        ipv6: false,
        labels: BTreeMap::new(),
        options: BTreeMap::new(),
    };
    define_any(&request, id, me, cluster, now)
}

fn define_any(
    request: &CreateNetwork,
    id: NetworkId,
    me: NodeId,
    cluster: &Cluster,
    now: u64,
) -> Result<Network, Refusal> {
    let taken = cluster.find_network(request.name.as_str());
    if let Some(network) = taken.filter(|network| network.name == request.name) {
        let kind = match (network.driver, network.encrypted) {
            (Driver::Bridge | Driver::Macvlan, _) => "on this host alone",
            (Driver::Overlay, true) => "encrypted",
            (Driver::Overlay, false) => "not encrypted",
        };
        return Err(Refusal::conflict(
            "name",
            format!(
                "network {} exists already, {kind}, with id {}: use it, or remove it first",
                request.name,
                network.id.short()
            ),
        ));
    }
    let chosen = options(request)?;
    refuse_bulk("labels", label_bytes(&request.labels))?;
    refuse_bulk("aux_addresses", request.aux_addresses.keys().map(String::len).sum())?;
    let pools = pools(request, id, me, cluster)?;
    if let Some(macvlan) = &chosen.options.macvlan {
        macvlan::refuse_neighbours(request, macvlan, &pools, cluster)?;
    }
    // As in Docker: where nothing is behind the containers' interfaces, nothing leads out.
    let alone = chosen.options.macvlan.is_some_and(|macvlan| macvlan.parent.is_none());
    let network = Network {
        id,
        name: request.name.clone(),
        driver: request.driver,
        vni: free_vni(id, cluster),
        pools,
        internal: request.internal || alone,
        encrypted: chosen.encrypted,
        labels: request.labels.clone(),
        options: chosen.options,
        creator: me,
        lenders: match request.driver {
            Driver::Overlay => lenders(me, cluster),
            Driver::Bridge | Driver::Macvlan => vec![me],
        },
        created: now,
    };
    network.checked().map_err(|error| Refusal::field("subnets", error.to_string()))
}

fn pools(
    request: &CreateNetwork,
    id: NetworkId,
    me: NodeId,
    cluster: &Cluster,
) -> Result<Vec<Pool>, Refusal> {
    let carriers = match request.driver {
        Driver::Overlay => Carriers::All,
        Driver::Bridge | Driver::Macvlan => Carriers::Only(me),
    };
    let mut subnets: BTreeMap<Family, Subnet> = BTreeMap::new();
    for subnet in &request.subnets {
        if let Some(other) = subnets.insert(subnet.family(), *subnet) {
            return refuse(
                "subnets",
                format!("{other} and {subnet} are both {}: give one a family", subnet.family()),
            );
        }
        // A macvlan network has the subnet of a link that its host is on.
        if request.driver.has_gateway() {
            refuse_overlap(*subnet, carriers, cluster)?;
        }
    }
    if subnets.is_empty() {
        subnets.insert(Family::V4, free_subnet(carriers, cluster, &[])?);
    }
    if request.ipv6 {
        subnets.entry(Family::V6).or_insert_with(|| unique_local(id));
    }

    let mut pools = Vec::new();
    for (&family, &subnet) in &subnets {
        let inside = |ip: &IpAddr| subnet.contains(*ip);
        let gateway = one("gateways", family, request.gateways.iter().copied().filter(inside))?;
        let ranges = request.ip_ranges.iter().copied();
        let ranges = ranges.filter(|range| subnet.net().contains(range));
        let range = one("ip_ranges", family, ranges)?;
        let pool = Pool {
            subnet,
            gateway: gateway.unwrap_or_else(|| subnet.first_host()),
            range,
            aux: request
                .aux_addresses
                .iter()
                .filter(|(_, ip)| inside(ip))
                .map(|(name, ip)| (name.clone(), *ip))
                .collect(),
        };
        pools.push(pool.checked().map_err(|error| Refusal::field("subnets", error.to_string()))?);
    }
    refuse_strays(request, &pools)?;
    Ok(pools)
}

/// Refuses addresses that lie in none of the subnets: they would be lost in silence.
fn refuse_strays(request: &CreateNetwork, pools: &[Pool]) -> Result<(), Refusal> {
    let subnets = pools.iter().map(|pool| pool.subnet.to_string()).collect::<Vec<_>>().join(", ");
    let stray = |net: IpNet| !pools.iter().any(|pool| pool.subnet.net().contains(&net));
    let outside = |value: String| format!("{value} lies outside {subnets}: give one inside it");
    if let Some(ip) = request.gateways.iter().find(|ip| stray(IpNet::from(**ip))) {
        return refuse("gateways", outside(ip.to_string()));
    }
    if let Some(range) = request.ip_ranges.iter().find(|range| stray(**range)) {
        return refuse("ip_ranges", outside(range.to_string()));
    }
    if let Some((name, ip)) = request.aux_addresses.iter().find(|(_, ip)| stray(IpNet::from(**ip)))
    {
        return refuse("aux_addresses", outside(format!("{name}={ip}")));
    }
    let gateways: BTreeSet<_> = pools.iter().map(|pool| pool.gateway).collect();
    if let Some((name, ip)) = request.aux_addresses.iter().find(|(_, ip)| gateways.contains(ip)) {
        return refuse(
            "aux_addresses",
            format!("{name}={ip} is the gateway: give another address"),
        );
    }
    Ok(())
}

fn one<T: ToString>(
    field: &'static str,
    family: Family,
    values: impl Iterator<Item = T>,
) -> Result<Option<T>, Refusal> {
    let mut values = values.collect::<Vec<_>>();
    match values.len() {
        0 | 1 => Ok(values.pop()),
        _ => refuse(
            field,
            format!(
                "{} and {} are both {family}: give one a family",
                values[0].to_string(),
                values[1].to_string()
            ),
        ),
    }
}

/// The nodes that may carry a network.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Carriers {
    All,
    Only(NodeId),
}

/// Refuses a subnet that the host of some carrier routes or asks for names: containers of that host
/// could no longer reach what is there.
fn refuse_overlap(subnet: Subnet, carriers: Carriers, cluster: &Cluster) -> Result<(), Refusal> {
    let carries = |node| match carriers {
        Carriers::All => true,
        Carriers::Only(only) => node == only,
    };
    for member in cluster.members().filter(|member| carries(member.id)) {
        let Some(node) = &member.node else { continue };
        if let Some(route) = node.routes.iter().find(|route| subnet.overlaps(**route)) {
            return refuse(
                "subnets",
                format!(
                    "{subnet} overlaps the route {route} of host {}: give another subnet",
                    node.name
                ),
            );
        }
        if let Some(resolver) = node.resolvers.iter().find(|ip| subnet.contains(**ip)) {
            return refuse(
                "subnets",
                format!(
                    "{subnet} contains the DNS resolver {resolver} of host {}: give another subnet",
                    node.name
                ),
            );
        }
    }
    Ok(())
}

/// The first /24 of the carriers' pool that is not in `besides`, no network has and none of their
/// hosts routes.
pub(crate) fn free_subnet(
    carriers: Carriers,
    cluster: &Cluster,
    besides: &[Subnet],
) -> Result<Subnet, Refusal> {
    let pool = match carriers {
        Carriers::All => DEFAULT_POOL,
        Carriers::Only(_) => LOCAL_POOL,
    };
    let taken: Vec<IpNet> = cluster
        .networks()
        .flat_map(|network| network.pools.iter().map(|pool| pool.subnet.net()))
        .chain(besides.iter().map(|subnet| subnet.net()))
        .collect();
    let mut candidates = pool.subnets(DEFAULT_PREFIX).expect("24 lies between 12 and 32");
    candidates
        .find_map(|net| {
            let subnet = Subnet::try_from(IpNet::V4(net)).expect("a /24 of a private range");
            let free = !taken.iter().any(|other| subnet.overlaps(*other));
            (free && refuse_overlap(subnet, carriers, cluster).is_ok()).then_some(subnet)
        })
        .ok_or_else(|| {
            Refusal::conflict(
                "subnets",
                format!("every /{DEFAULT_PREFIX} of {pool} is in use by a network or a host route: give a subnet of your own"),
            )
        })
}

/// A unique local /64 (RFC 4193 §3.2.2), its global id a function of the network's id.
pub(crate) fn unique_local(id: NetworkId) -> Subnet {
    let [a, b, c, d, e, f, g, ..] = id.digest(b"ula");
    let prefix = [0xfd, a, b, c, d, e, f, g, 0, 0, 0, 0, 0, 0, 0, 0];
    let net = ipnet::Ipv6Net::new(prefix.into(), 64).expect("64 is a prefix length");
    Subnet::try_from(IpNet::V6(net)).expect("a /64 of fd00::/8")
}

fn free_vni(id: NetworkId, cluster: &Cluster) -> Vni {
    let taken: BTreeSet<Vni> = cluster.networks().map(|network| network.vni).collect();
    (0..).map(|attempt| Vni::derive(id, attempt)).find(|vni| !taken.contains(vni)).expect("endless")
}

/// The creator and the first of the other nodes that are alive.
fn lenders(me: NodeId, cluster: &Cluster) -> Vec<NodeId> {
    let others = cluster.alive().into_iter().filter(|node| *node != me);
    [me].into_iter().chain(others).take(LENDERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network, network_id, node_id};

    fn request(json: serde_json::Value) -> CreateNetwork {
        serde_json::from_value(json).unwrap()
    }

    fn define_in(cluster: &Cluster, json: serde_json::Value) -> Result<Network, Refusal> {
        define(&request(json), network_id(9), node_id(1), cluster, 0)
    }

    fn three_nodes() -> Builder {
        Builder::default()
            .node(1)
            .node(2)
            .node(3)
            .change_node(2, |node| node.routes = vec!["10.32.0.0/16".parse().unwrap()])
            .change_node(3, |node| node.resolvers = vec!["10.40.0.53".parse().unwrap()])
    }

    #[test]
    fn a_picked_subnet_avoids_routes_of_all_hosts_and_other_networks() {
        let mut taken = network(1, "taken");
        taken.pools[0].subnet = "10.33.0.0/24".parse().unwrap();
        taken.pools[0].gateway = taken.pools[0].subnet.first_host();
        let cluster = three_nodes().network(1, &taken).build();
        let network = define_in(&cluster, serde_json::json!({"name": "app"})).unwrap();
        assert_eq!(network.pools[0].subnet.to_string(), "10.33.1.0/24");
        assert_eq!(network.pools[0].gateway.to_string(), "10.33.1.1");
        assert_eq!(network.lenders, [node_id(1), node_id(2), node_id(3)]);
    }

    #[test]
    fn ipv6_adds_a_unique_local_subnet_of_the_networks_own() {
        let cluster = three_nodes().build();
        let network =
            define_in(&cluster, serde_json::json!({"name": "app", "ipv6": true})).unwrap();
        assert_eq!(network.pools.len(), 2);
        assert!(network.pools[1].subnet.to_string().starts_with("fd"));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_field_value_and_remedy() {
        let cluster = three_nodes().network(1, &network(1, "old")).build();
        for (fields, field, words) in [
            (
                serde_json::json!({"subnets": ["10.32.5.0/24"]}),
                "subnets",
                &["10.32.5.0/24", "10.32.0.0/16", "h2"][..],
            ),
            (serde_json::json!({"subnets": ["10.40.0.0/24"]}), "subnets", &["10.40.0.53", "h3"]),
            (
                serde_json::json!({"subnets": ["10.50.0.0/24", "10.51.0.0/24"]}),
                "subnets",
                &["10.50.0.0/24", "IPv4"],
            ),
            (
                serde_json::json!({"subnets": ["10.50.0.0/24"], "gateways": ["10.51.0.1"]}),
                "gateways",
                &["10.51.0.1", "outside"],
            ),
            (
                serde_json::json!({"subnets": ["10.50.0.0/24"], "gateways": ["10.50.0.0"]}),
                "subnets",
                &["gateway 10.50.0.0"],
            ),
            (
                serde_json::json!({"subnets": ["10.50.0.0/24"], "ip_ranges": ["10.50.0.0/16"]}),
                "ip_ranges",
                &["10.50.0.0/16"],
            ),
            (
                serde_json::json!({"subnets": ["10.50.0.0/24"], "aux_addresses": {"r": "10.50.0.1"}}),
                "aux_addresses",
                &["r=10.50.0.1", "gateway"],
            ),
            (serde_json::json!({"options": {"mtu": "100"}}), "options", &["mtu=100", "1280"]),
            (serde_json::json!({"options": {"mtuu": "1400"}}), "options", &["mtuu"]),
            (
                serde_json::json!({"labels": {"a": "x".repeat(300_000)}}),
                "labels",
                &["300001", "4096"],
            ),
            (
                serde_json::json!({"options": {"encrypted": "1"}}),
                "options",
                &["encrypted=1", "true or false"],
            ),
            (
                serde_json::json!({"encrypted": true, "options": {"encrypted": "false"}}),
                "options",
                &["encrypted=false", "contradicts"],
            ),
            (
                serde_json::json!({"options": {"multicast": "maybe"}}),
                "options",
                &["multicast=maybe", "true or false"],
            ),
        ] {
            let mut json = serde_json::json!({"name": "app"});
            json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let refusal = define_in(&cluster, json.clone()).unwrap_err();
            assert_eq!(refusal.field, Some(field), "{json}: {refusal}");
            for word in words {
                assert!(refusal.message.contains(word), "{json}: {refusal}");
            }
        }
        for encrypted in [false, true] {
            let again = serde_json::json!({"name": "old", "encrypted": encrypted});
            let taken = define_in(&cluster, again).unwrap_err();
            assert!(taken.message.contains("exists already, not encrypted"), "{taken}");
        }
    }

    #[test]
    fn a_network_is_encrypted_if_the_flag_or_the_option_says_so_and_only_then() {
        let cluster = three_nodes().build();
        for (fields, encrypted) in [
            (serde_json::json!({}), false),
            (serde_json::json!({"encrypted": true}), true),
            (serde_json::json!({"options": {"encrypted": ""}}), true),
            (serde_json::json!({"options": {"encrypted": "true"}}), true),
            (serde_json::json!({"options": {"encrypted": "false"}}), false),
            (serde_json::json!({"encrypted": true, "options": {"encrypted": ""}}), true),
        ] {
            let mut json = serde_json::json!({"name": "app"});
            json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let network = define_in(&cluster, json.clone()).unwrap();
            assert_eq!(network.encrypted, encrypted, "{json}");
        }
    }

    #[test]
    fn a_network_of_one_host_looks_at_that_host_only() {
        let cluster = three_nodes()
            .change_node(2, |node| node.routes = vec!["10.48.0.0/13".parse().unwrap()])
            .build();
        let local = |json: serde_json::Value| {
            let mut request = serde_json::json!({"name": "local", "driver": "bridge"});
            request.as_object_mut().unwrap().extend(json.as_object().unwrap().clone());
            define_in(&cluster, request)
        };
        let network = local(serde_json::json!({})).unwrap();
        assert_eq!(network.pools[0].subnet.to_string(), "10.48.0.0/24");
        assert_eq!(network.lenders, [node_id(1)]);
        assert!(!network.options.isolated);
        for icc in ["icc", "com.docker.network.bridge.enable_icc"] {
            let network = local(serde_json::json!({"options": {icc: "false"}})).unwrap();
            assert!(network.options.isolated, "{icc}");
        }
        for bad in [
            serde_json::json!({"encrypted": true}),
            serde_json::json!({"options": {"encrypted": "true"}}),
            serde_json::json!({"options": {"multicast": "true"}}),
            serde_json::json!({"options": {"icc": "no"}}),
            serde_json::json!({"driver": "overlay", "options": {"icc": "false"}}),
        ] {
            assert!(local(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_predefined_is_not_created_by_hand() {
        let cluster = three_nodes().build();
        for name in ["bridge", "host", "none"] {
            for driver in ["bridge", "overlay"] {
                let request = serde_json::json!({"name": name, "driver": driver});
                let refusal = define_in(&cluster, request).unwrap_err();
                assert_eq!(refusal.field, Some("name"), "{refusal}");
            }
        }
        let network = define_default_bridge(network_id(9), node_id(1), &cluster, 0).unwrap();
        assert_eq!((network.name.as_str(), network.driver), ("bridge", Driver::Bridge));
    }
}
