use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{self, Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_gossip::{
    Bucket, ClusterView, Gossip, GossipConfig, Key, Liveness, Member, Record, memory::MemoryNetwork,
};
use weft_model::{
    AddressGrant, ClusterId, Endpoint, EndpointId, Family, MacAddr, NetworkId, Node, NodeId,
    NodeState, Unit,
};

/// Nodes of one cluster, by number. Node `n` has the address 10.0.x.y and all its seeds are the
/// first three nodes.
pub(crate) struct Cluster {
    pub(crate) network: MemoryNetwork,
    pub(crate) running: BTreeMap<u16, Running>,
    generations: BTreeMap<u16, u32>,
    configure: fn(&mut GossipConfig),
}

pub(crate) struct Running {
    pub(crate) gossip: Gossip,
    /// What the node has published.
    pub(crate) records: BTreeMap<Key, Record>,
    cancel: CancellationToken,
    tracker: TaskTracker,
}

impl Cluster {
    pub(crate) fn new(seed: u64) -> Self {
        Self::configured(seed, |_| {})
    }

    pub(crate) fn configured(seed: u64, configure: fn(&mut GossipConfig)) -> Self {
        let (running, generations) = (BTreeMap::new(), BTreeMap::new());
        Self { network: MemoryNetwork::new(seed), running, generations, configure }
    }

    /// A cluster of nodes 1 to `size` that all see each other.
    pub(crate) async fn of(size: u16, seed: u64) -> Self {
        let mut cluster = Self::new(seed);
        cluster.start_all(size).await;
        cluster
    }

    pub(crate) async fn start_all(&mut self, size: u16) {
        for n in 1..=size {
            self.start(n, [(Key::Node, node_record(n))].into());
        }
        self.converge(Duration::from_secs(20)).await;
    }

    /// Starts node `n` anew, one generation later than the last time.
    pub(crate) fn start(&mut self, n: u16, records: BTreeMap<Key, Record>) {
        let generation = self.generations.entry(n).or_default();
        *generation += 1;
        let generation = *generation;
        self.start_as(n, generation, records);
    }

    pub(crate) fn start_as(&mut self, n: u16, generation: u32, records: BTreeMap<Key, Record>) {
        let cluster = ClusterId::from([9; 16]);
        let mut config = GossipConfig::new(node(n), cluster, generation);
        config.seeds = (1..=3).map(address).collect();
        config.records = records.clone().into_iter().collect();
        config.seed = n.into();
        (self.configure)(&mut config);
        let (tracker, cancel) = (TaskTracker::new(), CancellationToken::new());
        let carrier = self.network.carrier(node(n), address(n));
        let gossip = Gossip::start(config, carrier, &tracker, cancel.clone());
        self.running.insert(n, Running { gossip, records, cancel, tracker });
    }

    /// Stops node `n` without a word.
    pub(crate) async fn crash(&mut self, n: u16) -> BTreeMap<Key, Record> {
        self.network.crash(address(n));
        self.stop(n).await
    }

    pub(crate) async fn leave(&mut self, n: u16) -> usize {
        let unconfirmed = self.running[&n].gossip.leave().await.unwrap();
        self.network.crash(address(n));
        self.stop(n).await;
        unconfirmed
    }

    async fn stop(&mut self, n: u16) -> BTreeMap<Key, Record> {
        let running = self.running.remove(&n).unwrap();
        running.cancel.cancel();
        running.tracker.close();
        running.tracker.wait().await;
        running.records
    }

    pub(crate) async fn publish(&mut self, n: u16, batch: Vec<(Key, Option<Record>)>) {
        let running = self.running.get_mut(&n).unwrap();
        for (key, record) in &batch {
            match record {
                Some(record) => drop(running.records.insert(*key, record.clone())),
                None => drop(running.records.remove(key)),
            }
        }
        running.gossip.publish(batch).await.unwrap();
    }

    pub(crate) fn view(&self, n: u16) -> Arc<ClusterView> {
        self.running[&n].gossip.view().borrow().clone()
    }

    /// Waits until every running node sees every running node alive, with exactly what it has
    /// published, and nobody else alive. Returns how long it took.
    pub(crate) async fn converge(&self, within: Duration) -> Duration {
        self.until(within, Self::difference).await
    }

    /// Waits until `difference` finds none; else panics with it. Returns how long it took.
    pub(crate) async fn until(
        &self,
        within: Duration,
        difference: impl Fn(&Self) -> Option<String>,
    ) -> Duration {
        let start = Instant::now();
        while let Some(found) = difference(self) {
            assert!(start.elapsed() < within, "after {within:?} still: {found}");
            time::sleep(Duration::from_millis(5)).await;
        }
        start.elapsed()
    }

    fn difference(&self) -> Option<String> {
        let expected: BTreeMap<_, _> = self
            .running
            .iter()
            .map(|(&n, running)| (node(n), Arc::new(expected_member(n, &running.records))))
            .collect();
        self.running.keys().find_map(|&n| {
            let view = self.view(n);
            let alive: BTreeMap<_, _> = view
                .members
                .iter()
                .filter(|(_, member)| member.liveness == Liveness::Alive)
                .map(|(id, member)| (*id, Arc::clone(member)))
                .collect();
            if alive == expected {
                return None;
            }
            let wrong = expected.iter().find(|(id, member)| alive.get(id) != Some(member));
            let extra = alive.keys().find(|id| !expected.contains_key(id));
            let seen = wrong.map(|(id, _)| view.members.get(id));
            Some(format!("node {n} lacks {wrong:?}, sees {seen:?}, has too much {extra:?}"))
        })
    }
}

/// Tasks of a cluster end with their runtime.
impl Drop for Cluster {
    fn drop(&mut self) {
        for running in self.running.values() {
            running.cancel.cancel();
        }
    }
}

fn expected_member(n: u16, records: &BTreeMap<Key, Record>) -> Member {
    let mut member = Member {
        id: node(n),
        liveness: Liveness::Alive,
        node: None,
        networks: BTreeMap::new(),
        endpoints: BTreeMap::new(),
        loans: BTreeMap::new(),
        holds: BTreeMap::new(),
        wants: BTreeMap::new(),
        services: BTreeMap::new(),
        conditions: BTreeMap::new(),
        drained: BTreeMap::new(),
        unknown_keys: 0,
        undecodable: 0,
    };
    for (key, record) in records {
        match (key.network(), record.clone()) {
            (None, Record::Node(node)) => member.node = Some(node),
            (Some(id), Record::Network(network)) => drop(member.networks.insert(id, network)),
            (Some(id), Record::Endpoints(endpoints)) => {
                for endpoint in endpoints {
                    member.endpoints.entry(id).or_default().insert(endpoint.id, endpoint);
                }
            }
            (Some(id), Record::Loan(loans)) => drop(member.loans.insert(id, loans)),
            (Some(id), Record::Hold(holds)) => drop(member.holds.insert(id, holds)),
            (Some(id), Record::Want(wants)) => drop(member.wants.insert(id, wants)),
            (Some(id), Record::Services(services)) => {
                for service in services {
                    member.services.entry(id).or_default().insert(service.name.clone(), service);
                }
            }
            (Some(id), Record::Conditions(conditions)) => {
                for condition in conditions {
                    let known = member.conditions.entry(id).or_default();
                    known.insert(condition.endpoint, condition);
                }
            }
            (Some(id), Record::Drained(endpoints)) => {
                drop(member.drained.insert(id, endpoints));
            }
            (None, _) | (Some(_), Record::Node(_)) => panic!("{key} has {record:?}"),
        }
    }
    member
}

pub(crate) fn node(n: u16) -> NodeId {
    let mut bytes = [0xa0; 16];
    bytes[..2].copy_from_slice(&n.to_be_bytes());
    NodeId::from(bytes)
}

pub(crate) fn address(n: u16) -> SocketAddr {
    let [high, low] = n.to_be_bytes();
    ([10, 0, high, low], 4790).into()
}

pub(crate) fn network(n: u8) -> NetworkId {
    NetworkId::from([n; 16])
}

pub(crate) fn node_record(n: u16) -> Record {
    Record::Node(Node {
        name: format!("host{n}").parse().unwrap(),
        vtep: address(n).ip().into(),
        address: address(n),
        version: "0.1.0".into(),
        state: NodeState::Up,
        underlay_mtu: 1500,
        routes: vec![],
        resolvers: vec![],
        sealing: None,
        metrics: None,
    })
}

/// The bucket of one endpoint, and what it holds when that endpoint is there.
pub(crate) fn endpoint(net: u8, number: u8, seq: u64) -> (Key, Record) {
    let id = EndpointId::from([number; 16]);
    let ip = [10, 32, net, number].into();
    let endpoint = Endpoint {
        id,
        network: network(net),
        name: format!("web{number}").parse().unwrap(),
        aliases: vec![],
        mac: MacAddr::for_address(network(net), ip),
        addresses: vec![AddressGrant { ip, unit: Unit::Block(Family::V4, 0), seq: 1 }],
        sandbox: format!("sandbox-{number}"),
        seq,
        service: None,
        labels: [].into(),
        default_route: false,
    };
    (endpoint_key(net, number), Record::Endpoints(vec![endpoint]))
}

pub(crate) fn endpoint_key(net: u8, number: u8) -> Key {
    Key::Endpoints(network(net), Bucket::of(EndpointId::from([number; 16])))
}

pub(crate) fn has_endpoint(view: &ClusterView, owner: u16, net: u8, number: u8) -> bool {
    let id = EndpointId::from([number; 16]);
    view.members
        .get(&node(owner))
        .and_then(|member| member.endpoints.get(&network(net)))
        .is_some_and(|endpoints| endpoints.contains_key(&id))
}

pub(crate) fn liveness(view: &ClusterView, of: u16) -> Option<Liveness> {
    view.members.get(&node(of)).map(|member| member.liveness)
}
