//! The bridge port that leads to other hosts: a VXLAN device, or the TAP of a sealed network.

use std::{fmt, net::IpAddr};

use netlink_packet_core::Nla;
use netlink_packet_route::link::{InfoBridgePort, InfoKind, InfoVxlan, LinkAttribute, VxlanDf};
use weft_model::{Vni, VtepAddr};

use crate::{
    OverlayNetwork, Transport,
    bridge::BRIDGE,
    link::{self, Link},
    netlink::{Netlink, NetlinkError},
};

/// The names of carriers in every network's namespace, which has one of them.
pub(crate) const VXLAN: &str = "vx0";
pub(crate) const TAP: &str = "tap0";

/// What carries a network's frames to other hosts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Carrier {
    pub(crate) identity: Identity,
    pub(crate) settings: CarrierSettings,
    pub(crate) up: bool,
}

/// What cannot be changed once the device is there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Identity {
    Vxlan(VxlanIdentity),
    Tap(TapIdentity),
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct VxlanIdentity {
    pub(crate) vni: Option<Vni>,
    pub(crate) local: Option<VtepAddr>,
    pub(crate) port: u16,
    pub(crate) proxy: bool,
    pub(crate) learning: bool,
    pub(crate) l2miss: bool,
    pub(crate) l3miss: bool,
}

/// The rest of a TAP's nature is settled anew by whoever opens its queues.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct TapIdentity {
    /// Whether it takes frames, and not packets (`IFF_TAP`).
    pub(crate) frames: bool,
    pub(crate) multi_queue: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct CarrierSettings {
    pub(crate) mtu: u32,
    pub(crate) bridged: bool,
    pub(crate) port_learning: bool,
    /// Whether frames to unknown stations reach the device.
    pub(crate) port_flood: bool,
    pub(crate) address_generation: bool,
    /// Packets that wait for a reader, up to [`QUEUE_LENGTH`]: more is as good. Absent where nobody
    /// reads.
    pub(crate) queue_length: Option<u32>,
}

impl Carrier {
    /// The carrier of `network`, and its name; none if it goes nowhere.
    pub(crate) fn of(network: &OverlayNetwork) -> Option<(&'static str, Self)> {
        let settings = CarrierSettings {
            mtu: network.mtu.into(),
            bridged: true,
            port_learning: false,
            port_flood: false,
            address_generation: false,
            queue_length: None,
        };
        let (identity, settings) = match network.transport {
            Transport::Vxlan { vni, local, port } => (
                Identity::Vxlan(VxlanIdentity {
                    vni: Some(vni),
                    local: Some(local),
                    port,
                    proxy: true,
                    learning: false,
                    l2miss: false,
                    l3miss: false,
                }),
                // The device drops them, unless it has a flood list.
                CarrierSettings { port_flood: !network.multicast, ..settings },
            ),
            Transport::Sealed => (
                Identity::Tap(TapIdentity { frames: true, multi_queue: true }),
                // A station that the bridge does not know is none of the tunnel's either: not
                // worth waking it.
                CarrierSettings { queue_length: Some(QUEUE_LENGTH), ..settings },
            ),
            Transport::Local | Transport::Macvlan { .. } => return None,
        };
        Some((network.transport.device()?, Self { identity, settings, up: true }))
    }

    /// What is called `name` in a namespace with `bridge`.
    pub(crate) fn read(name: &'static str, link: &Link, bridge: Option<&Link>) -> Self {
        let (mut port_learning, mut port_flood) = (true, true);
        for setting in &link.port {
            match *setting {
                InfoBridgePort::Learning(on) => port_learning = on,
                InfoBridgePort::UnicastFlood(on) => port_flood = on,
                _ => {}
            }
        }
        let (identity, queue_length) = match name {
            TAP => (Identity::Tap(read_tap(link)), Some(link.queue_length.min(QUEUE_LENGTH))),
            _ => (Identity::Vxlan(read_vxlan(link)), None),
        };
        Self {
            identity,
            settings: CarrierSettings {
                mtu: link.mtu,
                bridged: bridge.is_some_and(|bridge| link.controller == Some(bridge.index)),
                port_learning,
                port_flood,
                address_generation: link.generates_addresses(),
                queue_length,
            },
            up: link.up,
        }
    }
}

impl Transport {
    /// The name of what carries a network, if anything does.
    pub(crate) fn device(self) -> Option<&'static str> {
        match self {
            Self::Vxlan { .. } => Some(VXLAN),
            Self::Sealed => Some(TAP),
            Self::Local | Self::Macvlan { .. } => None,
        }
    }
}

impl CarrierSettings {
    pub(crate) fn configure(&self, name: &str, netlink: &mut Netlink) -> Result<(), NetlinkError> {
        let bridge = netlink.index(BRIDGE)?;
        let mut attributes = vec![
            LinkAttribute::Mtu(self.mtu),
            LinkAttribute::Controller(bridge),
            link::no_address_generation(),
        ];
        attributes.extend(self.queue_length.map(LinkAttribute::TxQueueLen));
        netlink.change_link(name, attributes)?;
        let port = vec![
            InfoBridgePort::Learning(self.port_learning),
            InfoBridgePort::UnicastFlood(self.port_flood),
        ];
        netlink.change_link(name, vec![link::port_settings(port)])
    }
}

impl VxlanIdentity {
    pub(crate) fn attributes(&self) -> Vec<InfoVxlan> {
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

/// The VNI of a VXLAN device.
pub(crate) fn carried_vni(device: &Link) -> Option<Vni> {
    device.vxlan.iter().find_map(|setting| match *setting {
        InfoVxlan::Id(vni) => Vni::try_from(vni).ok(),
        _ => None,
    })
}

fn read_vxlan(link: &Link) -> VxlanIdentity {
    let mut identity = VxlanIdentity {
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
    identity
}

fn read_tap(link: &Link) -> TapIdentity {
    let mut identity = TapIdentity { frames: false, multi_queue: false };
    if link.kind != Some(InfoKind::Tun) {
        return identity;
    }
    for setting in &link.tun {
        let mut value = vec![0; setting.value_len()];
        setting.emit_value(&mut value);
        match setting.kind() {
            IFLA_TUN_TYPE => identity.frames = value == [IFF_TAP],
            IFLA_TUN_MULTI_QUEUE => identity.multi_queue = value == [1],
            _ => {}
        }
    }
    identity
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vxlan(VxlanIdentity { vni, local, port, .. }) => {
                write!(f, "add {VXLAN} type vxlan")?;
                vni.map(|vni| write!(f, " id {vni}")).transpose()?;
                local.map(|local| write!(f, " local {local}")).transpose()?;
                write!(f, " dstport {port} nolearning proxy")
            }
            Self::Tap(_) => write!(f, "tuntap add {TAP} mode tap multi_queue vnet_hdr"),
        }
    }
}

/// What a burst may leave to the tunnel while that is busy with others. The kernel's own 500 are
/// gone in a few milliseconds.
pub(crate) const QUEUE_LENGTH: u32 = 2000;
const TTL: u8 = 64;
/// `include/uapi/linux/if_link.h`, `include/uapi/linux/if_tun.h`.
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFF_TAP: u8 = 2;
