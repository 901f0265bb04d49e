//! Follows Docker: the names of containers, what it lost in a crash, networks that all hosts shall
//! have. Never inside a call of Docker's, which may itself wait for that call.

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use tokio::time;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{EndpointId, NetworkId};
use weft_vxlan::Namespace;

use super::{
    PLUGIN, SWARM_PLUGIN,
    client::{ClientError, Event, Events, NetworkInspect},
    driver::Driver,
    names,
    protocol::EngineId,
    wishes::Refused,
};
use crate::{
    api::types::Sandbox,
    chain::Chain,
    clock,
    health::{EngineContainer, EngineHealth},
    ledger::DrainTarget,
    refusal::Refusal,
};

/// How often everything is compared with Docker, whatever its events said.
const RESYNC: Duration = Duration::from_secs(30);
/// How long to wait for a daemon that does not answer.
const RETRY: Duration = Duration::from_secs(2);
/// The signals by which a container is told to end: TERM, INT, QUIT and KILL. `docker stop` sends one
/// of them, or what the container was made with.
const ENDING: [&str; 4] = ["15", "2", "3", "9"];
/// What is younger may still be under way in Docker.
const SETTLED: Duration = Duration::from_secs(10);
/// An address without an endpoint is given back, and a network that Docker does not know is
/// forgotten, after this.
const ABANDONED: Duration = Duration::from_secs(60);

/// Follows the daemon until `stop`, also over its restarts.
pub(super) async fn follow(driver: Arc<Driver>, tracker: TaskTracker, stop: CancellationToken) {
    let mut follower = Follower {
        driver,
        tracker,
        stop,
        ours: BTreeSet::new(),
        orphans: BTreeSet::new(),
        failed: Failed::default(),
    };
    let stop = follower.stop.clone();
    let mut reachable = true;
    loop {
        let connected = stop.run_until_cancelled(follower.driver.client.events()).await;
        let Some(connected) = connected else { return };
        let ended = match connected {
            Ok(events) => {
                reachable = true;
                tracing::info!("follows Docker's events");
                stop.run_until_cancelled(follower.run(events)).await
            }
            Err(error) => Some(error),
        };
        let Some(error) = ended else { return };
        // A host without Docker is no news.
        if std::mem::take(&mut reachable) {
            tracing::debug!(error = %Chain(&error), "Docker cannot be followed; will try again");
        }
        if stop.run_until_cancelled(time::sleep(RETRY)).await.is_none() {
            return;
        }
    }
}

struct Follower {
    driver: Arc<Driver>,
    tracker: TaskTracker,
    stop: CancellationToken,
    /// The containers on weft's networks.
    ours: BTreeSet<String>,
    /// Endpoints in the book that the registry did not know at the last look.
    orphans: BTreeSet<EndpointId>,
    /// What is not tried again before all is compared again.
    failed: Failed,
}

#[derive(Default)]
struct Failed {
    /// Docker's networks that cannot be used.
    unusable: BTreeSet<EngineId>,
    refused: Refused,
}

enum Wake {
    Event(Result<Event, ClientError>),
    Changed,
    Resync,
}

impl Follower {
    /// Runs until the daemon goes.
    async fn run(&mut self, mut events: Events) -> ClientError {
        let mut changed = self.driver.changed.subscribe();
        let mut snapshots = self.driver.snapshots();
        let mut resync = time::interval(RESYNC);
        resync.set_missed_tick_behavior(time::MissedTickBehavior::Delay);
        let mut marked = BTreeSet::new();
        loop {
            let wake = tokio::select! {
                event = events.next() => Wake::Event(event),
                Ok(()) = changed.changed() => Wake::Changed,
                Ok(()) = snapshots.changed() => {
                    // Most changes of the cluster are none of Docker's.
                    let now = super::wishes::marked(&snapshots.borrow_and_update().cluster);
                    if now == marked {
                        continue;
                    }
                    marked = now;
                    Wake::Changed
                }
                _ = resync.tick() => Wake::Resync,
            };
            match wake {
                Wake::Event(Ok(event)) => {
                    if self.note(&event) {
                        self.settle_networks().await;
                    }
                }
                Wake::Event(Err(error)) => return error,
                Wake::Changed => self.settle_networks().await,
                Wake::Resync => {
                    self.failed = Failed::default();
                    self.settle_networks().await;
                    self.compare().await;
                }
            }
        }
    }

    /// Takes note of an event; tells whether it is about a network that was made.
    fn note(&mut self, event: &Event) -> bool {
        let attribute = |key: &str| event.actor.attributes.get(key).cloned();
        let id = &event.actor.id;
        match (event.kind.as_str(), event.action.as_str()) {
            ("network", "create") => {
                return attribute("type").is_some_and(|driver| is_ours(&driver));
            }
            ("network", "connect") if attribute("type").is_some_and(|driver| is_ours(&driver)) => {
                if let Some(container) = attribute("container") {
                    self.ours.insert(container.clone());
                    self.describe(container);
                }
            }
            ("container", "start" | "rename") if self.ours.contains(id) => {
                self.describe(id.clone())
            }
            ("container", "kill") if self.ours.contains(id) => {
                let signal = attribute("signal").unwrap_or_default();
                if ENDING.contains(&signal.as_str()) {
                    self.drain(id.clone());
                }
            }
            ("container", action)
                if action.starts_with("health_status") && self.ours.contains(id) =>
            {
                self.describe(id.clone());
            }
            ("container", "destroy") => {
                self.ours.remove(id);
                self.driver.forget_container(id);
            }
            _ => {}
        }
        false
    }

    /// Lets a container that is about to stop have no new connections. In a task of its own: the
    /// keeper answers when its book is on disk.
    fn drain(&self, container: String) {
        let driver = Arc::clone(&self.driver);
        self.tracker.spawn(async move {
            let containers = Arc::clone(&driver.containers.borrow());
            for (endpoint, _) in containers.iter().filter(|(_, known)| known.id == container) {
                match driver.ledger.drain(DrainTarget::Endpoint(*endpoint), true).await {
                    Ok(_) => {}
                    // It has gone already.
                    Err(refusal) => tracing::debug!(%container, %refusal, "not drained"),
                }
            }
        });
    }

    /// Asks what a container is called, in a task of its own: the answer waits until the container
    /// has been started.
    fn describe(&self, container: String) {
        let (driver, stop) = (Arc::clone(&self.driver), self.stop.clone());
        self.tracker.spawn(async move {
            let described = stop.run_until_cancelled(driver.describe(&container)).await;
            if let Some(Err(why)) = described {
                tracing::warn!(%container, %why, "the container's aliases are not known");
            }
        });
    }

    /// Finds out which networks of the cluster those are that Docker made without saying so, and
    /// makes those in Docker that all hosts shall have.
    async fn settle_networks(&mut self) {
        let unbound: Vec<EngineId> = self
            .driver
            .registry
            .read(|known| {
                let unbound = known.networks.iter().filter(|(_, docker)| docker.network.is_none());
                unbound.map(|(id, _)| id.clone()).collect()
            })
            .await;
        for id in unbound {
            if self.failed.unusable.contains(&id) {
                continue;
            }
            match self.driver.client.network(&id).await {
                // Still being created; the next look finds it.
                Err(error) if error.is_missing() => {}
                Err(error) => {
                    tracing::debug!(network = %id, error = %Chain(&error), "cannot ask for a network's name");
                }
                Ok(_) => {
                    if let Err(refusal) = self.driver.bind(&id).await {
                        self.failed.unusable.insert(id.clone());
                        tracing::warn!(network = %id, %refusal, "Docker's network cannot be used");
                    }
                }
            }
        }
        self.driver.fulfil(&mut self.failed.refused).await;
    }

    /// Compares what is known with what Docker has: it says nothing of what it lost in a crash.
    async fn compare(&mut self) {
        let networks: Vec<(EngineId, u64)> = self
            .driver
            .registry
            .read(|known| known.networks.iter().map(|(id, n)| (id.clone(), n.since)).collect())
            .await;
        for (id, since) in networks {
            match self.driver.client.network(&id).await {
                Ok(listing) => {
                    self.forget_lost(&id, &listing).await;
                    let containers =
                        listing.containers.keys().filter(|key| !key.starts_with("ep-"));
                    for container in containers {
                        self.ours.insert(container.clone());
                        self.describe(container.clone());
                    }
                }
                Err(error) if error.is_missing() => {
                    if age(since) > ABANDONED && !self.is_in_use(&id).await {
                        tracing::info!(network = %id, "Docker has this network no more");
                        report(self.driver.forget_network(&id).await);
                    }
                }
                Err(error) => {
                    tracing::debug!(network = %id, error = %Chain(&error), "cannot look at a network");
                }
            }
        }
        for (network, ip) in self.driver.old_reservations(ABANDONED) {
            report(self.driver.release_reservation(network, ip).await);
        }
        self.detach_orphans().await;
    }

    /// Whether a sandbox of the network is still there: it may be another daemon's.
    async fn is_in_use(&self, network: &EngineId) -> bool {
        let sandboxes: Vec<PathBuf> = self
            .driver
            .registry
            .read(|known| {
                let joined = known.endpoints_of(network).filter_map(|(_, e)| e.joined.as_ref());
                joined.map(|joined| joined.sandbox.clone()).collect()
            })
            .await;
        sandboxes.into_iter().any(|path| Namespace::open(path).is_ok())
    }

    async fn forget_lost(&self, network: &EngineId, listing: &NetworkInspect) {
        let lost: Vec<EngineId> = self
            .driver
            .registry
            .read(|known| {
                let gone = known.endpoints_of(network).filter(|(id, endpoint)| {
                    let patience = if endpoint.joined.is_some() { SETTLED } else { ABANDONED };
                    !listing.has(id) && age(endpoint.since) > patience
                });
                gone.map(|(id, _)| id.clone()).collect()
            })
            .await;
        for id in lost {
            tracing::info!(endpoint = %id, "Docker has this endpoint no more");
            report(self.driver.forget_endpoint(&id).await);
        }
    }

    /// Detaches what no endpoint of Docker's stands for, at the second look: a call that ran into
    /// its deadline may have left it.
    async fn detach_orphans(&mut self) {
        let claimed: BTreeSet<EndpointId> = self
            .driver
            .registry
            .read(|known| {
                let joined = known.endpoints.values().filter_map(|e| e.joined.as_ref());
                joined.map(|joined| joined.endpoint).collect()
            })
            .await;
        let snapshot = self.driver.snapshot();
        let engines = snapshot.book.endpoints.iter().filter(|(id, local)| {
            matches!(local.sandbox, Sandbox::Engine(_)) && !claimed.contains(id)
        });
        let orphans: BTreeSet<EndpointId> = engines.map(|(id, _)| *id).collect();
        for id in orphans.intersection(&self.orphans) {
            report(self.driver.detach(*id).await);
        }
        self.orphans = orphans;
    }
}

impl Driver {
    /// Gives a container's endpoints the names that Docker has for it.
    async fn describe(&self, container: &str) -> Result<(), Refusal> {
        let inspected = match self.client.container(container).await {
            Ok(inspected) => inspected,
            // Removed meanwhile.
            Err(error) if error.is_missing() => return Ok(()),
            Err(error) => {
                let why = Chain(&error).to_string();
                return Err(Refusal::new(crate::refusal::RefusalKind::Unavailable, why));
            }
        };
        let mut endpoints = BTreeSet::new();
        for settings in inspected.network_settings.networks.values() {
            let Ok(id) = EngineId::try_from(settings.endpoint_id.clone()) else { continue };
            let joined = self
                .registry
                .read(|known| known.endpoints.get(&id).and_then(|e| e.joined.clone()))
                .await;
            let Some(joined) = joined else { continue };
            endpoints.insert(joined.endpoint);
            let description = names::description(&inspected, settings);
            let snapshot = self.snapshot();
            let Some(local) = snapshot.book.endpoints.get(&joined.endpoint) else { continue };
            if !description.is_of(&local.endpoint) {
                self.ledger.describe(joined.endpoint, description).await?;
            }
        }
        let health = inspected.state.health.as_ref().map(|h| EngineHealth::from_docker(&h.status));
        self.note_container(&inspected.id, &endpoints, health.unwrap_or_default());
        Ok(())
    }

    /// Takes note of the endpoints of a container, and of what its health check says.
    fn note_container(&self, id: &str, endpoints: &BTreeSet<EndpointId>, health: EngineHealth) {
        self.containers.send_if_modified(|known| {
            let mut now = known.as_ref().clone();
            now.retain(|endpoint, container| container.id != id || endpoints.contains(endpoint));
            for endpoint in endpoints {
                now.insert(*endpoint, EngineContainer { id: id.to_owned(), health });
            }
            let changed = **known != now;
            if changed {
                *known = Arc::new(now);
            }
            changed
        });
    }

    fn forget_container(&self, id: &str) {
        self.note_container(id, &BTreeSet::new(), EngineHealth::Unchecked);
    }

    /// The networks of the cluster that Docker's networks on this host stand for.
    pub(super) async fn bound(&self) -> BTreeSet<NetworkId> {
        self.registry
            .read(|known| known.networks.values().filter_map(|n| n.network).collect())
            .await
    }
}

/// A plugin that Docker itself runs may have a registry before its name, and has a tag behind it.
fn is_ours(driver: &str) -> bool {
    let image = driver.rsplit('/').next().unwrap_or(driver);
    let name = image.split(':').next().unwrap_or(image);
    [PLUGIN, SWARM_PLUGIN].contains(&name)
}

fn age(since: u64) -> Duration {
    Duration::from_secs(clock::unix_seconds().saturating_sub(since))
}

fn report(outcome: Result<(), Refusal>) {
    if let Err(refusal) = outcome {
        tracing::warn!(%refusal, "cannot clear away what Docker lost");
    }
}
