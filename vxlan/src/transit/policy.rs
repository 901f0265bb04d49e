//! Which packets go to a router: a rule, a route and a neighbour entry for each family.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use weft_model::Family;

use super::{ANY_ROUTER, ROUTER_BIT};
use crate::{
    Table,
    bridge::BRIDGE,
    link,
    netlink::{Netlink, NetlinkError, ignore_existing, ignore_missing},
    table::{KernelError, KernelTable},
};

/// What leads marked packets to the routers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Policy(BTreeSet<Item>);

/// One piece of it; they build on each other in this order.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Item {
    /// The routers' common place is at a MAC.
    Neighbour(Family),
    /// All of a table goes there.
    Route(Family),
    /// Marked packets use the table.
    Rule(Family),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PolicyOp {
    Add(Item),
    Remove(Item),
}

impl Policy {
    pub(crate) fn of(families: &BTreeSet<Family>) -> Self {
        let items =
            |&family: &Family| [Item::Neighbour(family), Item::Route(family), Item::Rule(family)];
        Self(families.iter().flat_map(items).collect())
    }
}

/// Lists the operations that turn `actual` into `desired`: no packet is led to what is not there.
pub(crate) fn plan(desired: &Policy, actual: &Policy) -> Vec<PolicyOp> {
    let add = desired.0.difference(&actual.0).copied().map(PolicyOp::Add);
    let stale = actual.0.iter().rev().filter(|item| !desired.0.contains(item));
    add.chain(stale.copied().map(PolicyOp::Remove)).collect()
}

/// The policy routing of a network's namespace.
pub(crate) struct KernelPolicy<'a>(pub(crate) &'a mut Netlink);

impl KernelTable for KernelPolicy<'_> {
    const TABLE: Table = Table::Transit;
    type State = Policy;
    type Op = PolicyOp;

    fn read(&mut self) -> Result<Policy, KernelError> {
        let bridge = self.0.index(BRIDGE)?;
        let mut found = BTreeSet::new();
        for family in [Family::V4, Family::V6] {
            let present = [
                self.has_neighbour(family, bridge)?.then_some(Item::Neighbour(family)),
                self.has_route(family, bridge)?.then_some(Item::Route(family)),
                self.has_rule(family)?.then_some(Item::Rule(family)),
            ];
            found.extend(present.into_iter().flatten());
        }
        Ok(Policy(found))
    }

    fn apply(&mut self, ops: &[PolicyOp]) -> Vec<Result<(), KernelError>> {
        if ops.is_empty() {
            return Vec::new();
        }
        let bridge = match self.0.index(BRIDGE) {
            Ok(index) => index,
            Err(error) => return vec![Err(error.into())],
        };
        ops.iter().map(|op| self.apply_one(op, bridge).map_err(KernelError::from)).collect()
    }
}

impl KernelPolicy<'_> {
    fn has_neighbour(&mut self, family: Family, bridge: u32) -> Result<bool, NetlinkError> {
        let mut all = NeighbourMessage::default();
        all.header.family = link::family(place(family));
        let entries = self.0.dump(&RouteNetlinkMessage::GetNeighbour(all))?;
        let wanted = neighbour(family, bridge);
        Ok(entries.into_iter().any(|message| match message {
            RouteNetlinkMessage::NewNeighbour(entry) => {
                entry.header.ifindex == bridge
                    && entry.header.state == NeighbourState::Permanent
                    && wanted.attributes.iter().all(|wanted| entry.attributes.contains(wanted))
            }
            _ => false,
        }))
    }

    fn has_route(&mut self, family: Family, bridge: u32) -> Result<bool, NetlinkError> {
        let mut all = RouteMessage::default();
        all.header.address_family = link::family(place(family));
        let routes = self.0.dump(&RouteNetlinkMessage::GetRoute(all))?;
        Ok(routes.into_iter().any(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => {
                route.header.table == TABLE
                    && route.header.destination_prefix_length == 0
                    && link::gateway(&route) == Some(place(family))
                    && link::out_interface(&route) == Some(bridge)
            }
            _ => false,
        }))
    }

    fn has_rule(&mut self, family: Family) -> Result<bool, NetlinkError> {
        let mut all = RuleMessage::default();
        all.header.family = link::family(place(family));
        let rules = self.0.dump(&RouteNetlinkMessage::GetRule(all))?;
        let wanted = rule(family);
        Ok(rules.into_iter().any(|message| match message {
            RouteNetlinkMessage::NewRule(found) => {
                found.header.table == TABLE
                    && found.header.action == RuleAction::ToTable
                    && wanted.attributes.iter().all(|wanted| found.attributes.contains(wanted))
            }
            _ => false,
        }))
    }

    fn apply_one(&mut self, op: &PolicyOp, bridge: u32) -> Result<(), NetlinkError> {
        use RouteNetlinkMessage as Message;
        let new = NLM_F_CREATE | NLM_F_EXCL;
        let replace = NLM_F_CREATE | NLM_F_REPLACE;
        match *op {
            PolicyOp::Add(Item::Neighbour(family)) => {
                self.0.request(Message::NewNeighbour(neighbour(family, bridge)), replace)
            }
            PolicyOp::Add(Item::Route(family)) => {
                self.0.request(Message::NewRoute(route(family, bridge)), replace)
            }
            PolicyOp::Add(Item::Rule(family)) => {
                ignore_existing(self.0.request(Message::NewRule(rule(family)), new))
            }
            PolicyOp::Remove(Item::Neighbour(family)) => {
                ignore_missing(self.0.request(Message::DelNeighbour(neighbour(family, bridge)), 0))
            }
            PolicyOp::Remove(Item::Route(family)) => {
                ignore_missing(self.0.request(Message::DelRoute(route(family, bridge)), 0))
            }
            PolicyOp::Remove(Item::Rule(family)) => {
                ignore_missing(self.0.request(Message::DelRule(rule(family)), 0))
            }
        }
    }
}

/// Where all routers seem to be: on the link, and nobody's address.
fn place(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(169, 254, 0, 1)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2)),
    }
}

fn neighbour(family: Family, bridge: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = link::family(place(family));
    message.header.ifindex = bridge;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::from(place(family))),
        NeighbourAttribute::LinkLayerAddress(ANY_ROUTER.octets().to_vec()),
    ];
    message
}

fn route(family: Family, bridge: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = link::family(place(family));
    message.header.table = TABLE;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    // No address of the bridge's need be in the same subnet.
    message.header.flags = RouteFlags::Onlink;
    let gateway = match place(family) {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    message.attributes = vec![RouteAttribute::Gateway(gateway), RouteAttribute::Oif(bridge)];
    message
}

fn rule(family: Family) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    message.header.table = TABLE;
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(ROUTER_BIT),
        RuleAttribute::FwMask(ROUTER_BIT),
    ];
    message
}

impl fmt::Display for PolicyOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, item) = match self {
            Self::Add(item) => ("add", item),
            Self::Remove(item) => ("del", item),
        };
        match *item {
            Item::Neighbour(family) => {
                write!(f, "neigh {verb} {} lladdr {ANY_ROUTER} dev {BRIDGE}", place(family))
            }
            Item::Route(family) => {
                let place = place(family);
                write!(f, "route {verb} default via {place} dev {BRIDGE} onlink table {TABLE}")
            }
            Item::Rule(family) => write!(
                f,
                "{family} rule {verb} priority {PRIORITY} fwmark {ROUTER_BIT:#x}/{ROUTER_BIT:#x} \
                 lookup {TABLE}"
            ),
        }
    }
}

/// The namespace is ours alone: nothing else in it has rules or tables.
const TABLE: u8 = 100;
const PRIORITY: u32 = 100;
const _: () = assert!(TABLE < RouteHeader::RT_TABLE_MAIN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_led_to_a_router_once_there_is_a_way() {
        let both = Policy::of(&[Family::V4, Family::V6].into());
        let one = Policy::of(&[Family::V4].into());
        let print =
            |ops: Vec<PolicyOp>| ops.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
        insta::assert_snapshot!(print(plan(&one, &Policy::default())), @"
        neigh add 169.254.0.1 lladdr 0e:57:00:00:00:00 dev br0
        route add default via 169.254.0.1 dev br0 onlink table 100
        IPv4 rule add priority 100 fwmark 0x40000000/0x40000000 lookup 100
        ");
        insta::assert_snapshot!(print(plan(&one, &both)), @"
        IPv6 rule del priority 100 fwmark 0x40000000/0x40000000 lookup 100
        route del default via fe80::2 dev br0 onlink table 100
        neigh del fe80::2 lladdr 0e:57:00:00:00:00 dev br0
        ");
        assert!(plan(&both, &both).is_empty());
    }
}
