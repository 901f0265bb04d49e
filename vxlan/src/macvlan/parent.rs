//! The interfaces of the host that macvlan networks are on. What is called like a VLAN of another
//! interface is made if it is not there, and removed when no network needs it any more.

use std::{collections::BTreeSet, net::IpAddr, thread};

use netlink_packet_route::link::{InfoKind, LinkAttribute};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};
use weft_model::{InterfaceName, MacvlanMode};

use super::port::retry;
use crate::{
    Namespace, NetlinkError,
    link::{self, Link},
    netlink::Netlink,
    table::{Chain, KernelError},
};

/// The interfaces of the host's namespace, as parents of macvlan interfaces. Every call blocks for as
/// long as the kernel takes.
#[derive(Clone, Debug)]
pub struct Parents {
    host: Namespace,
}

/// A parent as it is now.
#[derive(Debug)]
pub(crate) struct ParentLink {
    /// In whose namespace it is.
    pub(crate) netlink: Netlink,
    pub(crate) index: u32,
    /// Bytes.
    pub(crate) mtu: u32,
}

/// Why an interface cannot be a parent.
#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    #[error(
        "there is no interface {name} on this host: ip link lists those that are there, and {name}.50 would be VLAN 50 of one"
    )]
    Missing { name: InterfaceName },
    #[error("there is no interface {lower} on this host, of which {name} would be a VLAN")]
    MissingLower { name: InterfaceName, lower: InterfaceName },
    #[error("{lower} is down, of which {name} would be a VLAN: ip link set {lower} up")]
    LowerDown { name: InterfaceName, lower: InterfaceName },
    #[error(
        "cannot make {name}: this kernel has no 802.1q VLANs ({reason}): load the module 8021q, use a kernel with CONFIG_VLAN_8021Q, or name an interface that is there"
    )]
    NoVlans { name: InterfaceName, reason: NetlinkError },
    #[error(
        "this kernel has no macvlan interfaces ({reason}): load the module macvlan, or use a kernel with CONFIG_MACVLAN"
    )]
    NoMacvlans { reason: NetlinkError },
    #[error("{name} is the loopback interface: name one with a link")]
    Loopback { name: InterfaceName },
    #[error("{name} is a part of {by}: take {by}, or an interface that nothing else has")]
    InUse { name: InterfaceName, by: String },
    #[error(
        "{name} cannot be divided with macvlan_mode={mode}: {reason}; something else may have it for itself, or it is no Ethernet interface"
    )]
    Unusable { name: InterfaceName, mode: MacvlanMode, reason: NetlinkError },
    #[error("an MTU of {wanted} bytes is more than the {has} of {name}: ask for {has} at most")]
    TooWide { name: InterfaceName, wanted: u16, has: u32 },
    #[error("failed to look at the interfaces of this host")]
    Host(#[source] NetlinkError),
    #[error("failed to {step} {name}")]
    Kernel { step: &'static str, name: InterfaceName, source: KernelError },
}

impl Parents {
    pub fn new(host: Namespace) -> Self {
        Self { host }
    }

    /// Tries whether `name` can be the parent of a network with `mode` and, if that is given, an
    /// `mtu` in bytes. A VLAN is made for it if need be. Returns the addresses that the host itself
    /// has there.
    ///
    /// # Errors
    ///
    /// See [`ParentError`]; a VLAN that was made for nothing is removed.
    pub fn try_out(
        &self,
        name: InterfaceName,
        mode: MacvlanMode,
        mtu: Option<u16>,
    ) -> Result<Vec<IpAddr>, ParentError> {
        let there = look(&mut self.open()?, name)?.is_some();
        let tried = self.find_fitting(name, mtu).and_then(|parent| self.divide(name, parent, mode));
        if tried.is_err()
            && !there
            && let Err(error) = self.open().and_then(|mut netlink| remove(&mut netlink, name))
        {
            tracing::warn!(%name, error = %Chain(&error), "a VLAN was left behind");
        }
        tried
    }

    /// Removes the VLANs that weft has made and that are not `wanted` any more. Returns which.
    ///
    /// # Errors
    ///
    /// The first that the kernel did not let go.
    pub fn release(
        &self,
        wanted: &BTreeSet<InterfaceName>,
    ) -> Result<Vec<InterfaceName>, ParentError> {
        let mut netlink = self.open()?;
        let links = netlink.links().map_err(ParentError::Host)?;
        let ours = links.values().filter(|link| is_ours(link));
        let ours = ours.filter_map(|link| link.name.parse::<InterfaceName>().ok());
        let unwanted: Vec<_> = ours.filter(|name| !wanted.contains(name)).collect();
        for &name in &unwanted {
            remove(&mut netlink, name)?;
        }
        Ok(unwanted)
    }

    /// The MTU of `name` in bytes, if it is there.
    pub fn mtu(&self, name: InterfaceName) -> Option<u32> {
        Some(self.open().ok()?.link(name.as_str()).ok()?.mtu)
    }

    /// What is wrong with `name`, and what to do: it has gone, or is down. A VLAN that has gone is
    /// made again when it is needed.
    pub fn fault(&self, name: InterfaceName) -> Option<String> {
        match look(&mut self.open().ok()?, name).ok()? {
            Some(link) if link.up => None,
            Some(_) => Some(format!("{name} is down: ip link set {name} up")),
            None if name.vlan().is_some() => None,
            None => Some(format!("{name} is not there: bring it back, or remove the network")),
        }
    }

    /// Finds the parent, or makes it if it is a VLAN. It has at least `mtu` bytes.
    pub(crate) fn find_fitting(
        &self,
        name: InterfaceName,
        mtu: Option<u16>,
    ) -> Result<ParentLink, ParentError> {
        let parent = self.find(name)?;
        match mtu {
            Some(wanted) if u32::from(wanted) > parent.mtu => {
                Err(ParentError::TooWide { name, wanted, has: parent.mtu })
            }
            _ => Ok(parent),
        }
    }

    fn find(&self, name: InterfaceName) -> Result<ParentLink, ParentError> {
        if name.as_str() == "lo" {
            return Err(ParentError::Loopback { name });
        }
        let mut netlink = self.open()?;
        let found = match look(&mut netlink, name)? {
            Some(found) => found,
            None => make_vlan(&mut netlink, name)?,
        };
        if let Some(index) = found.controller {
            let by = netlink
                .link_elsewhere(None, index)
                .map_or_else(|_| "a bridge".into(), |by| by.name);
            return Err(ParentError::InUse { name, by });
        }
        Ok(ParentLink { netlink, index: found.index, mtu: found.mtu })
    }

    /// Makes a macvlan interface where it harms nobody, and removes it.
    fn divide(
        &self,
        name: InterfaceName,
        mut parent: ParentLink,
        mode: MacvlanMode,
    ) -> Result<Vec<IpAddr>, ParentError> {
        thread::scope(|scope| {
            let tried = scope.spawn(|| {
                let failed = |source| ParentError::Kernel { step: "try out", name, source };
                unshare(CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| failed(NetlinkError::Socket(errno.into()).into()))?;
                let aside = Namespace::current().map_err(|error| failed(error.into()))?;
                let message = link::macvlan("probe0", parent.index, mode, &aside);
                // What is being taken away from a network that was just removed may be there still.
                let busy = |error: &NetlinkError| {
                    matches!(error.errno(), Some(Errno::EINVAL | Errno::EBUSY))
                };
                let made = retry(busy, || parent.netlink.create_link(message.clone()));
                made.map_err(|reason| match reason.errno() {
                    Some(Errno::EOPNOTSUPP) => ParentError::NoMacvlans { reason },
                    _ => ParentError::Unusable { name, mode, reason },
                })?;
                let deleted =
                    Netlink::open(&aside).and_then(|mut inside| inside.delete_link("probe0"));
                deleted.map_err(|error| failed(error.into()))?;
                let own = parent.netlink.addresses(parent.index);
                let own = own.map_err(|error| failed(error.into()))?;
                Ok(own.into_iter().map(|prefix| prefix.ip).collect())
            });
            tried.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn open(&self) -> Result<Netlink, ParentError> {
        Netlink::open(&self.host).map_err(ParentError::Host)
    }
}

fn look(netlink: &mut Netlink, name: InterfaceName) -> Result<Option<Link>, ParentError> {
    match netlink.link(name.as_str()) {
        Ok(link) => Ok(Some(link)),
        Err(NetlinkError::NoInterface { .. }) => Ok(None),
        Err(error) => Err(kernel("look at", name)(error)),
    }
}

/// Makes the VLAN that `name` speaks of, with our mark, and takes it up.
fn make_vlan(netlink: &mut Netlink, name: InterfaceName) -> Result<Link, ParentError> {
    let Some((lower, id)) = name.vlan() else { return Err(ParentError::Missing { name }) };
    let below = look(netlink, lower)?.ok_or(ParentError::MissingLower { name, lower })?;
    if !below.up {
        return Err(ParentError::LowerDown { name, lower });
    }
    match netlink.create_link(link::vlan(name.as_str(), below.index, id)) {
        Ok(()) => {}
        // Another network's endpoint came at the same moment.
        Err(error) if error.errno() == Some(Errno::EEXIST) && look(netlink, name)?.is_some() => {}
        Err(source) if source.errno() == Some(Errno::EOPNOTSUPP) => {
            return Err(ParentError::NoVlans { name, reason: source });
        }
        Err(source) => return Err(kernel("make the VLAN", name)(source)),
    }
    let mark = LinkAttribute::IfAlias(MARK.to_owned());
    let furnished =
        netlink.change_link(name.as_str(), vec![mark]).and_then(|()| netlink.set_up(name.as_str()));
    if let Err(source) = furnished {
        remove(netlink, name)?;
        return Err(kernel("take up the VLAN", name)(source));
    }
    tracing::info!(%name, %lower, id, "made a VLAN");
    look(netlink, name)?.ok_or(ParentError::Missing { name })
}

fn remove(netlink: &mut Netlink, name: InterfaceName) -> Result<(), ParentError> {
    let Some(link) = look(netlink, name)? else { return Ok(()) };
    if is_ours(&link) {
        netlink.delete_link(name.as_str()).map_err(kernel("remove the VLAN", name))?;
        tracing::info!(%name, "removed a VLAN");
    }
    Ok(())
}

fn is_ours(link: &Link) -> bool {
    link.kind == Some(InfoKind::Vlan) && link.alias.as_deref() == Some(MARK)
}

fn kernel(step: &'static str, name: InterfaceName) -> impl FnOnce(NetlinkError) -> ParentError {
    move |source| ParentError::Kernel { step, name, source: source.into() }
}

const MARK: &str = "weft vlan";

#[cfg(test)]
mod tests {
    use netlink_packet_core::Emitable as _;

    use super::*;

    /// A netlink attribute, filled up to a multiple of four bytes.
    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_vlan_is_asked_for_as_iproute2_does() {
        // `ip link add link lan0 name lan0.50 type vlan id 50`, where lan0 has the index 3.
        let message = link::vlan("lan0.50", 3, 50);
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let (header, attributes) = bytes.split_at(16);
        assert_eq!(header, [0; 16]);
        let id = attribute(1, &50_u16.to_ne_bytes());
        for (what, wanted) in [
            ("IFLA_LINK", attribute(5, &3_u32.to_ne_bytes())),
            ("IFLA_IFNAME", attribute(3, b"lan0.50\0")),
            ("IFLA_INFO_DATA", attribute(2, &id)),
        ] {
            let there = attributes.windows(wanted.len()).any(|window| window == wanted);
            assert!(there, "no {what} {wanted:?} in {attributes:?}");
        }
    }
}
