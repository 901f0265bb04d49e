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
mod tests;
