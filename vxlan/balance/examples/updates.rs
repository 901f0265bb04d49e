//! How long a change takes, and what a connection costs, with 10, 1,000 and 10,000 services:
//!
//! ```sh
//! cargo run --release -p weft-balance --example updates
//! ```
//!
//! Needs root. Works in namespaces of its own, which go with it. Three backends a service, IPv4,
//! one TCP and one UDP port.

#![expect(clippy::print_stdout, reason = "the figures are what it is for")]

use std::{
    collections::BTreeMap,
    error::Error,
    fs::{self, File},
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_balance::{Backend, Balancer, Desired, Frontend, HostPublish, NetworkBalance, Pool};
use weft_model::{EndpointId, MacAddr, NetworkId, NodeId, Protocol, Source, Spread};
use weft_vxlan::{
    AttachSpec, DataPlane, HostRules, Namespace, NamespaceError, OverlayNetwork, Port, Prefix,
    Sandbox, Transport,
};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let dir = tempfile::tempdir()?;
    mount(Some("tmpfs"), dir.path(), Some("tmpfs"), MsFlags::empty(), none)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(measure(dir.path()))
}

async fn measure(dir: &Path) -> Outcome<()> {
    let site = Site::build(dir).await?;
    println!(
        "services  all at once  a backend: best, median, processor   a service: best, median   \
         slot repaired  flush repaired  a new flow  slab"
    );
    for count in [10u16, 1_000, 10_000] {
        let memory = kernel_memory()?;
        let mut balance = services(count);
        let since = Instant::now();
        site.apply(&balance).await?;
        let whole = since.elapsed();
        let grown = kernel_memory()?.saturating_sub(memory);

        let spent = processor_time()?;
        let changes = site.change(&mut balance, count / 2).await?;
        let each = (processor_time()? - spent) / changes.len() as u32;

        let mut news = Vec::new();
        for round in 0..21 {
            for frontend in frontends(50_000 + round) {
                balance.frontends.insert(frontend, pool(50_000));
            }
            news.push(site.apply(&balance).await?);
        }
        news.sort();

        // Somebody's slot, for which everything is read.
        let slot = "{ 10.9.9.9 . tcp . 80 . 7 : 10.1.0.66 . 6666 }";
        let mend =
            site.heal(&["add", "element", "inet", "weft-services", "port-slots4-0", slot]).await?;
        let heal = site.heal(&["flush", "ruleset"]).await?;
        let flow = site.flow()?;
        println!(
            "{count:8}  {whole:>11.1?}  {:>12.2?} {:>11.2?} {each:>9.2?}  {:>12.2?} {:>11.2?}  \
             {mend:>12.1?}  {heal:>14.1?}  {flow:>10.2?}  {} MiB",
            changes[0],
            changes[changes.len() / 2],
            news[0],
            news[news.len() / 2],
            grown >> 20,
        );
    }
    for count in [10u16, 1_000] {
        let mut balance = services(count);
        for pool in balance.frontends.values_mut() {
            Arc::make_mut(pool).affinity = Some(Duration::from_secs(600));
        }
        site.apply(&balance).await?;
        let changes = site.change(&mut balance, count / 2).await?;
        println!(
            "{count:8}  {:>25.2?} {:>11.2?}  all with affinity",
            changes[0],
            changes[changes.len() / 2],
        );
    }
    Ok(())
}

struct Site {
    plane: DataPlane,
    balancer: Balancer,
    desired: watch::Sender<Option<Arc<Desired>>>,
    client: Namespace,
    _plane_desired: watch::Sender<Option<Arc<weft_vxlan::Desired>>>,
}

impl Site {
    async fn build(dir: &Path) -> Outcome<Self> {
        let (plane_desired, followed) = watch::channel(Some(Arc::new(weft_vxlan::Desired {
            networks: [(net(), Arc::new(network()))].into(),
            host: HostRules::default(),
        })));
        let (desired, services) = watch::channel(Some(Arc::default()));
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let resync = Duration::from_secs(3600);
        let config = weft_vxlan::Config {
            runtime_dir: dir.join("run"),
            resync,
            ..weft_vxlan::Config::default()
        };
        let plane = DataPlane::start(config, followed, &tracker, &stop)?;
        let config = weft_balance::Config { resync, ..weft_balance::Config::default() };
        let balancer = Balancer::start(config, plane.clone(), services, &tracker, &stop)?;
        let mut sandboxes = Vec::new();
        for station in [1, 2] {
            let sandbox = namespace(dir, &format!("station{station}"))?;
            plane.attach(spec(station, &sandbox)).await?;
            sandboxes.push(sandbox);
        }
        let server = sandboxes.pop().ok_or("no sandbox")?;
        let socket = server.run(|| Ok::<_, Failed>(UdpSocket::bind("0.0.0.0:8080")?))?;
        thread::spawn(move || {
            let mut buffer = [0; 100];
            while let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let _ = socket.send_to(&buffer[..length], from);
            }
        });
        let client = sandboxes.pop().ok_or("no sandbox")?;
        Ok(Self { plane, balancer, desired, client, _plane_desired: plane_desired })
    }

    /// Brings `balance` into force, and tells how long it took.
    async fn apply(&self, balance: &NetworkBalance) -> Outcome<Duration> {
        let balance = Arc::new(balance.clone());
        let desired = Desired {
            networks: [(net(), Arc::clone(&balance))].into(),
            host: Arc::new(HostPublish::default()),
        };
        let mut status = self.balancer.status();
        let since = Instant::now();
        self.desired.send_replace(Some(Arc::new(desired)));
        loop {
            let applied = status
                .borrow_and_update()
                .networks
                .get(&net())
                .and_then(|network| network.applied.clone());
            if applied.is_some_and(|applied| Arc::ptr_eq(&applied, &balance)) {
                return Ok(since.elapsed());
            }
            status.changed().await?;
        }
    }

    /// Replaces a backend of a service, again and again; tells how long it took each time, the best
    /// first.
    async fn change(&self, balance: &mut NetworkBalance, service: u16) -> Outcome<Vec<Duration>> {
        let mut times = Vec::new();
        for round in 0..21u8 {
            for frontend in frontends(service) {
                let pool = balance.frontends.get_mut(&frontend).ok_or("no frontend")?;
                let pool = Arc::make_mut(pool);
                pool.backends.pop_first();
                pool.backends.insert(endpoint(u32::from(round) + 500_000), backend(100 + round));
            }
            times.push(self.apply(balance).await?);
        }
        times.sort();
        Ok(times)
    }

    /// Has `nft` do something to our tables, and waits until it is undone.
    async fn heal(&self, edit: &[&str]) -> Outcome<Duration> {
        let repairs = |status: &weft_balance::Status| {
            status.networks.get(&net()).map(|network| network.repairs).unwrap_or_default()
        };
        let mut status = self.balancer.status();
        let before = repairs(&status.borrow_and_update());
        let inside = self.plane.namespace(net())?;
        let done = inside.run(|| Ok::<_, Failed>(Command::new("nft").args(edit).status()?))?;
        if !done.success() {
            return Err("nft failed".into());
        }
        let since = Instant::now();
        while repairs(&status.borrow_and_update()) == before {
            status.changed().await?;
        }
        Ok(since.elapsed())
    }

    /// The first packet of a flow and its answer, on average.
    fn flow(&self) -> Outcome<Duration> {
        let to = SocketAddr::from((vip(7), 80));
        let time = self.client.run(|| {
            let ask = |socket: &UdpSocket| -> io::Result<()> {
                socket.send_to(b"?", to)?;
                socket.recv_from(&mut [0; 100])?;
                Ok(())
            };
            let sockets = (0..FLOWS).map(|_| {
                let socket = UdpSocket::bind("0.0.0.0:0")?;
                socket.set_read_timeout(Some(Duration::from_secs(1)))?;
                Ok(socket)
            });
            let sockets: Vec<UdpSocket> = sockets.collect::<io::Result<_>>()?;
            let since = Instant::now();
            sockets.iter().try_for_each(ask)?;
            Ok::<_, Failed>(since.elapsed() / FLOWS)
        });
        Ok(time?)
    }
}

fn services(count: u16) -> NetworkBalance {
    let of = |number| frontends(number).map(|frontend| (frontend, pool(number)));
    let frontends = (0..count).flat_map(of).collect();
    NetworkBalance {
        gateway_mac: MacAddr::for_gateway(net()),
        gateways: [GATEWAY].into(),
        frontends,
    }
}

fn frontends(number: u16) -> [Frontend; 2] {
    [Protocol::Tcp, Protocol::Udp].map(|protocol| Frontend {
        ip: vip(number),
        protocol,
        port: Some(80),
    })
}

fn pool(number: u16) -> Arc<Pool> {
    let backends = (0..3u8).map(|n| {
        // The service that is asked has backends that answer.
        let ip = if number == 7 { 2 } else { 10 + n };
        (endpoint(u32::from(number) * 3 + u32::from(n)), backend(ip))
    });
    Arc::new(Pool {
        service: "web".parse().expect("a name"),
        backends: backends.collect(),
        spread: Spread::Hash,
        affinity: None,
        source: Source::Preserve,
    })
}

fn network() -> OverlayNetwork {
    let port = |station: u8| {
        let port = Port { mac: mac(station), ips: [ip(station)].into() };
        (endpoint(900_000 + u32::from(station)), port)
    };
    OverlayNetwork {
        id: net(),
        name: "scale".parse().expect("a name"),
        transport: Transport::Local,
        mtu: 1500,
        gateway_mac: MacAddr::for_gateway(net()),
        gateways: vec![Prefix { ip: GATEWAY, len: 16 }],
        vips: [vip(7)].into(),
        internal: true,
        multicast: false,
        isolated: false,
        provisional: false,
        remotes: BTreeMap::new(),
        flood: BTreeMap::new(),
        ports: [port(1), port(2)].into(),
        uplink: None,
        transit: None,
    }
}

fn spec(station: u8, sandbox: &Namespace) -> AttachSpec {
    AttachSpec {
        network: net(),
        endpoint: endpoint(900_000 + u32::from(station)),
        sandbox: Sandbox::Path(sandbox.path().to_owned()),
        ifname: None,
        mac: mac(station),
        addresses: vec![Prefix { ip: ip(station), len: 16 }],
        gateways: vec![GATEWAY],
        mtu: None,
    }
}

fn net() -> NetworkId {
    NetworkId::from([9; 16])
}

fn ip(station: u8) -> IpAddr {
    IpAddr::from([10, 1, 0, station])
}

fn vip(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    IpAddr::from([10, 2, high, low])
}

fn mac(station: u8) -> MacAddr {
    MacAddr::for_address(net(), ip(station))
}

fn endpoint(number: u32) -> EndpointId {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&number.wrapping_mul(0x9e37_79b1).to_be_bytes());
    bytes[4..8].copy_from_slice(&number.to_be_bytes());
    EndpointId::from(bytes)
}

fn backend(station: u8) -> Backend {
    let node = NodeId::from([1; 16]);
    Backend { ip: ip(station), port: Some(8080), weight: 1, node, local: true }
}

fn namespace(dir: &Path, name: &str) -> Outcome<Namespace> {
    let path = dir.join(name);
    File::create(&path)?;
    thread::scope(|scope| {
        let made = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let none = None::<&str>;
            mount(Some("/proc/thread-self/ns/net"), &path, none, MsFlags::MS_BIND, none)
        });
        made.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    Ok(Namespace::open(path)?)
}

/// What this process has used of processors, in the kernel and out of it.
fn processor_time() -> Outcome<Duration> {
    let table = fs::read_to_string("/proc/self/stat")?;
    // Behind the name, in hundredths of a second (`proc_pid_stat(5)`).
    let fields: Vec<&str> = table.rsplit(')').next().unwrap_or_default().split(' ').collect();
    let ticks = fields[12].parse::<u64>()? + fields[13].parse::<u64>()?;
    Ok(Duration::from_millis(ticks * 10))
}

/// Bytes of the kernel's slab that cannot be given back.
fn kernel_memory() -> Outcome<u64> {
    let table = fs::read_to_string("/proc/meminfo")?;
    let line = table.lines().find_map(|line| line.strip_prefix("SUnreclaim:"));
    let kibibytes: u64 = line.ok_or("no SUnreclaim")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kibibytes << 10)
}

#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Socket(#[from] io::Error),
}

const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 1, 0, 254));
const FLOWS: u32 = 500;
