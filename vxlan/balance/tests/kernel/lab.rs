use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Builder, sync::watch};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_balance::{
    Backend, Balancer, Desired, Frontend, HostPublish, NetworkBalance, NetworkStatus, Pool,
};
use weft_model::{EndpointId, MacAddr, NetworkId, NodeId, Protocol, Source, Spread, Vni, VtepAddr};
use weft_vxlan::{
    AttachSpec, DataPlane, HostRules, Namespace, OverlayNetwork, Port, Prefix, Sandbox, Station,
    Transport, namespace_name,
};

/// The room that the data plane's tests have.
#[path = "../../../tests/kernel/room.rs"]
mod room;

pub(crate) use room::{at, attempt, eventually, in_room, namespace, run};

/// ```text
///   stations 1.. ── br0 ─ vx0 ┄┄ host 1 ─ eth0 ───── eth0 ─ host 2 ┄┄ vx0 ─ br0 ── stations 11..
/// ```
pub(crate) struct Lab {
    dir: PathBuf,
    pub(crate) one: Host,
    pub(crate) two: Host,
    sandboxes: BTreeMap<u8, Namespace>,
}

/// Runs `test` with two hosts that carry one network, in a room of its own.
pub(crate) fn in_lab(stations: &'static [u8], test: impl AsyncFnOnce(Lab) + Send + 'static) {
    in_room(room_builder(), async move |dir| test(Lab::new(dir, stations).await).await);
}

/// Data plane and balancer go on while a test talks, which blocks its thread.
pub(crate) fn room_builder() -> Builder {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(1);
    builder
}

impl Lab {
    async fn new(dir: PathBuf, stations: &[u8]) -> Self {
        let namespaces = [1, 2].map(|n| namespace(&dir, &format!("host{n}")));
        let path = at(&namespaces[1]);
        run(&namespaces[0], &format!("ip link add eth0 type veth peer name eth0 netns {path}"));
        for (namespace, n) in namespaces.iter().zip(1..) {
            run(namespace, &format!("ip addr add 192.0.2.{n}/24 dev eth0; ip link set eth0 up"));
        }
        let [one, two] = namespaces;
        let one = Host::start(Remains::new(1, one, dir.join("run1")));
        let two = Host::start(Remains::new(2, two, dir.join("run2")));
        let mut lab = Self { dir, one, two, sandboxes: BTreeMap::new() };
        for host in [&lab.one, &lab.two] {
            host.plane_desired.send_replace(Some(Arc::new(weft_vxlan::Desired {
                networks: [(net(), Arc::new(network(host.n, stations)))].into(),
                host: HostRules {
                    local: [vtep(host.n)].into(),
                    vteps: [vtep(3 - host.n)].into(),
                    ..HostRules::default()
                },
            })));
        }
        for &station in stations {
            let sandbox = namespace(&lab.dir, &format!("station{station}"));
            let spec = spec(station, &sandbox);
            let host = lab.host(host_of(station));
            host.plane.attach(spec).await.unwrap_or_else(|error| panic!("{error:?}"));
            lab.sandboxes.insert(station, sandbox);
        }
        for host in [&lab.one, &lab.two] {
            host.carries_network().await;
        }
        lab
    }

    pub(crate) fn host(&self, n: u8) -> &Host {
        if n == 1 { &self.one } else { &self.two }
    }

    pub(crate) fn sandbox(&self, station: u8) -> &Namespace {
        &self.sandboxes[&station]
    }

    /// Publishes `balance` on both hosts and waits until it is in force.
    pub(crate) async fn serve(&self, balance: &NetworkBalance) {
        for host in [&self.one, &self.two] {
            host.serve(balance).await;
        }
    }
}

/// A host whose data plane and balancer run.
pub(crate) struct Host {
    pub(crate) n: u8,
    namespace: Namespace,
    runtime_dir: PathBuf,
    plane_desired: watch::Sender<Option<Arc<weft_vxlan::Desired>>>,
    desired: watch::Sender<Option<Arc<Desired>>>,
    pub(crate) plane: DataPlane,
    pub(crate) balancer: Balancer,
    tracker: TaskTracker,
    stop: DropGuard,
}

/// What is left of a host whose agent has ended.
struct Remains {
    n: u8,
    namespace: Namespace,
    runtime_dir: PathBuf,
    plane_desired: Option<Arc<weft_vxlan::Desired>>,
    desired: Option<Arc<Desired>>,
}

impl Remains {
    fn new(n: u8, namespace: Namespace, runtime_dir: PathBuf) -> Self {
        let (plane_desired, desired) = (Some(Arc::default()), Some(Arc::default()));
        Self { n, namespace, runtime_dir, plane_desired, desired }
    }
}

impl Host {
    fn start(Remains { n, namespace, runtime_dir, plane_desired, desired }: Remains) -> Self {
        let (plane_desired, plane_followed) = watch::channel(plane_desired);
        let (desired, followed) = watch::channel(desired);
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        // Repairs in these tests come from notifications, not from waiting.
        let resync = Duration::from_secs(600);
        let config = weft_vxlan::Config {
            runtime_dir: runtime_dir.clone(),
            host: Some(namespace.clone()),
            resync,
            ..weft_vxlan::Config::default()
        };
        let plane = DataPlane::start(config, plane_followed, &tracker, &stop).unwrap();
        let config = weft_balance::Config {
            host: Some(namespace.clone()),
            resync,
            ..weft_balance::Config::default()
        };
        let balancer = Balancer::start(config, plane.clone(), followed, &tracker, &stop).unwrap();
        let stop = stop.drop_guard();
        Self { n, namespace, runtime_dir, plane_desired, desired, plane, balancer, tracker, stop }
    }

    /// Ends the agent as a crash does: nothing is cleaned up. Then starts another one, which finds
    /// `balance` desired.
    pub(crate) async fn restart(self, balance: &NetworkBalance) -> Self {
        let Self {
            n, namespace, runtime_dir, plane_desired, plane, balancer, tracker, stop, ..
        } = self;
        drop((plane, balancer, stop));
        tracker.close();
        tracker.wait().await;
        let plane_desired = plane_desired.borrow().clone();
        let desired = Some(Arc::new(desired(balance)));
        Self::start(Remains { n, namespace, runtime_dir, plane_desired, desired })
    }

    pub(crate) fn network_namespace(&self) -> Namespace {
        Namespace::open(self.runtime_dir.join(namespace_name(net()))).unwrap()
    }

    async fn carries_network(&self) {
        let status = self.plane.status();
        let wanted = self.plane_desired.borrow().clone().unwrap();
        eventually("the data plane settles", async || {
            let status = status.borrow().clone();
            let reached = status.networks.get(&net()).and_then(|net| net.reached.clone());
            match reached.as_ref() == wanted.networks.get(&net()) {
                true => Ok(()),
                false => Err(format!("{status:#?}")),
            }
        })
        .await;
    }

    pub(crate) async fn serve(&self, balance: &NetworkBalance) {
        let desired = desired(balance);
        let balance = Arc::clone(&desired.networks[&net()]);
        self.desired.send_replace(Some(Arc::new(desired)));
        self.serves(&balance).await;
    }

    pub(crate) async fn serves(&self, balance: &NetworkBalance) {
        eventually(&format!("host {} serves", self.n), async || {
            let status = self.status();
            match status.applied.as_deref() == Some(balance) {
                true => Ok(()),
                false => Err(format!("{status:?}")),
            }
        })
        .await;
    }

    /// Withdraws all services.
    pub(crate) fn withdraw(&self) {
        self.desired.send_replace(Some(Arc::default()));
    }

    pub(crate) fn status(&self) -> NetworkStatus {
        self.balancer.status().borrow().networks.get(&net()).cloned().unwrap_or_default()
    }
}

fn desired(balance: &NetworkBalance) -> Desired {
    Desired {
        networks: [(net(), Arc::new(balance.clone()))].into(),
        host: Arc::new(HostPublish::default()),
    }
}

/// Services of the network; what is said of one holds for all virtual addresses.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    pub(crate) port: Option<u16>,
    pub(crate) target: Option<u16>,
    /// Stations, and their weights.
    pub(crate) backends: BTreeMap<u8, u16>,
    pub(crate) spread: Spread,
    pub(crate) affinity: Option<Duration>,
}

impl Service {
    pub(crate) fn new(port: u16, target: u16, stations: &[u8]) -> Self {
        Self {
            port: Some(port),
            target: Some(target),
            backends: stations.iter().map(|station| (*station, 1)).collect(),
            spread: Spread::Hash,
            affinity: None,
        }
    }

    /// As host `host` shall have it.
    pub(crate) fn balance(&self, host: u8) -> NetworkBalance {
        let mut frontends = BTreeMap::new();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for (index, ip) in VIPS.into_iter().enumerate() {
                let backends = self.backends.iter().map(|(&station, &weight)| {
                    let ip = ips(station)[index];
                    let (node, local) = (node(host_of(station)), host_of(station) == host);
                    let port = self.target;
                    (endpoint(station), Backend { ip, port, weight, node, local })
                });
                let pool = Pool {
                    service: "web".parse().unwrap(),
                    backends: backends.collect(),
                    spread: self.spread,
                    affinity: self.affinity,
                    source: Source::Preserve,
                };
                frontends.insert(Frontend { ip, protocol, port: self.port }, Arc::new(pool));
            }
        }
        NetworkBalance {
            gateway_mac: MacAddr::for_gateway(net()),
            gateways: GATEWAYS.into(),
            frontends,
        }
    }
}

pub(crate) fn net() -> NetworkId {
    NetworkId::from([7; 16])
}

pub(crate) const VIPS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 200)), IpAddr::V6(v6(200))];
pub(crate) const GATEWAYS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(10, 1, 0, 254)), IpAddr::V6(v6(254))];

const fn v6(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, last)
}

fn network(host: u8, stations: &[u8]) -> OverlayNetwork {
    let (here, there): (Vec<u8>, Vec<u8>) =
        stations.iter().partition(|station| host_of(**station) == host);
    let remotes = there.iter().map(|&station| {
        let at = host_of(station);
        (mac(station), Station { node: node(at), vtep: vtep(at), ips: ips(station).into() })
    });
    let ports = here
        .iter()
        .map(|&station| (endpoint(station), Port { mac: mac(station), ips: ips(station).into() }));
    OverlayNetwork {
        id: net(),
        name: "app".parse().unwrap(),
        transport: Transport::Vxlan {
            vni: Vni::try_from(4097).unwrap(),
            local: vtep(host),
            port: 4789,
        },
        mtu: 1450,
        gateway_mac: MacAddr::for_gateway(net()),
        gateways: GATEWAYS.map(|ip| Prefix { ip, len: if ip.is_ipv4() { 24 } else { 64 } }).into(),
        vips: VIPS.into(),
        internal: true,
        multicast: false,
        isolated: false,
        provisional: false,
        remotes: remotes.collect(),
        flood: BTreeMap::new(),
        ports: ports.collect(),
        uplink: None,
        transit: None,
    }
}

pub(crate) fn spec(station: u8, sandbox: &Namespace) -> AttachSpec {
    let [v4, v6] = ips(station);
    AttachSpec {
        network: net(),
        endpoint: endpoint(station),
        sandbox: Sandbox::Path(sandbox.path().to_owned()),
        ifname: None,
        mac: mac(station),
        addresses: vec![Prefix { ip: v4, len: 24 }, Prefix { ip: v6, len: 64 }],
        gateways: vec![GATEWAYS[0], "fe80::1".parse().unwrap()],
        mtu: None,
    }
}

pub(crate) fn ips(station: u8) -> [IpAddr; 2] {
    [IpAddr::from([10, 1, 0, station]), IpAddr::V6(v6(station.into()))]
}

pub(crate) fn endpoint(station: u8) -> EndpointId {
    let mut bytes = [0x5a; 16];
    bytes[0] = station;
    EndpointId::from(bytes)
}

fn host_of(station: u8) -> u8 {
    if station < 10 { 1 } else { 2 }
}

pub(crate) fn mac(station: u8) -> MacAddr {
    MacAddr::for_address(net(), ips(station)[0])
}

pub(crate) fn node(n: u8) -> NodeId {
    NodeId::from([n; 16])
}

pub(crate) fn vtep(n: u8) -> VtepAddr {
    IpAddr::from([192, 0, 2, n]).into()
}
