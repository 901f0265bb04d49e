//! The parent of networks that have none: one end of a veth in the network's namespace, the other
//! end of which is alone on the network's bridge.
//!
//! Docker makes a dummy interface, which not every kernel has.

use netlink_packet_route::link::LinkAttribute;

use super::ParentLink;
use crate::{
    bridge::BRIDGE,
    link,
    namespace::Namespace,
    netlink::{Netlink, NetlinkError, ignore_existing},
};

/// The end that the sandboxes' interfaces are parts of.
pub(crate) const PARENT: &str = "mv0";
/// The end on the bridge, so that there is a carrier.
const SWITCH_PORT: &str = "mv1";

/// Finds the segment in a network's namespace, or makes it.
pub(crate) fn ensure(namespace: &Namespace, mtu: Option<u16>) -> Result<ParentLink, NetlinkError> {
    let mut netlink = Netlink::open(namespace)?;
    ignore_existing(netlink.create_link(link::veth(PARENT, link::named(SWITCH_PORT))))?;
    let bridge = netlink.index(BRIDGE)?;
    netlink.change_link(SWITCH_PORT, vec![LinkAttribute::Controller(bridge)])?;
    for end in [PARENT, SWITCH_PORT] {
        let mtu = mtu.map(|mtu| LinkAttribute::Mtu(mtu.into()));
        let settings = mtu.into_iter().chain([link::no_address_generation()]);
        netlink.change_link(end, settings.collect())?;
        netlink.set_up(end)?;
    }
    let parent = netlink.link(PARENT)?;
    Ok(ParentLink { netlink, index: parent.index, mtu: parent.mtu })
}
