use std::{
    collections::BTreeSet,
    fmt, fs,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsRawFd,
};

use netlink_packet_route::link::LinkAttribute;
use weft_model::{Family, NetworkId};

use crate::{
    OverlayNetwork, Prefix, Table,
    link::{self, Link},
    namespace::Namespace,
    netlink::{Netlink, NetlinkError},
    table::{KernelError, KernelTable},
};

/// The uplink's name in the network's namespace.
pub(crate) const UPLINK: &str = "up0";
/// What the names of uplinks in the host's namespace begin with.
pub(crate) const HOST_PREFIX: &str = "wfu";

/// A network's way out.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct UplinkState {
    pub(crate) veth: Option<Veth>,
    pub(crate) host_addresses: BTreeSet<Prefix>,
    pub(crate) network_addresses: BTreeSet<Prefix>,
    pub(crate) gateways: BTreeSet<IpAddr>,
    /// The families whose loopback addresses may be clients of the network.
    pub(crate) loopback: BTreeSet<Family>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Veth {
    host: End,
    network: End,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct End {
    mtu: u32,
    up: bool,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Side {
    Host,
    Network,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum UplinkOp {
    Create { mtu: u32 },
    Configure { side: Side, mtu: u32 },
    Delete,
    AddAddress(Side, Prefix),
    RemoveAddress(Side, Prefix),
    AddGateway(IpAddr),
    RemoveGateway(IpAddr),
    AdmitLoopback(Family),
}

impl UplinkState {
    /// The uplink of `network`; none if it is internal.
    pub(crate) fn of(network: &OverlayNetwork) -> Self {
        let Some(uplink) = network.uplink.as_ref().filter(|_| !network.internal) else {
            return Self::default();
        };
        let v4 = uplink.v4.map(|pair| (IpAddr::V4(pair.host), IpAddr::V4(pair.network), 31));
        let v6 = uplink.v6.map(|pair| (IpAddr::V6(pair.host), IpAddr::V6(pair.network), 127));
        let pairs: Vec<_> = v4.into_iter().chain(v6).collect();
        let end = End { mtu: network.mtu.into(), up: true };
        let link_local = |ip: Ipv6Addr| v6.map(|_| Prefix { ip: ip.into(), len: 64 });
        let host = pairs.iter().map(|&(ip, _, len)| Prefix { ip, len });
        let inside = pairs.iter().map(|&(_, ip, len)| Prefix { ip, len });
        Self {
            veth: Some(Veth { host: end, network: end }),
            host_addresses: host.chain(link_local(HOST_LINK_LOCAL)).collect(),
            network_addresses: inside.chain(link_local(NETWORK_LINK_LOCAL)).collect(),
            gateways: pairs.iter().map(|&(host, ..)| host).collect(),
            loopback: pairs.iter().map(|&(host, ..)| Family::of(host)).collect(),
        }
    }
}

/// Lists the operations that turn `actual` into `desired`.
pub(crate) fn plan(desired: &UplinkState, actual: &UplinkState) -> Vec<UplinkOp> {
    let Some(wanted) = desired.veth else {
        return actual.veth.map(|_| UplinkOp::Delete).into_iter().collect();
    };
    let mut ops = Vec::new();
    if actual.veth.is_none() {
        ops.push(UplinkOp::Create { mtu: wanted.host.mtu });
    }
    let ends = [
        (Side::Host, wanted.host, actual.veth.map(|veth| veth.host)),
        (Side::Network, wanted.network, actual.veth.map(|veth| veth.network)),
    ];
    for (side, wanted, found) in ends {
        if found != Some(wanted) {
            ops.push(UplinkOp::Configure { side, mtu: wanted.mtu });
        }
    }
    let sides = [
        (Side::Host, &desired.host_addresses, &actual.host_addresses),
        (Side::Network, &desired.network_addresses, &actual.network_addresses),
    ];
    for (side, wanted, found) in sides {
        ops.extend(wanted.difference(found).map(|&prefix| UplinkOp::AddAddress(side, prefix)));
    }
    // There is no way back: it lasts as long as the link, and takes nothing in without a rule that
    // translates.
    let admit = desired.loopback.difference(&actual.loopback).copied();
    ops.extend(admit.map(UplinkOp::AdmitLoopback));
    // The old default route of a family goes when the new one replaces it.
    let add = desired.gateways.difference(&actual.gateways).copied();
    ops.extend(add.map(UplinkOp::AddGateway));
    let replaced = |ip: &IpAddr| desired.gateways.iter().any(|new| new.is_ipv4() == ip.is_ipv4());
    let stale = actual.gateways.difference(&desired.gateways).filter(|ip| !replaced(ip));
    ops.extend(stale.copied().map(UplinkOp::RemoveGateway));
    for (side, wanted, found) in sides {
        ops.extend(found.difference(wanted).map(|&prefix| UplinkOp::RemoveAddress(side, prefix)));
    }
    ops
}

/// The uplink's name in the host's namespace.
pub(crate) fn host_name(network: NetworkId) -> String {
    format!("{HOST_PREFIX}{}", network.short())
}

/// The uplink of one network, seen from both ends.
pub(crate) struct KernelUplink<'a> {
    pub(crate) network: NetworkId,
    pub(crate) namespace: &'a Namespace,
    pub(crate) host_namespace: &'a Namespace,
    pub(crate) inside: &'a mut Netlink,
    pub(crate) host: &'a mut Netlink,
}

impl KernelTable for KernelUplink<'_> {
    const TABLE: Table = Table::Uplink;
    type State = UplinkState;
    type Op = UplinkOp;

    fn read(&mut self) -> Result<UplinkState, KernelError> {
        let host = self.host.links()?.remove(&host_name(self.network));
        let inside = self.inside.links()?.remove(UPLINK);
        let (Some(host), Some(inside)) = (host, inside) else {
            return Ok(UplinkState::default());
        };
        let gateways = self.inside.default_routes()?.into_iter();
        let admits4 = self.admits_ipv4_loopback()?;
        let admits6 = self.host.has_loopback_route(host.index)?;
        Ok(UplinkState {
            veth: Some(Veth { host: end(&host), network: end(&inside) }),
            host_addresses: considered(self.host.addresses(host.index)?),
            network_addresses: considered(self.inside.addresses(inside.index)?),
            gateways: gateways.filter(|(_, by)| *by == inside.index).map(|(ip, _)| ip).collect(),
            loopback: [(Family::V4, admits4), (Family::V6, admits6)]
                .into_iter()
                .filter_map(|(family, admits)| admits.then_some(family))
                .collect(),
        })
    }

    fn apply(&mut self, ops: &[UplinkOp]) -> Vec<Result<(), KernelError>> {
        let apply = |op: &UplinkOp| match op {
            UplinkOp::AdmitLoopback(Family::V4) => self.admit_ipv4_loopback(),
            op => self.apply_one(op).map_err(KernelError::from),
        };
        ops.iter().map(apply).collect()
    }
}

impl KernelUplink<'_> {
    /// As the source of what the host sends and the destination of the answers. Rules of ours drop
    /// what comes from the network itself.
    fn admit_ipv4_loopback(&self) -> Result<(), KernelError> {
        let path = self.route_localnet();
        self.host_namespace
            .run(|| fs::write(&path, "1").map_err(|source| KernelError::Sysctl { path, source }))
    }

    fn admits_ipv4_loopback(&self) -> Result<bool, KernelError> {
        let path = self.route_localnet();
        self.host_namespace.run(|| match fs::read_to_string(&path) {
            Ok(value) => Ok(value.trim() == "1"),
            Err(source) => Err(KernelError::Sysctl { path, source }),
        })
    }

    fn route_localnet(&self) -> String {
        format!("/proc/sys/net/ipv4/conf/{}/route_localnet", host_name(self.network))
    }

    fn apply_one(&mut self, op: &UplinkOp) -> Result<(), NetlinkError> {
        match *op {
            UplinkOp::Create { mtu } => self.create(mtu),
            UplinkOp::AdmitLoopback(_) => {
                let index = self.host.index(&host_name(self.network))?;
                self.host.add_loopback_route(index)
            }
            UplinkOp::Configure { side, mtu } => {
                let attributes = vec![LinkAttribute::Mtu(mtu), link::no_address_generation()];
                let (netlink, name) = self.end(side);
                netlink.change_link(&name, attributes)?;
                netlink.set_up(&name)
            }
            UplinkOp::Delete => {
                let (netlink, name) = self.end(Side::Host);
                netlink.delete_link(&name)
            }
            UplinkOp::AddAddress(side, prefix) => {
                let (netlink, name) = self.end(side);
                let index = netlink.index(&name)?;
                netlink.add_address(index, prefix)
            }
            UplinkOp::RemoveAddress(side, prefix) => {
                let (netlink, name) = self.end(side);
                let index = netlink.index(&name)?;
                netlink.delete_address(index, prefix)
            }
            UplinkOp::AddGateway(ip) => {
                let index = self.inside.index(UPLINK)?;
                self.inside.add_default_route(index, ip, true)
            }
            UplinkOp::RemoveGateway(ip) => {
                let index = self.inside.index(UPLINK)?;
                self.inside.delete_default_route(index, ip)
            }
        }
    }

    fn create(&mut self, mtu: u32) -> Result<(), NetlinkError> {
        let name = host_name(self.network);
        // Half a pair is a predecessor's with another inner name: nothing else bears our prefix.
        self.host.delete_link(&name)?;
        self.inside.delete_link(UPLINK)?;
        let mut peer = link::named(UPLINK);
        peer.attributes.push(LinkAttribute::Mtu(mtu));
        peer.attributes.push(LinkAttribute::NetNsFd(self.namespace.file().as_raw_fd()));
        let mut message = link::veth(&name, peer);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.host.create_link(message)
    }

    fn end(&mut self, side: Side) -> (&mut Netlink, String) {
        match side {
            Side::Host => (self.host, host_name(self.network)),
            Side::Network => (self.inside, UPLINK.to_owned()),
        }
    }
}

fn end(link: &Link) -> End {
    End { mtu: link.mtu, up: link.up }
}

/// Without the kernel's own fe80:: addresses.
fn considered(prefixes: Vec<Prefix>) -> BTreeSet<Prefix> {
    let own = |prefix: &Prefix| match prefix.ip {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => {
            !ip.is_unicast_link_local() || ip == HOST_LINK_LOCAL || ip == NETWORK_LINK_LOCAL
        }
    };
    prefixes.into_iter().filter(own).collect()
}

/// What each end asks for the other one's MAC from, when it forwards: the kernel uses no other
/// address for that (RFC 4861 §7.2.2).
const HOST_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 1);
const NETWORK_LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 2);

impl fmt::Display for UplinkOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { mtu } => {
                write!(f, "add {HOST_PREFIX}… mtu {mtu} type veth peer {UPLINK}")
            }
            Self::Configure { side, mtu } => write!(f, "set {side} mtu {mtu} up"),
            Self::Delete => write!(f, "del {UPLINK}"),
            Self::AddAddress(side, prefix) => write!(f, "addr add {prefix} dev {side}"),
            Self::RemoveAddress(side, prefix) => write!(f, "addr del {prefix} dev {side}"),
            Self::AddGateway(ip) => write!(f, "route replace default via {ip} dev {UPLINK}"),
            Self::AdmitLoopback(Family::V4) => {
                write!(f, "net/ipv4/conf/{HOST_PREFIX}…/route_localnet=1")
            }
            Self::AdmitLoopback(Family::V6) => {
                write!(f, "route add local ::1 dev {HOST_PREFIX}… table local")
            }
            Self::RemoveGateway(ip) => write!(f, "route del default via {ip} dev {UPLINK}"),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "wfu…",
            Self::Network => UPLINK,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn end(mtu: u32, up: bool) -> End {
        End { mtu, up }
    }

    fn any_uplink() -> impl Strategy<Value = UplinkState> {
        let prefix = (0..4u8).prop_map(|n| Prefix { ip: [169, 254, 192, n].into(), len: 31 });
        let prefixes = prop::collection::btree_set(prefix, 0..3);
        let family = prop_oneof![Just(Family::V4), Just(Family::V6)];
        let loopback = prop::collection::btree_set(family, 0..3);
        let gateway = prop::option::of((0..4u8).prop_map(|n| IpAddr::from([169, 254, 192, n])));
        (any::<(bool, bool)>(), 1400..1402u32, prefixes.clone(), prefixes, gateway, loopback)
            .prop_map(|((there, up), mtu, host_addresses, network_addresses, gateway, loopback)| {
                match there {
                    false => UplinkState::default(),
                    true => UplinkState {
                        veth: Some(Veth { host: end(mtu, up), network: end(mtu, true) }),
                        host_addresses,
                        network_addresses,
                        gateways: gateway.into_iter().collect(),
                        loopback,
                    },
                }
            })
    }

    fn apply(state: &mut UplinkState, op: UplinkOp) {
        let side =
            |state: &mut UplinkState, side: Side, op: &dyn Fn(&mut BTreeSet<Prefix>)| match side {
                Side::Host => op(&mut state.host_addresses),
                Side::Network => op(&mut state.network_addresses),
            };
        match op {
            UplinkOp::Create { mtu } => {
                assert_eq!(*state, UplinkState::default(), "made twice");
                state.veth = Some(Veth { host: end(mtu, false), network: end(mtu, false) });
            }
            UplinkOp::Configure { side, mtu } => {
                let veth = state.veth.as_mut().unwrap();
                match side {
                    Side::Host => veth.host = end(mtu, true),
                    Side::Network => veth.network = end(mtu, true),
                }
            }
            UplinkOp::Delete => *state = UplinkState::default(),
            UplinkOp::AddAddress(at, prefix) => side(state, at, &|all| {
                all.insert(prefix);
            }),
            UplinkOp::RemoveAddress(at, prefix) => side(state, at, &|all| {
                all.remove(&prefix);
            }),
            UplinkOp::AddGateway(ip) => {
                state.gateways.retain(|other| other.is_ipv4() != ip.is_ipv4());
                state.gateways.insert(ip);
            }
            UplinkOp::RemoveGateway(ip) => drop(state.gateways.remove(&ip)),
            UplinkOp::AdmitLoopback(family) => drop(state.loopback.insert(family)),
        }
    }

    proptest! {
        #[test]
        fn any_uplink_converges_in_one_pass(desired in any_uplink(), actual in any_uplink()) {
            let mut desired = desired;
            if let Some(veth) = &mut desired.veth {
                veth.host.up = true;
                // For as long as the link.
                desired.loopback.extend(&actual.loopback);
            }
            let mut kernel = actual;
            for op in plan(&desired, &kernel.clone()) {
                apply(&mut kernel, op);
            }
            prop_assert_eq!(&kernel, &desired);
            prop_assert!(plan(&desired, &kernel).is_empty());
        }
    }
}
