use std::net::IpAddr;

use weft_model::{MacAddr, NodeId};

use crate::{Forwarding, Station, frame::Stations};

/// A network's stations, as one sees them who received from `peer`.
pub(super) struct SeenFrom<'a> {
    pub(super) peer: NodeId,
    pub(super) forwarding: &'a Forwarding,
}

impl Stations for SeenFrom<'_> {
    fn holds(&self, mac: MacAddr, ip: Option<IpAddr>) -> bool {
        self.forwarding.stations.get(&mac).is_some_and(|station| {
            station.node == self.peer && ip.is_none_or(|ip| station.ips.contains(&ip))
        })
    }

    fn forwards(&self, mac: MacAddr) -> bool {
        let router = |station: &Station| station.router && station.node == self.peer;
        mac == self.forwarding.gateway_mac || self.forwarding.stations.get(&mac).is_some_and(router)
    }

    fn is_elsewhere(&self, ip: IpAddr) -> bool {
        self.forwarding.is_elsewhere(ip, self.peer)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use weft_model::NetworkId;

    use super::*;

    #[test]
    fn only_the_peers_own_router_forwards_for_others() {
        let network = NetworkId::from([7; 16]);
        let nodes = [1, 2].map(|n| NodeId::from([n; 16]));
        let routers = nodes.map(|node| MacAddr::for_router(network, node));
        let station = MacAddr::try_from([2, 0, 0, 0, 0, 9]).unwrap();
        let (ip, outside) = (IpAddr::from([10, 0, 0, 9]), IpAddr::from([192, 0, 2, 9]));
        let router = |n: usize| Station { node: nodes[n], ips: Vec::new(), router: true };
        let forwarding = Forwarding {
            network,
            mtu: 1418,
            gateway_mac: MacAddr::for_gateway(network),
            gateways: Vec::new(),
            stations: [
                (routers[0], router(0)),
                (routers[1], router(1)),
                (station, Station { node: nodes[1], ips: vec![ip], router: false }),
            ]
            .into(),
            neighbours: [(ip, station)].into(),
            flood: BTreeSet::new(),
        };
        let seen = |peer: usize| SeenFrom { peer: nodes[peer], forwarding: &forwarding };

        assert!(seen(0).forwards(routers[0]) && seen(1).forwards(routers[1]));
        assert!(!seen(0).forwards(routers[1]) && !seen(1).forwards(routers[0]));
        assert!(!seen(1).forwards(station));
        assert!(seen(0).is_elsewhere(ip) && !seen(1).is_elsewhere(ip));
        assert!(!seen(0).is_elsewhere(outside));
    }
}
