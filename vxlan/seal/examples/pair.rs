//! One end of a sealed tunnel between two namespaces, without an agent: to measure the data path.
//!
//! ```text
//! pair OWN PEER TAP-NAMESPACE [LANES [LIMIT-BYTES]]
//! ```
//!
//! OWN and PEER are underlay addresses. The lower one is node 1 with station 10.77.0.1, the higher
//! one node 2 with station 10.77.0.2, each at MAC 02:00:00:00:00:0N. The TAP `tap0` is made in the
//! namespace that is mounted at TAP-NAMESPACE; put it into a bridge. Both ends share a fixed
//! secret: nothing that crosses is secret.

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs::File,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, setns};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{MacAddr, NetworkId, NodeId, Sealing, Suite};
use weft_seal::{
    Forwarding, Members, OffloadSwitches, Peer, Station, Tap, Tunnel, TunnelConfig,
    key::{Limits, Role, Root},
};

type Failure = Box<dyn Error + Send + Sync>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    let usage = "usage: pair OWN PEER TAP-NAMESPACE [LANES [LIMIT-BYTES]]";
    let arguments: Vec<String> = env::args().skip(1).collect();
    let [own, peer, namespace, rest @ ..] = arguments.as_slice() else { return Err(usage.into()) };
    let (own, peer): (IpAddr, IpAddr) = (own.parse()?, peer.parse()?);
    let lanes = rest.first().map_or(Ok(1), |lanes| lanes.parse())?;
    let bytes = rest.get(1).map_or_else(|| Ok(Limits::default().bytes), |bytes| bytes.parse())?;

    let (here, there) = if own < peer { (1, 2) } else { (2, 1) };
    let role = if own < peer { Role::Dialler } else { Role::Acceptor };
    let root = Arc::new(Root::new(&[7; 32], role, Instant::now() + Duration::from_secs(86_400)));
    let suites = vec![Suite::Aes128Gcm, Suite::Aes256Gcm, Suite::Chacha20Poly1305];
    let offer = Sealing { port: PORT, lanes, suites: suites.clone(), relay: false };
    let member = Peer {
        name: format!("node-{there}").parse()?,
        address: peer,
        offer: Some(offer),
        roots: vec![root],
        fault: None,
    };
    let members = Members { peers: BTreeMap::from([(node(there), member)]) };
    let (_keep, members) = watch::channel(Arc::new(members));

    let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
    let config = TunnelConfig {
        own: node(here),
        bind: own,
        port: PORT,
        lanes,
        limits: Limits { bytes, ..Limits::default() },
        suites,
        offloads: switches(),
        underlay_mtu: UNDERLAY_MTU,
        relay: false,
    };
    let tunnel = Tunnel::start(config, members, &tracker, &stop)?;
    let namespace = File::open(namespace)?;
    let queues = usize::from(lanes);
    let tap = thread::spawn(move || -> Result<_, Failure> {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        Ok(Tap::ensure("tap0", queues, switches())?)
    });
    let tap = tap.join().map_err(|_| "the TAP's thread panicked")??;
    tunnel.carry(tap, Arc::new(forwarding(there)?));

    let mut status = tunnel.status();
    loop {
        tokio::select! {
            result = tokio::signal::ctrl_c() => break result?,
            _ = status.changed() => tracing::info!(status = ?status.borrow_and_update().peers),
            () = tokio::time::sleep(Duration::from_secs(3600)) => {}
        }
    }
    stop.cancel();
    tracker.close();
    tracker.wait().await;
    report(&tunnel);
    Ok(())
}

#[expect(clippy::print_stdout, reason = "it is what the example is for")]
fn report(tunnel: &Tunnel) {
    let (status, counters) = (tunnel.status().borrow().clone(), tunnel.counters());
    println!("{:#?}\n{:?}\n{:#?}", status.peers, status.offloads, counters.total);
    println!("rekeys {} syscalls {}", counters.rekeys, counters.syscalls);
}

fn switches() -> OffloadSwitches {
    let on = |name: &str| env::var(name).as_deref() != Ok("0");
    OffloadSwitches {
        tap_tso: on("TSO"),
        tap_uso: on("USO"),
        udp_segment: on("SEGMENT"),
        udp_gro: on("GRO"),
    }
}

fn forwarding(there: u8) -> Result<Forwarding, Failure> {
    let mac = MacAddr::try_from([2, 0, 0, 0, 0, there])?;
    let ips: [IpAddr; 2] = [
        Ipv4Addr::new(10, 77, 0, there).into(),
        Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, there.into()).into(),
    ];
    Ok(Forwarding {
        network: NetworkId::from([7; 16]),
        mtu: UNDERLAY_MTU - 82,
        gateway_mac: MacAddr::try_from([2, 0x57, 0, 0, 0, 1])?,
        gateways: vec![Ipv4Addr::new(10, 77, 0, 254).into()],
        stations: BTreeMap::from([(
            mac,
            Station { node: node(there), ips: ips.into(), router: false },
        )]),
        neighbours: ips.into_iter().map(|ip| (ip, mac)).collect(),
        flood: [node(there)].into(),
    })
}

fn node(number: u8) -> NodeId {
    NodeId::from([number; 16])
}

const PORT: u16 = 6791;
const UNDERLAY_MTU: u16 = 1500;
