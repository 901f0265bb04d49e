use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
};
use weft_model::{MacAddr, VtepAddr};

use crate::{
    Table,
    carrier::VXLAN,
    netlink::{Netlink, NetlinkError, Request, ignore_existing, ignore_missing},
    table::{KernelError, KernelTable},
};

/// Where frames go: behind which bridge port a station is, and for those behind a VXLAN device, at
/// which host.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Fdb {
    /// The VXLAN device's own table: MAC → VTEP.
    pub(crate) unicast: BTreeMap<MacAddr, VtepAddr>,
    /// The bridge's static entries: MAC → bridge port. Without them a frame to a remote station
    /// would be copied to every local port as well.
    pub(crate) bridged: BTreeMap<MacAddr, String>,
    /// The VXLAN device's entries of the all-zero MAC.
    pub(crate) flood: BTreeSet<VtepAddr>,
}

/// One change; prints as a `bridge fdb` command.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum FdbOp {
    Set(MacAddr, VtepAddr),
    Bridge(MacAddr, String),
    FloodTo(VtepAddr),
    Remove(MacAddr, VtepAddr),
    Unbridge(MacAddr, String),
    StopFloodTo(VtepAddr),
}

impl FdbOp {
    /// Whether a destination is lost by it.
    pub(crate) fn is_removal(&self) -> bool {
        match self {
            Self::Set(..) | Self::Bridge(..) | Self::FloodTo(_) => false,
            Self::Remove(..) | Self::Unbridge(..) | Self::StopFloodTo(_) => true,
        }
    }
}

/// Lists the operations that turn `actual` into `desired`.
///
/// A MAC that moved yields one replacement and no removal, and additions come first, so no
/// address is ever without a destination in between.
pub(crate) fn plan(desired: &Fdb, actual: &Fdb) -> Vec<FdbOp> {
    let set = desired
        .unicast
        .iter()
        .filter(|(mac, vtep)| actual.unicast.get(mac) != Some(vtep))
        .map(|(&mac, &vtep)| FdbOp::Set(mac, vtep));
    let bridge = desired
        .bridged
        .iter()
        .filter(|(mac, port)| actual.bridged.get(mac) != Some(port))
        .map(|(&mac, port)| FdbOp::Bridge(mac, port.clone()));
    let flood = desired.flood.difference(&actual.flood).copied().map(FdbOp::FloodTo);
    let remove = actual
        .unicast
        .iter()
        .filter(|(mac, _)| !desired.unicast.contains_key(mac))
        .map(|(&mac, &vtep)| FdbOp::Remove(mac, vtep));
    let unbridge = actual
        .bridged
        .iter()
        .filter(|(mac, _)| !desired.bridged.contains_key(mac))
        .map(|(&mac, port)| FdbOp::Unbridge(mac, port.clone()));
    let stop = actual.flood.difference(&desired.flood).copied().map(FdbOp::StopFloodTo);

    set.chain(bridge).chain(flood).chain(remove).chain(unbridge).chain(stop).collect()
}

/// The FDB of the bridge and the VXLAN device of one network's namespace.
pub(crate) struct KernelFdb<'a>(pub(crate) &'a mut Netlink);

impl KernelTable for KernelFdb<'_> {
    const TABLE: Table = Table::Fdb;
    type State = Fdb;
    type Op = FdbOp;

    fn read(&mut self) -> Result<Fdb, KernelError> {
        let names = self.port_names()?;
        let mut all = NeighbourMessage::default();
        all.header.family = AddressFamily::Bridge;
        let mut fdb = Fdb::default();
        for message in self.0.dump(&RouteNetlinkMessage::GetNeighbour(all))? {
            let RouteNetlinkMessage::NewNeighbour(entry) = message else { continue };
            if let Some(port) = names.get(&entry.header.ifindex) {
                learn(&mut fdb, port, &entry);
            }
        }
        Ok(fdb)
    }

    fn apply(&mut self, ops: &[FdbOp]) -> Vec<Result<(), KernelError>> {
        if ops.is_empty() {
            return Vec::new();
        }
        let indexes = match self.port_names() {
            Ok(names) => names.into_iter().map(|(index, name)| (name, index)).collect(),
            // Nothing can be applied; one error says it for all.
            Err(error) => return vec![Err(error.into())],
        };
        let requests: Vec<_> = ops.iter().map(|op| request(op, &indexes)).collect();
        ops.iter()
            .zip(self.0.batch(&requests))
            .map(|(op, result)| settle(op, result).map_err(KernelError::from))
            .collect()
    }
}

impl KernelFdb<'_> {
    fn port_names(&mut self) -> Result<BTreeMap<u32, String>, NetlinkError> {
        Ok(self.0.links()?.into_values().map(|link| (link.index, link.name)).collect())
    }
}

fn learn(fdb: &mut Fdb, port: &str, entry: &NeighbourMessage) {
    let state = u16::from(entry.header.state);
    let (mut mac, mut destination, mut bridged) = (None, None, false);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok();
            }
            NeighbourAttribute::Destination(address) => destination = vtep(address),
            NeighbourAttribute::Controller(_) => bridged = true,
            _ => {}
        }
    }
    let Some(octets) = mac else { return };
    match (bridged, MacAddr::try_from(octets), destination) {
        // `permanent` on a bridge's entry means "the bridge's own": the kernel's, not ours.
        (true, Ok(mac), _) if state & (NUD_NOARP | NUD_PERMANENT) == NUD_NOARP => {
            fdb.bridged.insert(mac, port.to_owned());
        }
        // An entry that ages is none of ours; it will be replaced by one that does not.
        (false, Ok(mac), Some(vtep)) if port == VXLAN && state & STATIC_STATES != 0 => {
            fdb.unicast.insert(mac, vtep);
        }
        (false, Err(_), Some(vtep)) if port == VXLAN && octets == [0; 6] => {
            fdb.flood.insert(vtep);
        }
        _ => {}
    }
}

fn request(op: &FdbOp, indexes: &BTreeMap<String, u32>) -> Request {
    let index = |name: &str| indexes.get(name).copied().unwrap_or_default();
    let entry = |mac: [u8; 6], port: &str, flags| {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index(port);
        message.header.state = NeighbourState::Other(NUD_NOARP | NUD_REACHABLE);
        message.header.flags = flags;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
        message
    };
    let remote = |mac, vtep: &VtepAddr| {
        let mut message = entry(mac, VXLAN, NeighbourFlags::Own);
        message.attributes.push(NeighbourAttribute::Destination(vtep.ip().into()));
        message
    };
    let (message, flags) = match op {
        FdbOp::Set(mac, vtep) => (
            RouteNetlinkMessage::NewNeighbour(remote(mac.octets(), vtep)),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        FdbOp::Bridge(mac, port) => (
            RouteNetlinkMessage::NewNeighbour(entry(
                mac.octets(),
                port,
                NeighbourFlags::Controller,
            )),
            NLM_F_CREATE | NLM_F_REPLACE,
        ),
        // One MAC, many destinations: only NLM_F_APPEND keeps the earlier ones.
        FdbOp::FloodTo(vtep) => {
            (RouteNetlinkMessage::NewNeighbour(remote([0; 6], vtep)), NLM_F_CREATE | NLM_F_APPEND)
        }
        FdbOp::Remove(mac, vtep) => {
            (RouteNetlinkMessage::DelNeighbour(remote(mac.octets(), vtep)), 0)
        }
        FdbOp::Unbridge(mac, port) => (
            RouteNetlinkMessage::DelNeighbour(entry(
                mac.octets(),
                port,
                NeighbourFlags::Controller,
            )),
            0,
        ),
        FdbOp::StopFloodTo(vtep) => (RouteNetlinkMessage::DelNeighbour(remote([0; 6], vtep)), 0),
    };
    Request { message, flags }
}

fn settle(op: &FdbOp, result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match op {
        FdbOp::Set(..) | FdbOp::Bridge(..) => result,
        FdbOp::FloodTo(_) => ignore_existing(result),
        FdbOp::Remove(..) | FdbOp::Unbridge(..) | FdbOp::StopFloodTo(_) => ignore_missing(result),
    }
}

/// Destinations of AF_BRIDGE entries arrive as bare bytes.
fn vtep(address: &NeighbourAddress) -> Option<VtepAddr> {
    let ip = match address {
        NeighbourAddress::Inet(ip) => IpAddr::V4(*ip),
        NeighbourAddress::Inet6(ip) => IpAddr::V6(*ip),
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => IpAddr::from(<[u8; 4]>::try_from(bytes.as_slice()).ok()?),
            16 => IpAddr::from(<[u8; 16]>::try_from(bytes.as_slice()).ok()?),
            _ => return None,
        },
        _ => return None,
    };
    Some(VtepAddr::from(ip))
}

impl fmt::Display for FdbOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ZERO: &str = "00:00:00:00:00:00";
        match self {
            Self::Set(mac, vtep) => write!(f, "replace {mac} dev {VXLAN} dst {vtep} self static"),
            Self::Bridge(mac, port) => write!(f, "replace {mac} dev {port} master static"),
            Self::FloodTo(vtep) => write!(f, "append {ZERO} dev {VXLAN} dst {vtep} self"),
            Self::Remove(mac, vtep) => write!(f, "del {mac} dev {VXLAN} dst {vtep} self"),
            Self::Unbridge(mac, port) => write!(f, "del {mac} dev {port} master"),
            Self::StopFloodTo(vtep) => write!(f, "del {ZERO} dev {VXLAN} dst {vtep} self"),
        }
    }
}

/// Neighbour states (`include/uapi/linux/neighbour.h`). `bridge fdb … static` is NOARP with
/// REACHABLE: the bridge asks for the first, the VXLAN driver for the second.
const NUD_REACHABLE: u16 = 0x02;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const STATIC_STATES: u16 = NUD_NOARP | NUD_PERMANENT;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::table::reconcile;

    /// A table that keeps the trait's promises in memory; the kernel test holds the kernel to the
    /// same ones.
    struct FakeFdb(Fdb);

    impl KernelTable for FakeFdb {
        const TABLE: Table = Table::Fdb;
        type State = Fdb;
        type Op = FdbOp;

        fn read(&mut self) -> Result<Fdb, KernelError> {
            Ok(self.0.clone())
        }

        fn apply(&mut self, ops: &[FdbOp]) -> Vec<Result<(), KernelError>> {
            for op in ops.iter().cloned() {
                match op {
                    FdbOp::Set(mac, vtep) => drop(self.0.unicast.insert(mac, vtep)),
                    FdbOp::Bridge(mac, port) => drop(self.0.bridged.insert(mac, port)),
                    FdbOp::FloodTo(vtep) => drop(self.0.flood.insert(vtep)),
                    FdbOp::Remove(mac, _) => drop(self.0.unicast.remove(&mac)),
                    FdbOp::Unbridge(mac, _) => drop(self.0.bridged.remove(&mac)),
                    FdbOp::StopFloodTo(vtep) => drop(self.0.flood.remove(&vtep)),
                }
            }
            ops.iter().map(|_| Ok(())).collect()
        }
    }

    fn mac() -> impl Strategy<Value = MacAddr> {
        (0..8u8).prop_map(|n| MacAddr::try_from([2, 0, 0, 0, 0, n]).unwrap())
    }

    fn any_vtep() -> impl Strategy<Value = VtepAddr> {
        (1..4u8).prop_map(|n| VtepAddr::from(IpAddr::from([192, 0, 2, n])))
    }

    fn any_fdb() -> impl Strategy<Value = Fdb> {
        let port = prop_oneof![Just("vx0".to_owned()), Just("v00".to_owned())];
        (
            prop::collection::btree_map(mac(), any_vtep(), 0..8),
            prop::collection::btree_map(mac(), port, 0..8),
            prop::collection::btree_set(any_vtep(), 0..4),
        )
            .prop_map(|(unicast, bridged, flood)| Fdb { unicast, bridged, flood })
    }

    proptest! {
        #[test]
        fn any_fdb_converges_in_one_pass(desired in any_fdb(), actual in any_fdb()) {
            let mut kernel = FakeFdb(actual);
            let pass = reconcile(&mut kernel, |actual| plan(&desired, actual));
            prop_assert!(pass.errors.is_empty());
            prop_assert_eq!(&kernel.0, &desired);
            prop_assert!(plan(&desired, &kernel.0).is_empty());
        }
    }

    #[test]
    fn a_moved_station_costs_one_replacement() {
        let mac = MacAddr::try_from([2, 0, 0, 0, 0, 7]).unwrap();
        let at = |host: u8| Fdb {
            unicast: [(mac, VtepAddr::from(IpAddr::from([192, 0, 2, host])))].into(),
            bridged: [(mac, VXLAN.to_owned())].into(),
            flood: BTreeSet::new(),
        };
        let ops = plan(&at(2), &at(1));
        let script = ops.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!(script, @"replace 02:00:00:00:00:07 dev vx0 dst 192.0.2.2 self static");
    }
}
