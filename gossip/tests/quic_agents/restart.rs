use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::runtime::Runtime;
use weft_gossip::{
    identity::Identity,
    quic::{Session, SessionId, Timing},
};

use crate::{
    cluster::{Agent, Cluster, LIMIT},
    member::{Member, all_alive},
};

/// Three members, of which the last runs apart and can be killed without a goodbye.
struct Lab {
    runtime: Runtime,
    _dir: tempfile::TempDir,
    stay: Vec<Member>,
    dies: Option<(Runtime, Member)>,
    identity: Identity,
    seeds: Vec<SocketAddr>,
}

impl Lab {
    fn start() -> Self {
        let runtime = Runtime::new().unwrap();
        let cluster = runtime.block_on(async { Cluster::start() });
        let (one, two, three) = runtime.block_on(async {
            let one = cluster.admit("beta").await;
            let two = cluster.admit("gamma").await;
            (one, two, cluster.admit("delta").await)
        });
        let agents = runtime.block_on(async { [Agent::start(one), Agent::start(two)] });
        let seeds: Vec<_> = agents.iter().map(Agent::address).collect();
        let stay = runtime.block_on(async {
            agents.into_iter().map(|agent| Member::start(agent, 1, &seeds)).collect()
        });
        let dies = Runtime::new().unwrap();
        let member = dies.block_on(async { Member::start(Agent::start(three.clone()), 1, &seeds) });
        let lab = Self {
            runtime,
            _dir: cluster.dir,
            stay,
            dies: Some((dies, member)),
            identity: three,
            seeds,
        };
        lab.runtime.block_on(async {
            let (_, dies) = lab.dies.as_ref().unwrap();
            all_alive(&[&lab.stay[0], &lab.stay[1], dies]).await;
        });
        lab
    }

    fn dies(&self) -> &Member {
        &self.dies.as_ref().unwrap().1
    }

    /// Kills the last member, and starts it again after `pause`. Returns how long it took, counted
    /// from its start, until all pairs agreed on sessions that are new, and on no others.
    /// It knows the addresses of `seeds` others.
    fn restart(&mut self, generation: u32, pause: Duration, seeds: usize) -> Duration {
        let before: Vec<_> = self.stay.iter().map(|m| ids(m, self.dies())).collect();
        assert!(before.iter().all(|ids| !ids.is_empty()), "connected before");
        let (runtime, member) = self.dies.take().unwrap();
        let address = member.agent.address();
        runtime.shutdown_background();
        drop(member);
        self.runtime.block_on(async { tokio::time::sleep(pause).await });

        let end = Instant::now() + LIMIT;
        while std::net::UdpSocket::bind(address).is_err() {
            assert!(Instant::now() < end, "{address} is still taken");
            std::thread::yield_now();
        }
        let begin = Instant::now();
        let runtime = Runtime::new().unwrap();
        let member = runtime.block_on(async {
            let identity = self.identity.clone();
            let agent = Agent::start_with(identity, |config| config.bind = address);
            Member::start(agent, generation, &self.seeds[..seeds])
        });
        loop {
            let renewed = self.stay.iter().zip(&before).all(|(stays, before)| {
                let (here, there) = (ids(stays, &member), ids(&member, stays));
                !here.is_empty() && here == there && here.is_disjoint(before)
            });
            if renewed {
                break;
            }
            let state = || self.stay.iter().map(|m| m.agent.state()).collect::<Vec<_>>().join("\n");
            assert!(begin.elapsed() < LIMIT, "{}", state());
            self.runtime.block_on(async { tokio::time::sleep(Duration::from_millis(2)).await });
        }
        let took = begin.elapsed();
        self.dies = Some((runtime, member));
        took
    }
}

#[test]
fn all_have_new_sessions_after_the_restart_of_a_killed_agent_before_its_silence_is_noticed() {
    let mut lab = Lab::start();
    let mut all: Vec<Duration> = Vec::new();
    let cases = [(0, 2), (30, 1), (400, 2), (1000, 1), (2000, 2), (5000, 1)];
    for (generation, (pause, seeds)) in (2..).zip(cases) {
        let took = lab.restart(generation, Duration::from_millis(pause), seeds);
        let case = format!("after {pause} ms with {seeds} seeds: {took:?}");
        assert!(took < Timing::default().silence, "{case}");
        all.push(took);
        lab.runtime.block_on(async {
            all_alive(&[&lab.stay[0], &lab.stay[1], lab.dies()]).await;
        });
    }
    let longest = all.iter().max().map_or(0, Duration::as_millis);
    println!("RESULT new_sessions_after_restart_max_ms={longest}");
    lab.dies.take().unwrap().0.shutdown_background();
}

fn ids(here: &Member, there: &Member) -> BTreeSet<SessionId> {
    let sessions = here.agent.carrier.sessions(there.node());
    sessions.iter().filter_map(|session| Session::id(session).ok()).collect()
}
