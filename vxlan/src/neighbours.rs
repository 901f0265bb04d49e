use std::{collections::BTreeMap, fmt, net::IpAddr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
};
use weft_model::MacAddr;

use crate::{
    Table,
    carrier::VXLAN,
    link,
    netlink::{Netlink, Request, ignore_missing},
    table::{KernelError, KernelTable},
};

/// The answers that a VXLAN device gives to ARP and neighbour solicitations: IP → MAC.
pub(crate) type Neighbours = BTreeMap<IpAddr, MacAddr>;

/// One change; prints as an `ip neigh` command.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum NeighbourOp {
    Set(IpAddr, MacAddr),
    Remove(IpAddr),
}

impl NeighbourOp {
    pub(crate) fn is_removal(&self) -> bool {
        matches!(self, Self::Remove(_))
    }
}

/// Lists the operations that turn `actual` into `desired`: replacements first, then removals.
pub(crate) fn plan(desired: &Neighbours, actual: &Neighbours) -> Vec<NeighbourOp> {
    let set = desired
        .iter()
        .filter(|(ip, mac)| actual.get(ip) != Some(mac))
        .map(|(&ip, &mac)| NeighbourOp::Set(ip, mac));
    let remove =
        actual.keys().filter(|ip| !desired.contains_key(ip)).copied().map(NeighbourOp::Remove);
    set.chain(remove).collect()
}

/// The permanent neighbour entries of a network's VXLAN device.
pub(crate) struct KernelNeighbours<'a>(pub(crate) &'a mut Netlink);

impl KernelTable for KernelNeighbours<'_> {
    const TABLE: Table = Table::Neighbours;
    type State = Neighbours;
    type Op = NeighbourOp;

    fn read(&mut self) -> Result<Neighbours, KernelError> {
        let device = self.0.index(VXLAN)?;
        let all = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let entries = self.0.dump(&all)?.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewNeighbour(entry)
                if entry.header.ifindex == device
                    && entry.header.state == NeighbourState::Permanent =>
            {
                pair(&entry)
            }
            _ => None,
        });
        Ok(entries.collect())
    }

    fn apply(&mut self, ops: &[NeighbourOp]) -> Vec<Result<(), KernelError>> {
        if ops.is_empty() {
            return Vec::new();
        }
        let device = match self.0.index(VXLAN) {
            Ok(index) => index,
            Err(error) => return vec![Err(error.into())],
        };
        let requests: Vec<_> = ops.iter().map(|op| request(op, device)).collect();
        let settle = |(op, result)| match op {
            &NeighbourOp::Set(..) => result,
            NeighbourOp::Remove(_) => ignore_missing(result),
        };
        ops.iter()
            .zip(self.0.batch(&requests))
            .map(|pair| settle(pair).map_err(KernelError::from))
            .collect()
    }
}

fn pair(entry: &NeighbourMessage) -> Option<(IpAddr, MacAddr)> {
    let ip = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let mac = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    })?;
    Some((ip, MacAddr::try_from(mac).ok()?))
}

fn request(op: &NeighbourOp, device: u32) -> Request {
    let entry = |ip: IpAddr| {
        let mut message = NeighbourMessage::default();
        message.header.family = link::family(ip);
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::Destination(ip.into()));
        message
    };
    match *op {
        NeighbourOp::Set(ip, mac) => {
            let mut message = entry(ip);
            let mac = NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec());
            message.attributes.push(mac);
            Request {
                message: RouteNetlinkMessage::NewNeighbour(message),
                flags: NLM_F_CREATE | NLM_F_REPLACE,
            }
        }
        NeighbourOp::Remove(ip) => {
            Request { message: RouteNetlinkMessage::DelNeighbour(entry(ip)), flags: 0 }
        }
    }
}

impl fmt::Display for NeighbourOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(ip, mac) => write!(f, "replace {ip} lladdr {mac} dev {VXLAN} nud permanent"),
            Self::Remove(ip) => write!(f, "del {ip} dev {VXLAN}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_neighbours() -> impl Strategy<Value = Neighbours> {
        let ip = prop_oneof![
            (1..6u8).prop_map(|n| IpAddr::from([10, 0, 0, n])),
            (1..6u16).prop_map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n])),
        ];
        let mac = (0..4u8).prop_map(|n| MacAddr::try_from([2, 0, 0, 0, 0, n]).unwrap());
        prop::collection::btree_map(ip, mac, 0..10)
    }

    proptest! {
        #[test]
        fn any_neighbours_converge_in_one_pass(
            desired in any_neighbours(),
            actual in any_neighbours(),
        ) {
            let mut kernel = actual;
            for op in plan(&desired, &kernel.clone()) {
                match op {
                    NeighbourOp::Set(ip, mac) => drop(kernel.insert(ip, mac)),
                    NeighbourOp::Remove(ip) => drop(kernel.remove(&ip)),
                }
            }
            prop_assert_eq!(kernel, desired);
        }
    }
}
