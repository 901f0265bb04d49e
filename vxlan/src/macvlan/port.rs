use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::fd::AsRawFd,
};

use netlink_packet_route::link::{InfoKind, LinkAttribute};
use nix::errno::Errno;
use weft_model::{EndpointId, MacvlanMode};

use super::ParentLink;
use crate::{
    AttachSpec, Attached, Port, Sandbox,
    attach::{self, AttachError, Surface, Wire, holds_in_time, kernel},
    link::{self, Link},
    namespace::Namespace,
    netlink::{Netlink, NetlinkError},
    ports::{self, Label},
    table::{Chain, KernelError},
};

/// A sandbox that shall be connected, and to what.
pub(crate) struct Errand<'a> {
    pub(crate) spec: &'a AttachSpec,
    pub(crate) mode: MacvlanMode,
    /// Bytes; the parent's when absent.
    pub(crate) mtu: Option<u16>,
    pub(crate) parent: ParentLink,
    /// The network's.
    pub(crate) namespace: &'a Namespace,
    pub(crate) inside: &'a mut Netlink,
    pub(crate) host: &'a Namespace,
}

/// A port as it is found in its sandbox.
struct MacvlanPort {
    /// The sandbox, as the network's namespace numbers it.
    nsid: i32,
    index: u32,
    name: String,
}

/// Connects a sandbox, whole or not at all. Repeating it is harmless.
pub(crate) fn ensure(mut errand: Errand<'_>) -> Result<Attached, AttachError> {
    let spec = errand.spec;
    if spec.sandbox == Sandbox::Engine {
        return Err(AttachError::Unmovable { endpoint: spec.endpoint });
    }
    let far = attach::open_sandbox(spec, errand.host)?;
    let failed = |step| kernel(spec.endpoint, step);
    let nsid = errand.inside.number(&far).map_err(failed("number the sandbox"))?;
    let mut found = read(errand.inside).map_err(failed("look into the sandboxes"))?;
    let host_ifname = ports::host_name(spec.endpoint);
    let wire = match found.remove(&spec.endpoint) {
        Some(port) if port.nsid == nsid => {
            Wire { far, ifname: port.name, host_ifname, new: false, surface: Surface::Lan }
        }
        other => {
            // The endpoint has another sandbox now.
            if let Some(MacvlanPort { nsid, index, .. }) = other {
                let deleted = errand.inside.delete_link_elsewhere(nsid, index);
                deleted.map_err(failed("replace the port"))?;
            }
            let ifname = create(&mut errand, &far)?;
            Wire { far, ifname, host_ifname, new: true, surface: Surface::Lan }
        }
    };
    let furnished = prepare(&errand, &wire).and_then(|()| wire.furnish(spec, errand.inside));
    if furnished.is_err()
        && wire.new
        && let Err(error) = delete(errand.inside, spec.endpoint)
    {
        tracing::warn!(port = %wire.ifname, error = %Chain(&error), "a port was left behind");
    }
    furnished.map(|()| Attached { ifname: wire.ifname, host_ifname: wire.host_ifname })
}

/// Makes the port: in the network's namespace, where a later agent would find it, then labelled, then
/// moved into the sandbox. Returns its name there.
fn create(errand: &mut Errand<'_>, far: &Namespace) -> Result<String, AttachError> {
    let Errand { spec, mode, mtu, parent, namespace, inside, .. } = errand;
    let failed = |step| kernel(spec.endpoint, step);
    let waiting = ports::host_name(spec.endpoint);
    inside.delete_link(&waiting).map_err(failed("remove what was left of the port"))?;
    let mtu = spec.mtu.or(*mtu).map_or(parent.mtu, u32::from);
    let mut message = link::macvlan(&waiting, parent.index, *mode, namespace);
    message.attributes.push(LinkAttribute::Address(spec.mac.octets().to_vec()));
    message.attributes.push(LinkAttribute::Mtu(mtu));
    // A predecessor that had the parent for itself may be on its way out still.
    let busy = |error: &NetlinkError| {
        *mode == MacvlanMode::Passthru
            && matches!(error.errno(), Some(Errno::EINVAL | Errno::EBUSY))
    };
    retry(busy, || parent.netlink.create_link(message.clone()))
        .map_err(failed("create the port"))?;
    let identity = Port { mac: spec.mac, ips: spec.addresses.iter().map(|p| p.ip).collect() };
    let label = Label { endpoint: spec.endpoint, identity, mtu: spec.mtu }.to_string();
    let moved = inside
        .change_link(&waiting, vec![LinkAttribute::IfAlias(label)])
        .map_err(failed("label the port"))
        .and_then(|()| hand_over(spec, inside, &waiting, far));
    if moved.is_err() {
        // Under its first name, wherever it got to.
        let _ = inside.delete_link(&waiting);
        let _ = Netlink::open(far).and_then(|mut far| far.delete_link(&waiting));
    }
    moved
}

/// Moves the port into the sandbox, under a name that is free there.
fn hand_over(
    spec: &AttachSpec,
    inside: &mut Netlink,
    waiting: &str,
    far: &Namespace,
) -> Result<String, AttachError> {
    let failed = |step| kernel(spec.endpoint, step);
    let index = inside.index(waiting).map_err(failed("find the port"))?;
    let mut there = Netlink::open(far).map_err(failed("open the sandbox's netlink"))?;
    let links = there.links().map_err(failed("list the sandbox's interfaces"))?;
    let ifname = attach::choose_name(spec, &links)?;
    let namespace = LinkAttribute::NetNsFd(far.file().as_raw_fd());
    let named = vec![namespace, LinkAttribute::IfName(ifname.clone())];
    inside.change_link_at(index, named).map_err(failed("move the port into the sandbox"))?;
    Ok(ifname)
}

/// Does what an interface among strangers needs before it may send, and takes it up.
fn prepare(errand: &Errand<'_>, wire: &Wire) -> Result<(), AttachError> {
    let Errand { spec, mode, .. } = errand;
    let failed = |step| kernel(spec.endpoint, step);
    let with_v6 = spec.addresses.iter().any(|prefix| prefix.ip.is_ipv6());
    // What has no IPv6 address of the network gets none of the link's routers either.
    let disabled = if with_v6 { "0" } else { "1" };
    let settings = [("accept_ra", "0"), ("disable_ipv6", disabled)];
    wire.far
        .run(|| {
            for (key, value) in settings {
                let path = format!("/proc/sys/net/ipv6/conf/{}/{key}", wire.ifname);
                match fs::write(&path, value) {
                    // A kernel without IPv6.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(source) => return Err(KernelError::Sysctl { path, source }),
                    Ok(()) => {}
                }
            }
            Ok(())
        })
        .map_err(|source| AttachError::Kernel {
            step: "set up the interface",
            endpoint: spec.endpoint,
            source,
        })?;
    let mut netlink = Netlink::open(&wire.far).map_err(failed("open the sandbox's netlink"))?;
    if *mode == MacvlanMode::Passthru {
        // It was born with its parent's, and the parent takes on what it is given.
        let mac = LinkAttribute::Address(spec.mac.octets().to_vec());
        netlink.change_link(&wire.ifname, vec![mac]).map_err(failed("set the MAC address"))?;
    }
    // An endpoint that had the same MAC may be on its way out still.
    let busy =
        |error: &NetlinkError| matches!(error.errno(), Some(Errno::EADDRINUSE | Errno::EBUSY));
    retry(busy, || netlink.set_up(&wire.ifname)).map_err(|error| match busy(&error) {
        true => AttachError::MacTaken { endpoint: spec.endpoint, mac: spec.mac },
        false => failed("take up the interface")(error),
    })
}

/// Tries again, for a while, what fails for a reason that passes by itself.
pub(super) fn retry(
    passes: impl Fn(&NetlinkError) -> bool,
    mut action: impl FnMut() -> Result<(), NetlinkError>,
) -> Result<(), NetlinkError> {
    let mut last = Ok(());
    holds_in_time(|| {
        last = action();
        !last.as_ref().is_err_and(&passes)
    });
    last
}

/// The endpoints whose ports are there.
pub(crate) fn endpoints(inside: &mut Netlink) -> Result<BTreeSet<EndpointId>, NetlinkError> {
    Ok(read(inside)?.into_keys().collect())
}

/// Removes a port. Succeeds if it has gone already.
pub(crate) fn delete(inside: &mut Netlink, endpoint: EndpointId) -> Result<(), NetlinkError> {
    inside.delete_link(&ports::host_name(endpoint))?;
    match read(inside)?.remove(&endpoint) {
        Some(MacvlanPort { nsid, index, .. }) => inside.delete_link_elsewhere(nsid, index),
        None => Ok(()),
    }
}

/// Removes all ports.
pub(crate) fn delete_all(inside: &mut Netlink) -> Result<(), NetlinkError> {
    for MacvlanPort { nsid, index, .. } in read(inside)?.into_values() {
        inside.delete_link_elsewhere(nsid, index)?;
    }
    Ok(())
}

/// Looks for ports in all sandboxes that the network's namespace has numbered.
fn read(inside: &mut Netlink) -> Result<BTreeMap<EndpointId, MacvlanPort>, NetlinkError> {
    let mut found = BTreeMap::new();
    for nsid in inside.numbers()? {
        let links = match inside.links_elsewhere(nsid) {
            Ok(links) => links,
            // It has ended since.
            Err(NetlinkError::Refused { .. }) => continue,
            Err(error) => return Err(error),
        };
        let ports = links.into_values().filter_map(|link| Some((label(&link)?, link)));
        found.extend(ports.map(|(label, Link { index, name, .. })| {
            (label.endpoint, MacvlanPort { nsid, index, name })
        }));
    }
    Ok(found)
}

fn label(link: &Link) -> Option<Label> {
    let macvlan = link.kind == Some(InfoKind::MacVlan);
    Label::parse(link.alias.as_deref()?).filter(|_| macvlan)
}
