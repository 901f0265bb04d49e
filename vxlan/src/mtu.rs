//! The MTU of ports, which a network may change while sandboxes use it.
//!
//! A veth drops without a word what is larger than its other end takes. So the sandbox's end is the
//! first to shrink and the last to grow.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use netlink_packet_route::link::LinkAttribute;
use weft_model::EndpointId;

use crate::{
    Table, Transport,
    namespace::{self, Namespace},
    netlink::{Netlink, NetlinkError},
    ports,
    table::{KernelError, KernelTable},
};

/// The ports of one network.
pub(crate) type Widths = BTreeMap<EndpointId, Width>;

/// How large a packet passes a port, in bytes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Width {
    /// The host end's name.
    name: String,
    near: u32,
    /// Absent if the sandbox cannot be looked into.
    far: Option<u32>,
    far_end: FarEnd,
    /// What the port was asked to have whatever the network has.
    pinned: Option<u16>,
}

/// The end in the sandbox, as the host end points to it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct FarEnd {
    /// The sandbox, as the network's namespace numbers it; absent if it is that one itself.
    nsid: Option<i32>,
    index: u32,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum MtuOp {
    Near { name: String, mtu: u32 },
    Far { endpoint: EndpointId, end: FarEnd, mtu: u32 },
}

/// Lists what makes ports narrower: first of all, so that nothing enters that would not come out.
pub(crate) fn plan_narrower(network: u16, actual: &Widths) -> Vec<MtuOp> {
    let mut ops = Vec::new();
    for (&endpoint, width) in actual {
        let mtu = width.wanted(network);
        if width.far.map_or(width.near > mtu, |far| far > mtu) {
            ops.push(MtuOp::Far { endpoint, end: width.far_end, mtu });
        }
        if width.near > mtu {
            ops.push(MtuOp::Near { name: width.name.clone(), mtu });
        }
    }
    ops
}

/// Lists what makes ports wider: last of all, when everything behind them is.
pub(crate) fn plan_wider(network: u16, actual: &Widths) -> Vec<MtuOp> {
    let mut ops = Vec::new();
    for (&endpoint, width) in actual {
        let mtu = width.wanted(network);
        if width.near < mtu {
            ops.push(MtuOp::Near { name: width.name.clone(), mtu });
        }
        if width.far.is_none_or(|far| far < mtu) {
            ops.push(MtuOp::Far { endpoint, end: width.far_end, mtu });
        }
    }
    ops
}

/// What the end of a port in its sandbox has, so that packets of up to `mtu` bytes leave it.
///
/// A sandbox hands over up to 64 KiB of TCP at once. Sealed, that is a run of packets for one send,
/// which takes so many and no more; what is left over would cost a send, and a wake-up at the other
/// host, of its own (measured: 7 % of the tunnel's CPU time per byte). TAP, bridge and the ends in
/// the network's namespace have no such limit: what is larger, from a sandbox without it or from
/// outside, they would cut to single packets, which halves the throughput.
pub(crate) fn far_end(mtu: u32, transport: Transport) -> Vec<LinkAttribute> {
    let width = [LinkAttribute::Mtu(mtu)].into_iter();
    match transport {
        Transport::Vxlan { .. } | Transport::Local | Transport::Macvlan { .. } => width.collect(),
        Transport::Sealed => {
            let segments = (LARGEST_DATAGRAM / (mtu + SEALED_OVERHEAD)).clamp(1, UDP_MAX_SEGMENTS);
            width.chain([LinkAttribute::GsoMaxSegs(segments)]).collect()
        }
    }
}

/// The data of the largest UDP datagram (IPv4), in bytes; that of one send is no larger.
const LARGEST_DATAGRAM: u32 = 65_507;
/// `include/linux/udp.h`, before Linux 6.9; twice as many since.
const UDP_MAX_SEGMENTS: u32 = 64;
/// What is around an IP packet inside a UDP datagram, in bytes: the frame's header and the seal's.
const SEALED_OVERHEAD: u32 = 14 + 40;

impl Width {
    fn wanted(&self, network: u16) -> u32 {
        self.pinned.unwrap_or(network).into()
    }
}

/// The ports of one network's namespace, and what they lead to.
pub(crate) struct KernelWidths<'a> {
    pub(crate) inside: &'a mut Netlink,
    /// Where ports are that wait for an engine.
    pub(crate) host: &'a Namespace,
    pub(crate) transport: Transport,
}

impl KernelTable for KernelWidths<'_> {
    const TABLE: Table = Table::Mtu;
    type State = Widths;
    type Op = MtuOp;

    fn read(&mut self) -> Result<Widths, KernelError> {
        let mut found = Widths::new();
        for link in self.inside.links()?.into_values() {
            let Some(label) = link.alias.as_deref().and_then(ports::Label::parse) else { continue };
            let Some(index) = link.peer else { continue };
            let far_end = FarEnd { nsid: link.peer_nsid, index };
            let far = self.inside.link_elsewhere(far_end.nsid, index).ok().map(|link| link.mtu);
            let (near, pinned) = (link.mtu, label.mtu);
            let width = Width { name: link.name, near, far, far_end, pinned };
            found.insert(label.endpoint, width);
        }
        Ok(found)
    }

    fn apply(&mut self, ops: &[MtuOp]) -> Vec<Result<(), KernelError>> {
        let far = ops.iter().filter_map(|op| match op {
            MtuOp::Far { end, .. } => end.nsid,
            MtuOp::Near { .. } => None,
        });
        let sandboxes = self.find(far.collect());
        ops.iter().map(|op| self.apply_one(op, &sandboxes)).collect()
    }
}

impl KernelWidths<'_> {
    fn apply_one(
        &mut self,
        op: &MtuOp,
        sandboxes: &BTreeMap<i32, Namespace>,
    ) -> Result<(), KernelError> {
        match *op {
            MtuOp::Near { ref name, mtu } => {
                Ok(self.inside.change_link(name, vec![LinkAttribute::Mtu(mtu)])?)
            }
            MtuOp::Far { end: FarEnd { nsid: None, index }, mtu, .. } => {
                Ok(self.inside.change_link_at(index, far_end(mtu, self.transport))?)
            }
            MtuOp::Far { end: FarEnd { nsid: Some(nsid), index }, mtu, .. } => {
                let sandbox = sandboxes.get(&nsid).ok_or(KernelError::HiddenSandbox)?;
                let mut netlink = Netlink::open(sandbox)?;
                Ok(netlink.change_link_at(index, far_end(mtu, self.transport))?)
            }
        }
    }

    /// Looks for the namespaces with the numbers `wanted`: the kernel lets us read a link by such a
    /// number, but not change it.
    fn find(&mut self, mut wanted: BTreeSet<i32>) -> BTreeMap<i32, Namespace> {
        let mut found = BTreeMap::new();
        for namespace in std::iter::once(self.host.clone()).chain(namespace::visible()) {
            if wanted.is_empty() {
                break;
            }
            match self.inside.nsid(&namespace) {
                Ok(Some(nsid)) if wanted.remove(&nsid) => drop(found.insert(nsid, namespace)),
                // Of no interest, or gone meanwhile.
                Ok(_) | Err(NetlinkError::Refused { .. }) => {}
                Err(_) => break,
            }
        }
        found
    }
}

impl fmt::Display for MtuOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Near { name, mtu } => write!(f, "set {name} mtu {mtu}"),
            Self::Far { endpoint, mtu, .. } => {
                write!(f, "set the interface of endpoint {endpoint} mtu {mtu} in its sandbox")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_widths() -> impl Strategy<Value = Widths> {
        let mtu = || 1400..1403u32;
        let width =
            (mtu(), mtu(), prop::option::of(1400..1403u16)).prop_map(|(near, far, pinned)| {
                let far_end = FarEnd { nsid: Some(1), index: 2 };
                Width { name: String::new(), near, far: Some(far), far_end, pinned }
            });
        prop::collection::btree_map((0..9u8).prop_map(|n| EndpointId::from([n; 16])), width, 0..5)
            .prop_map(|widths| {
                let named = widths.into_iter().map(|(endpoint, width)| {
                    (endpoint, Width { name: endpoint.to_string(), ..width })
                });
                named.collect()
            })
    }

    fn apply(kernel: &mut Widths, op: &MtuOp) {
        match op {
            MtuOp::Near { name, mtu } => {
                kernel.values_mut().find(|width| width.name == *name).unwrap().near = *mtu;
            }
            MtuOp::Far { endpoint, mtu, .. } => kernel.get_mut(endpoint).unwrap().far = Some(*mtu),
        }
    }

    proptest! {
        #[test]
        fn all_ports_get_the_networks_width_and_none_sends_more_than_its_host_end_takes(
            network in 1400..1403u16,
            mut kernel in any_widths(),
        ) {
            type Plan = fn(u16, &Widths) -> Vec<MtuOp>;
            for plan in [plan_narrower as Plan, plan_wider] {
                for op in plan(network, &kernel.clone()) {
                    let before = kernel.clone();
                    apply(&mut kernel, &op);
                    for (endpoint, width) in &kernel {
                        let fits = |width: &Width| width.far <= Some(width.near);
                        prop_assert!(fits(width) || !fits(&before[endpoint]), "{op}");
                    }
                }
            }
            for width in kernel.values() {
                let wanted = width.wanted(network);
                prop_assert_eq!((width.near, width.far), (wanted, Some(wanted)));
            }
        }
    }

    #[test]
    fn a_sandbox_that_cannot_be_looked_into_is_not_taken_for_done() {
        let end = FarEnd { nsid: Some(1), index: 2 };
        let (endpoint, mtu) = (EndpointId::from([1; 16]), 1400);
        let width = Width { name: "v01".into(), near: 1400, far: None, far_end: end, pinned: None };
        let widths = [(endpoint, width)].into();
        assert_eq!(plan_narrower(1400, &widths), []);
        let ops = plan_wider(1400, &widths);
        assert_eq!(ops, [MtuOp::Far { endpoint, end, mtu }]);
        assert!(ops[0].to_string().contains(&endpoint.to_string()), "{}", ops[0]);
    }
}
