use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use serde_json::json;
use weft_testbed::{
    Container, Host, Lab, Pinger, Question, api_call, query,
    report::{Figure, Target, percentile},
};

/// Measures how soon an attach is seen on another host.
#[expect(clippy::print_stdout, reason = "a benchmark reports")]
pub(crate) fn run() -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    let mut course = Course::new(&lab)?;
    let samples = (0..ATTACHES).map(|_| course.measure()).collect::<anyhow::Result<Vec<_>>>()?;

    println!("{ATTACHES} attaches, each on h1 or h3, seen from a container on h2");
    println!("milliseconds after attach returned   p50       p99       slowest");
    for (what, values) in [
        ("name resolved", milliseconds(&samples, |sample| sample.resolved)),
        ("first ping answered", milliseconds(&samples, |sample| sample.reached)),
        ("attach itself", milliseconds(&samples, |sample| sample.attach)),
    ] {
        let [p50, p99, slowest] = [50.0, 99.0, 100.0].map(|rank| percentile(&values, rank));
        println!("{what:<36} {p50:<9.2} {p99:<9.2} {slowest:.2}");
    }
    let reached = milliseconds(&samples, |sample| sample.reached);
    for (name, rank) in [("converge_p50", 50.0), ("converge_p99", 99.0)] {
        let (value, target) = (percentile(&reached, rank), Target::AtMost(50.0));
        println!("{}", Figure { name, value, unit: "ms", target });
    }
    lab.finish();
    Ok(())
}

/// How long one attach took, and how much later it was seen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    pub(crate) attach: Duration,
    pub(crate) resolved: Duration,
    pub(crate) reached: Duration,
}

/// A network with an observer on the second host, and containers on the others to attach.
#[derive(Debug)]
pub(crate) struct Course {
    observer: Container,
    resolver: UdpSocket,
    runners: Vec<(Arc<Host>, Container)>,
    turn: usize,
}

impl Course {
    pub(crate) fn new(lab: &Lab) -> anyhow::Result<Self> {
        lab.create_network(&format!("{NETWORK} --subnet 10.46.0.0/16"))?;
        let observer = lab.host(2).container("observer")?;
        let gateway = observer.attach(NETWORK, "")?.gateways;
        let gateway = *gateway.first().context("the network has no gateway")?;
        let resolver = observer.inside(|| {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(SocketAddr::new(gateway, 53))?;
            Ok(socket)
        })?;
        let runners = [1, 3]
            .into_iter()
            .map(|index| Ok((Arc::clone(lab.host(index)), lab.host(index).container("runner")?)))
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { observer, resolver, runners, turn: 0 })
    }

    /// Attaches once over the API, and asks and pings from the other host until both answer.
    pub(crate) fn measure(&mut self) -> anyhow::Result<Sample> {
        let (host, runner) = &self.runners[self.turn % self.runners.len()];
        let name = format!("runner-{}", self.turn);
        self.turn += 1;
        let body = json!({"network": NETWORK, "name": name, "sandbox": {"pid": runner.pid()}});

        let before = Instant::now();
        let answer = api_call(host, "POST", "/v1/endpoints", &body.to_string())?;
        let attached = Instant::now();
        ensure!(answer.status < 300, "attach is refused: {answer:?}");
        let address = self.resolve(&name, attached)?;
        let resolved = attached.elapsed();
        self.reach(address, attached)?;
        let reached = attached.elapsed();

        let path = format!("/v1/endpoints/{name}?network={NETWORK}");
        let answer = api_call(host, "DELETE", &path, "")?;
        ensure!(answer.status < 300, "detach is refused: {answer:?}");
        Ok(Sample { attach: attached - before, resolved, reached })
    }

    fn resolve(&self, name: &str, start: Instant) -> anyhow::Result<IpAddr> {
        while start.elapsed() < PATIENCE {
            let reply = query(&self.resolver, name, Question::A, Duration::from_secs(1))?;
            if let Some(address) = reply.addresses.first() {
                return Ok(*address);
            }
        }
        anyhow::bail!("{name} is not resolved on h2 within {PATIENCE:?}")
    }

    fn reach(&self, address: IpAddr, start: Instant) -> anyhow::Result<()> {
        let pinger = Pinger::open(&self.observer, address)?;
        for sequence in 1..u16::MAX {
            if pinger.echo(sequence, Duration::from_millis(2))?.is_some() {
                return Ok(());
            }
            if start.elapsed() > PATIENCE {
                break;
            }
        }
        anyhow::bail!("{address} is not reached from h2 within {PATIENCE:?}")
    }
}

pub(crate) fn milliseconds(samples: &[Sample], of: impl Fn(&Sample) -> Duration) -> Vec<f64> {
    samples.iter().map(|sample| of(sample).as_secs_f64() * 1e3).collect()
}

const ATTACHES: usize = 200;
const NETWORK: &str = "course";
const PATIENCE: Duration = Duration::from_secs(5);
