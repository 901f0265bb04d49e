use std::net::IpAddr;

use weft_model::{MacAddr, NodeId};

use crate::{Forwarding, frame::Stations};

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

    fn is_gateway(&self, mac: MacAddr) -> bool {
        mac == self.forwarding.gateway_mac
    }

    fn is_elsewhere(&self, ip: IpAddr) -> bool {
        let holder = self.forwarding.neighbours.get(&ip);
        holder
            .and_then(|mac| self.forwarding.stations.get(mac))
            .is_some_and(|station| station.node != self.peer)
    }
}
