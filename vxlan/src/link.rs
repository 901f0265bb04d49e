//! Links as the reconcilers see them, and the messages that change them.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv6Addr},
    os::fd::AsRawFd,
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope, CacheInfo,
    },
    link::{
        AfSpecInet6, AfSpecUnspec, BridgePortState, In6AddrGenMode, InfoBridge, InfoBridgePort,
        InfoData, InfoKind, InfoMacVlan, InfoPortData, InfoPortKind, InfoTun, InfoVeth, InfoVlan,
        InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, MacVlanMode,
    },
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use nix::errno::Errno;
use weft_model::MacvlanMode;

use crate::{
    Prefix,
    namespace::Namespace,
    netlink::{Netlink, NetlinkError, ignore_existing, ignore_missing},
};

/// What we look at of a link.
#[derive(Clone, Debug)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) up: bool,
    pub(crate) mtu: u32,
    /// Packets.
    pub(crate) queue_length: u32,
    pub(crate) mac: Vec<u8>,
    pub(crate) alias: Option<String>,
    /// The bridge that it is a port of.
    pub(crate) controller: Option<u32>,
    /// The other end of a veth, by its index in its own namespace.
    pub(crate) peer: Option<u32>,
    /// That namespace's number in this one, if it is another.
    pub(crate) peer_nsid: Option<i32>,
    pub(crate) kind: Option<InfoKind>,
    pub(crate) vxlan: Vec<InfoVxlan>,
    pub(crate) tun: Vec<InfoTun>,
    pub(crate) bridge: Vec<InfoBridge>,
    pub(crate) port: Vec<InfoBridgePort>,
    pub(crate) address_generation: Option<In6AddrGenMode>,
}

impl Link {
    pub(crate) fn read(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            mtu: 0,
            queue_length: 0,
            mac: Vec::new(),
            alias: None,
            controller: None,
            peer: None,
            peer_nsid: None,
            kind: None,
            vxlan: Vec::new(),
            tun: Vec::new(),
            bridge: Vec::new(),
            port: Vec::new(),
            address_generation: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::TxQueueLen(length) => link.queue_length = length,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::Link(index) => link.peer = Some(index),
                LinkAttribute::LinkNetNsId(nsid) => link.peer_nsid = Some(nsid),
                LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|i| link.learn(i)),
                LinkAttribute::AfSpecUnspec(families) => {
                    link.address_generation = families.iter().find_map(address_generation);
                }
                _ => {}
            }
        }
        link
    }

    /// Whether its bridge forwards what it sends.
    pub(crate) fn forwards(&self) -> bool {
        let forwarding = InfoBridgePort::State(BridgePortState::Forwarding);
        self.controller.is_some() && self.port.contains(&forwarding)
    }

    /// Whether the kernel gives it a link-local address.
    pub(crate) fn generates_addresses(&self) -> bool {
        // Absent where IPv6 is off.
        self.address_generation.is_some_and(|mode| mode != In6AddrGenMode::None)
    }

    fn learn(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(kind) => self.kind = Some(kind),
            LinkInfo::Data(InfoData::Vxlan(data)) => self.vxlan = data,
            LinkInfo::Data(InfoData::Tun(data)) => self.tun = data,
            LinkInfo::Data(InfoData::Bridge(data)) => self.bridge = data,
            LinkInfo::PortData(InfoPortData::BridgePort(data)) => self.port = data,
            _ => {}
        }
    }
}

/// A link named by a message: the kernel looks it up by name when the index is zero.
pub(crate) fn named(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
}

/// A new bridge.
pub(crate) fn bridge(name: &str, data: Vec<InfoBridge>) -> LinkMessage {
    of_kind(name, InfoKind::Bridge, InfoData::Bridge(data))
}

/// A new VXLAN device, born in `namespace` while its socket stays where the message is sent.
pub(crate) fn vxlan(name: &str, namespace: &Namespace, data: Vec<InfoVxlan>) -> LinkMessage {
    let mut message = of_kind(name, InfoKind::Vxlan, InfoData::Vxlan(data));
    message.attributes.push(LinkAttribute::NetNsFd(namespace.file().as_raw_fd()));
    message
}

/// A new veth whose other end is `peer`.
pub(crate) fn veth(name: &str, peer: LinkMessage) -> LinkMessage {
    of_kind(name, InfoKind::Veth, InfoData::Veth(InfoVeth::Peer(peer)))
}

/// A new macvlan interface of the link with index `parent`, born in `namespace` while its parent is
/// where the message is sent.
pub(crate) fn macvlan(
    name: &str,
    parent: u32,
    mode: MacvlanMode,
    namespace: &Namespace,
) -> LinkMessage {
    let mode = match mode {
        MacvlanMode::Bridge => MacVlanMode::Bridge,
        MacvlanMode::Private => MacVlanMode::Private,
        MacvlanMode::Vepa => MacVlanMode::Vepa,
        MacvlanMode::Passthru => MacVlanMode::Passthrough,
    };
    let data = InfoData::MacVlan(vec![InfoMacVlan::Mode(mode)]);
    let mut message = of_kind(name, InfoKind::MacVlan, data);
    message.attributes.push(LinkAttribute::Link(parent));
    message.attributes.push(LinkAttribute::NetNsFd(namespace.file().as_raw_fd()));
    message
}

/// A new VLAN of the link with index `lower`, as iproute2 makes it (`ip link add link eth0 name
/// eth0.50 type vlan id 50`): of 802.1Q, by the kernel's default (`vlan_newlink()`).
pub(crate) fn vlan(name: &str, lower: u32, id: u16) -> LinkMessage {
    let mut message = of_kind(name, InfoKind::Vlan, InfoData::Vlan(vec![InfoVlan::Id(id)]));
    message.attributes.push(LinkAttribute::Link(lower));
    message
}

fn of_kind(name: &str, kind: InfoKind, data: InfoData) -> LinkMessage {
    let mut message = named(name);
    let info = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
    message.attributes.push(LinkAttribute::LinkInfo(info));
    message
}

/// No link-local address of the kernel's making.
pub(crate) fn no_address_generation() -> LinkAttribute {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])
}

/// Settings of a bridge's port.
pub(crate) fn port_settings(data: Vec<InfoBridgePort>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(data)),
    ])
}

impl Namespace {
    /// Takes the loopback interface up, which in a new namespace is down.
    ///
    /// # Errors
    ///
    /// The namespace cannot be entered (`CAP_NET_ADMIN` is missing).
    pub fn take_up_loopback(&self) -> Result<(), NetlinkError> {
        Netlink::open(self)?.set_up("lo")
    }
}

impl Netlink {
    /// All links of the namespace by name.
    pub(crate) fn links(&mut self) -> Result<BTreeMap<String, Link>, NetlinkError> {
        self.links_of(LinkMessage::default())
    }

    pub(crate) fn links_of(
        &mut self,
        all: LinkMessage,
    ) -> Result<BTreeMap<String, Link>, NetlinkError> {
        let links = self.dump(&RouteNetlinkMessage::GetLink(all))?;
        let links = links.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(message) => Some(Link::read(message)),
            _ => None,
        });
        Ok(links.map(|link| (link.name.clone(), link)).collect())
    }

    /// One link.
    pub(crate) fn link(&mut self, name: &str) -> Result<Link, NetlinkError> {
        match self.get(RouteNetlinkMessage::GetLink(named(name))) {
            Ok(RouteNetlinkMessage::NewLink(message)) => Ok(Link::read(message)),
            Err(error) if error.errno() != Some(Errno::ENODEV) => Err(error),
            _ => Err(NetlinkError::NoInterface { name: name.to_owned() }),
        }
    }

    pub(crate) fn index(&mut self, name: &str) -> Result<u32, NetlinkError> {
        Ok(self.link(name)?.index)
    }

    /// Creates a link. One of that name already there is an error: the caller planned without it.
    pub(crate) fn create_link(&mut self, message: LinkMessage) -> Result<(), NetlinkError> {
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Changes the link called `name`.
    pub(crate) fn change_link(
        &mut self,
        name: &str,
        attributes: Vec<LinkAttribute>,
    ) -> Result<(), NetlinkError> {
        let mut message = named(name);
        message.attributes.extend(attributes);
        self.request(RouteNetlinkMessage::NewLink(message), 0)
    }

    /// Changes the link with `index`.
    pub(crate) fn change_link_at(
        &mut self,
        index: u32,
        attributes: Vec<LinkAttribute>,
    ) -> Result<(), NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        self.request(RouteNetlinkMessage::NewLink(message), 0)
    }

    pub(crate) fn set_up(&mut self, name: &str) -> Result<(), NetlinkError> {
        let mut message = named(name);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::NewLink(message), 0)
    }

    /// Deletes the link called `name`. Succeeds if it has gone already.
    pub(crate) fn delete_link(&mut self, name: &str) -> Result<(), NetlinkError> {
        ignore_missing(self.request(RouteNetlinkMessage::DelLink(named(name)), 0))
    }

    /// The addresses of the link with `index`.
    pub(crate) fn addresses(&mut self, index: u32) -> Result<Vec<Prefix>, NetlinkError> {
        let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let addresses = self.dump(&all)?.into_iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(message) if message.header.index == index => {
                prefix(&message)
            }
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// Adds an address without duplicate detection: uniqueness is settled before, and the
    /// detection would keep the address unusable for a second. Succeeds if it is there already.
    pub(crate) fn add_address(&mut self, index: u32, prefix: Prefix) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::NewAddress(address(index, prefix));
        ignore_existing(self.request(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// As [`add_address`](Self::add_address), but an address that nothing of ours sends from: its
    /// preferred lifetime is over (RFC 6724 §5, rule 3).
    pub(crate) fn add_virtual_address(
        &mut self,
        index: u32,
        prefix: Prefix,
    ) -> Result<(), NetlinkError> {
        let mut message = address(index, prefix);
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = FOREVER;
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
        let message = RouteNetlinkMessage::NewAddress(message);
        ignore_existing(self.request(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// Removes an address. Succeeds if it has gone already.
    pub(crate) fn delete_address(
        &mut self,
        index: u32,
        prefix: Prefix,
    ) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelAddress(address(index, prefix));
        ignore_missing(self.request(message, 0))
    }

    /// The gateways of the main table's default routes and the links they leave by.
    pub(crate) fn default_routes(&mut self) -> Result<Vec<(IpAddr, u32)>, NetlinkError> {
        let routes = self.routes()?.into_iter().filter_map(|route| {
            (route.header.destination_prefix_length == 0)
                .then(|| Some((gateway(&route)?, out_interface(&route)?)))
                .flatten()
        });
        Ok(routes.collect())
    }

    /// Whether packets to `ip` are taken in.
    pub(crate) fn takes_in(&mut self, ip: IpAddr) -> Result<bool, NetlinkError> {
        let mut all = RouteMessage::default();
        all.header.address_family = family(ip);
        let routes = self.dump(&RouteNetlinkMessage::GetRoute(all))?;
        Ok(routes.iter().any(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => {
                route.header.kind == RouteType::Local && destination(route) == Some(ip)
            }
            _ => false,
        }))
    }

    /// The main table's unicast routes of both families.
    pub(crate) fn routes(&mut self) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut all = RouteMessage::default();
            all.header.address_family = family;
            let routes = self.dump(&RouteNetlinkMessage::GetRoute(all))?;
            found.extend(routes.into_iter().filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(route)
                    if route.header.table == RouteHeader::RT_TABLE_MAIN
                        && route.header.kind == RouteType::Unicast =>
                {
                    Some(route)
                }
                _ => None,
            }));
        }
        Ok(found)
    }

    /// Whether `::1` may be the destination of what comes in by the link with `index`.
    pub(crate) fn has_loopback_route(&mut self, index: u32) -> Result<bool, NetlinkError> {
        let mut all = RouteMessage::default();
        all.header.address_family = AddressFamily::Inet6;
        let routes = self.dump(&RouteNetlinkMessage::GetRoute(all))?;
        let wanted = IpAddr::V6(Ipv6Addr::LOCALHOST);
        Ok(routes.iter().any(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => {
                route.header.kind == RouteType::Local
                    && destination(route) == Some(wanted)
                    && out_interface(route) == Some(index)
            }
            _ => false,
        }))
    }

    /// Lets `::1` be the destination of what comes in by the link with `index`: for IPv6 it is bound
    /// to the link that a route names. The kernel drops packets that come with it; only what is
    /// translated to it afterwards gets so far. Succeeds if it is there already.
    pub(crate) fn add_loopback_route(&mut self, index: u32) -> Result<(), NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet6;
        message.header.destination_prefix_length = 128;
        message.header.table = RT_TABLE_LOCAL;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Local;
        message.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet6(Ipv6Addr::LOCALHOST)),
            RouteAttribute::Oif(index),
            // The loopback interface's own comes first, for everything else.
            RouteAttribute::Priority(LOOPBACK_METRIC),
        ];
        // Not exclusive: other uplinks have the same.
        ignore_existing(self.request(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE))
    }

    /// Makes `gateway` the default route by the link with `index`, in place of another one if
    /// `replace` is set.
    pub(crate) fn add_default_route(
        &mut self,
        index: u32,
        gateway: IpAddr,
        replace: bool,
    ) -> Result<(), NetlinkError> {
        let mode = if replace { NLM_F_REPLACE } else { NLM_F_EXCL };
        let message = RouteNetlinkMessage::NewRoute(default_route(index, gateway));
        self.request(message, NLM_F_CREATE | mode)
    }

    /// Removes a default route. Succeeds if it has gone already.
    pub(crate) fn delete_default_route(
        &mut self,
        index: u32,
        gateway: IpAddr,
    ) -> Result<(), NetlinkError> {
        let message = RouteNetlinkMessage::DelRoute(default_route(index, gateway));
        ignore_missing(self.request(message, 0))
    }
}

pub(crate) fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(crate) fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        _ => None,
    })
}

pub(crate) fn destination(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    })
}

pub(crate) fn out_interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

pub(crate) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

fn address_generation(family: &AfSpecUnspec) -> Option<In6AddrGenMode> {
    let AfSpecUnspec::Inet6(settings) = family else { return None };
    settings.iter().find_map(|setting| match setting {
        AfSpecInet6::AddrGenMode(mode) => Some(*mode),
        _ => None,
    })
}

fn prefix(message: &AddressMessage) -> Option<Prefix> {
    let len = message.header.prefix_len;
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| {
        message.attributes.iter().find_map(wanted).map(|ip| Prefix { ip, len })
    };
    // On IPv4 `Local` is the address and `Address` may be a peer's; on IPv6 there is no `Local`.
    find(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    })
    .or_else(|| {
        find(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

fn address(index: u32, Prefix { ip, len }: Prefix) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(ip);
    message.header.index = index;
    message.header.prefix_len = len;
    message.header.scope = AddressScope::Universe;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    match ip {
        IpAddr::V4(v4) if len < 31 => {
            let broadcast = u32::from(v4) | u32::MAX.checked_shr(len.into()).unwrap_or(0);
            message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
        }
        IpAddr::V4(_) => {}
        IpAddr::V6(_) => {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
    }
    message
}

/// `include/uapi/linux/rtnetlink.h`.
const RT_TABLE_LOCAL: u8 = 255;
const LOOPBACK_METRIC: u32 = 4096;
/// `INFINITY_LIFE_TIME` of `include/net/addrconf.h`.
const FOREVER: u32 = u32::MAX;

fn default_route(index: u32, gateway: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(gateway);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    let gateway = match gateway {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    };
    message.attributes = vec![RouteAttribute::Gateway(gateway), RouteAttribute::Oif(index)];
    message
}
