use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Mutex,
};

use tokio::{
    io::{DuplexStream, duplex},
    process::Command,
};
use weft_model::{EndpointId, Network, NetworkId};

use super::*;
use crate::{
    api::types::Sandbox,
    fixture::{endpoint, network},
    health::{
        engine::EngineContainer, exec::Running, outlet::Outlet, probe::EndpointProber,
        targets::ProgramContext,
    },
};

/// Backends that succeed unless they are named here, and how often each was asked.
#[derive(Clone, Default)]
struct Scripted {
    failing: Arc<Mutex<BTreeSet<EndpointId>>>,
    asked: Arc<Mutex<BTreeMap<EndpointId, Vec<Instant>>>>,
}

impl Prober for Scripted {
    async fn probe(&self, target: &Target) -> Result<(), Failure> {
        let id = target.program.endpoint.id;
        self.asked.lock().unwrap().entry(id).or_default().push(Instant::now());
        match self.failing.lock().unwrap().contains(&id) {
            true => Err(Failure::Late { milliseconds: 100 }),
            false => Ok(()),
        }
    }
}

impl<P: Prober> Prober for Arc<P> {
    async fn probe(&self, target: &Target) -> Result<(), Failure> {
        P::probe(self, target).await
    }
}

impl Scripted {
    fn fail(&self, target: &Target, fails: bool) {
        let mut failing = self.failing.lock().unwrap();
        match fails {
            true => failing.insert(target.program.endpoint.id),
            false => failing.remove(&target.program.endpoint.id),
        };
    }
}

/// A checker at work in virtual time.
struct Bench<P> {
    prober: Arc<P>,
    wanted: watch::Sender<Arc<Wanted>>,
    containers: watch::Sender<Arc<EngineContainers>>,
    verdicts: watch::Receiver<Arc<Verdicts>>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Bench<Scripted> {
    fn start(wanted: Wanted) -> Self {
        Self::of(Scripted::default(), wanted)
    }
}

impl<P: Prober> Bench<P> {
    fn of(prober: P, wanted: Wanted) -> Self {
        let (prober, tracker) = (Arc::new(prober), TaskTracker::new());
        let stop = CancellationToken::new();
        let (containers, told) = watch::channel(Arc::default());
        let (sender, verdicts) = watch::channel(Arc::default());
        let (wanted, followed) = watch::channel(Arc::new(wanted));
        let checker = Checker::new(Arc::clone(&prober), told, sender, tracker.clone());
        tracker.spawn(checker.run(followed, stop.clone()));
        Self { prober, wanted, containers, verdicts, tracker, stop }
    }

    fn want(&self, targets: impl IntoIterator<Item = Target>) {
        self.wanted.send_replace(Arc::new(wanted(targets)));
    }

    /// The verdict of a target's check at this moment.
    fn verdict(&self, target: &Target) -> Option<Verdict> {
        let id = target.program.endpoint.id;
        let verdicts = self.verdicts.borrow();
        let conditions = verdicts.get(&target.network)?;
        let condition = conditions.iter().find(|condition| condition.endpoint == id)?;
        condition.verdicts.get(&target.program.service).cloned()
    }

    async fn until(&mut self, target: &Target, healthy: bool) -> Duration {
        let start = Instant::now();
        while (self.verdict(target) == Some(Verdict::Healthy)) != healthy {
            let changed = time::timeout(Duration::from_secs(60), self.verdicts.changed()).await;
            changed.expect("the verdict changes within a minute").unwrap();
        }
        start.elapsed()
    }

    async fn end(self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_verdict_follows_the_backend_within_the_bound() {
    let target = target("web-1", probe());
    let mut bench = Bench::start(wanted([target.clone()]));
    assert_eq!(bench.verdict(&target), None);
    let took = bench.until(&target, true).await;
    assert!(took <= Duration::from_millis(2100), "{took:?}");
    for _ in 0..5 {
        bench.prober.fail(&target, true);
        let took = bench.until(&target, false).await;
        assert!(took <= INTERVAL * 3, "{took:?}");
        bench.prober.fail(&target, false);
        let took = bench.until(&target, true).await;
        assert!(took <= INTERVAL * 2, "{took:?}");
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn another_check_of_the_same_backend_starts_with_the_verdict_of_the_first() {
    let mut target = target("web-1", probe());
    let mut bench = Bench::start(wanted([target.clone()]));
    bench.until(&target, true).await;
    bench.prober.fail(&target, true);
    target.check.rise = 9;
    bench.want([target.clone()]);
    let took = bench.until(&target, false).await;
    assert!(took >= INTERVAL * 3 / 2 && took <= INTERVAL * 3, "{took:?}");
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn what_the_agent_before_found_holds_until_there_is_news() {
    let target = target("web-1", probe());
    let id = target.program.endpoint.id;
    let before = BTreeMap::from([(target.program.service.clone(), Verdict::Healthy)]);
    let verdicts = BTreeMap::from([(id, before)]);
    let bench = Bench::start(Wanted { verdicts, ..wanted([target.clone()]) });
    bench.prober.fail(&target, true);
    time::sleep(Duration::from_millis(1)).await;
    assert_eq!(bench.verdict(&target), Some(Verdict::Healthy));
    time::sleep(INTERVAL * 3).await;
    assert!(matches!(bench.verdict(&target), Some(Verdict::Unhealthy(_))));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_comes_again_is_new() {
    let target = target("web-1", probe());
    let mut bench = Bench::start(wanted([target.clone()]));
    bench.until(&target, true).await;
    bench.want([]);
    bench.until(&target, false).await;
    assert_eq!(bench.verdict(&target), None);
    bench.prober.fail(&target, true);
    bench.want([target.clone()]);
    time::sleep(INTERVAL).await;
    assert!(matches!(bench.verdict(&target), Some(Verdict::Unhealthy(_))));
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn a_thousand_checks_are_spread_over_their_interval_and_keep_to_it() {
    let targets: Vec<Target> = (0..1000).map(|n| target(&format!("web-{n}"), probe())).collect();
    let bench = Bench::start(wanted(targets));
    time::sleep(INTERVAL * 20).await;
    let asked = bench.prober.asked.lock().unwrap().clone();
    assert_eq!(asked.len(), 1000);
    let mut slots = [0; 10];
    for times in asked.values() {
        assert!((19..=21).contains(&times.len()), "{}", times.len());
        let gaps: Vec<_> = times[1..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        let exact = |gap: &Duration| gap.abs_diff(INTERVAL) <= Duration::from_millis(2);
        assert!(gaps.iter().all(exact), "{gaps:?}");
        let phase = times[5].duration_since(times[0].min(times[5])).as_millis() % 1000;
        slots[usize::try_from(phase / 100).unwrap()] += 1;
    }
    // The second probe comes in the second half of the interval.
    assert!(slots[5..].iter().all(|&count| count > 100), "{slots:?}");
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn docker_is_believed_at_once_and_never_asked() {
    let target = Target { engine: Some(Engine::Docker), ..target("web-1", Probe::Engine) };
    let mut bench = Bench::start(wanted([target.clone()]));
    let id = target.program.endpoint.id;
    let says = |bench: &Bench<Scripted>, health| {
        let container = EngineContainer { id: "c1".into(), health };
        bench.containers.send_replace(Arc::new(BTreeMap::from([(id, container)])));
    };
    says(&bench, EngineHealth::Starting);
    time::sleep(INTERVAL).await;
    assert_eq!(bench.verdict(&target), None);
    for healthy in [true, false, true] {
        says(&bench, if healthy { EngineHealth::Healthy } else { EngineHealth::Unhealthy });
        assert!(bench.until(&target, healthy).await < Duration::from_millis(1));
    }
    assert!(bench.prober.asked.lock().unwrap().is_empty());
    bench.end().await;
}

/// A host on which some addresses swallow what is sent to them, and no program ever starts.
#[derive(Clone, Default)]
struct Swallowing {
    addresses: Arc<Mutex<BTreeSet<IpAddr>>>,
}

impl Outlet for Swallowing {
    type Socket = bool;
    type Stream = DuplexStream;

    async fn socket(&self, _: NetworkId, to: SocketAddr, _: IpAddr) -> Result<bool, Failure> {
        // A thread takes its time.
        time::sleep(Duration::from_millis(1)).await;
        Ok(self.addresses.lock().unwrap().contains(&to.ip()))
    }

    async fn connect(is_swallowed: bool, _: SocketAddr) -> Result<DuplexStream, Failure> {
        match is_swallowed {
            true => std::future::pending().await,
            false => Ok(duplex(1).0),
        }
    }

    async fn start(&self, _: Command, _: &ProgramContext) -> Result<Running, Failure> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn neither_black_holes_nor_programs_that_hang_delay_the_verdict_of_another_backend() {
    let (dir, outlet) = (tempfile::tempdir().unwrap(), Swallowing::default());
    std::fs::write(dir.path().join("hang"), "").unwrap();
    let gateway: IpAddr = "10.1.0.1".parse().unwrap();
    let at = |n: usize| IpAddr::from([10, 2, (n / 256) as u8, (n % 256) as u8]);
    let patient = |n: usize, probe| {
        let check = Check { probe, interval: 30_000, timeout: 30_000, rise: 1, fall: 3 };
        let addresses = vec![(at(n), gateway)];
        Target { check, addresses, ..target(&format!("slow-{n}"), self::probe()) }
    };
    outlet.addresses.lock().unwrap().extend((0..500).map(at));
    let hang = || Probe::Exec { command: vec!["hang".into()] };
    let others =
        (0..500).map(|n| patient(n, probe())).chain((500..600).map(|n| patient(n, hang())));
    let one = Target { addresses: vec![(at(600), gateway)], ..target("web", probe()) };
    let prober = EndpointProber::new(outlet.clone(), dir.path().to_owned());
    let mut bench = Bench::of(prober, wanted(others.chain([one.clone()])));
    // Until all of the others wait.
    time::sleep(Duration::from_secs(60)).await;
    bench.until(&one, true).await;
    for _ in 0..5 {
        outlet.addresses.lock().unwrap().insert(at(600));
        let took = bench.until(&one, false).await;
        assert!(took <= INTERVAL * 3 + Duration::from_millis(100), "{took:?}");
        outlet.addresses.lock().unwrap().remove(&at(600));
        let took = bench.until(&one, true).await;
        assert!(took <= INTERVAL * 2 + Duration::from_millis(100), "{took:?}");
    }
    bench.end().await;
}

#[tokio::test(start_paused = true)]
async fn of_two_addresses_the_one_that_accepts_counts_whatever_the_other_swallows() {
    let outlet = Swallowing::default();
    let addresses: [IpAddr; 2] = ["10.1.0.8".parse().unwrap(), "fd00:1::8".parse().unwrap()];
    let gateways: [IpAddr; 2] = ["10.1.0.1".parse().unwrap(), "fd00:1::1".parse().unwrap()];
    let both = addresses.into_iter().zip(gateways).collect();
    let target = Target { addresses: both, ..target("web", probe()) };
    let prober = EndpointProber::new(outlet.clone(), "/nonexistent".into());
    let swallow = |swallowed: &[IpAddr]| {
        *outlet.addresses.lock().unwrap() = swallowed.iter().copied().collect();
    };
    for one in addresses {
        swallow(&[one]);
        assert_eq!(prober.probe(&target).await.map_err(|why| why.to_string()), Ok(()), "{one}");
    }
    swallow(&addresses);
    assert!(prober.probe(&target).await.is_err());
}

const INTERVAL: Duration = Duration::from_secs(1);

fn wanted(targets: impl IntoIterator<Item = Target>) -> Wanted {
    let subject = |target: &Target| Subject {
        endpoint: target.program.endpoint.id,
        service: target.program.service.clone(),
    };
    let targets = targets.into_iter().map(|target| (subject(&target), target)).collect();
    Wanted { targets, verdicts: BTreeMap::new() }
}

fn probe() -> Probe {
    Probe::Tcp { port: std::num::NonZeroU16::MIN }
}

/// Asked once a second; healthy after two successes, unhealthy after three failures.
fn target(name: &str, probe: Probe) -> Target {
    let app: Network = network(1, "app");
    let endpoint = endpoint(&app, name, "10.1.0.8");
    Target {
        network: app.id,
        check: Check { probe, interval: 1000, timeout: 100, rise: 2, fall: 3 },
        addresses: Vec::new(),
        engine: None,
        program: Arc::new(ProgramContext {
            sandbox: Sandbox::Pid(1),
            endpoint,
            network: app.name,
            service: "web".parse().unwrap(),
        }),
    }
}
