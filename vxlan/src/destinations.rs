use std::{collections::BTreeSet, net::IpAddr};

use weft_model::MacAddr;
use weft_seal::Forwarding;

use crate::{OverlayNetwork, Port, Transport, fdb::Fdb, neighbours::Neighbours, ports::Ports};

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
            fdb.bridged.insert(mac, network.transport.device().to_owned());
            neighbours.extend(here.others(&station.ips).map(|ip| (ip, mac)));
        }
        for port in ports.values() {
            fdb.bridged.insert(port.identity.mac, port.name.clone());
        }
        match network.transport {
            Transport::Vxlan { .. } => {
                fdb.unicast.extend(remotes.map(|(&mac, station)| (mac, station.vtep)));
                fdb.flood.extend(flood.map(|(_, &vtep)| vtep));
                Self { fdb, beyond: Beyond::Vxlan(neighbours) }
            }
            Transport::Sealed => {
                let stations = remotes.map(|(&mac, station)| {
                    let ips = here.others(&station.ips).collect();
                    (mac, weft_seal::Station { node: station.node, ips })
                });
                let forwarding = Forwarding {
                    network: network.id,
                    mtu: network.mtu,
                    gateway_mac: network.gateway_mac,
                    gateways: network.gateways.iter().map(|prefix| prefix.ip).collect(),
                    stations: stations.collect(),
                    neighbours,
                    flood: flood.map(|(&node, _)| node).collect(),
                };
                Self { fdb, beyond: Beyond::Sealed(forwarding) }
            }
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
        stations.insert(*mac, weft_seal::Station { node: station.node, ips });
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
