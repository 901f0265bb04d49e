use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{self, Instant},
};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_model::{Check, Condition, EndpointId, Label, Probe, Verdict};

use super::{
    engine::{EngineContainers, EngineHealth},
    failure::Failure,
    probe::Prober,
    tally::Tally,
    targets::{Engine, Subject, Target},
};
use crate::ledger::Verdicts;

/// What has to be checked.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) targets: BTreeMap<Subject, Target>,
    /// What was found before, if only by an agent that ran before this one.
    pub(super) verdicts: BTreeMap<EndpointId, BTreeMap<Label, Verdict>>,
}

/// The task that owns the verdicts of this host. A small task a check asks at its times.
pub(super) struct Checker<P> {
    prober: Arc<P>,
    tracker: TaskTracker,
    running: BTreeMap<Subject, Running>,
    containers: watch::Receiver<Arc<EngineContainers>>,
    verdicts: watch::Sender<Arc<Verdicts>>,
    outcomes: mpsc::Sender<Outcome>,
    inbox: mpsc::Receiver<Outcome>,
    /// How many checks have been started.
    runs: u64,
}

/// A check at work.
struct Running {
    target: Target,
    tally: Tally,
    run: u64,
    /// Ends the task that asks; there is none where the engine tells by itself.
    _task: Option<DropGuard>,
}

/// What became of one probe.
struct Outcome {
    subject: Subject,
    run: u64,
    result: Result<(), Failure>,
}

enum Wake {
    Wanted,
    Containers,
    Outcome(Outcome),
}

impl<P: Prober> Checker<P> {
    pub(super) fn new(
        prober: P,
        containers: watch::Receiver<Arc<EngineContainers>>,
        verdicts: watch::Sender<Arc<Verdicts>>,
        tracker: TaskTracker,
    ) -> Self {
        let (outcomes, inbox) = mpsc::channel(256);
        Self {
            prober: Arc::new(prober),
            tracker,
            running: BTreeMap::new(),
            containers,
            verdicts,
            outcomes,
            inbox,
            runs: 0,
        }
    }

    /// Checks what `wanted` names, until `stop`.
    pub(super) async fn run(
        mut self,
        mut wanted: watch::Receiver<Arc<Wanted>>,
        stop: CancellationToken,
    ) {
        let mut wake = Wake::Wanted;
        loop {
            match wake {
                Wake::Wanted => {
                    let seen = Arc::clone(&wanted.borrow_and_update());
                    self.follow(&seen, &stop);
                    self.publish();
                }
                Wake::Containers => {
                    self.ask_engine();
                    self.publish();
                }
                Wake::Outcome(outcome) => {
                    if self.note(outcome) {
                        self.publish();
                    }
                }
            }
            // Every arm is cancel-safe and none awaits in its body.
            wake = tokio::select! {
                () = stop.cancelled() => return,
                changed = wanted.changed() => match changed {
                    Ok(()) => Wake::Wanted,
                    Err(_) => return,
                },
                Ok(()) = self.containers.changed() => Wake::Containers,
                Some(outcome) = self.inbox.recv() => Wake::Outcome(outcome),
            };
        }
    }

    /// Starts and ends checks, so that those that are wanted run.
    fn follow(&mut self, wanted: &Wanted, stop: &CancellationToken) {
        let Wanted { targets, verdicts } = wanted;
        self.running.retain(|subject, _| targets.contains_key(subject));
        let changed = targets.iter().filter(|(subject, target)| {
            self.running.get(subject).is_none_or(|running| running.target != **target)
        });
        let changed: Vec<_> = changed.map(|(s, t)| (s.clone(), t.clone())).collect();
        for (subject, target) in changed {
            let before = self.running.remove(&subject);
            let verdict = match before {
                Some(before) => before.tally.verdict().cloned(),
                None => {
                    let found = verdicts.get(&subject.endpoint);
                    found.and_then(|by_service| by_service.get(&subject.service)).cloned()
                }
            };
            self.start(subject, target, verdict, stop);
        }
        self.ask_engine();
    }

    fn start(
        &mut self,
        subject: Subject,
        target: Target,
        verdict: Option<Verdict>,
        stop: &CancellationToken,
    ) {
        self.runs += 1;
        let run = self.runs;
        let rhythm = Rhythm::new(&target, verdict.is_some(), rand::random(), rand::random());
        let tally = Tally::new(&target.check, verdict);
        let task = (!is_told(&target)).then(|| {
            let stop = stop.child_token();
            let (prober, outcomes) = (Arc::clone(&self.prober), self.outcomes.clone());
            let (subject, target) = (subject.clone(), target.clone());
            let asked = ask(prober, subject, target, run, rhythm, outcomes);
            let stopped = stop.clone();
            self.tracker.spawn(async move {
                stopped.run_until_cancelled(asked).await;
            });
            stop.drop_guard()
        });
        self.running.insert(subject, Running { target, tally, run, _task: task });
    }

    /// Counts what the engine says of its containers: it has its own rise and fall.
    fn ask_engine(&mut self) {
        let containers = Arc::clone(&self.containers.borrow_and_update());
        let told = self.running.iter_mut().filter(|(_, running)| is_told(&running.target));
        for (subject, running) in told {
            let health = containers.get(&subject.endpoint).map(|container| container.health);
            let result = match health {
                None | Some(EngineHealth::Starting) => continue,
                Some(EngineHealth::Healthy) => Ok(()),
                Some(EngineHealth::Unhealthy) => Err(Failure::Engine),
                Some(EngineHealth::Unchecked) => Err(Failure::NoEngineCheck),
            };
            let verdict = running.tally.verdict().cloned();
            let check = Check { rise: 1, fall: 1, ..running.target.check.clone() };
            running.tally = Tally::new(&check, verdict);
            if running.tally.count(result) {
                tell(subject, &running.tally);
            }
        }
    }

    /// Counts an outcome; tells whether there is a new verdict.
    fn note(&mut self, Outcome { subject, run, result }: Outcome) -> bool {
        // A probe may end after its check has.
        let running = self.running.get_mut(&subject).filter(|running| running.run == run);
        let Some(running) = running else { return false };
        let changed = running.tally.count(result);
        if changed {
            tell(&subject, &running.tally);
        }
        changed
    }

    fn publish(&self) {
        let mut verdicts = Verdicts::new();
        let mut last = None;
        for (Subject { endpoint, service }, running) in &self.running {
            let Some(verdict) = running.tally.verdict() else { continue };
            let conditions = verdicts.entry(running.target.network).or_default();
            // The subjects of one endpoint follow each other, and it has one network.
            if last.replace(*endpoint) != Some(*endpoint) {
                let verdicts = BTreeMap::new();
                conditions.push(Condition { endpoint: *endpoint, draining: false, verdicts });
            }
            let condition = conditions.last_mut().expect("just pushed");
            condition.verdicts.insert(service.clone(), verdict.clone());
        }
        self.verdicts.send_if_modified(|current| {
            let changed = **current != verdicts;
            if changed {
                *current = Arc::new(verdicts);
            }
            changed
        });
    }
}

/// Whether nobody has to ask: Docker tells by itself.
fn is_told(target: &Target) -> bool {
    target.check.probe == Probe::Engine && target.engine == Some(Engine::Docker)
}

fn tell(Subject { endpoint, service }: &Subject, tally: &Tally) {
    match tally.verdict() {
        Some(Verdict::Unhealthy(why)) => {
            tracing::info!(%service, %endpoint, %why, "a backend is unhealthy");
        }
        Some(Verdict::Healthy) => tracing::info!(%service, %endpoint, "a backend is healthy"),
        None => {}
    }
}

/// Asks at the times of `rhythm`, until nobody listens.
async fn ask(
    prober: Arc<impl Prober>,
    subject: Subject,
    target: Target,
    run: u64,
    rhythm: Rhythm,
    outcomes: mpsc::Sender<Outcome>,
) {
    let mut due = Instant::now() + rhythm.first;
    let mut next = rhythm.second;
    loop {
        time::sleep_until(due).await;
        let result = prober.probe(&target).await;
        let outcome = Outcome { subject: subject.clone(), run, result };
        if outcomes.send(outcome).await.is_err() {
            return;
        }
        // Two probes of a check never overlap, also if they take longer than the interval.
        due = (due + next).max(Instant::now());
        next = rhythm.interval;
    }
}

/// When a check's probes are made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Rhythm {
    /// From the check's start to its first probe.
    first: Duration,
    /// From there to the second one.
    second: Duration,
    interval: Duration,
}

impl Rhythm {
    /// A new backend is asked soon, one that has a verdict when its turn comes. The second probe
    /// comes early by chance, so that checks which started together do not stay together. `first` and
    /// `second` are random numbers from 0 to 1.
    fn new(target: &Target, is_known: bool, first: f64, second: f64) -> Self {
        let interval = Duration::from_millis(target.check.interval.max(1).into());
        let first = match is_known {
            true => interval.mul_f64(first),
            false => (interval / 10).min(SOON).mul_f64(first),
        };
        Self { first, second: interval.mul_f64(0.5 + second / 2.0), interval }
    }
}

/// The longest until a new backend is first asked.
const SOON: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use weft_model::{EndpointId, Network};

    use super::*;
    use crate::{
        api::types::Sandbox,
        fixture::{endpoint, network},
        health::{engine::EngineContainer, targets::ProgramContext},
    };

    /// Backends that succeed unless they are named here, and how often each was asked.
    #[derive(Clone, Default)]
    struct Scripted {
        failing: Arc<Mutex<std::collections::BTreeSet<EndpointId>>>,
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
    struct Bench {
        prober: Scripted,
        wanted: watch::Sender<Arc<Wanted>>,
        containers: watch::Sender<Arc<EngineContainers>>,
        verdicts: watch::Receiver<Arc<Verdicts>>,
        tracker: TaskTracker,
        stop: CancellationToken,
    }

    impl Bench {
        fn start(wanted: Wanted) -> Self {
            let (prober, tracker) = (Scripted::default(), TaskTracker::new());
            let stop = CancellationToken::new();
            let (containers, told) = watch::channel(Arc::default());
            let (sender, verdicts) = watch::channel(Arc::default());
            let (wanted, followed) = watch::channel(Arc::new(wanted));
            let checker = Checker::new(prober.clone(), told, sender, tracker.clone());
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
        let targets: Vec<Target> =
            (0..1000).map(|n| target(&format!("web-{n}"), probe())).collect();
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
        let says = |bench: &Bench, health| {
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
}
