use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_balance::{
    Backend, Balancer, Desired, Frontend, HostPort, HostPublish, HostStatus, NetworkBalance, Pool,
};
use weft_model::{Family, MacAddr, Protocol, Source, Spread, Vni};
use weft_vxlan::{
    AddressPair, DataPlane, HostRules, Namespace, OverlayNetwork, Port, Prefix, Station, Transit,
    Transport, Uplink,
};

use crate::{
    lab::{
        GATEWAYS, at, endpoint, eventually, in_room, ips, mac, namespace, net, node, room_builder,
        run, spec, vtep,
    },
    talk::serve,
};

/// Hosts 1 to 3 on one wire, each with the station of its number on one network; and a client that
/// has none of it.
pub(crate) struct Site {
    pub(crate) hosts: BTreeMap<u8, Gate>,
    pub(crate) client: Namespace,
    pub(crate) sandboxes: BTreeMap<u8, Namespace>,
    _wire: Namespace,
}

/// A port that leads to stations.
#[derive(Clone, Debug)]
pub(crate) struct Entrance {
    pub(crate) port: u16,
    /// On that address alone; on all of the host's if absent.
    pub(crate) ip: Option<IpAddr>,
    pub(crate) stations: Vec<u8>,
    pub(crate) source: Source,
    pub(crate) proxied: bool,
}

impl Entrance {
    pub(crate) fn new(port: u16, stations: &[u8]) -> Self {
        Self { port, ip: None, stations: stations.into(), source: Source::Preserve, proxied: false }
    }
}

/// Runs `test` in a room of its own.
pub(crate) fn on_site(test: impl AsyncFnOnce(Site) + Send + 'static) {
    in_room(room_builder(), async move |dir| test(Site::new(&dir).await).await);
}

impl Site {
    async fn new(dir: &std::path::Path) -> Self {
        let wire = namespace(dir, "wire");
        run(&wire, "ip link add wire0 type bridge; ip link set wire0 up");
        let join = |name: &str, n: u8| {
            let joined = namespace(dir, name);
            let path = at(&joined);
            run(&wire, &format!("ip link add w{n} type veth peer name eth0 netns {path}"));
            run(&wire, &format!("ip link set w{n} master wire0 up"));
            run(&joined, &format!("ip addr add 192.0.2.{n}/24 dev eth0"));
            run(&joined, &format!("ip addr add 2001:db8::{n}/64 dev eth0 nodad"));
            run(&joined, "ip link set eth0 up");
            joined
        };
        let client = join("client", CLIENT);
        let mut site = Self {
            hosts: BTreeMap::new(),
            client,
            sandboxes: BTreeMap::new(),
            _wire: wire.clone(),
        };
        for n in HOSTS {
            let host = join(&format!("host{n}"), n);
            let gate = Gate::start(n, host, dir.join(format!("run{n}")), Desired::default());
            let sandbox = namespace(dir, &format!("station{n}"));
            gate.plane.attach(spec(n, &sandbox)).await.unwrap_or_else(|error| panic!("{error:?}"));
            serve(n, &sandbox, TARGET);
            gate.carries_network().await;
            site.sandboxes.insert(n, sandbox);
            site.hosts.insert(n, gate);
        }
        site
    }

    /// Opens the entrances, and no others, on all hosts.
    pub(crate) async fn open(&self, entrances: &[Entrance]) {
        for gate in self.hosts.values() {
            gate.open(entrances);
        }
        for gate in self.hosts.values() {
            gate.is_open().await;
        }
    }
}

/// A host's addresses on the wire.
pub(crate) fn addresses(n: u8) -> [IpAddr; 2] {
    [IpAddr::from([192, 0, 2, n]), IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n.into()])]
}

/// A host whose data plane and balancer run.
pub(crate) struct Gate {
    pub(crate) n: u8,
    pub(crate) namespace: Namespace,
    runtime_dir: std::path::PathBuf,
    /// Nothing changes it, but the data plane ends with it.
    plane_desired: watch::Sender<Option<Arc<weft_vxlan::Desired>>>,
    desired: watch::Sender<Option<Arc<Desired>>>,
    pub(crate) plane: DataPlane,
    pub(crate) balancer: Balancer,
    tracker: TaskTracker,
    stop: DropGuard,
}

impl Gate {
    fn start(
        n: u8,
        namespace: Namespace,
        runtime_dir: std::path::PathBuf,
        desired: Desired,
    ) -> Self {
        let plane_desired = weft_vxlan::Desired {
            networks: [(net(), Arc::new(network(n)))].into(),
            host: HostRules {
                local: [vtep(n)].into(),
                vteps: HOSTS.into_iter().filter(|at| *at != n).map(vtep).collect(),
                uplink_pools: vec![
                    "169.254.192.0/18".parse().unwrap(),
                    "fd77::/64".parse().unwrap(),
                ],
                ..HostRules::default()
            },
        };
        let (plane_desired, plane_followed) = watch::channel(Some(Arc::new(plane_desired)));
        let (desired, followed) = watch::channel(Some(Arc::new(desired)));
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

    /// Ends the agent as a crash does: nothing is cleaned up. Then starts another one, after
    /// `meanwhile`.
    pub(crate) async fn restart(self, meanwhile: impl AsyncFnOnce()) -> Self {
        let Self {
            n,
            namespace,
            runtime_dir,
            plane_desired,
            desired,
            plane,
            balancer,
            tracker,
            stop,
        } = self;
        drop((plane_desired, plane, balancer, stop));
        tracker.close();
        tracker.wait().await;
        meanwhile().await;
        let desired = desired.borrow().clone().map(Arc::unwrap_or_clone).unwrap();
        Self::start(n, namespace, runtime_dir, desired)
    }

    pub(crate) fn open(&self, entrances: &[Entrance]) {
        self.desired.send_replace(Some(Arc::new(desired(self.n, entrances))));
    }

    pub(crate) fn status(&self) -> HostStatus {
        self.balancer.status().borrow().host.clone()
    }

    /// Waits until all that is desired is in force, but for ports that others have.
    pub(crate) async fn is_open(&self) {
        let wanted = self.desired.borrow().clone().unwrap();
        eventually(&format!("host {} has what it shall", self.n), async || {
            let status = self.balancer.status().borrow().clone();
            let services = status.networks.get(&net()).and_then(|network| network.applied.clone());
            let services = services.as_ref() == wanted.networks.get(&net());
            match services && status.host.applied.as_ref() == Some(&wanted.host) {
                true => Ok(()),
                false => Err(format!("{status:#?}")),
            }
        })
        .await;
    }

    async fn carries_network(&self) {
        let status = self.plane.status();
        eventually("the data plane settles", async || {
            let status = status.borrow().clone();
            match status.networks.get(&net()).and_then(|net| net.reached.as_ref()) {
                Some(_) => Ok(()),
                None => Err(format!("{status:#?}")),
            }
        })
        .await;
    }
}

fn desired(host: u8, entrances: &[Entrance]) -> Desired {
    let mut frontends = BTreeMap::new();
    let mut publish = HostPublish::default();
    let uplink = uplink();
    let ends = [IpAddr::V4(uplink.v4.unwrap().network), IpAddr::V6(uplink.v6.unwrap().network)];
    for (number, entrance) in (1000..).zip(entrances) {
        for (index, end) in ends.into_iter().enumerate() {
            let family = Family::of(end);
            if entrance.ip.is_some_and(|ip| Family::of(ip) != family) {
                continue;
            }
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let port = HostPort { ip: entrance.ip, family, protocol, port: entrance.port };
                let backends = entrance.stations.iter().map(|&station| {
                    let (ip, local) = (ips(station)[index], station == host);
                    let port = Some(TARGET);
                    (endpoint(station), Backend { ip, port, weight: 1, node: node(station), local })
                });
                let pool = Pool {
                    service: "web".parse().unwrap(),
                    backends: backends.collect(),
                    spread: Spread::Hash,
                    affinity: None,
                    source: entrance.source,
                };
                let ports = match (entrance.proxied, protocol) {
                    (true, Protocol::Tcp) => &mut publish.proxies,
                    _ => &mut publish.ports,
                };
                ports.insert(port, SocketAddr::new(end, number));
                let frontend = Frontend { ip: end, protocol, port: Some(number) };
                frontends.insert(frontend, Arc::new(pool));
            }
        }
    }
    let balance = NetworkBalance {
        gateway_mac: MacAddr::for_gateway(net()),
        gateways: GATEWAYS.into(),
        frontends,
    };
    Desired { networks: [(net(), Arc::new(balance))].into(), host: Arc::new(publish) }
}

fn uplink() -> Uplink {
    let v4 = |end| Ipv4Addr::new(169, 254, 192, end);
    Uplink {
        v4: Some(AddressPair { host: v4(0), network: v4(1) }),
        v6: Some(AddressPair {
            host: "fd77::".parse().unwrap(),
            network: "fd77::1".parse().unwrap(),
        }),
    }
}

fn network(host: u8) -> OverlayNetwork {
    let others: BTreeSet<_> = HOSTS.into_iter().filter(|n| *n != host).collect();
    let remotes = others
        .iter()
        .map(|&n| (mac(n), Station { node: node(n), vtep: vtep(n), ips: ips(n).into() }));
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
        vips: BTreeSet::new(),
        internal: false,
        multicast: false,
        isolated: false,
        provisional: false,
        remotes: remotes.collect(),
        flood: BTreeMap::new(),
        ports: [(endpoint(host), Port { mac: mac(host), ips: ips(host).into() })].into(),
        uplink: Some(uplink()),
        transit: Some(Transit {
            own: node(host),
            routers: others.iter().map(|&n| (node(n), vtep(n))).collect(),
            addresses: addresses(host).into(),
        }),
    }
}

/// What the stations serve at.
const TARGET: u16 = 80;
const HOSTS: [u8; 3] = [1, 2, 3];
pub(crate) const CLIENT: u8 = 9;
