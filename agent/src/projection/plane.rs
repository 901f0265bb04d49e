use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use weft_model::{
    Driver, Endpoint, Family, MacAddr, Macvlan, Network, NetworkId, NodeId, VtepAddr,
};
use weft_vxlan::{
    AddressPair, Desired, HostRules, OverlayNetwork, Port, Prefix, Station, Transit, Transport,
    Uplink,
};

use super::balance::carried;
use crate::{
    cluster::{Cluster, is_mistakable},
    ledger::book::{Book, EndpointState},
};

/// What the plane's projection needs besides records.
#[derive(Clone, Copy, Debug)]
pub struct PlaneContext {
    pub me: NodeId,
    pub local: VtepAddr,
    pub vxlan_port: u16,
    /// Where sealed packets come, if this host takes part in encrypted networks.
    pub sealed: Option<SealedPorts>,
    pub uplink_pool: Ipv4Net,
}

/// Consecutive UDP ports, one a lane.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SealedPorts {
    pub first: u16,
    pub lanes: u8,
}

impl SealedPorts {
    fn all(self) -> impl Iterator<Item = u16> {
        (self.first..=u16::MAX).take(self.lanes.into())
    }
}

/// Where the IPv6 ends of uplinks come from: a unique local prefix (RFC 4193) of weft's own.
const UPLINK_POOL_V6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd77, 0x6566, 0x7401, 0, 0, 0, 0, 0), 112);

/// Bytes of an outer IP header (RFC 791, RFC 8200).
const IP_V4: u16 = 20;
const IP_V6: u16 = 40;
/// Bytes that VXLAN adds to a packet besides: UDP 8, VXLAN 8, inner Ethernet 14.
const PLAIN: u16 = 8 + 8 + 14;
/// Bytes that sealing adds to a packet besides: UDP 8, header 16, meta 8, inner Ethernet 14, tag 16.
const SEALED: u16 = 8 + 16 + 8 + 14 + 16;

/// The kernel's desired state on this host.
///
/// It is `provisional` as long as other nodes may have more than what was heard.
pub fn plane(context: PlaneContext, cluster: &Cluster, book: &Book, provisional: bool) -> Desired {
    let carried = carried(cluster, book);
    let networks = carried.iter().filter_map(|id| {
        let network = cluster.network(*id).map(AsRef::as_ref).or_else(|| book.networks.get(id))?;
        let network = overlay_network(context, cluster, book, network);
        Some((*id, Arc::new(OverlayNetwork { provisional, ..network })))
    });
    let peers = cluster.members().filter(|member| member.id != context.me);
    Desired {
        networks: networks.collect(),
        host: HostRules {
            vxlan_port: context.vxlan_port,
            local: BTreeSet::from([context.local]),
            vteps: peers.filter_map(|member| Some(member.node.as_ref()?.vtep)).collect(),
            sealed_ports: context.sealed.into_iter().flat_map(SealedPorts::all).collect(),
            uplink_pools: vec![IpNet::V4(context.uplink_pool), IpNet::V6(UPLINK_POOL_V6)],
        },
    }
}

fn overlay_network(
    context: PlaneContext,
    cluster: &Cluster,
    book: &Book,
    network: &Network,
) -> OverlayNetwork {
    let mut remotes: BTreeMap<MacAddr, Station> = BTreeMap::new();
    let mut flood = BTreeMap::new();
    // Of two networks that packets cannot tell apart only one may be carried between hosts.
    let before = cluster.conflict(network.id);
    let settled = before.is_none_or(|before| !is_mistakable(before, network));
    let others = cluster.endpoints(network.id).filter(|p| settled && p.node != context.me);
    // Of what is one host's alone, no other host has a part, whatever it says.
    let others = others.filter(|_| !network.driver.is_local());
    // Another node may not draw frames to itself that belong on this host.
    let own: BTreeSet<MacAddr> = book
        .endpoints_of(network.id)
        .filter(|local| local.state != EndpointState::Detaching)
        .map(|local| local.endpoint.mac)
        .chain([MacAddr::for_gateway(network.id)])
        .collect();
    for placed in others.filter(|placed| !own.contains(&placed.endpoint.mac)) {
        let Some(node) = cluster.node(placed.node) else { continue };
        // A VXLAN device, and a tunnel's socket, has one family of VTEPs.
        if Family::of(node.vtep.ip()) != Family::of(context.local.ip()) {
            continue;
        }
        let ips = placed.endpoint.ips().collect();
        let station = Station { node: placed.node, vtep: node.vtep, ips };
        // Nobody takes a MAC by a record that is made of the addresses of another's.
        match remotes.entry(placed.endpoint.mac) {
            Entry::Vacant(entry) => drop(entry.insert(station)),
            Entry::Occupied(mut entry) if is_made_of(placed.endpoint, network.id) => {
                entry.insert(station);
            }
            Entry::Occupied(_) => {}
        }
        flood.insert(placed.node, node.vtep);
    }
    let ports = book
        .endpoints_of(network.id)
        .filter(|local| local.state != EndpointState::Detaching)
        .map(|local| {
            let endpoint = &local.endpoint;
            (endpoint.id, Port { mac: endpoint.mac, ips: endpoint.ips().collect() })
        });
    OverlayNetwork {
        id: network.id,
        name: network.name.clone(),
        transport: transport(context, network),
        mtu: mtu(network, cluster),
        gateway_mac: MacAddr::for_gateway(network.id),
        gateways: if network.driver.has_gateway() { gateways(network) } else { Vec::new() },
        vips: cluster.services(network.id).flat_map(|service| service.vips).copied().collect(),
        internal: network.internal,
        multicast: network.options.multicast,
        isolated: network.options.isolated,
        provisional: false,
        remotes,
        flood: if network.options.multicast { flood } else { BTreeMap::new() },
        ports: ports.collect(),
        uplink: uplink(context, book, network),
        transit: transit(context, cluster, network),
    }
}

fn transport(context: PlaneContext, network: &Network) -> Transport {
    match (network.driver, network.encrypted) {
        (Driver::Bridge, _) => Transport::Local,
        (Driver::Macvlan, _) => {
            let Macvlan { parent, mode } = network.options.macvlan.unwrap_or_default();
            Transport::Macvlan { parent, mode, mtu: network.options.mtu }
        }
        (Driver::Overlay, true) => Transport::Sealed,
        (Driver::Overlay, false) => {
            Transport::Vxlan { vni: network.vni, local: context.local, port: context.vxlan_port }
        }
    }
}

/// How what comes to published ports gets to the other hosts of the network, if some of it may.
fn transit(context: PlaneContext, cluster: &Cluster, network: &Network) -> Option<Transit> {
    let before = cluster.conflict(network.id);
    let settled = before.is_none_or(|before| !is_mistakable(before, network));
    if network.driver.is_local() || !settled || !cluster.has_ingress(network.id) {
        return None;
    }
    let others = cluster.carriers(network.id).into_iter().filter(|node| *node != context.me);
    let routers = others.filter_map(|node| Some((node, cluster.node(node)?.vtep)));
    let family = Family::of(context.local.ip());
    Some(Transit {
        own: context.me,
        routers: routers.filter(|(_, vtep)| Family::of(vtep.ip()) == family).collect(),
        addresses: BTreeSet::from([context.local.ip()]),
    })
}

/// Whether an endpoint's MAC follows from its addresses, which others cannot have.
fn is_made_of(endpoint: &Endpoint, network: NetworkId) -> bool {
    endpoint.ips().any(|ip| MacAddr::for_address(network, ip) == endpoint.mac)
}

fn gateways(network: &Network) -> Vec<Prefix> {
    let gateway =
        |pool: &weft_model::Pool| Prefix { ip: pool.gateway, len: pool.subnet.prefix_len() };
    network.pools.iter().map(gateway).collect()
}

/// The least MTU that a link can have: IPv4 needs 68 bytes (RFC 791), but hosts may send 576; IPv6
/// needs 1280 (RFC 8200 §5).
const LEAST_MTU_V4: u16 = 576;
const LEAST_MTU_V6: u16 = 1280;

/// Bytes that a packet in `network` may have, so that it fits the underlay of every node that may
/// carry it. What no link could have, whoever says it, is raised to what it needs.
pub fn mtu(network: &Network, cluster: &Cluster) -> u16 {
    let around = |outer| match (network.driver, network.encrypted) {
        (Driver::Bridge | Driver::Macvlan, _) => 0,
        (Driver::Overlay, true) => outer + SEALED,
        (Driver::Overlay, false) => outer + PLAIN,
    };
    let fits = |node: &weft_model::Node| {
        let outer = if node.vtep.ip().is_ipv6() { IP_V6 } else { IP_V4 };
        node.underlay_mtu.saturating_sub(around(outer))
    };
    let carriers = cluster
        .members()
        .filter(|member| !network.driver.is_local() || member.id == network.creator)
        .filter_map(|member| member.node.as_ref());
    let floor = network.pool(Family::V6).map_or(LEAST_MTU_V4, |_| LEAST_MTU_V6);
    let least = carriers.map(fits).min();
    network.options.mtu.or(least).unwrap_or_else(|| 1500 - around(IP_V4)).max(floor)
}

/// How many networks of one host can have an uplink.
pub fn uplink_capacity(pool: Ipv4Net) -> u16 {
    let pairs = 1_u64 << (32 - u32::from(pool.prefix_len())).saturating_sub(1);
    u16::try_from(pairs.min(1 << 15)).expect("at most 2^15")
}

pub(super) fn uplink(context: PlaneContext, book: &Book, network: &Network) -> Option<Uplink> {
    if network.internal || !network.driver.has_gateway() {
        return None;
    }
    let slot = *book.uplinks.get(&network.id)?;
    let v4 = u32::from(context.uplink_pool.network()) + 2 * u32::from(slot);
    let v6 = u128::from(UPLINK_POOL_V6.network()) + 2 * u128::from(slot);
    let with = |family| network.pool(family).is_some();
    Some(Uplink {
        v4: with(Family::V4)
            .then(|| AddressPair { host: Ipv4Addr::from(v4), network: Ipv4Addr::from(v4 + 1) }),
        v6: with(Family::V6)
            .then(|| AddressPair { host: Ipv6Addr::from(v6), network: Ipv6Addr::from(v6 + 1) }),
    })
}

/// The lowest uplink slot that no network of this host has.
pub(crate) fn free_slot(uplinks: &BTreeMap<NetworkId, u16>, capacity: u16) -> Option<u16> {
    let taken: BTreeSet<u16> = uplinks.values().copied().collect();
    (0..capacity).find(|slot| !taken.contains(slot))
}

/// Names the route a sandbox needs for its gateway addresses.
pub(crate) fn gateway_ips(network: &Network) -> Vec<IpAddr> {
    network.pools.iter().map(|pool| pool.gateway).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, book_with, network, plane_context};

    #[test]
    fn only_networks_with_a_local_endpoint_are_carried() {
        let (app, db) = (network(1, "app"), network(2, "db"));
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .network(1, &db)
            .endpoint(1, &app, "web", "10.1.0.8")
            .endpoint(2, &app, "far", "10.1.0.9")
            .endpoint(2, &db, "other", "10.2.0.9")
            .build();
        let desired = plane(plane_context(), &cluster, &book_with(&app, "web", "10.1.0.8"), false);
        assert_eq!(desired.networks.keys().copied().collect::<Vec<_>>(), [app.id]);
        let carried = &desired.networks[&app.id];
        let remotes: Vec<_> = carried.remotes.values().map(|s| s.vtep.to_string()).collect();
        assert_eq!(remotes, ["192.0.2.2"]);
        assert_eq!(carried.ports.len(), 1);
        assert_eq!(carried.mtu, 1450);
        assert_eq!(carried.uplink.as_ref().unwrap().v4.unwrap().host.to_string(), "169.254.192.6");
        assert!(carried.flood.is_empty());
        assert_eq!(desired.host.vteps.len(), 1);
    }

    #[test]
    fn an_encrypted_network_is_sealed_to_nodes_and_a_plain_one_never_is() {
        for encrypted in [true, false] {
            let app = Network { encrypted, ..network(1, "app") };
            let cluster = Builder::default()
                .node(1)
                .node(2)
                .network(1, &app)
                .endpoint(1, &app, "web", "10.1.0.8")
                .endpoint(2, &app, "far", "10.1.0.9")
                .build();
            let book = book_with(&app, "web", "10.1.0.8");
            let context = PlaneContext {
                sealed: Some(SealedPorts { first: 6791, lanes: 2 }),
                ..plane_context()
            };
            let desired = plane(context, &cluster, &book, false);
            let carried = &desired.networks[&app.id];
            assert_eq!(carried.transport == Transport::Sealed, encrypted);
            assert_eq!(carried.transport.vni(), (!encrypted).then_some(app.vni));
            assert_eq!(carried.mtu, if encrypted { 1418 } else { 1450 });
            let nodes: Vec<_> = carried.remotes.values().map(|s| s.node).collect();
            assert_eq!(nodes, [crate::fixture::node_id(2)]);
            assert_eq!(desired.host.sealed_ports, BTreeSet::from([6791, 6792]));

            // A host that cannot seal does not fall back to what anybody can read.
            let desired = plane(plane_context(), &cluster, &book, false);
            let carried = &desired.networks[&app.id];
            assert_eq!(carried.transport == Transport::Sealed, encrypted);
            assert!(desired.host.sealed_ports.is_empty());
        }
    }

    #[test]
    fn a_silent_nodes_forwarding_entries_stay() {
        let app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .endpoint(1, &app, "web", "10.1.0.8")
            .endpoint(2, &app, "far", "10.1.0.9")
            .change(2, |member| member.liveness = weft_gossip::Liveness::Suspect)
            .build();
        let desired = plane(plane_context(), &cluster, &book_with(&app, "web", "10.1.0.8"), false);
        assert_eq!(desired.networks[&app.id].remotes.len(), 1);
    }

    #[test]
    fn the_least_underlay_decides_the_mtu_unless_the_network_says() {
        let mut app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .change_node(2, |node| node.underlay_mtu = 1400)
            .build();
        assert_eq!(mtu(&app, &cluster), 1350);
        app.options.mtu = Some(1300);
        assert_eq!(mtu(&app, &cluster), 1300);
        let v6 = Builder::default()
            .node(1)
            .change_node(1, |node| node.vtep = "2001:db8::1".parse().unwrap())
            .build();
        assert_eq!(mtu(&network(1, "app"), &v6), 1430);

        let sealed = Network { encrypted: true, ..network(1, "app") };
        assert_eq!(mtu(&sealed, &cluster), 1400 - 82);
        assert_eq!(mtu(&sealed, &v6), 1500 - 102);
    }

    #[test]
    fn a_network_of_this_host_alone_has_its_mtu_and_no_remotes() {
        let app = Network { driver: Driver::Bridge, ..network(1, "app") };
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .change_node(2, |node| node.underlay_mtu = 1400)
            .build();
        assert_eq!(mtu(&app, &cluster), 1500);
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &network(1, "app"))
            .endpoint(2, &app, "far", "10.1.0.9")
            .build();
        let mut book = book_with(&app, "web", "10.1.0.8");
        book.networks.insert(app.id, app.clone());
        let carried = overlay_network(plane_context(), &cluster, &book, &app);
        assert_eq!(carried.transport, Transport::Local);
        assert!(carried.remotes.is_empty());
    }

    #[test]
    fn no_node_can_make_links_impossible_by_a_senseless_mtu() {
        let mut app = network(1, "app");
        let cluster =
            Builder::default().node(1).node(2).change_node(2, |node| node.underlay_mtu = 0).build();
        assert_eq!(mtu(&app, &cluster), LEAST_MTU_V4);
        app.options.mtu = Some(1);
        assert_eq!(mtu(&app, &cluster), LEAST_MTU_V4);
        let subnet: weft_model::Subnet = "fd00:1::/64".parse().unwrap();
        let pool =
            weft_model::Pool { subnet, gateway: subnet.first_host(), ..app.pools[0].clone() };
        app.pools.push(pool);
        assert_eq!(mtu(&app, &cluster), LEAST_MTU_V6);
    }

    #[test]
    fn no_node_can_claim_the_mac_of_the_gateway_or_of_a_local_endpoint() {
        let app = network(1, "app");
        let book = book_with(&app, "web", "10.1.0.8");
        let taken = book.endpoints_of(app.id).next().unwrap().endpoint.mac;
        for mac in [taken, MacAddr::for_gateway(app.id)] {
            let cluster = Builder::default()
                .node(1)
                .node(2)
                .network(1, &app)
                .endpoint(2, &app, "far", "10.1.0.9")
                .change(2, |member| {
                    let endpoints = member.endpoints.get_mut(&app.id).unwrap();
                    endpoints.values_mut().for_each(|endpoint| endpoint.mac = mac);
                })
                .build();
            let desired = plane(plane_context(), &cluster, &book, false);
            assert!(desired.networks[&app.id].remotes.is_empty(), "{mac}");
        }
    }

    #[test]
    fn no_node_can_take_the_mac_that_belongs_to_anothers_address() {
        let app = network(1, "app");
        let mac = MacAddr::for_address(app.id, "10.1.0.9".parse().unwrap());
        for first_or_last in [0, 0xff] {
            let claim = |member: &mut weft_gossip::Member| {
                let endpoints = member.endpoints.get_mut(&app.id).unwrap();
                let (_, endpoint) = endpoints.pop_first().unwrap();
                let id = weft_model::EndpointId::from([first_or_last; 16]);
                endpoints.insert(id, Endpoint { id, mac, ..endpoint });
            };
            let cluster = Builder::default()
                .node(1)
                .node(2)
                .node(3)
                .network(1, &app)
                .endpoint(2, &app, "far", "10.1.0.9")
                .endpoint(3, &app, "evil", "10.1.0.10")
                .change(3, claim)
                .build();
            let book = book_with(&app, "web", "10.1.0.8");
            let desired = plane(plane_context(), &cluster, &book, false);
            let station = &desired.networks[&app.id].remotes[&mac];
            assert_eq!(station.node, crate::fixture::node_id(2));
        }
    }

    #[test]
    fn an_internal_network_has_no_uplink_and_a_conflicting_one_no_remotes() {
        let mut app = network(2, "app");
        app.internal = true;
        let mut other = network(1, "other");
        other.vni = app.vni;
        let cluster = Builder::default()
            .node(1)
            .node(2)
            .network(1, &app)
            .network(1, &other)
            .endpoint(2, &app, "far", "10.2.0.9")
            .build();
        let desired = plane(plane_context(), &cluster, &book_with(&app, "web", "10.2.0.8"), false);
        let carried = &desired.networks[&app.id];
        assert!(carried.uplink.is_none());
        assert!(carried.remotes.is_empty());
    }

    #[test]
    fn uplink_slots_are_reused_and_end_with_the_pool() {
        let pool: Ipv4Net = "169.254.192.0/30".parse().unwrap();
        assert_eq!(uplink_capacity(pool), 2);
        let mut uplinks = BTreeMap::from([(network(1, "a").id, 0)]);
        assert_eq!(free_slot(&uplinks, 2), Some(1));
        uplinks.insert(network(2, "b").id, 1);
        assert_eq!(free_slot(&uplinks, 2), None);
    }
}
