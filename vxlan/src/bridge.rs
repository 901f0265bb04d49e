use netlink_packet_route::link::{InfoBridge, LinkAttribute};
use weft_model::{MacAddr, NetworkId};

use crate::{
    OverlayNetwork, Transport,
    link::{self, Link},
    netlink::{Netlink, NetlinkError},
};

/// The bridge's name in every network's namespace.
pub(crate) const BRIDGE: &str = "br0";

/// The bridge of a network, which is its gateway, too.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Bridge {
    pub(crate) settings: BridgeSettings,
    pub(crate) up: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct BridgeSettings {
    /// Pinned: a bridge that borrows its ports' MACs forgets all neighbours when it changes.
    pub(crate) mac: Option<MacAddr>,
    pub(crate) mtu: u32,
    /// Tells a later agent which network the namespace belongs to.
    pub(crate) mark: Option<String>,
    pub(crate) snooping: bool,
    pub(crate) address_generation: bool,
}

impl Bridge {
    /// The bridge of `network`.
    pub(crate) fn of(network: &OverlayNetwork) -> Self {
        Self {
            settings: BridgeSettings {
                mac: Some(network.gateway_mac),
                mtu: network.mtu.into(),
                mark: Some(mark(network)),
                snooping: network.multicast,
                address_generation: false,
            },
            up: true,
        }
    }

    pub(crate) fn read(link: &Link) -> Self {
        let snooping = link.bridge.iter().find_map(|setting| match setting {
            InfoBridge::MulticastSnooping(on) => Some(*on),
            _ => None,
        });
        Self {
            settings: BridgeSettings {
                mac: <[u8; 6]>::try_from(link.mac.as_slice())
                    .ok()
                    .and_then(|mac| MacAddr::try_from(mac).ok()),
                mtu: link.mtu,
                mark: link.alias.clone(),
                // A kernel without snooping does not report it, and does not do it.
                snooping: snooping.unwrap_or(false),
                address_generation: link.generates_addresses(),
            },
            up: link.up,
        }
    }
}

impl BridgeSettings {
    pub(crate) fn create(&self, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        let mut message = link::bridge(BRIDGE, Vec::new());
        message.attributes.extend(self.mac.map(mac_attribute));
        netlink.create_link(message)
    }

    pub(crate) fn configure(&self, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        let mut attributes = vec![LinkAttribute::Mtu(self.mtu), link::no_address_generation()];
        attributes.extend(self.mac.map(mac_attribute));
        attributes.extend(self.mark.clone().map(LinkAttribute::IfAlias));
        netlink.change_link(BRIDGE, attributes)?;
        let data = vec![InfoBridge::MulticastSnooping(self.snooping)];
        netlink.change_link(BRIDGE, link::bridge(BRIDGE, data).attributes)
    }
}

/// The network that a bridge's mark names.
pub(crate) fn marked_network(alias: &str) -> Option<NetworkId> {
    alias.strip_prefix(MARK)?.split(' ').next()?.parse().ok()
}

/// Whether a bridge's mark says that the network's ports are macvlan interfaces.
pub(crate) fn is_macvlan(alias: &str) -> bool {
    marked_network(alias).is_some() && alias.ends_with(MACVLAN)
}

fn mark(network: &OverlayNetwork) -> String {
    let kind = match network.transport {
        Transport::Macvlan { .. } => MACVLAN,
        Transport::Vxlan { .. } | Transport::Sealed | Transport::Local => "",
    };
    format!("{MARK}{}{kind}", network.id)
}

fn mac_attribute(mac: MacAddr) -> LinkAttribute {
    LinkAttribute::Address(mac.octets().to_vec())
}

const MARK: &str = "weft network ";
const MACVLAN: &str = " macvlan";
