use std::{collections::BTreeSet, net::IpAddr};

use weft_model::MacAddr;
use weft_seal::Forwarding;

use crate::{
    OverlayNetwork, Port, Transport, fdb::Fdb, neighbours::Neighbours, ports::Ports, transit,
};

/// Where a network's frames go, and what is answered to ARP and neighbour discovery: by the kernel
/// if it carries the network, else by the tunnel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Destinations {
    pub(crate) fdb: Fdb,
    pub(crate) beyond: Beyond,
}

/// What is beyond the bridge.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Beyond {
    /// The VXLAN device's answers.
    Vxlan(Neighbours),
    /// The tunnel's snapshot.
    Sealed(Forwarding),
    /// No other host.
    Nothing,
}

impl Destinations {
    /// The destinations of `network` from a host with `ports`; those on this host only, unless it is
    /// `connected`.
    ///
    /// A local port wins over a remote station of the same MAC or address: the record that said
    /// otherwise is about to follow.
    pub(crate) fn of(network: &OverlayNetwork, ports: &Ports, connected: bool) -> Self {
        let here = Here::of(ports);
        let remotes = network.remotes.iter();
        let remotes = remotes.filter(|(mac, _)| connected && !here.macs.contains(mac));
        let flood = network.flood.iter().filter(|_| connected && network.multicast);
        let (mut fdb, mut neighbours) = (Fdb::default(), Neighbours::new());
        for (&mac, station) in remotes.clone() {
            fdb.bridged.extend(network.transport.device().map(|name| (mac, name.to_owned())));
            neighbours.extend(here.others(&station.ips).map(|ip| (ip, mac)));
        }
        // None on a network of this host alone.
        let carrier = network.transport.device().filter(|_| connected);
        let transit = network.transit.as_ref().filter(|_| carrier.is_some());
        let routers = || {
            let routers = transit.into_iter().flat_map(|transit| &transit.routers);
            routers.map(|(&node, &vtep)| (MacAddr::for_router(network.id, node), node, vtep))
        };
        if let Some(name) = carrier.filter(|_| transit.is_some()) {
            let macs = routers().map(|(mac, ..)| mac).chain([transit::ANY_ROUTER]);
            fdb.bridged.extend(macs.map(|mac| (mac, name.to_owned())));
        }
        for port in ports.values() {
            fdb.bridged.insert(port.identity.mac, port.name.clone());
        }
        match network.transport {
            Transport::Vxlan { .. } => {
                fdb.unicast.extend(remotes.map(|(&mac, station)| (mac, station.vtep)));
                fdb.unicast.extend(routers().map(|(mac, _, vtep)| (mac, vtep)));
                fdb.flood.extend(flood.map(|(_, &vtep)| vtep));
                Self { fdb, beyond: Beyond::Vxlan(neighbours) }
            }
            Transport::Sealed => {
                let stations = remotes.map(|(&mac, station)| {
                    let ips = here.others(&station.ips).collect();
                    (mac, weft_seal::Station { node: station.node, ips, router: false })
                });
                let routers = routers().map(|(mac, node, _)| {
                    (mac, weft_seal::Station { node, ips: Vec::new(), router: true })
                });
                let forwarding = Forwarding {
                    network: network.id,
                    mtu: network.mtu,
                    gateway_mac: network.gateway_mac,
                    gateways: network.gateways.iter().map(|prefix| prefix.ip).collect(),
                    stations: stations.chain(routers).collect(),
                    neighbours,
                    flood: flood.map(|(&node, _)| node).collect(),
                };
                Self { fdb, beyond: Beyond::Sealed(forwarding) }
            }
            Transport::Local | Transport::Macvlan { .. } => Self { fdb, beyond: Beyond::Nothing },
        }
    }
}

/// Leaves in `forwarding` what was in it `before`: none of that is known to have gone. A station
/// that is here now, and an address that another one has, are known to have.
pub(crate) fn keep(forwarding: &mut Forwarding, before: &Forwarding, ports: &Ports) {
    let here = Here::of(ports);
    let Forwarding { stations, neighbours, flood, .. } = forwarding;
    for (mac, station) in before.stations.iter().filter(|(mac, _)| !here.macs.contains(mac)) {
        if stations.contains_key(mac) {
            continue;
        }
        let ips: Vec<_> =
            here.others(&station.ips).filter(|ip| !neighbours.contains_key(ip)).collect();
        neighbours.extend(ips.iter().map(|&ip| (ip, *mac)));
        let &weft_seal::Station { node, router, .. } = station;
        stations.insert(*mac, weft_seal::Station { node, ips, router });
    }
    flood.extend(&before.flood);
}

/// Who is on this host.
struct Here {
    macs: BTreeSet<MacAddr>,
    ips: BTreeSet<IpAddr>,
}

impl Here {
    fn of(ports: &Ports) -> Self {
        let ports = || ports.values().map(|port| &port.identity);
        Self {
            macs: ports().map(|port: &Port| port.mac).collect(),
            ips: ports().flat_map(|port| port.ips.iter().copied()).collect(),
        }
    }

    /// Those of `ips` that nobody here has.
    fn others<'a>(
        &'a self,
        ips: impl IntoIterator<Item = &'a IpAddr> + 'a,
    ) -> impl Iterator<Item = IpAddr> + 'a {
        ips.into_iter().copied().filter(|ip| !self.ips.contains(ip))
    }
}

#[cfg(test)]
mod tests {
    use weft_model::{EndpointId, NodeId};

    use super::*;
    use crate::{Station, ports::PortLink, ruleset};

    const HOST: [u8; 16] = [2; 16];

    fn mac(n: u8) -> MacAddr {
        MacAddr::try_from([2, 0, 0, 0, 0, n]).unwrap()
    }

    fn ip(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    /// A network with remote stations, each with the address of its number.
    fn network(transport: Transport, remotes: &[u8]) -> OverlayNetwork {
        let vtep = "192.0.2.2".parse().unwrap();
        let station = |n| Station { node: NodeId::from(HOST), vtep, ips: [ip(n)].into() };
        OverlayNetwork {
            transport,
            multicast: true,
            remotes: remotes.iter().map(|&n| (mac(n), station(n))).collect(),
            flood: [(NodeId::from(HOST), vtep)].into(),
            ..ruleset::tests::network(true)
        }
    }

    /// A local port with the MAC of one number and the address of another.
    fn port(of: u8, with: u8) -> Ports {
        let identity = Port { mac: mac(of), ips: [ip(with)].into() };
        let label =
            crate::ports::Label { endpoint: EndpointId::from([of; 16]), identity, mtu: None };
        [(label.endpoint, PortLink::labelled("v01", &label))].into()
    }

    fn sealed(network: &OverlayNetwork, ports: &Ports, connected: bool) -> (Fdb, Forwarding) {
        let Destinations { fdb, beyond } = Destinations::of(network, ports, connected);
        let Beyond::Sealed(forwarding) = beyond else { panic!("{beyond:?}") };
        (fdb, forwarding)
    }

    #[test]
    fn a_sealed_network_has_the_same_stations_as_a_plain_one_by_their_nodes() {
        let plain = network(ruleset::tests::network(true).transport, &[7, 8]);
        let encrypted = network(Transport::Sealed, &[7, 8]);
        let ports = port(9, 9);
        let Destinations { fdb: plain, beyond } = Destinations::of(&plain, &ports, true);
        let Beyond::Vxlan(neighbours) = beyond else { panic!("{beyond:?}") };
        let (fdb, forwarding) = sealed(&encrypted, &ports, true);

        assert_eq!(forwarding.neighbours, neighbours);
        assert!(forwarding.stations.keys().eq(plain.unicast.keys()));
        assert!(forwarding.stations.values().all(|station| station.node == NodeId::from(HOST)));
        assert_eq!(forwarding.flood, [NodeId::from(HOST)].into());
        // Nothing of it is left to a VXLAN device.
        assert!(fdb.unicast.is_empty() && fdb.flood.is_empty());
        let behind = |fdb: &Fdb| fdb.bridged.values().cloned().collect::<Vec<_>>();
        assert_eq!(behind(&plain), ["vx0", "vx0", "v01"]);
        assert_eq!(behind(&fdb), ["tap0", "tap0", "v01"]);
    }

    #[test]
    fn what_is_here_is_not_looked_for_elsewhere() {
        let network = network(Transport::Sealed, &[7, 8]);
        let (fdb, forwarding) = sealed(&network, &port(7, 8), true);
        assert_eq!(fdb.bridged[&mac(7)], "v01");
        assert!(forwarding.neighbours.is_empty(), "{forwarding:?}");
        assert_eq!(forwarding.stations.keys().collect::<Vec<_>>(), [&mac(8)]);
        assert!(forwarding.stations[&mac(8)].ips.is_empty(), "{forwarding:?}");
    }

    #[test]
    fn a_network_that_is_not_connected_has_its_own_ports_only() {
        let (fdb, forwarding) = sealed(&network(Transport::Sealed, &[7, 8]), &port(9, 9), false);
        assert_eq!(fdb.bridged.keys().collect::<Vec<_>>(), [&mac(9)]);
        assert!(forwarding.stations.is_empty() && forwarding.flood.is_empty(), "{forwarding:?}");
    }

    #[test]
    fn what_is_not_known_to_have_gone_stays() {
        let (_, before) = sealed(&network(Transport::Sealed, &[5, 6, 7, 8]), &Ports::new(), true);
        // Station 5 is unheard of, 6 has another place, 7 is here, 8's address is now 9's.
        let mut after = network(Transport::Sealed, &[6, 9]);
        after.remotes.get_mut(&mac(6)).unwrap().node = NodeId::from([3; 16]);
        after.remotes.get_mut(&mac(9)).unwrap().ips = [ip(8)].into();
        after.flood.clear();
        let ports = port(7, 7);
        let (_, mut forwarding) = sealed(&after, &ports, true);
        keep(&mut forwarding, &before, &ports);

        let nodes: Vec<_> = forwarding.stations.values().map(|station| station.node).collect();
        assert_eq!(nodes, [HOST, [3; 16], HOST, HOST].map(NodeId::from));
        assert_eq!(forwarding.stations.keys().copied().collect::<Vec<_>>(), [5, 6, 8, 9].map(mac));
        assert!(forwarding.stations[&mac(8)].ips.is_empty(), "{forwarding:?}");
        let answers = [(5, 5), (6, 6), (8, 9)].map(|(of, by)| (ip(of), mac(by)));
        assert_eq!(forwarding.neighbours, answers.into());
        assert_eq!(forwarding.flood, [NodeId::from(HOST)].into());
    }

    #[test]
    fn a_network_of_this_host_alone_has_nothing_beyond() {
        let network = network(Transport::Local, &[7, 8]);
        for connected in [true, false] {
            let Destinations { fdb, beyond } = Destinations::of(&network, &port(9, 9), connected);
            assert_eq!(beyond, Beyond::Nothing);
            assert_eq!(fdb.bridged.into_iter().collect::<Vec<_>>(), [(mac(9), "v01".to_owned())]);
            assert!(fdb.unicast.is_empty() && fdb.flood.is_empty());
        }
    }
}
