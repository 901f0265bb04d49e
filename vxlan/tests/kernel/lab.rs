use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use nix::mount::{MntFlags, umount2};
use tokio::{runtime::Builder, sync::watch};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_model::{EndpointId, MacAddr, NetworkId, NodeId, Vni, VtepAddr};
use weft_vxlan::{
    AddressPair, AttachSpec, Attached, Config, DataPlane, Desired, HostRules, Namespace,
    OverlayNetwork, Port, Prefix, Sandbox, Station, Table, Transit, Transport, Uplink,
    namespace_name,
};

pub(crate) use crate::room::{at, attempt, eventually, run};
use crate::{
    room::{self, in_room},
    tunnels::{self, LabTunnel},
};

/// Runs `test` in a room of its own.
pub(crate) fn in_lab(test: impl AsyncFnOnce(&Lab) + Send + 'static) {
    in_room(Builder::new_current_thread(), async move |dir| test(&Lab { dir }).await);
}

/// ```text
///   sandboxes ── br0 ─ vx0 ┄┄┄ host 1 ─ eth0 ──┐        ┌── eth0 ─ host 2 ┄┄┄ vx0 ─ br0 ── sandboxes
///               weft-…                         └─ wire ─┘                        weft-…
/// ```
pub(crate) struct Lab {
    dir: PathBuf,
}

/// Which family the hosts talk to each other in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Underlay {
    V4,
    V6,
}

impl Underlay {
    pub(crate) fn vtep(self, host: u8) -> VtepAddr {
        match self {
            Self::V4 => IpAddr::from([192, 0, 2, host]).into(),
            Self::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, host.into())).into(),
        }
    }

    pub(crate) fn overhead(self) -> u16 {
        match self {
            Self::V4 => 50,
            Self::V6 => 70,
        }
    }
}

impl Lab {
    /// A bare namespace, mounted under the lab's directory.
    pub(crate) fn namespace(&self, name: &str) -> Namespace {
        room::namespace(&self.dir, name)
    }

    /// Removes a namespace, as the end of a container does.
    pub(crate) fn kill(&self, namespace: Namespace) {
        let path = namespace.path().to_owned();
        drop(namespace);
        umount2(&path, MntFlags::MNT_DETACH).unwrap();
        fs::remove_file(&path).unwrap();
    }

    /// The switch that joins the hosts.
    pub(crate) fn wire(&self) -> Namespace {
        let wire = self.namespace("wire");
        run(&wire, "ip link add wire0 type bridge");
        run(&wire, "ip link set wire0 up");
        wire
    }

    /// Host number `n` on `wire`, with its data plane running.
    pub(crate) fn host(&self, n: u8, wire: &Namespace) -> Host {
        self.host_with(n, wire, None)
    }

    /// The same, with a tunnel too if there is an underlay for it.
    pub(crate) fn host_with(&self, n: u8, wire: &Namespace, sealed: Option<Underlay>) -> Host {
        let namespace = self.namespace(&format!("host{n}"));
        run(wire, &format!("ip link add h{n} type veth peer name eth0 netns {}", at(&namespace)));
        run(wire, &format!("ip link set h{n} master wire0 up"));
        for command in [
            format!("ip addr add 192.0.2.{n}/24 dev eth0"),
            format!("ip addr add 2001:db8::{n}/64 dev eth0 nodad"),
            "ip link set eth0 up".into(),
        ] {
            run(&namespace, &command);
        }
        let runtime_dir = self.dir.join(format!("run{n}"));
        let desired = Some(Desired::default());
        Host::start(Remains { n, namespace, runtime_dir, desired, sealed })
    }

    pub(crate) fn two_hosts(&self) -> (Namespace, Host, Host) {
        let wire = self.wire();
        let (one, two) = (self.host(1, &wire), self.host(2, &wire));
        (wire, one, two)
    }
}

/// A host whose data plane runs.
pub(crate) struct Host {
    pub(crate) n: u8,
    pub(crate) namespace: Namespace,
    pub(crate) runtime_dir: PathBuf,
    pub(crate) desired: watch::Sender<Option<Arc<Desired>>>,
    pub(crate) plane: DataPlane,
    pub(crate) tunnel: Option<LabTunnel>,
    tracker: TaskTracker,
    /// The threads of a tunnel go on until it is dropped.
    stop: DropGuard,
}

/// What is left of a host whose agent has ended.
pub(crate) struct Remains {
    pub(crate) n: u8,
    pub(crate) namespace: Namespace,
    pub(crate) runtime_dir: PathBuf,
    /// What the agent was told last.
    pub(crate) desired: Option<Desired>,
    /// The underlay of its tunnel, if it had one.
    pub(crate) sealed: Option<Underlay>,
}

impl Host {
    pub(crate) fn start(remains: Remains) -> Self {
        let Remains { n, namespace, runtime_dir, desired, sealed } = remains;
        let (desired, followed) = watch::channel(desired.map(Arc::new));
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let tunnel =
            sealed.map(|underlay| LabTunnel::start(n, underlay, &namespace, &tracker, &stop));
        let config = Config {
            runtime_dir: runtime_dir.clone(),
            host: Some(namespace.clone()),
            // Repairs in these tests come from notifications, not from waiting.
            resync: Duration::from_secs(600),
            tunnel: match &tunnel {
                Some(tunnel) => Ok(tunnel.handle.clone()),
                None => Config::default().tunnel,
            },
        };
        let plane = DataPlane::start(config, followed, &tracker, &stop).unwrap();
        let stop = stop.drop_guard();
        Self { n, namespace, runtime_dir, desired, plane, tunnel, tracker, stop }
    }

    /// Ends the agent as a crash does: nothing is cleaned up.
    pub(crate) async fn crash(self) -> Remains {
        let Self { n, namespace, runtime_dir, desired, plane, tunnel, tracker, stop } = self;
        let sealed = tunnel.map(|tunnel| tunnel.underlay);
        drop(plane);
        drop(stop);
        tracker.close();
        tracker.wait().await;
        if let Some(underlay) = sealed {
            // A pass that nobody waits for any longer may hold the tunnel for a moment.
            tunnels::ports_are_free(&namespace, underlay.vtep(n).ip()).await;
        }
        let desired = desired.borrow().clone().map(Arc::unwrap_or_clone);
        Remains { n, namespace, runtime_dir, desired, sealed }
    }

    /// A new agent, with the desired state of the one before, or none if it had none.
    pub(crate) async fn restart(self) -> Self {
        Self::start(self.crash().await)
    }

    /// A new agent that finds one network of the desired state changed since.
    pub(crate) async fn restart_with(
        self,
        network: NetworkId,
        change: impl FnOnce(&mut OverlayNetwork),
    ) -> Self {
        let mut remains = self.crash().await;
        let networks = &mut remains.desired.as_mut().unwrap().networks;
        change(Arc::make_mut(networks.get_mut(&network).unwrap()));
        Self::start(remains)
    }

    /// Changes the desired state.
    pub(crate) fn desire(&self, change: impl FnOnce(&mut Desired)) {
        self.desired.send_modify(|desired| {
            let mut next = desired.take().map(Arc::unwrap_or_clone).unwrap_or_default();
            change(&mut next);
            *desired = Some(Arc::new(next));
        });
    }

    /// Changes one network of the desired state.
    pub(crate) fn desire_network(&self, id: NetworkId, change: impl FnOnce(&mut OverlayNetwork)) {
        self.desire(|desired| change(Arc::make_mut(desired.networks.get_mut(&id).unwrap())));
    }

    /// Carries `network` here, with the rules that let its peers in.
    pub(crate) fn carry(&self, network: &Net, underlay: Underlay) {
        let overlay = network.on(self.n, underlay);
        self.desire(|desired| {
            desired.networks.insert(overlay.id, Arc::new(overlay));
            desired.host = HostRules {
                local: [underlay.vtep(self.n)].into(),
                vteps: network.hosts().filter(|n| *n != self.n).map(|n| underlay.vtep(n)).collect(),
                sealed_ports: self.tunnel.iter().flat_map(LabTunnel::ports).collect(),
                uplink_pools: uplink_pools(),
                ..HostRules::default()
            };
        });
    }

    pub(crate) fn network_namespace(&self, network: NetworkId) -> Namespace {
        Namespace::open(self.runtime_dir.join(namespace_name(network))).unwrap()
    }

    pub(crate) async fn attach(&self, spec: AttachSpec) -> Attached {
        self.plane.attach(spec).await.unwrap_or_else(|error| panic!("{error:?}"))
    }

    /// Waits until every table of `network` is as desired, and the host lets its peers in.
    pub(crate) async fn settled(&self, network: NetworkId) {
        let status = self.plane.status();
        let local = self.desired.borrow().as_ref().unwrap().host.local.clone();
        eventually(&format!("host {} lets its peers in", self.n), async || {
            let rules = attempt(&self.namespace, "nft list table inet weft")?;
            match local.iter().all(|vtep| rules.contains(&vtep.to_string())) {
                true => Ok(()),
                false => Err(rules),
            }
        })
        .await;
        eventually(&format!("{network} settles on host {}", self.n), async || {
            let status = status.borrow().clone();
            let tables = status.networks.get(&network).map(|network| network.tables.clone());
            match tables {
                Some(tables)
                    if tables.contains_key(&Table::Uplink)
                        && tables
                            .values()
                            .chain(status.host.values())
                            .all(|t| t.error.is_none())
                        && status.host.contains_key(&Table::Rules) =>
                {
                    Ok(())
                }
                _ => Err(format!("{status:#?}")),
            }
        })
        .await;
    }

    /// Operations applied since the start, all tables together.
    pub(crate) fn operations(&self) -> u64 {
        let status = self.plane.status().borrow().clone();
        let tables = status.networks.values().flat_map(|network| network.tables.values());
        tables.chain(status.host.values()).map(|table| table.applied).sum()
    }
}

/// A network of the tests: number `n` has VNI 4096+n; all have the same subnets.
#[derive(Clone, Debug)]
pub(crate) struct Net {
    n: u8,
    /// Stations by their number; where each one is, by its host's.
    pub(crate) stations: BTreeMap<u8, u8>,
    pub(crate) internal: bool,
    pub(crate) multicast: bool,
    pub(crate) encrypted: bool,
    /// Of one host alone.
    pub(crate) local: bool,
    pub(crate) isolated: bool,
    /// Open to clients from outside by all hosts.
    pub(crate) transit: bool,
}

impl Net {
    pub(crate) fn new(n: u8, stations: &[(u8, u8)]) -> Self {
        Self {
            n,
            stations: stations.iter().copied().collect(),
            internal: true,
            multicast: false,
            encrypted: false,
            local: false,
            isolated: false,
            transit: false,
        }
    }

    /// The hosts that have it.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = u8> {
        let hosts: BTreeSet<_> = self.stations.values().copied().chain([1, 2]).collect();
        hosts.into_iter()
    }

    /// The same, of one host alone, with a way out.
    pub(crate) fn local(n: u8, stations: &[(u8, u8)]) -> Self {
        Self { local: true, internal: false, ..Self::new(n, stations) }
    }

    /// The same, its stations kept apart.
    pub(crate) fn isolated(n: u8, stations: &[(u8, u8)]) -> Self {
        Self { isolated: true, ..Self::local(n, stations) }
    }

    /// The same, encrypted.
    pub(crate) fn sealed(n: u8, stations: &[(u8, u8)]) -> Self {
        Self { encrypted: true, ..Self::new(n, stations) }
    }

    pub(crate) fn id(&self) -> NetworkId {
        NetworkId::from([self.n; 16])
    }

    pub(crate) fn ips(&self, station: u8) -> [IpAddr; 2] {
        [
            IpAddr::from([10, 1, 0, station]),
            IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, station.into())),
        ]
    }

    pub(crate) fn mac(&self, station: u8) -> MacAddr {
        MacAddr::for_address(self.id(), self.ips(station)[0])
    }

    pub(crate) fn endpoint(&self, station: u8) -> EndpointId {
        let mut bytes = [self.n; 16];
        bytes[0] = station;
        EndpointId::from(bytes)
    }

    /// The network as host `host` shall carry it.
    pub(crate) fn on(&self, host: u8, underlay: Underlay) -> OverlayNetwork {
        let remotes = self.stations.iter().filter(|(_, at)| **at != host).map(|(&station, &at)| {
            let ips = self.ips(station).into();
            (self.mac(station), Station { node: node(at), vtep: underlay.vtep(at), ips })
        });
        let ports = self.stations.iter().filter(|(_, at)| **at == host).map(|(&station, _)| {
            let ips = self.ips(station).into();
            (self.endpoint(station), Port { mac: self.mac(station), ips })
        });
        let others: BTreeSet<_> = self.stations.values().filter(|at| **at != host).collect();
        OverlayNetwork {
            id: self.id(),
            name: format!("net{}", self.n).parse().unwrap(),
            transport: match (self.encrypted, self.local) {
                (true, _) => Transport::Sealed,
                (false, true) => Transport::Local,
                (false, false) => Transport::Vxlan {
                    vni: Vni::try_from(4096 + u32::from(self.n)).unwrap(),
                    local: underlay.vtep(host),
                    port: 4789,
                },
            },
            // A sealed packet has 32 bytes more around it than a VXLAN packet.
            mtu: 1500 - underlay.overhead() - if self.encrypted { 32 } else { 0 },
            gateway_mac: MacAddr::for_gateway(self.id()),
            gateways: vec![
                Prefix { ip: IpAddr::from([10, 1, 0, 254]), len: 24 },
                Prefix { ip: "fd00:1::fe".parse().unwrap(), len: 64 },
            ],
            vips: BTreeSet::new(),
            internal: self.internal,
            multicast: self.multicast,
            isolated: self.isolated,
            provisional: false,
            remotes: remotes.collect(),
            flood: others.into_iter().map(|&at| (node(at), underlay.vtep(at))).collect(),
            ports: ports.collect(),
            uplink: Some(self.uplink()),
            transit: self.transit.then(|| Transit {
                own: node(host),
                routers: self
                    .hosts()
                    .filter(|at| *at != host)
                    .map(|at| (node(at), underlay.vtep(at)))
                    .collect(),
                addresses: [Underlay::V4, Underlay::V6].map(|of| of.vtep(host).ip()).into(),
            }),
        }
    }

    pub(crate) fn uplink(&self) -> Uplink {
        let v4 = |end: u8| Ipv4Addr::new(169, 254, 192, self.n * 2 + end);
        let v6 = |end: u8| {
            Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, u16::from(self.n) * 2 + u16::from(end))
        };
        Uplink {
            v4: Some(AddressPair { host: v4(0), network: v4(1) }),
            v6: Some(AddressPair { host: v6(0), network: v6(1) }),
        }
    }

    pub(crate) fn spec(&self, station: u8, sandbox: &Namespace) -> AttachSpec {
        let [v4, v6] = self.ips(station);
        AttachSpec {
            network: self.id(),
            endpoint: self.endpoint(station),
            sandbox: Sandbox::Path(sandbox.path().to_owned()),
            ifname: None,
            mac: self.mac(station),
            addresses: vec![Prefix { ip: v4, len: 24 }, Prefix { ip: v6, len: 64 }],
            gateways: vec![IpAddr::from([10, 1, 0, 254]), "fe80::1".parse().unwrap()],
            mtu: None,
        }
    }
}

/// The node of host `n`.
pub(crate) fn node(n: u8) -> NodeId {
    NodeId::from([n; 16])
}

fn uplink_pools() -> Vec<ipnet::IpNet> {
    vec!["169.254.192.0/18".parse().unwrap(), "fd77::/64".parse().unwrap()]
}

/// Sends one ping that must be answered; nothing is retried, so that a lost packet shows.
pub(crate) fn ping(from: &Namespace, to: IpAddr) -> Result<String, String> {
    attempt(from, &format!("ping -n -c 1 -W 10 {to}"))
}

/// The same where there need not be an answer, or not yet: waits for a second only.
pub(crate) fn probe(from: &Namespace, to: IpAddr) -> Result<String, String> {
    attempt(from, &format!("ping -n -c 1 -W 1 {to}"))
}

/// Packets that `filter` matches on `device` while it exists, counted by nftables at ingress or
/// egress of the device's namespace.
pub(crate) struct Tally<'a> {
    namespace: &'a Namespace,
}

impl<'a> Tally<'a> {
    /// Counts what the wire's bridge forwards and matches `filter`.
    pub(crate) fn on(namespace: &'a Namespace, filter: &str) -> Self {
        let script = format!(
            "table bridge tally {{\n chain counted {{\n type filter hook prerouting priority 0;\n {filter} counter\n }}\n}}"
        );
        run(namespace, &format!("printf '%s\\n' '{script}' | nft -f -"));
        Self { namespace }
    }

    pub(crate) fn packets(&self) -> u64 {
        let listing = run(self.namespace, "nft list table bridge tally");
        let words: Vec<_> = listing.split_whitespace().collect();
        let position = words.iter().position(|word| *word == "packets").unwrap();
        words[position + 1].parse().unwrap()
    }
}

impl Drop for Tally<'_> {
    fn drop(&mut self) {
        // The namespace may be on its way out, with a panic.
        let _ = attempt(self.namespace, "nft delete table bridge tally");
    }
}
