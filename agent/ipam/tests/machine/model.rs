//! The machine under a model checker: every interleaving, within bounds, of two or three nodes, one
//! lender, and gossip that is late, lost and out of order.

use std::{
    collections::BTreeMap,
    hash::Hash,
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use stateright::{Checker, HasDiscoveries, Model, Property};
use weft_ipam::{Ask, Ipam, State, Timing, View, accepts};
use weft_model::{
    AddressGrant, EndpointId, Family, HoldRecord, LoanRecord, Network, NodeId, WantRecord,
};

#[test]
fn no_reachable_state_has_an_address_on_two_nodes() {
    for asks in [[ANY, FIXED], [FIXED, ANY], [FIXED, FIXED]] {
        let checker = check(Lending { asks: asks.map(Some).to_vec(), ..Lending::new() });
        assert!(checker.state_count() < MOST_STATES, "the bounds leave out reachable states");
        checker.assert_properties();
    }
}

#[test]
fn no_crash_puts_an_address_on_two_nodes() {
    for crashes in [[1, 0, 0], [0, 1, 0]] {
        let checker = check(Lending { crashes, ..Lending::new() });
        checker.assert_properties();
    }
}

/// Of a block of two addresses, in use where the lender is or elsewhere.
#[test]
fn no_address_ceded_out_of_a_block_is_on_two_nodes() {
    for asks in [[ANY, FIRST], [FIRST, ANY]] {
        let asks = asks.map(Some).to_vec();
        let lending = Lending { asks, idle: LONG, versions: 5, ..Lending::with_two() };
        let checker = check(lending);
        assert!(checker.state_count() < MOST_STATES, "the bounds leave out reachable states");
        checker.assert_no_discovery(DUPLICATE);
        checker.assert_no_discovery(TWO_OWNERS);
        checker.assert_any_discovery(CEDED);
    }
}

#[test]
fn no_address_ceded_to_a_third_node_is_on_two_nodes() {
    let checker = check(Lending { past: node_1_is_done(), versions: 5, ..Lending::to_a_third() });
    assert!(checker.state_count() < MOST_STATES, "the bounds leave out reachable states");
    checker.assert_no_discovery(DUPLICATE);
    checker.assert_no_discovery(TWO_OWNERS);
    checker.assert_any_discovery(CEDED);
}

#[test]
fn a_holder_that_forgets_what_it_ceded_is_caught() {
    let mut past = node_1_is_done();
    past.push(Act::Ask(2));
    for (from, to) in [(2, 1), (2, 0), (1, 0), (0, 2)] {
        past.extend([Act::Send { from, to }, Act::Hear { from, to }]);
    }
    past.push(Act::Ask(2));
    let forgets = Some(Forgets::Ceded);
    let checker = check(Lending { crashes: [0, 1, 0], forgets, past, ..Lending::to_a_third() });
    checker.assert_any_discovery(DUPLICATE);
}

#[test]
fn a_lender_that_forgets_its_loans_is_caught() {
    let forgets = Some(Forgets::Loans);
    let checker = check(Lending { crashes: [1, 0, 0], forgets, ..Lending::new() });
    checker.assert_any_discovery(DUPLICATE);
}

/// Starts where node 1 has an address and the register that says so is on its way a second time.
#[test]
fn a_node_that_forgets_what_it_released_is_caught() {
    let past = vec![
        Act::Ask(1),
        Act::Send { from: 1, to: 0 },
        Act::Hear { from: 1, to: 0 },
        Act::Send { from: 0, to: 1 },
        Act::Hear { from: 0, to: 1 },
        Act::Ask(1),
        Act::Ask(0),
        Act::Send { from: 0, to: 1 },
    ];
    let forgets = Some(Forgets::Released);
    let checker =
        check(Lending { crashes: [0, 1, 0], versions: 9, forgets, past, ..Lending::new() });
    checker.assert_any_discovery(DUPLICATE);
}

#[test]
fn a_wrong_removal_gives_no_observer_an_address_twice() {
    let checker = check(Lending {
        removal: true,
        turns: 2,
        versions: 5,
        past: node_1_runs(),
        ..Lending::new()
    });
    assert!(checker.state_count() < MOST_STATES, "the bounds leave out reachable states");
    checker.assert_no_discovery(TWO_OWNERS);
    checker.assert_any_discovery(REUSED);
}

#[test]
fn an_observer_that_ignores_the_loans_is_caught() {
    let past = node_1_runs();
    let checker = check(Lending { removal: true, credulous: true, past, ..Lending::new() });
    checker.assert_any_discovery(TWO_OWNERS);
}

/// Node 1 gets an address, and both nodes know it.
fn node_1_runs() -> Vec<Act> {
    vec![
        Act::Ask(1),
        Act::Send { from: 1, to: 0 },
        Act::Hear { from: 1, to: 0 },
        Act::Send { from: 0, to: 1 },
        Act::Hear { from: 0, to: 1 },
        Act::Ask(1),
        Act::Send { from: 1, to: 0 },
        Act::Hear { from: 1, to: 0 },
    ]
}

/// Node 1 has had the only address and has given it back; the block stays with it. All know.
fn node_1_is_done() -> Vec<Act> {
    let mut past = node_1_runs();
    past.push(Act::Stop(1));
    for (from, to) in [(1, 0), (1, 2), (0, 2)] {
        past.extend([Act::Send { from, to }, Act::Hear { from, to }]);
    }
    past
}

fn check(lending: Lending) -> impl Checker<Lending> {
    lending
        .checker()
        .target_state_count(MOST_STATES)
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join()
}

const MOST_STATES: usize = 45_000;
const ANY: Ask = Ask::Any(Family::V4);
const FIXED: Ask = Ask::Fixed(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 6)));
const FIRST: Ask = Ask::Fixed(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2)));
const LONG: Duration = Duration::from_secs(1);
const TWO_OWNERS: &str = "an observer has an address on one node at most";
const REUSED: &str = "a removed node and its successor both have the address";
const CEDED: &str = "an address is ceded and used by another node";
const DUPLICATE: &str = "an address is in use on one node at most";

/// What a broken node leaves out when it restarts.
#[derive(Clone, Copy)]
enum Forgets {
    Released,
    Loans,
    Ceded,
}

struct Lending {
    network: Arc<Network>,
    /// What each node asks for; nothing, where it merely lends.
    asks: Vec<Option<Ask>>,
    /// Crashes each node may have.
    crashes: [u8; 3],
    /// Turns a unit may be lent.
    turns: u64,
    /// Times a node may publish.
    versions: u64,
    forgets: Option<Forgets>,
    /// Whether an operator may remove node 1 while it is alive.
    removal: bool,
    /// Observers that believe whatever they hear.
    credulous: bool,
    /// How long an empty block stays with its node; the clock stands still.
    idle: Duration,
    /// What has happened before the search begins.
    past: Vec<Act>,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Cluster {
    hosts: Vec<Host>,
    /// Node 1 was removed, though it is alive, and the lender has heard of it.
    removed: bool,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Host {
    ipam: Ipam,
    running: Option<AddressGrant>,
    crashes: u8,
    published: Arc<Published>,
    /// Of each other node, what was heard last and what is under way.
    heard: BTreeMap<usize, Arc<Published>>,
    coming: BTreeMap<usize, Arc<Published>>,
}

#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
struct Published {
    version: u64,
    loans: LoanRecord,
    holds: HoldRecord,
    wants: WantRecord,
    running: Option<AddressGrant>,
}

#[derive(Clone, Debug, PartialEq)]
enum Act {
    Ask(usize),
    Stop(usize),
    Step(usize),
    Crash(usize),
    /// A register leaves; whatever was under way is lost.
    Send {
        from: usize,
        to: usize,
    },
    Hear {
        from: usize,
        to: usize,
    },
    Remove,
}

impl Model for Lending {
    type State = Cluster;
    type Action = Act;

    fn init_states(&self) -> Vec<Cluster> {
        let host = |place| Host {
            ipam: Ipam::new(self.network.clone(), node_id(place), self.timing()),
            running: None,
            crashes: 0,
            published: Arc::default(),
            heard: BTreeMap::new(),
            coming: BTreeMap::new(),
        };
        let start = Cluster { hosts: (0..self.asks.len()).map(host).collect(), removed: false };
        let act = |cluster, act: &Act| self.next_state(&cluster, act.clone()).unwrap();
        vec![self.past.iter().fold(start, act)]
    }

    fn actions(&self, cluster: &Cluster, acts: &mut Vec<Act>) {
        if self.removal && !cluster.removed {
            acts.push(Act::Remove);
        }
        for (at, host) in cluster.hosts.iter().enumerate() {
            match host.running {
                None => acts.extend(self.asks[at].map(|_| Act::Ask(at))),
                Some(_) => acts.push(Act::Stop(at)),
            }
            acts.push(Act::Step(at));
            if host.crashes < self.crashes[at] {
                acts.push(Act::Crash(at));
            }
            for (from, other) in cluster.hosts.iter().enumerate().filter(|&(from, _)| from != at) {
                let heard = host.heard.get(&from).map_or(0, |heard| heard.version);
                let coming = host.coming.get(&from);
                if coming.is_none() && other.published.version > heard {
                    acts.push(Act::Send { from, to: at });
                }
                if coming.is_some() {
                    acts.push(Act::Hear { from, to: at });
                }
            }
        }
    }

    fn next_state(&self, before: &Cluster, act: Act) -> Option<Cluster> {
        let mut cluster = before.clone();
        match act {
            Act::Ask(at) => {
                let endpoint = endpoint_id(at);
                let ask = self.asks[at]?;
                let grant =
                    cluster.with_view(at, |ipam, view| ipam.allocate(endpoint, ask, view, 0));
                cluster.hosts[at].running = grant.ok();
                cluster.publish(at);
            }
            Act::Stop(at) => {
                cluster.hosts[at].running = None;
                cluster.hosts[at].ipam.release(endpoint_id(at), 0);
                cluster.publish(at);
            }
            Act::Step(at) => cluster.step(at),
            Act::Remove => cluster.removed = true,
            Act::Crash(at) => {
                let state = self.damaged(cluster.hosts[at].ipam.saved_state());
                let host = &mut cluster.hosts[at];
                host.crashes += 1;
                host.heard.clear();
                host.ipam =
                    Ipam::restore(self.network.clone(), node_id(at), self.timing(), state).unwrap();
                cluster.publish(at);
            }
            Act::Send { from, to } => {
                let register = cluster.hosts[from].published.clone();
                cluster.hosts[to].coming.insert(from, register);
            }
            Act::Hear { from, to } => {
                let host = &mut cluster.hosts[to];
                let register = host.coming.remove(&from)?;
                let heard = host.heard.get(&from).map_or(0, |heard| heard.version);
                if register.version > heard {
                    host.heard.insert(from, register);
                    cluster.step(to);
                }
            }
        }
        (cluster != *before).then_some(cluster)
    }

    fn within_boundary(&self, cluster: &Cluster) -> bool {
        let lent = cluster.hosts[0].published.loans.loans.values();
        let few_turns = lent.map(|loan| loan.seq).all(|seq| seq <= self.turns);
        few_turns && cluster.hosts.iter().all(|host| host.published.version <= self.versions)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(DUPLICATE, |_, cluster| {
                // Two nodes have it after a wrong removal: that is the operator's word.
                if cluster.removed {
                    return true;
                }
                let in_use = cluster.hosts.iter().filter_map(|host| Some(host.running?.ip));
                let mut in_use: Vec<IpAddr> = in_use.collect();
                in_use.sort();
                in_use.windows(2).all(|pair| pair[0] != pair[1])
            }),
            Property::<Self>::always(TWO_OWNERS, |lending, cluster| {
                let differ = |at| cluster.accepted(lending, at).windows(2).all(|p| p[0] != p[1]);
                (0..cluster.hosts.len()).all(differ)
            }),
            Property::<Self>::sometimes(REUSED, |lending, cluster| {
                let running = |host: &Host| host.running.is_some();
                !lending.removal || cluster.hosts.iter().all(running)
            }),
            Property::<Self>::sometimes("an address changes hands", |_, cluster| {
                let [first, second, ..] = &cluster.hosts[..] else { return false };
                let had = !first.published.holds.released.is_empty();
                had && first.running.is_none() && second.running.is_some()
            }),
            Property::<Self>::sometimes(CEDED, |lending, cluster| {
                let ceded_by = |host: &Host, ip| {
                    host.published.holds.held.values().any(|hold| hold.ceded.contains(&ip))
                };
                let mut in_use = cluster.hosts.iter().filter_map(|host| Some(host.running?.ip));
                lending.idle.is_zero()
                    || in_use.any(|ip| cluster.hosts.iter().any(|host| ceded_by(host, ip)))
            }),
        ]
    }
}

impl Lending {
    /// A subnet of which only the address .6 can be given out.
    fn new() -> Self {
        Self::within("10.0.0.0/29", 2..6)
    }

    /// A subnet of which only the block of .2 and .3 can be given out.
    fn with_two() -> Self {
        Self::within("10.0.0.0/26", 4..63)
    }

    /// Node 0 merely lends, node 1 has an address and node 2 asks for the same.
    fn to_a_third() -> Self {
        Self { asks: vec![None, Some(ANY), Some(FIXED)], idle: LONG, ..Self::new() }
    }

    fn within(subnet: &str, taken: Range<u128>) -> Self {
        let subnet: weft_model::Subnet = subnet.parse().unwrap();
        let taken = taken.map(|offset| subnet.nth(offset).unwrap());
        let aux: BTreeMap<_, _> = taken.map(|ip| (ip.to_string(), ip)).collect();
        let network = serde_json::json!({
            "id": "0a".repeat(16), "name": "app", "vni": 5000,
            "pools": [{"subnet": subnet, "gateway": subnet.first_host(), "aux": aux}],
            "creator": node_id(0), "lenders": [node_id(0)],
        });
        Self {
            network: Arc::new(serde_json::from_value(network).unwrap()),
            asks: vec![Some(ANY); 2],
            crashes: [0; 3],
            turns: 3,
            versions: 7,
            forgets: None,
            removal: false,
            credulous: false,
            idle: Duration::ZERO,
            past: Vec::new(),
        }
    }

    fn timing(&self) -> Timing {
        Timing { rest: Duration::ZERO, idle: self.idle, patience: Duration::from_secs(1) }
    }

    fn damaged(&self, state: &State) -> State {
        let mut file = serde_json::to_value(state).unwrap();
        match self.forgets {
            Some(Forgets::Released) => file["holds"]["released"] = serde_json::json!([]),
            Some(Forgets::Loans) => file["loans"]["loans"] = serde_json::json!([]),
            Some(Forgets::Ceded) => {
                for pair in file["holds"]["held"].as_array_mut().unwrap() {
                    pair[1]["ceded"] = serde_json::json!([]);
                }
            }
            None => {}
        }
        serde_json::from_value(file).unwrap()
    }
}

impl Cluster {
    fn with_view<T>(&mut self, at: usize, act: impl FnOnce(&mut Ipam, &View<'_>) -> T) -> T {
        let removed = self.removed && at == 0;
        let host = &mut self.hosts[at];
        act(&mut host.ipam, &view(&host.heard, removed))
    }

    fn step(&mut self, at: usize) {
        let step = self.with_view(at, |ipam, view| ipam.step(view, 0));
        if !step.fenced.is_empty() {
            self.hosts[at].running = None;
            self.hosts[at].ipam.release(endpoint_id(at), 0);
        }
        self.publish(at);
    }

    fn publish(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if let Some(unsaved) = host.ipam.unsaved() {
            host.ipam.saved(unsaved);
        }
        let records = host.ipam.records();
        let old = &host.published;
        let same = old.loans == *records.loans
            && old.holds == *records.holds
            && old.wants == *records.wants
            && old.running == host.running;
        if !same {
            host.published = Arc::new(Published {
                version: old.version + 1,
                loans: records.loans.clone(),
                holds: records.holds.clone(),
                wants: records.wants.clone(),
                running: host.running,
            });
        }
    }

    /// The addresses that `at` accepts, of any node, in order.
    fn accepted(&self, lending: &Lending, at: usize) -> Vec<IpAddr> {
        let mut known = self.hosts[at].heard.clone();
        known.insert(at, self.hosts[at].published.clone());
        let view = view(&known, self.removed && at == 0);
        let mut accepted: Vec<IpAddr> = known
            .iter()
            .filter_map(|(&from, register)| Some((from, register.running?)))
            .filter(|(from, grant)| {
                lending.credulous || accepts(&lending.network, node_id(*from), grant, &view)
            })
            .map(|(_, grant)| grant.ip)
            .collect();
        accepted.sort();
        accepted
    }
}

fn view(known: &BTreeMap<usize, Arc<Published>>, removed: bool) -> View<'_> {
    let by_node = || known.iter().map(|(&from, register)| (node_id(from), register));
    View {
        loans: by_node().map(|(node, register)| (node, &register.loans)).collect(),
        holds: by_node().map(|(node, register)| (node, &register.holds)).collect(),
        wants: by_node().map(|(node, register)| (node, &register.wants)).collect(),
        live: (0..3).map(node_id).collect(),
        revoked: removed.then(|| node_id(1)).into_iter().collect(),
        ..View::default()
    }
}

fn node_id(place: usize) -> NodeId {
    NodeId::from([place as u8 + 1; 16])
}

fn endpoint_id(place: usize) -> EndpointId {
    EndpointId::from([place as u8 + 1; 16])
}
