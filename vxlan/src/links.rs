use std::{collections::BTreeSet, fmt, net::IpAddr};

use netlink_packet_route::link::{
    In6AddrGenMode, InfoBridge, InfoBridgePort, InfoVxlan, LinkAttribute, VxlanDf,
};
use weft_model::{MacAddr, NetworkId, Vni, VtepAddr};

use crate::{
    OverlayNetwork, Prefix, Table,
    link::{self, Link},
    namespace::Namespace,
    netlink::{Netlink, NetlinkError},
    table::{KernelError, KernelTable},
};

/// The names of the links in every network's namespace.
pub(crate) const BRIDGE: &str = "br0";
pub(crate) const TUNNEL: &str = "vx0";

/// The links that make a namespace a network.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Links {
    pub(crate) loopback_up: bool,
    pub(crate) bridge: Option<Bridge>,
    pub(crate) tunnel: Option<Tunnel>,
    /// The bridge's.
    pub(crate) addresses: BTreeSet<Prefix>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Bridge {
    pub(crate) settings: BridgeSettings,
    pub(crate) up: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct BridgeSettings {
    /// Pinned: a bridge that borrows its ports' MACs forgets all neighbours when it changes.
    mac: Option<MacAddr>,
    mtu: u32,
    /// Tells a later agent which network the namespace belongs to.
    mark: Option<String>,
    snooping: bool,
    address_generation: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Tunnel {
    pub(crate) identity: TunnelIdentity,
    pub(crate) settings: TunnelSettings,
    pub(crate) up: bool,
}

/// What cannot be changed once the device is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TunnelIdentity {
    vni: Option<Vni>,
    local: Option<VtepAddr>,
    port: u16,
    proxy: bool,
    learning: bool,
    l2miss: bool,
    l3miss: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TunnelSettings {
    mtu: u32,
    bridged: bool,
    port_learning: bool,
    /// Whether frames to unknown stations reach the device, which drops them unless it has a
    /// flood list.
    port_flood: bool,
    address_generation: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum LinkOp {
    Up(&'static str),
    CreateBridge(BridgeSettings),
    ConfigureBridge(BridgeSettings),
    CreateTunnel(TunnelIdentity),
    ConfigureTunnel(TunnelSettings),
    DeleteTunnel,
    AddAddress(Prefix),
    RemoveAddress(Prefix),
}

impl Links {
    /// The links that carry `network`.
    pub(crate) fn of(network: &OverlayNetwork) -> Self {
        let mtu = u32::from(network.mtu);
        Self {
            loopback_up: true,
            bridge: Some(Bridge {
                settings: BridgeSettings {
                    mac: Some(network.gateway_mac),
                    mtu,
                    mark: Some(mark(network.id)),
                    snooping: network.multicast,
                    address_generation: false,
                },
                up: true,
            }),
            tunnel: Some(Tunnel {
                identity: TunnelIdentity {
                    vni: Some(network.vni),
                    local: Some(network.local),
                    port: network.port,
                    proxy: true,
                    learning: false,
                    l2miss: false,
                    l3miss: false,
                },
                settings: TunnelSettings {
                    mtu,
                    bridged: true,
                    port_learning: false,
                    port_flood: !network.multicast,
                    address_generation: false,
                },
                up: true,
            }),
            addresses: network.gateways.iter().copied().chain([ROUTER]).collect(),
        }
    }
}

/// Lists the operations that turn `actual` into `desired`.
pub(crate) fn plan(desired: &Links, actual: &Links) -> Vec<LinkOp> {
    let mut ops = Vec::new();
    if desired.loopback_up && !actual.loopback_up {
        ops.push(LinkOp::Up("lo"));
    }
    if let Some(wanted) = &desired.bridge {
        let found = actual.bridge.as_ref();
        if found.is_none() {
            ops.push(LinkOp::CreateBridge(wanted.settings.clone()));
        }
        if found.is_none_or(|found| found.settings != wanted.settings) {
            ops.push(LinkOp::ConfigureBridge(wanted.settings.clone()));
        }
        if !found.is_some_and(|found| found.up) {
            ops.push(LinkOp::Up(BRIDGE));
        }
    }
    if let Some(wanted) = &desired.tunnel {
        let mut found = actual.tunnel.as_ref();
        // Break before make: two devices cannot share a VNI and a port.
        if found.is_some_and(|found| found.identity != wanted.identity) {
            ops.push(LinkOp::DeleteTunnel);
            found = None;
        }
        if found.is_none() {
            ops.push(LinkOp::CreateTunnel(wanted.identity.clone()));
        }
        if found.is_none_or(|found| found.settings != wanted.settings) {
            ops.push(LinkOp::ConfigureTunnel(wanted.settings.clone()));
        }
        if !found.is_some_and(|found| found.up) {
            ops.push(LinkOp::Up(TUNNEL));
        }
    }
    let add = desired.addresses.difference(&actual.addresses).copied().map(LinkOp::AddAddress);
    let remove =
        actual.addresses.difference(&desired.addresses).copied().map(LinkOp::RemoveAddress);
    ops.extend(add.chain(remove));
    ops
}

/// The network that a bridge's mark names.
pub(crate) fn marked_network(alias: &str) -> Option<NetworkId> {
    alias.strip_prefix(MARK)?.parse().ok()
}

/// The VNI of a tunnel.
pub(crate) fn carried_vni(tunnel: &Link) -> Option<Vni> {
    tunnel.vxlan.iter().find_map(|setting| match *setting {
        InfoVxlan::Id(vni) => Vni::try_from(vni).ok(),
        _ => None,
    })
}

fn mark(network: NetworkId) -> String {
    format!("{MARK}{network}")
}

/// The links of one namespace. The tunnel's socket belongs to the host's.
pub(crate) struct KernelLinks<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) inside: &'a mut Netlink,
    pub(crate) host: &'a mut Netlink,
}

impl KernelTable for KernelLinks<'_> {
    const TABLE: Table = Table::Links;
    type State = Links;
    type Op = LinkOp;

    fn read(&mut self) -> Result<Links, KernelError> {
        let links = self.inside.links()?;
        let bridge = links.get(BRIDGE);
        let addresses = match bridge {
            Some(link) => self.inside.addresses(link.index)?.into_iter().collect(),
            None => BTreeSet::new(),
        };
        Ok(Links {
            loopback_up: links.get("lo").is_some_and(|link| link.up),
            bridge: bridge.map(read_bridge),
            tunnel: links.get(TUNNEL).map(|link| read_tunnel(link, bridge)),
            addresses,
        })
    }

    fn apply(&mut self, ops: &[LinkOp]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|op| self.apply_one(op).map_err(KernelError::from)).collect()
    }
}

impl KernelLinks<'_> {
    fn apply_one(&mut self, op: &LinkOp) -> Result<(), NetlinkError> {
        match op {
            LinkOp::Up(name) => self.inside.set_up(name),
            LinkOp::CreateBridge(settings) => {
                let mut message = link::bridge(BRIDGE, Vec::new());
                message.attributes.extend(settings.mac.map(mac_attribute));
                self.inside.create_link(message)
            }
            LinkOp::ConfigureBridge(settings) => self.configure_bridge(settings),
            LinkOp::CreateTunnel(identity) => {
                let data = identity.attributes();
                self.host.create_link(link::vxlan(TUNNEL, self.namespace, data))
            }
            LinkOp::ConfigureTunnel(settings) => self.configure_tunnel(settings),
            LinkOp::DeleteTunnel => self.inside.delete_link(TUNNEL),
            LinkOp::AddAddress(prefix) => {
                let index = self.inside.index(BRIDGE)?;
                self.inside.add_address(index, *prefix)
            }
            LinkOp::RemoveAddress(prefix) => {
                let index = self.inside.index(BRIDGE)?;
                self.inside.delete_address(index, *prefix)
            }
        }
    }

    fn configure_bridge(&mut self, settings: &BridgeSettings) -> Result<(), NetlinkError> {
        let mut attributes = vec![LinkAttribute::Mtu(settings.mtu), link::no_address_generation()];
        attributes.extend(settings.mac.map(mac_attribute));
        attributes.extend(settings.mark.clone().map(LinkAttribute::IfAlias));
        self.inside.change_link(BRIDGE, attributes)?;
        let data = vec![InfoBridge::MulticastSnooping(settings.snooping)];
        self.inside.change_link(BRIDGE, link::bridge(BRIDGE, data).attributes)
    }

    fn configure_tunnel(&mut self, settings: &TunnelSettings) -> Result<(), NetlinkError> {
        let bridge = self.inside.index(BRIDGE)?;
        self.inside.change_link(
            TUNNEL,
            vec![
                LinkAttribute::Mtu(settings.mtu),
                LinkAttribute::Controller(bridge),
                link::no_address_generation(),
            ],
        )?;
        let port = vec![
            InfoBridgePort::Learning(settings.port_learning),
            InfoBridgePort::UnicastFlood(settings.port_flood),
        ];
        self.inside.change_link(TUNNEL, vec![link::port_settings(port)])
    }
}

impl TunnelIdentity {
    fn attributes(&self) -> Vec<InfoVxlan> {
        let mut data = vec![
            InfoVxlan::Port(self.port),
            InfoVxlan::Proxy(self.proxy),
            InfoVxlan::Learning(self.learning),
            InfoVxlan::L2Miss(self.l2miss),
            InfoVxlan::L3Miss(self.l3miss),
            InfoVxlan::Ttl(TTL),
            InfoVxlan::Df(VxlanDf::Unset),
        ];
        data.extend(self.vni.map(|vni| InfoVxlan::Id(vni.into())));
        data.extend(self.local.map(|vtep| match vtep.ip() {
            IpAddr::V4(ip) => InfoVxlan::Local(ip),
            IpAddr::V6(ip) => InfoVxlan::Local6(ip),
        }));
        data
    }
}

fn read_bridge(link: &Link) -> Bridge {
    let snooping = link.bridge.iter().find_map(|setting| match setting {
        InfoBridge::MulticastSnooping(on) => Some(*on),
        _ => None,
    });
    Bridge {
        settings: BridgeSettings {
            mac: <[u8; 6]>::try_from(link.mac.as_slice())
                .ok()
                .and_then(|mac| MacAddr::try_from(mac).ok()),
            mtu: link.mtu,
            mark: link.alias.clone(),
            // A kernel without snooping does not report it, and does not do it.
            snooping: snooping.unwrap_or(false),
            address_generation: generates_addresses(link),
        },
        up: link.up,
    }
}

fn read_tunnel(link: &Link, bridge: Option<&Link>) -> Tunnel {
    let mut identity = TunnelIdentity {
        vni: None,
        local: None,
        port: 0,
        proxy: false,
        learning: false,
        l2miss: false,
        l3miss: false,
    };
    for setting in &link.vxlan {
        match *setting {
            InfoVxlan::Id(vni) => identity.vni = Vni::try_from(vni).ok(),
            InfoVxlan::Local(ip) => identity.local = Some(IpAddr::V4(ip).into()),
            InfoVxlan::Local6(ip) => identity.local = Some(IpAddr::V6(ip).into()),
            InfoVxlan::Port(port) => identity.port = port,
            InfoVxlan::Proxy(on) => identity.proxy = on,
            InfoVxlan::Learning(on) => identity.learning = on,
            InfoVxlan::L2Miss(on) => identity.l2miss = on,
            InfoVxlan::L3Miss(on) => identity.l3miss = on,
            _ => {}
        }
    }
    let (mut port_learning, mut port_flood) = (true, true);
    for setting in &link.port {
        match *setting {
            InfoBridgePort::Learning(on) => port_learning = on,
            InfoBridgePort::UnicastFlood(on) => port_flood = on,
            _ => {}
        }
    }
    Tunnel {
        identity,
        settings: TunnelSettings {
            mtu: link.mtu,
            bridged: bridge.is_some_and(|bridge| link.controller == Some(bridge.index)),
            port_learning,
            port_flood,
            address_generation: generates_addresses(link),
        },
        up: link.up,
    }
}

fn generates_addresses(link: &Link) -> bool {
    // Absent where IPv6 is off.
    link.address_generation.is_some_and(|mode| mode != In6AddrGenMode::None)
}

fn mac_attribute(mac: MacAddr) -> LinkAttribute {
    LinkAttribute::Address(mac.octets().to_vec())
}

impl fmt::Display for LinkOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up(name) => write!(f, "set {name} up"),
            Self::CreateBridge(_) => write!(f, "add {BRIDGE} type bridge"),
            Self::ConfigureBridge(settings) => write!(f, "set {BRIDGE} mtu {}", settings.mtu),
            Self::CreateTunnel(TunnelIdentity { vni, local, port, .. }) => {
                write!(f, "add {TUNNEL} type vxlan")?;
                vni.map(|vni| write!(f, " id {vni}")).transpose()?;
                local.map(|local| write!(f, " local {local}")).transpose()?;
                write!(f, " dstport {port} nolearning proxy")
            }
            Self::ConfigureTunnel(settings) => {
                write!(f, "set {TUNNEL} mtu {} master {BRIDGE}", settings.mtu)
            }
            Self::DeleteTunnel => write!(f, "del {TUNNEL}"),
            Self::AddAddress(prefix) => write!(f, "addr add {prefix} dev {BRIDGE} nodad"),
            Self::RemoveAddress(prefix) => write!(f, "addr del {prefix} dev {BRIDGE}"),
        }
    }
}

/// The IPv6 router of every network: containers' default route goes to it.
const ROUTER: Prefix =
    Prefix { ip: IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)), len: 64 };
const TTL: u8 = 64;
const MARK: &str = "weft network ";

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_links() -> impl Strategy<Value = Links> {
        let mac = (0..3u8).prop_map(|n| MacAddr::try_from([2, 0, 0, 0, 0, n]).ok());
        let settings = (mac, 1400..1403u32, any::<bool>(), any::<bool>()).prop_map(
            |(mac, mtu, snooping, address_generation)| BridgeSettings {
                mac,
                mtu,
                mark: None,
                snooping,
                address_generation,
            },
        );
        let bridge = (settings, any::<bool>()).prop_map(|(settings, up)| Bridge { settings, up });
        let identity = (1..3u32, 4789..4791u16, any::<bool>(), any::<bool>()).prop_map(
            |(vni, port, proxy, learning)| TunnelIdentity {
                vni: Vni::try_from(vni).ok(),
                local: Some(IpAddr::from([192, 0, 2, 1]).into()),
                port,
                proxy,
                learning,
                l2miss: false,
                l3miss: false,
            },
        );
        let settings = (1400..1403u32, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(mtu, bridged, port_learning, port_flood)| TunnelSettings {
                mtu,
                bridged,
                port_learning,
                port_flood,
                address_generation: false,
            },
        );
        let tunnel = (identity, settings, any::<bool>())
            .prop_map(|(identity, settings, up)| Tunnel { identity, settings, up });
        let address = (1..4u8).prop_map(|n| Prefix { ip: IpAddr::from([10, 0, 0, n]), len: 24 });
        (
            any::<bool>(),
            prop::option::of(bridge),
            prop::option::of(tunnel),
            prop::collection::btree_set(address, 0..3),
        )
            .prop_map(|(loopback_up, bridge, tunnel, addresses)| Links {
                loopback_up,
                bridge,
                tunnel,
                addresses,
            })
    }

    /// What the kernel does with an operation.
    fn apply(links: &mut Links, op: LinkOp) {
        let plain = |settings| Bridge { settings, up: false };
        match op {
            LinkOp::Up("lo") => links.loopback_up = true,
            LinkOp::Up(BRIDGE) => links.bridge.as_mut().unwrap().up = true,
            LinkOp::Up(_) => links.tunnel.as_mut().unwrap().up = true,
            LinkOp::CreateBridge(settings) => {
                assert!(links.bridge.is_none(), "two bridges");
                links.bridge = Some(plain(BridgeSettings { mtu: 1500, ..settings }));
            }
            LinkOp::ConfigureBridge(settings) => links.bridge.as_mut().unwrap().settings = settings,
            LinkOp::CreateTunnel(identity) => {
                assert!(links.tunnel.is_none(), "two tunnels");
                let settings = TunnelSettings {
                    mtu: 1500,
                    bridged: false,
                    port_learning: true,
                    port_flood: true,
                    address_generation: true,
                };
                links.tunnel = Some(Tunnel { identity, settings, up: false });
            }
            LinkOp::ConfigureTunnel(settings) => links.tunnel.as_mut().unwrap().settings = settings,
            LinkOp::DeleteTunnel => links.tunnel = None,
            LinkOp::AddAddress(prefix) => drop(links.addresses.insert(prefix)),
            LinkOp::RemoveAddress(prefix) => drop(links.addresses.remove(&prefix)),
        }
    }

    fn wanted() -> impl Strategy<Value = Links> {
        any_links().prop_filter_map("whole", |links| {
            let bridge = Bridge { up: true, ..links.bridge? };
            let tunnel = Tunnel { up: true, ..links.tunnel? };
            Some(Links {
                loopback_up: true,
                bridge: Some(bridge),
                tunnel: Some(tunnel),
                addresses: links.addresses,
            })
        })
    }

    proptest! {
        #[test]
        fn any_links_converge_in_one_pass(desired in wanted(), actual in any_links()) {
            let mut kernel = actual;
            for op in plan(&desired, &kernel.clone()) {
                apply(&mut kernel, op);
            }
            prop_assert_eq!(&kernel, &desired);
            prop_assert!(plan(&desired, &kernel).is_empty());
        }
    }
}
