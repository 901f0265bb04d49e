use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use crate::{
    OverlayNetwork, Prefix, Table,
    bridge::{BRIDGE, Bridge, BridgeSettings},
    carrier::{Carrier, CarrierSettings, Identity, TAP, VXLAN},
    handover::Handover,
    link,
    namespace::Namespace,
    netlink::Netlink,
    table::{KernelError, KernelTable},
};

/// The links that make a namespace a network.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Links {
    pub(crate) loopback_up: bool,
    pub(crate) bridge: Option<Bridge>,
    /// By name; a network wants one at most.
    pub(crate) carriers: BTreeMap<&'static str, Carrier>,
    /// The bridge's.
    pub(crate) addresses: BTreeSet<Prefix>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum LinkOp {
    DeleteCarrier(&'static str),
    Up(&'static str),
    CreateBridge(BridgeSettings),
    ConfigureBridge(BridgeSettings),
    CreateCarrier(Identity),
    ConfigureCarrier(&'static str, CarrierSettings),
    AddAddress(Prefix),
    RemoveAddress(Prefix),
}

impl Links {
    /// The links that carry `network`; on this host only unless it is `connected`.
    pub(crate) fn of(network: &OverlayNetwork, connected: bool) -> Self {
        let vips = network.vips.iter().copied().map(Prefix::of_host);
        Self {
            loopback_up: true,
            bridge: Some(Bridge::of(network)),
            carriers: connected.then(|| Carrier::of(network)).flatten().into_iter().collect(),
            addresses: network.gateways.iter().copied().chain([ROUTER]).chain(vips).collect(),
        }
    }
}

/// Lists what removes the carriers that `desired` does not have, or has as another kind of device.
pub(crate) fn removals(desired: &Links, actual: &Links) -> Vec<LinkOp> {
    let wrong = actual.carriers.iter().filter(|(name, found)| {
        desired.carriers.get(*name).is_none_or(|wanted| wanted.identity != found.identity)
    });
    wrong.map(|(name, _)| LinkOp::DeleteCarrier(name)).collect()
}

/// Lists the operations that turn `actual` into `desired`.
pub(crate) fn plan(desired: &Links, actual: &Links) -> Vec<LinkOp> {
    // First of all: what should not carry the network must not, whatever else fails. And break
    // before make: two VXLAN devices cannot share a VNI and a port.
    let mut ops = removals(desired, actual);
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
    for (name, wanted) in &desired.carriers {
        let found = actual.carriers.get(name).filter(|found| found.identity == wanted.identity);
        if found.is_none() {
            ops.push(LinkOp::CreateCarrier(wanted.identity.clone()));
        }
        if found.is_none_or(|found| found.settings != wanted.settings) {
            ops.push(LinkOp::ConfigureCarrier(name, wanted.settings.clone()));
        }
        if !found.is_some_and(|found| found.up) {
            ops.push(LinkOp::Up(name));
        }
    }
    let add = desired.addresses.difference(&actual.addresses).copied().map(LinkOp::AddAddress);
    let remove =
        actual.addresses.difference(&desired.addresses).copied().map(LinkOp::RemoveAddress);
    ops.extend(add.chain(remove));
    ops
}

/// The links of one namespace. The socket of a VXLAN device belongs to the host's.
pub(crate) struct KernelLinks<'a> {
    pub(crate) namespace: &'a Namespace,
    pub(crate) inside: &'a mut Netlink,
    pub(crate) host: &'a mut Netlink,
    pub(crate) handover: &'a mut Handover,
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
        let carriers = [VXLAN, TAP]
            .into_iter()
            .filter_map(|name| Some((name, Carrier::read(name, links.get(name)?, bridge))));
        Ok(Links {
            loopback_up: links.get("lo").is_some_and(|link| link.up),
            bridge: bridge.map(Bridge::read),
            carriers: carriers.collect(),
            addresses,
        })
    }

    fn apply(&mut self, ops: &[LinkOp]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|op| self.apply_one(op)).collect()
    }
}

impl KernelLinks<'_> {
    fn apply_one(&mut self, op: &LinkOp) -> Result<(), KernelError> {
        match op {
            LinkOp::DeleteCarrier(name) => self.inside.delete_link(name)?,
            LinkOp::Up(name) => self.inside.set_up(name)?,
            LinkOp::CreateBridge(settings) => settings.create(self.inside)?,
            LinkOp::ConfigureBridge(settings) => settings.configure(self.inside)?,
            LinkOp::CreateCarrier(Identity::Vxlan(identity)) => {
                let data = identity.attributes();
                self.host.create_link(link::vxlan(VXLAN, self.namespace, data))?;
            }
            LinkOp::CreateCarrier(Identity::Tap(_)) => {
                self.handover.open(self.namespace, self.inside)?
            }
            LinkOp::ConfigureCarrier(name, settings) => settings.configure(name, self.inside)?,
            LinkOp::AddAddress(prefix) => {
                let index = self.inside.index(BRIDGE)?;
                match prefix.is_host() {
                    true => self.inside.add_virtual_address(index, *prefix)?,
                    false => self.inside.add_address(index, *prefix)?,
                }
            }
            LinkOp::RemoveAddress(prefix) => {
                let index = self.inside.index(BRIDGE)?;
                self.inside.delete_address(index, *prefix)?;
            }
        }
        Ok(())
    }
}

impl fmt::Display for LinkOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeleteCarrier(name) => write!(f, "del {name}"),
            Self::Up(name) => write!(f, "set {name} up"),
            Self::CreateBridge(_) => write!(f, "add {BRIDGE} type bridge"),
            Self::ConfigureBridge(settings) => write!(f, "set {BRIDGE} mtu {}", settings.mtu),
            Self::CreateCarrier(identity) => identity.fmt(f),
            Self::ConfigureCarrier(name, settings) => {
                write!(f, "set {name} mtu {} master {BRIDGE}", settings.mtu)
            }
            Self::AddAddress(prefix) => write!(f, "addr add {prefix} dev {BRIDGE} nodad"),
            Self::RemoveAddress(prefix) => write!(f, "addr del {prefix} dev {BRIDGE}"),
        }
    }
}

/// The IPv6 router of every network: containers' default route goes to it.
const ROUTER: Prefix =
    Prefix { ip: IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1)), len: 64 };

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use weft_model::{MacAddr, Vni};

    use super::*;
    use crate::carrier::{QUEUE_LENGTH, TapIdentity, VxlanIdentity};

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
        let vxlan = (1..3u32, 4789..4791u16, any::<bool>(), any::<bool>()).prop_map(
            |(vni, port, proxy, learning)| VxlanIdentity {
                vni: Vni::try_from(vni).ok(),
                local: Some(IpAddr::from([192, 0, 2, 1]).into()),
                port,
                proxy,
                learning,
                l2miss: false,
                l3miss: false,
            },
        );
        let tap = any::<(bool, bool)>()
            .prop_map(|(frames, multi_queue)| TapIdentity { frames, multi_queue });
        let settings = (1400..1403u32, any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
            |(mtu, bridged, port_learning, port_flood)| CarrierSettings {
                mtu,
                bridged,
                port_learning,
                port_flood,
                address_generation: false,
                queue_length: None,
            },
        );
        let vxlan = (vxlan, settings.clone(), any::<bool>()).prop_map(|(vxlan, settings, up)| {
            Carrier { identity: Identity::Vxlan(vxlan), settings, up }
        });
        let tap = (tap, settings, 499..=QUEUE_LENGTH, any::<bool>()).prop_map(
            |(tap, settings, length, up)| {
                let settings = CarrierSettings { queue_length: Some(length), ..settings };
                Carrier { identity: Identity::Tap(tap), settings, up }
            },
        );
        let carriers = (prop::option::of(vxlan), prop::option::of(tap)).prop_map(|(vxlan, tap)| {
            let vxlan = vxlan.map(|vxlan| (VXLAN, vxlan));
            vxlan.into_iter().chain(tap.map(|tap| (TAP, tap))).collect::<BTreeMap<_, _>>()
        });
        let address = (1..4u8).prop_map(|n| Prefix { ip: IpAddr::from([10, 0, 0, n]), len: 24 });
        (
            any::<bool>(),
            prop::option::of(bridge),
            carriers,
            prop::collection::btree_set(address, 0..3),
        )
            .prop_map(|(loopback_up, bridge, carriers, addresses)| Links {
                loopback_up,
                bridge,
                carriers,
                addresses,
            })
    }

    /// What the kernel does with an operation.
    fn apply(links: &mut Links, op: LinkOp) {
        let plain = |settings| Bridge { settings, up: false };
        match op {
            LinkOp::Up("lo") => links.loopback_up = true,
            LinkOp::Up(BRIDGE) => links.bridge.as_mut().unwrap().up = true,
            LinkOp::Up(name) => links.carriers.get_mut(name).unwrap().up = true,
            LinkOp::CreateBridge(settings) => {
                assert!(links.bridge.is_none(), "two bridges");
                links.bridge = Some(plain(BridgeSettings { mtu: 1500, ..settings }));
            }
            LinkOp::ConfigureBridge(settings) => links.bridge.as_mut().unwrap().settings = settings,
            LinkOp::CreateCarrier(identity) => {
                let (name, queue_length) = match identity {
                    Identity::Vxlan(_) => (VXLAN, None),
                    Identity::Tap(_) => (TAP, Some(500)),
                };
                let settings = CarrierSettings {
                    mtu: 1500,
                    bridged: false,
                    port_learning: true,
                    port_flood: true,
                    address_generation: true,
                    queue_length,
                };
                links.carriers.insert(name, Carrier { identity, settings, up: false });
                assert_eq!(links.carriers.len(), 1, "two carriers");
            }
            LinkOp::ConfigureCarrier(name, settings) => {
                links.carriers.get_mut(name).unwrap().settings = settings;
            }
            LinkOp::DeleteCarrier(name) => drop(links.carriers.remove(name).unwrap()),
            LinkOp::AddAddress(prefix) => drop(links.addresses.insert(prefix)),
            LinkOp::RemoveAddress(prefix) => drop(links.addresses.remove(&prefix)),
        }
    }

    fn wanted() -> impl Strategy<Value = Links> {
        (any_links(), any::<bool>()).prop_filter_map("whole", |(links, sealed)| {
            let bridge = Bridge { up: true, ..links.bridge? };
            let name = if sealed { TAP } else { VXLAN };
            let carrier = links.carriers.get(name).cloned();
            let carrier = carrier.map(|carrier| (name, Carrier { up: true, ..carrier }));
            Some(Links {
                loopback_up: true,
                bridge: Some(bridge),
                carriers: carrier.into_iter().collect(),
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

    #[test]
    fn what_must_not_carry_a_network_is_removed_before_anything_else() {
        let encrypted = OverlayNetwork {
            transport: crate::Transport::Sealed,
            ..crate::ruleset::tests::network(true)
        };
        let local = OverlayNetwork { transport: crate::Transport::Local, ..encrypted.clone() };
        assert!(Links::of(&local, true).carriers.is_empty());
        let plain = crate::ruleset::tests::network(true);
        for (before, after, wrong) in [(&plain, &encrypted, VXLAN), (&encrypted, &plain, TAP)] {
            for connected in [true, false] {
                let found = Links { bridge: None, loopback_up: false, ..Links::of(before, true) };
                let ops = plan(&Links::of(after, connected), &found);
                assert_eq!(ops[0], LinkOp::DeleteCarrier(wrong));
                let made = ops.iter().filter(|op| matches!(op, LinkOp::CreateCarrier(_)));
                assert_eq!(made.count(), usize::from(connected));
            }
        }
    }
}
