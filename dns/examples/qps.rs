//! How many queries a second one listener answers, and how long a network's names take to index.
//!
//! `cargo run --release -p weft-dns --example qps [SECONDS]`
//!
//! Server and clients share the machine and talk over loopback. Each client keeps 64 queries in
//! flight and asks in turn for a name of one endpoint, IPv4 and IPv6, and for a name that does not
//! exist. The directory holds 25,000 endpoints.
#![expect(clippy::print_stdout, reason = "the figures are for people and scripts to read")]

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use domain::base::{MessageBuilder, Name, Rtype};
use tokio::{runtime, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_dns::{Config, Directory, Entry, NetworkNames, Server};
use weft_model::{DnsName, NetworkId};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let run = match std::env::args().nth(1) {
        Some(text) => Duration::from_secs(text.parse()?),
        None => Duration::from_secs(3),
    };
    let entries = (0..ENDPOINTS).map(entry).collect::<Result<Vec<_>, _>>()?;
    let started = Instant::now();
    let names = NetworkNames::new(
        "app".parse()?,
        false,
        vec!["10.64.0.0/16".parse()?, "fd00:64::/64".parse()?],
        entries,
    );
    let indexed = started.elapsed();

    let network = NetworkId::from([1; 16]);
    let mut directory = Directory::new("weft.internal".parse()?);
    directory.networks.insert(network, Arc::new(names));
    for workers in [1, 2] {
        for clients in [1, 2] {
            let rate = measure(network, directory.clone(), workers, clients, run)?;
            println!(
                "RESULT dns_qps workers={workers} clients={clients} endpoints={ENDPOINTS} \
                 qps={rate:.0}"
            );
        }
    }
    println!(
        "RESULT dns_index endpoints={ENDPOINTS} names={} ms={:.1}",
        ENDPOINTS * NAMES,
        indexed.as_secs_f64() * 1e3
    );
    Ok(())
}

/// The names and addresses of endpoint `number`, as many as a container of a service has.
fn entry(number: u32) -> Result<Entry, Box<dyn std::error::Error>> {
    let service = number / 50;
    let names: Vec<DnsName> = [
        format!("web-{number}"),
        format!("shop_web_{number}"),
        format!("{number:012x}"),
        format!("service-{service}"),
        format!("tasks.service-{service}"),
    ]
    .iter()
    .map(|name| name.parse())
    .collect::<Result<_, _>>()?;
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 64, 0, 2)) + number);
    let v6: IpAddr = format!("fd00:64::{number:x}").parse()?;
    Ok(Entry { names, addresses: vec![v4.into(), v6] })
}

fn measure(
    network: NetworkId,
    directory: Directory,
    workers: usize,
    clients: u64,
    run: Duration,
) -> Result<f64, Box<dyn std::error::Error>> {
    let runtime =
        runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build()?;
    let _inside = runtime.enter();
    let (_directory, directory) = watch::channel(Arc::new(directory));
    let (_upstream, upstream) = watch::channel(Vec::new());
    let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
    let mut server =
        Server::start(Config::default(), directory, upstream, tracker.clone(), cancel.clone());
    let tcp = TcpListener::bind("127.0.0.1:0")?;
    let udp = UdpSocket::bind(tcp.local_addr()?)?;
    let address = server.listen(network, udp, tcp)?;

    let asking: Vec<_> = (0..clients)
        .map(|_| thread::spawn(move || client(address, run).map_err(|error| error.to_string())))
        .collect();
    let mut rate = 0.0;
    for client in asking {
        rate += client.join().map_err(|_| "a client panicked")??;
    }
    let counts = server.counters().snapshot().networks[&network];
    if counts.answered < 2 * counts.nxdomain || counts.failed + counts.dropped > 0 {
        return Err(format!("the answers were not what was asked for: {counts:?}").into());
    }
    cancel.cancel();
    tracker.close();
    runtime.block_on(tracker.wait());
    Ok(rate)
}

/// Asks `server` for `run` and returns how many answers came in a second.
fn client(server: SocketAddr, run: Duration) -> Result<f64, Box<dyn std::error::Error>> {
    let queries: Vec<Vec<u8>> = (0..1000)
        .map(|number| match number % 4 {
            0 | 1 => query(&format!("web-{}", number * 25), Rtype::A),
            2 => query(&format!("web-{}.app", number * 25), Rtype::AAAA),
            _ => query(&format!("no-{number}.app.weft.internal"), Rtype::A),
        })
        .collect::<Result<_, _>>()?;
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut next = queries.iter().cycle();
    let mut send = || socket.send(next.next().expect("a cycle has no end"));

    for _ in 0..IN_FLIGHT {
        send()?;
    }
    let (mut answers, mut buffer) = (0_u32, [0; 2048]);
    let started = Instant::now();
    while started.elapsed() < run {
        // The place of a lost packet is filled again too.
        answers += u32::from(socket.recv(&mut buffer).is_ok());
        send()?;
    }
    Ok(f64::from(answers) / started.elapsed().as_secs_f64())
}

fn query(name: &str, rtype: Rtype) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question.push((Name::vec_from_str(name)?, rtype)).map_err(|error| error.to_string())?;
    Ok(question.finish())
}

const ENDPOINTS: u32 = 25_000;
/// Names that one endpoint answers to, each in four forms.
const NAMES: u32 = 5;
const IN_FLIGHT: usize = 64;
