//! The ways between the routers of a network's hosts, by which clients from outside that came in by
//! one host reach a station of another, and the answers come back without source translation.
//!
//! ```text
//!   client ── host A ── up0 │ br0 ─ vx0 ┄┄┄┄┄┄┄┄ vx0 ─ br0 ─ station
//!                           A's namespace        B's namespace
//!
//!   A → B: the frame is for the station, but its source is A's router
//!          B lifts it: it goes up to B's gateway, which notes A's router in the connection's mark
//!          and forwards it
//!   B → A: the station's answer goes to B's gateway; the connection's mark leads it to A's router
//!          A lifts it: A's gateway knows the connection, and sends it out by up0
//! ```
//!
//! So a host that is new, or gone, changes one element of two maps, and a station none at all.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use weft_model::{Family, MacAddr};

use crate::OverlayNetwork;

mod policy;
mod rules;

pub(crate) use policy::{KernelPolicy, Policy, plan as plan_policy};
pub(crate) use rules::{KernelRouters, Memory, Routers, plan as plan_routers};

/// What a network's namespace has of the transit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Ways {
    pub(crate) policy: Policy,
    pub(crate) routers: Routers,
}

impl Ways {
    /// Those of `network`; none if it has no transit, or nothing that would carry it.
    pub(crate) fn of(network: &OverlayNetwork, pools: &[IpNet]) -> Option<Self> {
        let (transit, carrier) = network.transit.as_ref().zip(network.transport.device())?;
        let router = |node| MacAddr::for_router(network.id, node);
        let families: BTreeSet<_> =
            network.gateways.iter().map(|prefix| Family::of(prefix.ip)).collect();
        Some(Self {
            policy: Policy::of(&families),
            routers: Routers {
                gateway: network.gateway_mac,
                own: router(transit.own),
                carrier,
                sources: sources(&transit.addresses, pools),
                macs: transit.routers.keys().copied().map(router).collect(),
            },
        })
    }
}

/// Which addresses of uplinks become which of the host's.
fn sources(addresses: &BTreeSet<IpAddr>, pools: &[IpNet]) -> Vec<(IpNet, IpAddr)> {
    let of = |pool: &IpNet| {
        addresses.iter().copied().find(|ip| ip.is_ipv4() == matches!(pool, IpNet::V4(_)))
    };
    pools.iter().filter_map(|pool| Some((*pool, of(pool)?))).collect()
}

/// The MAC of the next hop of what is for a router: which one, the bridge's rules know by the mark.
/// No router has it.
pub(crate) const ANY_ROUTER: MacAddr = MacAddr::PLACE_OF_ROUTERS;

/// The bit that the marks of routers have; [`MacAddr::router_mark`].
const ROUTER_BIT: u32 = 0x4000_0000;
/// The mark of what came in by the uplink.
const FROM_OUTSIDE: u32 = 1;
