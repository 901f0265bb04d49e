//! Puts the agent together and takes it down again.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use ipnet::Ipv4Net;
use sd_notify::NotifyState;
use time::OffsetDateTime;
use tokio::{
    net::{TcpListener, UnixListener},
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_balance::Balancer;
use weft_dns::{Directory, Server};
use weft_gossip::{
    ClusterView, Gossip, GossipConfig, Liveness,
    identity::{Identity, NODE_VALIDITY},
    quic::{self, Admission, QuicCarrier, QuicConfig},
};
use weft_model::{Label, NetworkId, NodeId, VtepAddr};
use weft_vxlan::{DataPlane, Missing, Namespace, Parents, advertise_address, probe};

use crate::{
    advertise::Advertise,
    api::{self, Api},
    chain::Chain,
    clock,
    config::{AGENT_PORT, Config},
    encryption::Encryption,
    engines::docker::{Docker, Places, SWARM_SOCKET},
    health::{self, drain::Drains},
    ledger::{self, Balancing, BookFile, Keeper, Ledger, Links, Start, Verdicts},
    listeners::{Listeners, sandboxes::SandboxListeners},
    metrics,
    projection::{NamesProjection, PlaneContext, carried, own_records},
    remembered::{self, Remembered},
    renewal, roster,
    state_dir::StateLock,
    status::{self, Report},
    tokens::Tokens,
    underlay::Watcher,
};

/// How long the parts of the agent have to end.
const GRACE: Duration = Duration::from_secs(5);

/// Runs the agent until it is told to stop.
///
/// # Errors
///
/// It cannot start, or it cannot go on: then with the reason.
pub fn run(config: Config) -> anyhow::Result<()> {
    log_to_stderr();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(config))
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("WEFT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

async fn serve(config: Config) -> anyhow::Result<()> {
    let identity = Identity::load(&config.state_dir)?;
    // Both are taken before anything is touched: a second agent changes nothing.
    let _lock = StateLock::take(&config.state_dir)?;
    let socket = api::bind(&config.socket, config.socket_group.as_deref()).await?;
    let host = Namespace::current()?;
    refuse_missing(&probe())?;
    let advertise = advertised(&config, &host)?;
    config.refuse_port_clash(advertise.port())?;
    let tracker = TaskTracker::new();
    let stop = CancellationToken::new();
    let agent = Agent::start(&config, host, identity, advertise, &tracker, &stop).await?;

    agent.serve_api(socket, &tracker, &stop);
    if let Some(address) = config.metrics {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot serve metrics on {address}: change `metrics`"))?;
        agent.serve_metrics(listener, &tracker, &stop);
    }
    notify(&[NotifyState::Ready]);
    tracing::info!(node = %agent.identity.name(), %advertise, socket = %config.socket.display(), "ready");

    let outcome = agent.wait().await;
    notify(&[NotifyState::Stopping]);
    agent.stop(&tracker, &stop).await;
    let _ = std::fs::remove_file(&config.socket);
    outcome
}

/// The underlay address of this host: configured, given to `init` or `join`, or found.
fn advertised(config: &Config, host: &Namespace) -> anyhow::Result<SocketAddr> {
    let told = Advertise::load(&config.state_dir)?;
    let port = config.listen.map(|listen| listen.port()).or_else(|| told?.port);
    let ip = match config.advertise.or_else(|| Some(told?.ip)) {
        Some(ip) => ip,
        None => advertise_address(host)?.ip(),
    };
    Ok(SocketAddr::new(ip, port.unwrap_or(AGENT_PORT)))
}

/// Refuses to start on a system that lacks something, and says what.
fn refuse_missing(missing: &[Missing]) -> anyhow::Result<()> {
    let lines: Vec<_> = missing.iter().map(ToString::to_string).collect();
    anyhow::ensure!(lines.is_empty(), "this system lacks what weft needs: {}", lines.join("; "));
    Ok(())
}

/// The running parts.
struct Agent {
    identity: Arc<Identity>,
    gossip: Gossip,
    carrier: Arc<QuicCarrier>,
    ledger: Ledger,
    report: Report,
    tokens: Arc<Tokens>,
    listeners: Listeners,
    plane: DataPlane,
    encryption: Encryption,
    /// Absent where it is switched off.
    docker: Option<Docker>,
    drains: Drains,
    /// Why the keeper could not go on, once that is so.
    failure: watch::Receiver<Option<Arc<ledger::BookError>>>,
}

impl Agent {
    async fn start(
        config: &Config,
        host: Namespace,
        identity: Identity,
        advertise: SocketAddr,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> anyhow::Result<Self> {
        let me = identity.node();
        let watcher = Watcher::new(
            host.clone(),
            identity.name().clone(),
            advertise,
            config.dns_upstream.clone(),
        );
        let mtu = watcher.look()?.node.underlay_mtu;
        let encryption = Encryption::start(config, me, advertise.ip(), mtu, tracker);
        let watcher = watcher.offering(encryption.offer()).measured(config.metrics);
        let seen = watcher.look()?;
        let (node, node_updates) = watch::channel(seen.node);
        let (resolvers, resolver_updates) = watch::channel(seen.resolvers);

        // What is desired stays unknown until the keeper has understood what there is.
        let (desired, desired_updates) = watch::channel(None);
        let parents = Parents::new(host.clone());
        let plane_config = weft_vxlan::Config {
            runtime_dir: config.runtime_dir.clone(),
            host: Some(host),
            tunnel: encryption.tunnel().cloned().map_err(Clone::clone),
            ..weft_vxlan::Config::default()
        };
        let plane = DataPlane::start(plane_config, desired_updates, tracker, stop)?;
        let present: BTreeSet<_> = flatten(plane.present_ports().await?);

        let timing = ledger::timing(config.rest());
        let (file, mut book) = BookFile::open(&config.state_dir)?;
        let lost = book.mark_lost(&present);
        tracing::info!(endpoints = book.endpoints.len(), lost, "took up the book");
        let spaces = ledger::restore_spaces(&book, me, timing, clock::unix_seconds())?;
        let own = own_records(me, &node_updates.borrow(), &book, &spaces);

        let view: ViewCell = Arc::default();
        // Nobody is revoked in this version: removal of nodes is not there yet.
        let (_, revoked) = watch::channel(BTreeSet::new());
        let roads = Roads { advertise, revoked: revoked.clone(), detour: encryption.detour() };
        let carrier = Arc::new(bind_carrier(config, &identity, roads, &view)?);
        let generation = identity.next_generation(OffsetDateTime::now_utc())?;
        let mut gossip_config = GossipConfig::new(me, identity.cluster(), generation);
        gossip_config.seeds = seeds(&identity, config, advertise);
        gossip_config.records = own.public.iter().map(|(k, r)| (*k, r.clone())).collect();
        let gossip =
            Gossip::start(gossip_config, Arc::clone(&carrier), tracker, stop.child_token());
        let _ = view.set(gossip.view());

        let (addresses, known_addresses) = watch::channel(vec![advertise]);
        let state_dir = config.state_dir.clone();
        let followed =
            roster::follow(me, state_dir.clone(), gossip.view(), addresses, stop.child_token());
        tracker.spawn(followed);
        let remembered = Remembered::load(&config.state_dir);
        tracker.spawn(remembered::keep(
            remembered.clone(),
            me,
            state_dir,
            gossip.view(),
            stop.child_token(),
        ));
        tracker.spawn(watcher.run(node, resolvers, stop.child_token()));
        tracker.spawn(renewal::keep_valid(Arc::clone(&carrier), gossip.view(), stop.child_token()));

        let (directory, names) = watch::channel(Arc::new(Directory::new(config.domain.clone())));
        let dns_config = weft_dns::Config {
            ttl: Duration::from_secs(config.dns_ttl.into()),
            ..weft_dns::Config::default()
        };
        let dns =
            Server::start(dns_config, names, resolver_updates, tracker.clone(), stop.child_token());
        let (balanced, balance_updates) = watch::channel(None);
        let balance_config = weft_balance::Config::default();
        let balancer =
            Balancer::start(balance_config, plane.clone(), balance_updates, tracker, stop)?;
        let listeners = Listeners::new(plane.clone(), dns, tracker.clone());
        let sandbox_listeners = SandboxListeners::new(listeners.clone(), tracker.clone());

        // Nothing is checked as long as nobody says so.
        let (found, verdicts) = watch::channel(Arc::new(Verdicts::new()));
        let links = Links {
            gossip: gossip.clone(),
            plane: plane.clone(),
            listeners: listeners.clone(),
            desired,
            directory,
            node: node_updates,
            encryption: encryption.clone(),
            verdicts,
            balance: Balancing {
                desired: balanced,
                status: balancer.status(),
                ports: balancer.host_ports(),
            },
            parents: parents.clone(),
            sandbox_listeners: sandbox_listeners.clone(),
            tracker: tracker.clone(),
        };
        let start = Start {
            context: PlaneContext {
                me,
                local: VtepAddr::from(advertise.ip()),
                vxlan_port: config.vxlan_port,
                sealed: encryption.ports(),
                uplink_pool: Ipv4Net::trunc(&config.uplink_pool),
            },
            timing,
            file,
            book,
            spaces,
            own,
            remembered,
            names: NamesProjection::new(config.domain.clone()),
        };
        let (ledger, inbox) = Ledger::channel();
        let (keeper, snapshots) = Keeper::new(links, start, inbox);
        tracker.spawn(sandbox_listeners.keep(snapshots.clone(), stop.child_token()));
        encryption.follow(Arc::clone(&carrier), snapshots.clone(), revoked, stop.child_token());
        let (failed, failure) = watch::channel(None);
        let (gone, stopped) = (plane.gone(), stop.child_token());
        tracker.spawn(async move {
            if let Err(error) = keeper.run(gone, stopped).await {
                failed.send_replace(Some(Arc::new(error)));
            }
        });

        let identity = Arc::new(identity);
        let tokens = Arc::new(Tokens::new(identity.issuer().cloned(), known_addresses));
        let peers = Arc::clone(&carrier);
        let rtt = move || -> BTreeMap<NodeId, f64> {
            peers.peers().iter().map(|p| (p.node, p.rtt.as_secs_f64() * 1e3)).collect()
        };
        let docker = match config.docker {
            true => {
                let (ledger, snapshots) = (ledger.clone(), snapshots.clone());
                let (places, listeners) = (places(config), listeners.clone());
                Some(Docker::start(&places, ledger, snapshots, listeners, tracker, stop).await?)
            }
            false => None,
        };
        let containers = match &docker {
            Some(docker) => docker.handle().containers(),
            None => watch::channel(Arc::default()).1,
        };
        let checked = health::Sources {
            snapshots: snapshots.clone(),
            containers: containers.clone(),
            plane: plane.clone(),
            programs: config.check_programs.clone(),
        };
        health::start(checked, found, tracker, stop);
        let drains = Drains {
            ledger: ledger.clone(),
            snapshots: snapshots.clone(),
            containers,
            docker: docker.as_ref().map(Docker::handle),
        };
        let sources = status::Sources {
            ledger: ledger.clone(),
            snapshots,
            plane: plane.status(),
            balancer: balancer.clone(),
            carrier: Arc::clone(&carrier),
            encryption: encryption.clone(),
            parents,
        };
        let report = Report::new(sources, config.domain.clone(), Arc::new(rtt));
        Ok(Self {
            identity,
            gossip,
            carrier,
            ledger,
            report,
            tokens,
            listeners,
            plane,
            encryption,
            docker,
            drains,
            failure,
        })
    }

    fn serve_api(&self, socket: UnixListener, tracker: &TaskTracker, stop: &CancellationToken) {
        let api = Api {
            ledger: self.ledger.clone(),
            tokens: Arc::clone(&self.tokens),
            report: self.report.clone(),
            docker: self.docker.as_ref().map(Docker::handle),
            drains: self.drains.clone(),
        };
        let stop = stop.clone();
        tracker.spawn(async move {
            let served = axum::serve(socket, api::router(api));
            let served = served.with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(error = %Chain(&error), "the API has ended");
            }
        });
    }

    fn serve_metrics(
        &self,
        listener: TcpListener,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) {
        let sources = metrics::Sources {
            report: self.report.clone(),
            ledger: self.ledger.clone(),
            gossip: self.gossip.clone(),
            listeners: self.listeners.clone(),
            plane: self.plane.status(),
            encryption: self.encryption.clone(),
        };
        let stop = stop.clone();
        tracker.spawn(async move {
            let served = axum::serve(listener, metrics::router(sources));
            let served = served.with_graceful_shutdown(stop.cancelled_owned());
            if let Err(error) = served.await {
                tracing::error!(error = %Chain(&error), "the metrics have ended");
            }
        });
    }

    /// Waits for a signal, or for the keeper to fail. Tells the watchdog meanwhile that the keeper
    /// answers.
    async fn wait(&self) -> anyhow::Result<()> {
        let mut failure = self.failure.clone();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let beat = sd_notify::watchdog_enabled().map(|limit| limit / 3);
        let mut beats = tokio::time::interval(beat.unwrap_or(Duration::from_secs(3600)));
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                Ok(failed) = failure.wait_for(Option::is_some) => {
                    let error = failed.clone().expect("just seen");
                    return Err(anyhow::Error::new(error));
                }
                _ = beats.tick() => {}
            }
            if beat.is_some() && self.ledger.usage().await.is_ok() {
                notify(&[NotifyState::Watchdog]);
            }
        }
    }

    /// Tells the others that this node stops, if nothing goes on without the agent: no endpoint, and no
    /// port by which clients reach those of other nodes.
    async fn stop(self, tracker: &TaskTracker, stop: &CancellationToken) {
        if let Some(docker) = &self.docker {
            docker.stop(GRACE).await;
        }
        let snapshot = self.report.snapshot();
        let attached = snapshot.book.endpoints.len();
        if attached == 0 && carried(&snapshot.cluster, &snapshot.book).is_empty() {
            if let Err(error) = self.gossip.leave().await {
                tracing::warn!(error = %Chain(&error), "could not say that this node stops");
            }
        } else {
            tracing::info!(attached, "endpoints and published ports go on without the agent");
        }
        stop.cancel();
        self.carrier.shutdown(GRACE).await;
        self.encryption.stop();
        tracker.close();
        if tokio::time::timeout(GRACE, tracker.wait()).await.is_err() {
            tracing::warn!(tasks = tracker.len(), "some tasks did not end in time");
        }
    }
}

fn places(config: &Config) -> Places {
    Places {
        state_dir: config.state_dir.clone(),
        plugin_dir: config.docker_plugin_dir.clone(),
        swarm_socket: config.socket.with_file_name(SWARM_SOCKET),
        socket: config.docker_socket.clone(),
    }
}

/// The view, once there is one.
type ViewCell = Arc<OnceLock<watch::Receiver<Arc<ClusterView>>>>;

/// How members are reached, and which are not to be.
struct Roads {
    advertise: SocketAddr,
    revoked: watch::Receiver<BTreeSet<NodeId>>,
    detour: Option<quic::Detour>,
}

fn bind_carrier(
    config: &Config,
    identity: &Identity,
    roads: Roads,
    view: &ViewCell,
) -> Result<QuicCarrier, quic::BindError> {
    let Roads { advertise, revoked, detour } = roads;
    let (for_names, for_seeds) = (Arc::clone(view), Arc::clone(view));
    let own = identity.name().clone();
    let admission = Admission {
        admit: Arc::new(move |name, node| {
            let view = for_names.get().map(|view| Arc::clone(&view.borrow()));
            free_name(&own, view.as_deref(), name, node)
        }),
        seeds: Arc::new(move || {
            let view = for_seeds.get().map(|view| Arc::clone(&view.borrow()));
            view.map_or_else(|| vec![advertise], |view| live_addresses(&view))
        }),
        validity: NODE_VALIDITY,
    };
    QuicCarrier::bind(QuicConfig {
        identity: identity.clone(),
        bind: config.listen.unwrap_or(advertise),
        advertise: Some(advertise),
        clock: quic::Clock::system(),
        revoked,
        admission: identity.issuer().map(|_| admission),
        detour,
        timing: quic::Timing::default(),
    })
}

/// Refuses a name that another member has.
fn free_name(
    own: &Label,
    view: Option<&ClusterView>,
    name: &Label,
    node: NodeId,
) -> Result<(), String> {
    let members = view.into_iter().flat_map(|view| view.members.values());
    let taken = members
        .filter(|member| member.id != node && member.liveness != Liveness::Left)
        .any(|member| member.node.as_ref().is_some_and(|record| record.name == *name));
    match taken || (name == own && view.is_none()) {
        true => Err(format!("another node is called {name}: give this one another --name")),
        false => Ok(()),
    }
}

fn live_addresses(view: &ClusterView) -> Vec<SocketAddr> {
    let alive = view.members.values().filter(|member| member.liveness == Liveness::Alive);
    alive.filter_map(|member| member.node.as_ref()).map(|node| node.address).collect()
}

fn seeds(identity: &Identity, config: &Config, own: SocketAddr) -> Vec<SocketAddr> {
    let mut seeds: BTreeSet<SocketAddr> = roster::load(&config.state_dir).into_iter().collect();
    seeds.extend(identity.seeds());
    seeds.remove(&own);
    seeds.into_iter().collect()
}

fn flatten<E: Ord + Copy>(ports: BTreeMap<NetworkId, BTreeSet<E>>) -> BTreeSet<(NetworkId, E)> {
    ports.into_iter().flat_map(|(id, all)| all.into_iter().map(move |e| (id, e))).collect()
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}
