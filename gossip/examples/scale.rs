//! Simulates one large cluster in virtual time and prints how it does, as `RESULT name=value`.
//!
//! `cargo run -p weft-gossip --example scale -- [NODES] [PUSH_SLICE] [ENDPOINTS_PER_NODE]`

#![expect(clippy::print_stdout, reason = "its output is what it is for")]

use std::{collections::BTreeMap, net::SocketAddr, str::FromStr, time::Duration};

use anyhow::Context;
use tokio::time::{self, Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_gossip::{
    Bucket, ClusterView, Gossip, GossipConfig, Key, Liveness, Record, memory::MemoryNetwork,
};
use weft_model::{
    AddressGrant, ClusterId, Endpoint, EndpointId, Family, MacAddr, NetworkId, Node, NodeId,
    NodeState, Unit,
};

fn main() -> anyhow::Result<()> {
    let scale = Scale {
        nodes: argument(1, 500)?,
        push_slice: argument(2, 64)?,
        endpoints: argument(3, 4)?,
    };
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()?
        .block_on(scale.simulate())
}

struct Scale {
    nodes: u16,
    push_slice: usize,
    endpoints: u16,
}

struct Simulation {
    network: MemoryNetwork,
    running: Vec<(Gossip, CancellationToken)>,
    tracker: TaskTracker,
}

impl Scale {
    async fn simulate(self) -> anyhow::Result<()> {
        println!("RESULT nodes={}", self.nodes);
        println!("RESULT push_slice={}", self.push_slice);
        println!("RESULT endpoints_per_node={}", self.endpoints);
        let mut simulation = Simulation {
            network: MemoryNetwork::new(1),
            running: Vec::new(),
            tracker: TaskTracker::new(),
        };
        for n in 0..self.nodes {
            simulation.start(n, self.push_slice, self.endpoints)?;
        }
        let all = usize::from(self.nodes);
        let endpoints = all * usize::from(self.endpoints);
        let took = simulation
            .until(|view| {
                let alive = view.members.values().filter(|m| m.liveness == Liveness::Alive);
                alive.count() == all && endpoints_in(view) == endpoints
            })
            .await;
        println!("RESULT cold_start_all_ms={}", last(&took).as_millis());

        let span = Duration::from_secs(5);
        time::sleep(Duration::from_secs(2)).await;
        simulation.traffic("idle", span, time::sleep(span)).await;
        let publishing = simulation.publish_often(span);
        simulation.traffic("one_change_a_second", span, publishing).await;

        let mut spread = Vec::new();
        for trial in 0..5 {
            let publisher = usize::from(trial * 97 % self.nodes);
            let number = 60_000 + trial;
            let id = id(number);
            simulation.publish(publisher, number).await?;
            spread.extend(simulation.until(|view| has(view, id)).await);
            time::sleep(Duration::from_secs(3)).await;
        }
        spread.sort();
        for (name, share) in [("p50", 50), ("p90", 90), ("p99", 99), ("max", 100)] {
            let at = (spread.len() * share).div_ceil(100) - 1;
            println!("RESULT publish_{name}_ms={}", spread[at].as_millis());
        }

        let dead = node(self.nodes - 1);
        simulation.network.crash(address(self.nodes - 1));
        simulation.running.pop().context("there is at least one node")?.1.cancel();
        let took = simulation
            .until(|view| view.members.get(&dead).is_some_and(|m| m.liveness == Liveness::Suspect))
            .await;
        println!("RESULT death_first_ms={}", took[0].as_millis());
        println!("RESULT death_all_ms={}", last(&took).as_millis());
        let wrongly: u64 = simulation
            .running
            .iter()
            .map(|(gossip, _)| gossip.counters().suspicions.saturating_sub(1))
            .sum();
        println!("RESULT wrong_suspicions={wrongly}");
        let counters = simulation.running[0].0.counters();
        println!("RESULT digest_bytes={}", counters.digest_bytes);
        Ok(())
    }
}

impl Simulation {
    fn start(&mut self, n: u16, push_slice: usize, endpoints: u16) -> anyhow::Result<()> {
        let mut config = GossipConfig::new(node(n), ClusterId::from([1; 16]), 1);
        config.seeds = (0..3).map(address).collect();
        config.push_slice = push_slice;
        config.seed = n.into();
        let mut buckets = BTreeMap::new();
        for number in n * endpoints..(n + 1) * endpoints {
            let (key, endpoint) = endpoint(n, number);
            buckets.entry(key).or_insert_with(Vec::new).push(endpoint);
        }
        let records = buckets.into_iter().map(|(key, all)| (key, Record::Endpoints(all)));
        config.records = records.collect();
        config.records.push((Key::Node, node_record(n)?));
        let cancel = CancellationToken::new();
        let carrier = self.network.carrier(node(n), address(n));
        let gossip = Gossip::start(config, carrier, &self.tracker, cancel.clone());
        self.running.push((gossip, cancel));
        Ok(())
    }

    /// Waits until `reached` holds at all nodes; returns when it did at each, sorted.
    async fn until(&self, reached: impl Fn(&ClusterView) -> bool) -> Vec<Duration> {
        let start = Instant::now();
        let mut waiting: Vec<_> = self.running.iter().map(|(gossip, _)| gossip.view()).collect();
        for view in &mut waiting {
            view.mark_changed();
        }
        let mut took = Vec::new();
        while !waiting.is_empty() {
            assert!(start.elapsed() < Duration::from_secs(60), "{} nodes wait", waiting.len());
            waiting.retain_mut(|view| {
                let changed = view.has_changed().unwrap_or(false);
                let done = changed && reached(&view.borrow_and_update());
                if done {
                    took.push(start.elapsed());
                }
                !done
            });
            time::sleep(Duration::from_millis(1)).await;
        }
        took
    }

    async fn publish(&self, publisher: usize, number: u16) -> anyhow::Result<()> {
        let (key, endpoint) = endpoint(u16::try_from(publisher)?, number);
        let record = Record::Endpoints(vec![endpoint]);
        Ok(self.running[publisher].0.publish(vec![(key, Some(record))]).await?)
    }

    async fn publish_often(&self, span: Duration) {
        let end = Instant::now() + span;
        let mut number = 50_000;
        while Instant::now() < end {
            number += 1;
            let publisher = usize::from(number) % self.running.len();
            let published = self.publish(publisher, number).await;
            published.expect("the record is short and gossip runs");
            time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn traffic(&self, name: &str, span: Duration, meanwhile: impl Future<Output = ()>) {
        let before = self.network.traffic();
        meanwhile.await;
        let after = self.network.traffic();
        let per_node = |total: u64| total as f64 / span.as_secs_f64() / self.running.len() as f64;
        let kilobytes = per_node(after.bytes - before.bytes) / 1000.0;
        println!("RESULT {name}_sent_kB_per_s_and_node={kilobytes:.1}");
        let messages = per_node(after.messages - before.messages);
        println!("RESULT {name}_messages_per_s_and_node={messages:.1}");
    }
}

fn last(took: &[Duration]) -> Duration {
    took.last().copied().unwrap_or_default()
}

fn has(view: &ClusterView, id: EndpointId) -> bool {
    view.members.values().any(|member| member.endpoints.values().any(|all| all.contains_key(&id)))
}

fn endpoints_in(view: &ClusterView) -> usize {
    let networks = view.members.values().flat_map(|member| member.endpoints.values());
    networks.map(BTreeMap::len).sum()
}

fn argument<T: FromStr>(place: usize, default: T) -> anyhow::Result<T> {
    match std::env::args().nth(place) {
        None => Ok(default),
        Some(text) => text.parse().ok().with_context(|| format!("{text:?} is no such number")),
    }
}

fn node(n: u16) -> NodeId {
    NodeId::from(hash(7, n))
}

fn address(n: u16) -> SocketAddr {
    let [high, low] = n.to_be_bytes();
    ([10, 1, high, low], 4790).into()
}

fn id(number: u16) -> EndpointId {
    EndpointId::from(hash(8, number))
}

fn hash(domain: u8, n: u16) -> [u8; 16] {
    let digest = ClusterId::from([domain; 16]).digest(&n.to_be_bytes());
    let (half, _) = digest.split_first_chunk().expect("32 bytes have 16 first ones");
    *half
}

fn node_record(n: u16) -> anyhow::Result<Record> {
    Ok(Record::Node(Node {
        name: format!("host{n}").parse()?,
        vtep: address(n).ip().into(),
        address: address(n),
        version: "0.1.0".into(),
        state: NodeState::Up,
        underlay_mtu: 1500,
        routes: vec![],
        resolvers: vec![],
        sealing: None,
        metrics: None,
    }))
}

/// An endpoint at node `n`, in one of twenty networks, and its bucket.
fn endpoint(n: u16, number: u16) -> (Key, Endpoint) {
    let network = NetworkId::from([(n % 20) as u8; 16]);
    let [high, low] = number.to_be_bytes();
    let ip = [10, 32, high, low].into();
    let endpoint = Endpoint {
        id: id(number),
        network,
        name: format!("web{number}").parse().expect("letters and digits make a label"),
        aliases: vec![],
        mac: MacAddr::for_address(network, ip),
        addresses: vec![AddressGrant { ip, unit: Unit::Block(Family::V4, 0), seq: 1 }],
        sandbox: format!("sandbox-{number}"),
        seq: 1,
        service: None,
        labels: [].into(),
        default_route: false,
    };
    (Key::Endpoints(network, Bucket::of(id(number))), endpoint)
}
