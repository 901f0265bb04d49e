//! Connects a sandbox to a network: one veth, made whole or not at all.

use std::{
    collections::BTreeMap,
    fs, io,
    net::IpAddr,
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use netlink_packet_route::link::LinkAttribute;
use nix::errno::Errno;
use weft_model::{EndpointId, MacAddr, NetworkId};

use crate::{
    AttachSpec, NamespaceError, NetlinkError, OverlayNetwork, ParentError, Port, Prefix, Sandbox,
    link::{self, Link},
    mtu,
    namespace::Namespace,
    netlink::Netlink,
    port::exposed_name,
    ports::{self, Label},
    table::{Chain, KernelError},
    underlay,
};

/// Why a sandbox could not be connected. Nothing of the attempt is left behind.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("network {network} is not among those that this host carries")]
    UnknownNetwork { network: NetworkId },
    #[error("network {network} is not ready on this host: {reason}")]
    NotReady { network: NetworkId, reason: String },
    #[error("{ifname:?} is no interface name: give 1 to 15 characters without slash or space")]
    InvalidIfname { ifname: String },
    #[error("the sandbox of endpoint {endpoint} cannot be used")]
    Sandbox { endpoint: EndpointId, source: NamespaceError },
    #[error("{sandbox} is the host's own network namespace: run the container with a private one")]
    HostSandbox { sandbox: Sandbox },
    #[error("the sandbox {sandbox} already has an interface {ifname}: choose another name")]
    IfnameTaken { sandbox: Sandbox, ifname: String },
    #[error(
        "the sandbox {sandbox} already has a default route via {existing}: attach without {gateway}"
    )]
    DefaultRouteTaken { sandbox: Sandbox, gateway: IpAddr, existing: IpAddr },
    #[error(
        "{subnet} overlaps the route {route} by {ifname}, which this host has already: use a network with another subnet, or remove the route"
    )]
    RouteTaken { subnet: IpNet, route: IpNet, ifname: String },
    #[error("failed to {step} for endpoint {endpoint}")]
    Kernel { step: &'static str, endpoint: EndpointId, source: KernelError },
    #[error(
        "endpoint {endpoint} is on a macvlan network, whose interfaces cannot wait until an engine moves them"
    )]
    Unmovable { endpoint: EndpointId },
    #[error(
        "the MAC address {mac} of endpoint {endpoint} is in use on its network's parent: take another"
    )]
    MacTaken { endpoint: EndpointId, mac: MacAddr },
    #[error(transparent)]
    Parent(#[from] ParentError),
    #[error("the data plane has stopped")]
    Stopped,
}

/// The two ends of a port.
#[derive(Debug)]
pub(crate) struct Wire {
    /// The sandbox, or the host's namespace while the sandbox is the engine's affair.
    pub(crate) far: Namespace,
    pub(crate) ifname: String,
    pub(crate) host_ifname: String,
    /// Whether it was made just now.
    pub(crate) new: bool,
    pub(crate) surface: Surface,
}

/// What a port meets outside.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Surface {
    /// A bridge of this host, which answers for everybody.
    Bridge,
    /// A link with machines that weft knows nothing of.
    Lan,
}

impl Wire {
    /// Finds the port, or makes it: the near end in the network's namespace, labelled and down, the
    /// far end born in the sandbox.
    pub(crate) fn ensure(
        spec: &AttachSpec,
        network: &OverlayNetwork,
        near: &mut Netlink,
        host: &Namespace,
    ) -> Result<Self, AttachError> {
        let far = open_sandbox(spec, host)?;
        let host_ifname = ports::host_name(spec.endpoint);
        let failed = |step| kernel(spec.endpoint, step);
        let mut netlink = Netlink::open(&far).map_err(failed("open the sandbox's netlink"))?;

        let found = near.links().map_err(failed("list the ports"))?.remove(&host_ifname);
        if let Some(near_end) = found {
            let links = netlink.links().map_err(failed("list the sandbox's interfaces"))?;
            match links.into_values().find(|link| is_far_end(link, &near_end, spec.mac)) {
                Some(Link { name: ifname, .. }) => {
                    let surface = Surface::Bridge;
                    return Ok(Self { far, ifname, host_ifname, new: false, surface });
                }
                // The engine has moved it, which is what it waited for.
                None if spec.sandbox == Sandbox::Engine => {
                    let ifname = spec.ifname.clone().unwrap_or_else(|| waiting_name(spec.endpoint));
                    let surface = Surface::Bridge;
                    return Ok(Self { far, ifname, host_ifname, new: false, surface });
                }
                // The endpoint has another sandbox now.
                None => near.delete_link(&host_ifname).map_err(failed("replace the port"))?,
            }
        }

        if spec.sandbox == Sandbox::Host {
            refuse_overlap(spec, &mut netlink)?;
        }
        loop {
            let links = netlink.links().map_err(failed("list the sandbox's interfaces"))?;
            let ifname = choose_name(spec, &links)?;
            match create(spec, network, near, &host_ifname, &far, &ifname) {
                Ok(()) => {
                    let surface = Surface::Bridge;
                    return Ok(Self { far, ifname, host_ifname, new: true, surface });
                }
                // Somebody else took the name since.
                Err(error) if error.errno() == Some(Errno::EEXIST) && spec.ifname.is_none() => {}
                Err(error) => {
                    // The label may have failed after the pair was made.
                    let _ = near.delete_link(&host_ifname);
                    return Err(failed("create the port")(error));
                }
            }
        }
    }

    /// Gives the far end its addresses and routes, and takes it up. Nothing to do if the sandbox
    /// is the engine's affair.
    pub(crate) fn furnish(&self, spec: &AttachSpec, near: &mut Netlink) -> Result<(), AttachError> {
        if spec.sandbox == Sandbox::Engine {
            return Ok(());
        }
        let failed = |step| kernel(spec.endpoint, step);
        let mut netlink = Netlink::open(&self.far).map_err(failed("open the sandbox's netlink"))?;
        let index = netlink.index(&self.ifname).map_err(failed("find the interface"))?;
        match spec.sandbox {
            Sandbox::Host => self.keep_to_itself().map_err(|source| AttachError::Kernel {
                step: "set up the interface",
                endpoint: spec.endpoint,
                source,
            })?,
            _ => netlink.set_up("lo").map_err(failed("take up the loopback interface"))?,
        }
        netlink.set_up(&self.ifname).map_err(failed("take up the interface"))?;
        self.await_carrier(near);
        // The kernel takes note of the carrier when it is asked for the link (Linux 6.8). An IPv6
        // address given before would lack its subnet's route until then.
        netlink.link(&self.ifname).map_err(failed("look at the interface"))?;
        for &prefix in &spec.addresses {
            netlink.add_address(index, prefix).map_err(failed("add the address"))?;
        }
        self.await_addresses(spec, &mut netlink);
        for &gateway in &spec.gateways {
            self.route(spec, &mut netlink, index, gateway)?;
        }
        // The neighbours' caches expire by themselves, only later.
        if let Err(error) = self.announce(spec) {
            let error = Chain(&error);
            tracing::debug!(port = %self.host_ifname, %error, "the port was not announced");
        }
        Ok(())
    }

    /// Waits until the bridge forwards what the sandbox sends: it learns of the far end's rise from
    /// a kernel worker that may take its time. Asking for the link hurries it (Linux 6.8).
    fn await_carrier(&self, near: &mut Netlink) {
        // A port that has gone will be told of by others.
        let forwards = || near.link(&self.host_ifname).map_or(true, |link| link.forwards());
        if !holds_in_time(forwards) {
            tracing::warn!(port = %self.host_ifname, "the bridge does not forward the port yet");
        }
    }

    /// Waits until the sandbox takes in what is sent to its addresses: for IPv6, another kernel
    /// worker sees to it.
    fn await_addresses(&self, spec: &AttachSpec, far: &mut Netlink) {
        for prefix in &spec.addresses {
            if !holds_in_time(|| far.takes_in(prefix.ip).unwrap_or(true)) {
                let port = &self.host_ifname;
                tracing::warn!(%port, ip = %prefix.ip, "the sandbox does not take in the address yet");
            }
        }
    }

    fn route(
        &self,
        spec: &AttachSpec,
        netlink: &mut Netlink,
        index: u32,
        gateway: IpAddr,
    ) -> Result<(), AttachError> {
        let failed = kernel(spec.endpoint, "add the default route");
        let routes = netlink.default_routes().map_err(kernel(spec.endpoint, "list the routes"))?;
        match routes.iter().find(|(ip, _)| ip.is_ipv4() == gateway.is_ipv4()) {
            Some((existing, by)) if *existing == gateway && *by == index => Ok(()),
            Some((existing, _)) => Err(AttachError::DefaultRouteTaken {
                sandbox: spec.sandbox.clone(),
                gateway,
                existing: *existing,
            }),
            None => netlink.add_default_route(index, gateway, false).map_err(failed),
        }
    }

    /// Sees to it that a host, which has other addresses and routes too, shows the network none of
    /// them and learns none from it.
    fn keep_to_itself(&self) -> Result<(), KernelError> {
        self.far.run(|| write_settings(&host_settings(&self.ifname)))
    }

    /// Tells the neighbours on this host who has the addresses now (gratuitous ARP, unsolicited
    /// neighbour advertisement), so that they forget who had them before.
    ///
    /// The kernel does it when an interface is given a MAC address, if it is told to; the same one
    /// will do.
    fn announce(&self, spec: &AttachSpec) -> Result<(), KernelError> {
        self.far.run(|| write_settings(&sandbox_settings(&self.ifname, self.surface)))?;
        let mac = LinkAttribute::Address(spec.mac.octets().to_vec());
        Ok(Netlink::open(&self.far)?.change_link(&self.ifname, vec![mac])?)
    }
}

fn write_settings(settings: &[(String, &str)]) -> Result<(), KernelError> {
    for (path, value) in settings {
        let path = format!("/proc/sys/net/{path}");
        match fs::write(&path, value) {
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(KernelError::Sysctl { path, source }),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// What the host's own interface on a network is told, by path under `/proc/sys/net`.
fn host_settings(ifname: &str) -> [(String, &'static str); 4] {
    [
        (format!("ipv4/conf/{ifname}/arp_ignore"), "1"),
        (format!("ipv4/conf/{ifname}/arp_announce"), "2"),
        (format!("ipv6/conf/{ifname}/accept_ra"), "0"),
        (format!("ipv6/conf/{ifname}/autoconf"), "0"),
    ]
}

/// What an interface in a sandbox is told, by path under `/proc/sys/net`.
///
/// On a bridge, neighbours are asked for every 50 ms rather than every second, for three seconds as
/// before: the answer is always near, since this host gives it, but an endpoint that was attached
/// elsewhere a moment ago may not be known to it yet.
fn sandbox_settings(ifname: &str, surface: Surface) -> Vec<(String, &'static str)> {
    let asking = [
        (format!("ipv4/neigh/{ifname}/retrans_time_ms"), "50"),
        (format!("ipv4/neigh/{ifname}/mcast_solicit"), "60"),
        (format!("ipv6/neigh/{ifname}/retrans_time_ms"), "50"),
        (format!("ipv6/neigh/{ifname}/mcast_solicit"), "60"),
    ];
    let telling = [
        (format!("ipv4/conf/{ifname}/arp_notify"), "1"),
        (format!("ipv6/conf/{ifname}/ndisc_notify"), "1"),
    ];
    match surface {
        Surface::Bridge => asking.into_iter().chain(telling).collect(),
        Surface::Lan => telling.into(),
    }
}

/// Looks again and again; a blocking thread has nothing better to do, and the kernel offers no
/// event that all versions send.
pub(crate) fn holds_in_time(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < WORKER_TIMEOUT {
        if condition() {
            return true;
        }
        thread::park_timeout(WORKER_POLL);
    }
    false
}

const WORKER_TIMEOUT: Duration = Duration::from_secs(2);
const WORKER_POLL: Duration = Duration::from_millis(2);

pub(crate) fn open_sandbox(spec: &AttachSpec, host: &Namespace) -> Result<Namespace, AttachError> {
    let opened = match &spec.sandbox {
        Sandbox::Engine | Sandbox::Host => return Ok(host.clone()),
        Sandbox::Pid(pid) => Namespace::of_process(*pid),
        Sandbox::Path(path) => Namespace::open(path),
    };
    let far = opened.map_err(|source| AttachError::Sandbox { endpoint: spec.endpoint, source })?;
    match far.is(host) {
        true => Err(AttachError::HostSandbox { sandbox: spec.sandbox.clone() }),
        false => Ok(far),
    }
}

/// Refuses subnets that the host routes elsewhere: what goes there would go astray.
fn refuse_overlap(spec: &AttachSpec, host: &mut Netlink) -> Result<(), AttachError> {
    let failed = |step| kernel(spec.endpoint, step);
    let links = host.links().map_err(failed("list the host's interfaces"))?;
    let routes = host.routes().map_err(failed("list the host's routes"))?;
    for prefix in &spec.addresses {
        let Ok(subnet) = IpNet::new(prefix.ip, prefix.len).map(|net| net.trunc()) else { continue };
        let overlaps = |net: &IpNet| net.contains(&subnet) || subnet.contains(net);
        if let Some((route, by)) =
            underlay::foreign_routes(&routes, &links).find(|(net, _)| overlaps(net))
        {
            let ifname = by.map_or_else(|| "no interface".into(), |link| link.name.clone());
            return Err(AttachError::RouteTaken { subnet, route, ifname });
        }
    }
    Ok(())
}

/// Whether `link` is the other end of `near`. Indexes of another namespace may coincide, so the
/// MAC has its say.
fn is_far_end(link: &Link, near: &Link, mac: MacAddr) -> bool {
    near.peer == Some(link.index) && link.peer == Some(near.index) && link.mac == mac.octets()
}

pub(crate) fn choose_name(
    spec: &AttachSpec,
    taken: &BTreeMap<String, Link>,
) -> Result<String, AttachError> {
    let wanted = match (&spec.ifname, &spec.sandbox) {
        (_, Sandbox::Host) => exposed_name(spec.network),
        (Some(name), _) => name.clone(),
        (None, Sandbox::Engine) => waiting_name(spec.endpoint),
        (None, _) => {
            let free = (0u32..).map(|n| format!("eth{n}")).find(|name| !taken.contains_key(name));
            return Ok(free.expect("there are fewer interfaces than numbers"));
        }
    };
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    match () {
        () if wanted.is_empty() || wanted.len() > 15 => {
            Err(AttachError::InvalidIfname { ifname: wanted })
        }
        () if wanted == "." || wanted == ".." || wanted.contains(odd) => {
            Err(AttachError::InvalidIfname { ifname: wanted })
        }
        () if taken.contains_key(&wanted) => {
            Err(AttachError::IfnameTaken { sandbox: spec.sandbox.clone(), ifname: wanted })
        }
        () => Ok(wanted),
    }
}

/// The far end's name until an engine renames it.
fn waiting_name(endpoint: EndpointId) -> String {
    format!("wfp{}", endpoint.short())
}

fn create(
    spec: &AttachSpec,
    network: &OverlayNetwork,
    near: &mut Netlink,
    host_ifname: &str,
    far: &Namespace,
    ifname: &str,
) -> Result<(), NetlinkError> {
    let mtu = spec.mtu.unwrap_or(network.mtu).into();
    let mut peer = link::named(ifname);
    peer.attributes.extend([
        LinkAttribute::Address(spec.mac.octets().to_vec()),
        LinkAttribute::NetNsFd(far.file().as_raw_fd()),
    ]);
    peer.attributes.extend(mtu::far_end(mtu, network.transport));
    let mut message = link::veth(host_ifname, peer);
    message.attributes.push(LinkAttribute::Mtu(mtu));
    near.create_link(message)?;
    let identity =
        Port { mac: spec.mac, ips: spec.addresses.iter().map(|p: &Prefix| p.ip).collect() };
    let label = Label { endpoint: spec.endpoint, identity, mtu: spec.mtu };
    let alias = LinkAttribute::IfAlias(label.to_string());
    near.change_link(host_ifname, vec![alias, link::no_address_generation()])
}

pub(crate) fn kernel(
    endpoint: EndpointId,
    step: &'static str,
) -> impl FnOnce(NetlinkError) -> AttachError {
    move |source| AttachError::Kernel { step, endpoint, source: source.into() }
}
