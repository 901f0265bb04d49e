//! What the host's own network looks like: the ground that the overlay stands on.

use std::{collections::BTreeMap, net::IpAddr};

use ipnet::IpNet;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use weft_model::VtepAddr;

use crate::{
    NetlinkError,
    link::{self, Link},
    namespace::Namespace,
    netlink::Netlink,
    port::EXPOSED_PREFIX,
    uplink::HOST_PREFIX,
};

/// The interface that a VTEP address lives on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Underlay {
    pub ifname: String,
    pub ifindex: u32,
    /// Bytes.
    pub mtu: u32,
    /// The destinations of all routes of the host, default routes left out: subnets that a new
    /// network had better not overlap. Without those to our own networks.
    pub routes: Vec<IpNet>,
}

impl Underlay {
    /// Looks up where `vtep` lives in `host`.
    ///
    /// # Errors
    ///
    /// No interface has the address, or the kernel refuses to tell.
    pub fn of(vtep: VtepAddr, host: &Namespace) -> Result<Self, UnderlayError> {
        let mut netlink = Netlink::open(host)?;
        let links = netlink.links()?;
        for link in links.values() {
            if netlink.addresses(link.index)?.iter().any(|prefix| prefix.ip == vtep.ip()) {
                return Ok(Self {
                    ifname: link.name.clone(),
                    ifindex: link.index,
                    mtu: link.mtu,
                    routes: destinations(&netlink.routes()?, &links),
                });
            }
        }
        Err(UnderlayError::NoSuchAddress { vtep })
    }
}

/// The address to advertise to peers if the operator names none: the one that the default route
/// leaves with, IPv4 before IPv6; else the first global one.
///
/// # Errors
///
/// There is none, or the kernel refuses to tell.
pub fn advertise_address(host: &Namespace) -> Result<VtepAddr, UnderlayError> {
    let mut netlink = Netlink::open(host)?;
    let links = netlink.links()?;
    let mut defaults: Vec<_> = netlink
        .routes()?
        .into_iter()
        .filter(|route| route.header.destination_prefix_length == 0)
        .filter_map(|route| {
            let v6 = link::gateway(&route).is_some_and(|gateway| gateway.is_ipv6());
            Some(((v6, metric(&route)), link::out_interface(&route)?, source(&route)))
        })
        .collect();
    defaults.sort();
    for ((v6, _), index, source) in defaults {
        if let Some(ip) = source {
            return Ok(ip.into());
        }
        let addresses = netlink.addresses(index)?;
        if let Some(prefix) = addresses.iter().find(|p| p.ip.is_ipv6() == v6 && is_global(p.ip)) {
            return Ok(prefix.ip.into());
        }
    }
    for link in links.values().filter(|link| link.up && !is_ours(link)) {
        let mut addresses = netlink.addresses(link.index)?;
        addresses.retain(|prefix| is_global(prefix.ip));
        if let Some(prefix) = addresses.into_iter().min_by_key(|prefix| prefix.ip.is_ipv6()) {
            return Ok(prefix.ip.into());
        }
    }
    Err(UnderlayError::NoAddress)
}

fn destinations(routes: &[RouteMessage], links: &BTreeMap<String, Link>) -> Vec<IpNet> {
    let mut nets: Vec<_> = foreign_routes(routes, links).map(|(net, _)| net).collect();
    nets.sort();
    nets.dedup();
    nets
}

/// Where the host's routes lead, and by which interface; default routes and those to our own
/// networks left out.
pub(crate) fn foreign_routes<'a>(
    routes: &'a [RouteMessage],
    links: &'a BTreeMap<String, Link>,
) -> impl Iterator<Item = (IpNet, Option<&'a Link>)> {
    let by = |index| links.values().find(|link| link.index == index);
    let led = routes.iter().map(move |route| (route, link::out_interface(route).and_then(by)));
    let foreign = led.filter(|(_, by)| !by.is_some_and(is_ours));
    let foreign = foreign.filter_map(|(route, by)| Some((destination(route)?, by)));
    foreign.filter(|(net, _)| net.prefix_len() > 0 && !is_link_local(net.addr()))
}

/// Whether it leads to a network of ours.
fn is_ours(link: &Link) -> bool {
    [HOST_PREFIX, EXPOSED_PREFIX].iter().any(|prefix| link.name.starts_with(prefix))
}

fn destination(route: &RouteMessage) -> Option<IpNet> {
    let ip = link::destination(route)?;
    IpNet::new(ip, route.header.destination_prefix_length).ok()
}

fn source(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) => link::ip(address),
        _ => None,
    })
}

fn metric(route: &RouteMessage) -> u32 {
    let metric = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    metric.unwrap_or_default()
}

fn is_global(ip: IpAddr) -> bool {
    !ip.is_loopback() && !ip.is_unspecified() && !is_link_local(ip)
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_multicast(),
    }
}

/// Why the underlay is not known.
#[derive(Debug, thiserror::Error)]
pub enum UnderlayError {
    #[error("no interface of this host has the address {vtep}: advertise one that it has")]
    NoSuchAddress { vtep: VtepAddr },
    #[error("this host has no address to advertise: give one")]
    NoAddress,
    #[error("failed to look at the host's interfaces")]
    Netlink(#[from] NetlinkError),
}
