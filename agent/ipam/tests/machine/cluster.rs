//! A few nodes and the gossip between them: it loses, repeats, delays and reorders registers, each
//! register on its own, but never puts an older version of one in the place of a newer.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use weft_ipam::{Ask, Ipam, Lease, Refusal, State, Timing, View, accepts};
use weft_model::{
    AddressGrant, EndpointId, Family, HoldRecord, LoanRecord, Network, NodeId, WantRecord,
};

pub(crate) const TIMING: Timing = Timing {
    rest: Duration::from_secs(60),
    idle: Duration::from_secs(120),
    patience: Duration::from_secs(600),
};

pub(crate) fn node_id(place: usize) -> NodeId {
    NodeId::from([place as u8 + 1; 16])
}

pub(crate) fn endpoint_id(number: u64) -> EndpointId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    EndpointId::from(bytes)
}

/// A network with the gateway on the first host address of each subnet.
pub(crate) fn network(subnets: &[&str], lenders: usize) -> Arc<Network> {
    let pools: Vec<_> = subnets
        .iter()
        .map(|text| {
            let subnet: weft_model::Subnet = text.parse().unwrap();
            serde_json::json!({"subnet": text, "gateway": subnet.first_host()})
        })
        .collect();
    let lenders: Vec<_> = (0..lenders).map(node_id).collect();
    let network = serde_json::json!({
        "id": "0a".repeat(16), "name": "app", "vni": 5000, "pools": pools,
        "creator": node_id(0), "lenders": lenders,
    });
    Arc::new(serde_json::from_value(network).unwrap())
}

/// One register as it travels.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Loans(LoanRecord),
    Holds(HoldRecord),
    Wants(WantRecord),
    Endpoints(BTreeMap<EndpointId, AddressGrant>),
}

#[derive(Clone, Debug)]
pub(crate) struct Register {
    pub(crate) version: u64,
    pub(crate) body: Body,
}

#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) to: usize,
    pub(crate) from: usize,
    pub(crate) kind: usize,
    pub(crate) register: Register,
}

pub(crate) struct Host {
    pub(crate) ipam: Ipam,
    pub(crate) disk: String,
    /// Endpoints with an address in use. They outlive a crash of the agent.
    pub(crate) running: BTreeMap<EndpointId, AddressGrant>,
    pub(crate) waiting: BTreeMap<EndpointId, Ask>,
    pub(crate) revoked: BTreeSet<NodeId>,
    /// Truly gone: it does nothing any more.
    pub(crate) stopped: bool,
    published: Vec<Register>,
    heard: BTreeMap<(usize, usize), Register>,
}

pub(crate) struct Cluster {
    pub(crate) network: Arc<Network>,
    pub(crate) hosts: Vec<Host>,
    pub(crate) flying: Vec<Message>,
    pub(crate) now: u64,
    /// Nodes that an operator removed, dead or not.
    pub(crate) removed: BTreeSet<usize>,
    /// The part of its state that a broken node finds empty after a restart.
    pub(crate) forgotten: Option<&'static str>,
    endpoints: u64,
}

impl Cluster {
    pub(crate) fn new(network: Arc<Network>, hosts: usize) -> Self {
        let hosts = (0..hosts)
            .map(|place| {
                let ipam = Ipam::new(network.clone(), node_id(place), TIMING);
                Host {
                    disk: serde_json::to_string(ipam.saved_state()).unwrap(),
                    ipam,
                    running: BTreeMap::new(),
                    waiting: BTreeMap::new(),
                    revoked: BTreeSet::new(),
                    stopped: false,
                    published: vec![
                        Register { version: 0, body: Body::Loans(LoanRecord::default()) },
                        Register { version: 0, body: Body::Holds(HoldRecord::default()) },
                        Register { version: 0, body: Body::Wants(WantRecord::default()) },
                        Register { version: 0, body: Body::Endpoints(BTreeMap::new()) },
                    ],
                    heard: BTreeMap::new(),
                }
            })
            .collect();
        Self {
            network,
            hosts,
            flying: Vec::new(),
            now: 1000,
            removed: BTreeSet::new(),
            forgotten: None,
            endpoints: 0,
        }
    }

    /// A new endpoint on `at` asks for an address.
    pub(crate) fn allocate(&mut self, at: usize, ask: Ask) -> Result<AddressGrant, Refusal> {
        self.endpoints += 1;
        let endpoint = endpoint_id(self.endpoints);
        self.hosts[at].waiting.insert(endpoint, ask);
        self.retry(at, endpoint)
    }

    /// A waiting endpoint on `at` asks again.
    pub(crate) fn retry(
        &mut self,
        at: usize,
        endpoint: EndpointId,
    ) -> Result<AddressGrant, Refusal> {
        let ask = self.hosts[at].waiting[&endpoint];
        let answer = self.with_view(at, &BTreeSet::new(), |ipam, view, now| {
            ipam.allocate(endpoint, ask, view, now)
        });
        self.save(at);
        match &answer {
            Ok(grant) => {
                self.hosts[at].waiting.remove(&endpoint);
                self.hosts[at].running.insert(endpoint, *grant);
            }
            Err(refusal) if !refusal.may_pass() => {
                self.hosts[at].waiting.remove(&endpoint);
                self.hosts[at].ipam.release(endpoint, self.now);
                self.save(at);
            }
            Err(_) => {}
        }
        self.publish(at);
        answer
    }

    /// Asks like [`Self::allocate`], but the agent dies before it has saved the outcome.
    pub(crate) fn allocate_and_crash(&mut self, at: usize, ask: Ask) {
        self.endpoints += 1;
        let endpoint = endpoint_id(self.endpoints);
        let _ = self.with_view(at, &BTreeSet::new(), |ipam, view, now| {
            ipam.allocate(endpoint, ask, view, now)
        });
        self.crash(at);
    }

    pub(crate) fn release(&mut self, at: usize, endpoint: EndpointId) {
        self.hosts[at].running.remove(&endpoint);
        self.hosts[at].waiting.remove(&endpoint);
        self.hosts[at].ipam.release(endpoint, self.now);
        self.save(at);
        self.publish(at);
    }

    /// `unheard` are the nodes that `at` takes for dead.
    pub(crate) fn step(&mut self, at: usize, unheard: &BTreeSet<usize>) {
        let step = self.with_view(at, unheard, Ipam::step);
        self.save(at);
        self.publish(at);
        for Lease { endpoint, .. } in step.fenced {
            self.release(at, endpoint);
        }
    }

    /// The agent dies and starts again: its view is gone, its endpoints run on.
    pub(crate) fn crash(&mut self, at: usize) {
        let mut file: serde_json::Value = serde_json::from_str(&self.hosts[at].disk).unwrap();
        if let Some(pointer) = self.forgotten {
            *file.pointer_mut(pointer).unwrap() = serde_json::json!([]);
        }
        let state: State = serde_json::from_value(file).unwrap();
        let ipam = Ipam::restore(self.network.clone(), node_id(at), TIMING, state).unwrap();
        let host = &mut self.hosts[at];
        host.ipam = ipam;
        host.heard.clear();
        host.waiting.clear();
        let orphans: Vec<EndpointId> = host
            .ipam
            .leases()
            .map(|lease| lease.endpoint)
            .filter(|endpoint| !host.running.contains_key(endpoint))
            .collect();
        for endpoint in orphans {
            self.release(at, endpoint);
        }
    }

    pub(crate) fn send(&mut self, from: usize, to: usize) {
        for (kind, register) in self.hosts[from].published.iter().enumerate() {
            self.flying.push(Message { to, from, kind, register: register.clone() });
        }
    }

    pub(crate) fn deliver(&mut self, message: Message) {
        let heard = &mut self.hosts[message.to].heard;
        let old = heard.get(&(message.from, message.kind)).map(|register| register.version);
        if old.is_none_or(|old| old < message.register.version) {
            heard.insert((message.from, message.kind), message.register);
        }
    }

    /// All hear all, removals too, and each makes a step.
    pub(crate) fn round(&mut self) {
        self.flying.clear();
        for from in self.present() {
            for to in self.present().into_iter().filter(|&to| to != from) {
                self.send(from, to);
            }
        }
        for message in std::mem::take(&mut self.flying) {
            self.deliver(message);
        }
        let removed: BTreeSet<NodeId> = self.removed.iter().map(|&place| node_id(place)).collect();
        for at in self.present() {
            self.hosts[at].revoked.extend(&removed);
            self.step(at, &BTreeSet::new());
        }
    }

    pub(crate) fn present(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|&at| !self.hosts[at].stopped).collect()
    }

    /// I1: the addresses in use on nodes that are not removed differ. I2: every observer accepts
    /// each address of one node at most.
    pub(crate) fn check(&self) -> Result<(), String> {
        let mut in_use = BTreeMap::new();
        for (at, host) in self.hosts.iter().enumerate() {
            for grant in host.running.values().filter(|_| !self.removed.contains(&at)) {
                if let Some(other) = in_use.insert(grant.ip, at) {
                    return Err(format!("{} is in use on hosts {other} and {at}", grant.ip));
                }
            }
        }
        for at in self.present() {
            self.check_observer(at)?;
        }
        Ok(())
    }

    fn check_observer(&self, at: usize) -> Result<(), String> {
        let view = self.view(at, true, &BTreeSet::new());
        let mut owners: BTreeMap<IpAddr, usize> = BTreeMap::new();
        for from in 0..self.hosts.len() {
            for grant in self.endpoints_heard(at, from).into_iter().flat_map(BTreeMap::values) {
                if accepts(&self.network, node_id(from), grant, &view) {
                    let before = owners.insert(grant.ip, from).filter(|&before| before != from);
                    if let Some(before) = before {
                        let ip = grant.ip;
                        return Err(format!("host {at} has {ip} on hosts {before} and {from}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// I3: what a node holds it can give out all by itself.
    pub(crate) fn check_alone(&self, at: usize) -> Result<(), String> {
        for family in [Family::V4, Family::V6] {
            let usage = self.hosts[at].ipam.usage(family, self.now);
            let mut alone = self.hosts[at].ipam.clone();
            let endpoint = endpoint_id(u64::MAX);
            let answer = alone.allocate(endpoint, Ask::Any(family), &View::default(), self.now);
            if usage.free > 0 && answer.is_err() {
                return Err(format!("host {at} is alone, has {usage:?}, and refuses: {answer:?}"));
            }
        }
        Ok(())
    }

    /// Whether `observer` accepts the endpoint address that `owner` publishes.
    pub(crate) fn is_accepted(&self, observer: usize, owner: usize, grant: &AddressGrant) -> bool {
        let view = self.view(observer, true, &BTreeSet::new());
        accepts(&self.network, node_id(owner), grant, &view)
    }

    fn with_view<T>(
        &mut self,
        at: usize,
        unheard: &BTreeSet<usize>,
        act: impl FnOnce(&mut Ipam, &View<'_>, u64) -> T,
    ) -> T {
        let mut ipam = self.hosts[at].ipam.clone();
        let outcome = act(&mut ipam, &self.view(at, false, unheard), self.now);
        self.hosts[at].ipam = ipam;
        outcome
    }

    fn view(&self, at: usize, with_own: bool, unheard: &BTreeSet<usize>) -> View<'_> {
        let host = &self.hosts[at];
        let mut view = View { revoked: host.revoked.clone(), ..View::default() };
        let own = host.published.iter().enumerate().map(|(kind, register)| ((at, kind), register));
        let own = own.filter(|_| with_own);
        for ((from, _), register) in host.heard.iter().map(|(key, value)| (*key, value)).chain(own)
        {
            match &register.body {
                Body::Loans(loans) => drop(view.loans.insert(node_id(from), loans)),
                Body::Holds(holds) => drop(view.holds.insert(node_id(from), holds)),
                Body::Wants(wants) => drop(view.wants.insert(node_id(from), wants)),
                Body::Endpoints(endpoints) => {
                    let of_node = endpoints.iter().filter(|_| from != at);
                    view.endpoints
                        .extend(of_node.map(|(&id, grant)| (grant.ip, (node_id(from), id))));
                }
            }
        }
        let live = self.present().into_iter().filter(|place| !unheard.contains(place));
        view.live = live.map(node_id).collect();
        view
    }

    fn endpoints_heard(
        &self,
        at: usize,
        from: usize,
    ) -> Option<&BTreeMap<EndpointId, AddressGrant>> {
        let register = match at == from {
            true => self.hosts[at].published.get(3),
            false => self.hosts[at].heard.get(&(from, 3)),
        };
        match &register?.body {
            Body::Endpoints(endpoints) => Some(endpoints),
            _ => None,
        }
    }

    fn save(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        if let Some(unsaved) = host.ipam.unsaved() {
            host.disk = serde_json::to_string(unsaved.state()).unwrap();
            host.ipam.saved(unsaved);
        }
    }

    fn publish(&mut self, at: usize) {
        let host = &mut self.hosts[at];
        let records = host.ipam.records();
        let bodies = [
            Body::Loans(records.loans.clone()),
            Body::Holds(records.holds.clone()),
            Body::Wants(records.wants.clone()),
            Body::Endpoints(host.running.clone()),
        ];
        for (register, body) in host.published.iter_mut().zip(bodies) {
            *register = Register { version: register.version + 1, body };
        }
    }
}
