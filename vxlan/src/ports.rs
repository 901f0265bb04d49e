use std::{collections::BTreeMap, fmt, net::IpAddr};

use netlink_packet_route::link::{InfoBridgePort, LinkAttribute};
use weft_model::{EndpointId, MacAddr};

use crate::{
    Port, Table,
    bridge::BRIDGE,
    link::{self, Link},
    netlink::{Netlink, NetlinkError},
    table::{KernelError, KernelTable},
};

/// The ports of a network's bridge, as their host ends show them.
pub(crate) type Ports = BTreeMap<EndpointId, PortLink>;

/// The host end of a port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PortLink {
    pub(crate) name: String,
    /// What the sandbox may use as source; kept in the link's alias, so that it outlives us.
    pub(crate) identity: Port,
    /// The MTU that it was attached with, if that is not to be the network's.
    mtu: Option<u16>,
    bridged: bool,
    /// Off: the FDB reconciler says where a port's MAC is, not the frames that come from it.
    learning: bool,
    up: bool,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum PortOp {
    Label { name: String, alias: String },
    Bridge { name: String },
    Up { name: String },
}

#[cfg(test)]
impl PortLink {
    /// A port in good order.
    pub(crate) fn labelled(name: &str, label: &Label) -> Self {
        Self {
            name: name.to_owned(),
            identity: label.identity.clone(),
            mtu: label.mtu,
            bridged: true,
            learning: false,
            up: true,
        }
    }
}

/// Lists what the ports need that are there. `desired` corrects what they may send from; it
/// neither makes nor removes a port.
pub(crate) fn plan(desired: &BTreeMap<EndpointId, Port>, actual: &Ports) -> Vec<PortOp> {
    let mut ops = Vec::new();
    for (endpoint, port) in actual {
        let name = &port.name;
        if let Some(wanted) = desired.get(endpoint).filter(|wanted| **wanted != port.identity) {
            ops.push(PortOp::Label {
                name: name.clone(),
                alias: Label { endpoint: *endpoint, identity: wanted.clone(), mtu: port.mtu }
                    .to_string(),
            });
        }
        if !port.bridged || port.learning {
            ops.push(PortOp::Bridge { name: name.clone() });
        }
        if !port.up {
            ops.push(PortOp::Up { name: name.clone() });
        }
    }
    ops
}

/// The name of the host end of `endpoint`'s port.
pub(crate) fn host_name(endpoint: EndpointId) -> String {
    format!("{NAME_PREFIX}{}", endpoint.short())
}

/// The label of a port, which the alias of its host end bears: whose it is, and what it was attached
/// with.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Label {
    pub(crate) endpoint: EndpointId,
    pub(crate) identity: Port,
    /// Absent if the port follows its network.
    pub(crate) mtu: Option<u16>,
}

impl Label {
    pub(crate) fn parse(alias: &str) -> Option<Self> {
        let mut fields = alias.strip_prefix(MARK)?.split(' ');
        let endpoint = fields.next()?.parse().ok()?;
        let mac: MacAddr = fields.next()?.parse().ok()?;
        let ips = fields.next().unwrap_or_default().split(',').filter(|text| !text.is_empty());
        let ips = ips.map(str::parse::<IpAddr>).collect::<Result<_, _>>().ok()?;
        let mtu = fields.next().map(str::parse).transpose().ok()?;
        Some(Self { endpoint, identity: Port { mac, ips }, mtu })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { endpoint, identity: Port { mac, ips }, mtu } = self;
        let ips: Vec<_> = ips.iter().map(ToString::to_string).collect();
        write!(f, "{MARK}{endpoint} {mac} {}", ips.join(","))?;
        mtu.map(|mtu| write!(f, " {mtu}")).transpose().map(drop)
    }
}

/// The ports of one network's namespace.
pub(crate) struct KernelPorts<'a>(pub(crate) &'a mut Netlink);

impl KernelTable for KernelPorts<'_> {
    const TABLE: Table = Table::Ports;
    type State = Ports;
    type Op = PortOp;

    fn read(&mut self) -> Result<Ports, KernelError> {
        let links = self.0.links()?;
        let bridge = links.get(BRIDGE).map(|link| link.index);
        Ok(links.values().filter_map(|link| port(link, bridge)).collect())
    }

    fn apply(&mut self, ops: &[PortOp]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|op| self.apply_one(op).map_err(KernelError::from)).collect()
    }
}

impl KernelPorts<'_> {
    fn apply_one(&mut self, op: &PortOp) -> Result<(), NetlinkError> {
        match op {
            PortOp::Label { name, alias } => {
                self.0.change_link(name, vec![LinkAttribute::IfAlias(alias.clone())])
            }
            PortOp::Bridge { name } => {
                let bridge = self.0.index(BRIDGE)?;
                self.0.change_link(name, vec![LinkAttribute::Controller(bridge)])?;
                let quiet = link::port_settings(vec![InfoBridgePort::Learning(false)]);
                self.0.change_link(name, vec![quiet])
            }
            PortOp::Up { name } => self.0.set_up(name),
        }
    }
}

fn port(link: &Link, bridge: Option<u32>) -> Option<(EndpointId, PortLink)> {
    let Label { endpoint, identity, mtu } = Label::parse(link.alias.as_deref()?)?;
    let learning = link.port.iter().any(|s| matches!(s, InfoBridgePort::Learning(true)));
    let port = PortLink {
        name: link.name.clone(),
        identity,
        mtu,
        bridged: bridge.is_some() && link.controller == bridge,
        learning,
        up: link.up,
    };
    Some((endpoint, port))
}

impl fmt::Display for PortOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label { name, alias } => write!(f, "set {name} alias `{alias}`"),
            Self::Bridge { name } => write!(f, "set {name} master {BRIDGE} learning off"),
            Self::Up { name } => write!(f, "set {name} up"),
        }
    }
}

const NAME_PREFIX: &str = "v";
const MARK: &str = "weft port ";

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(ips: &[&str]) -> Port {
        Port {
            mac: "02:00:00:00:00:07".parse().unwrap(),
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn a_label_reads_what_it_prints() {
        let endpoint = EndpointId::from([0xab; 16]);
        for identity in [identity(&[]), identity(&["10.0.0.7", "fd00::7"])] {
            for mtu in [None, Some(1400)] {
                let label = Label { endpoint, identity: identity.clone(), mtu };
                let text = label.to_string();
                assert_eq!(Label::parse(&text), Some(label), "{text}");
            }
        }
        assert_eq!(Label::parse("weft port nonsense"), None);
        assert_eq!(Label::parse("someone else's"), None);
    }

    #[test]
    fn a_port_that_fell_out_of_its_bridge_is_put_back() {
        let endpoint = EndpointId::from([1; 16]);
        let label = Label { endpoint, identity: identity(&["10.0.0.7"]), mtu: None };
        let fine = PortLink::labelled("v01", &label);
        let plan = |port: PortLink| {
            let desired = [(endpoint, identity(&["10.0.0.7"]))].into();
            plan(&desired, &[(endpoint, port)].into())
        };
        assert_eq!(plan(fine.clone()), []);
        assert_eq!(
            plan(PortLink { bridged: false, up: false, ..fine }),
            [PortOp::Bridge { name: "v01".into() }, PortOp::Up { name: "v01".into() }]
        );
    }
}
