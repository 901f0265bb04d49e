//! Clusters made by hand, for tests of pure functions.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use weft_gossip::{ClusterView, Liveness, Member};
use weft_model::{
    AddressGrant, Condition, Driver, Endpoint, EndpointId, Hold, Label, Loan, MacAddr, Network,
    NetworkId, NetworkOptions, NetworkRecord, Node, NodeId, NodeState, Pool, Service,
    ServiceRecord, ServiceState, Unit, VipLease, Vni,
};

use crate::{
    api::types::Sandbox,
    cluster::Cluster,
    ledger::book::{Book, EndpointState, LocalEndpoint},
    projection::PlaneContext,
};

pub(crate) fn node_id(n: u8) -> NodeId {
    NodeId::from([n; 16])
}

pub(crate) fn network_id(n: u8) -> NetworkId {
    NetworkId::from([n; 16])
}

/// A cluster under construction.
#[derive(Default)]
pub(crate) struct Builder {
    members: BTreeMap<NodeId, Member>,
}

impl Builder {
    /// Adds node `n`, called `hN`, with VTEP 192.0.2.N.
    pub(crate) fn node(mut self, n: u8) -> Self {
        let ip = IpAddr::from([192, 0, 2, n]);
        let node = Node {
            name: format!("h{n}").parse().unwrap(),
            vtep: ip.into(),
            address: (ip, 6790).into(),
            version: "0".into(),
            state: NodeState::Up,
            underlay_mtu: 1500,
            routes: Vec::new(),
            resolvers: Vec::new(),
            sealing: None,
            metrics: None,
        };
        let member = Member {
            id: node_id(n),
            liveness: Liveness::Alive,
            node: Some(node),
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
        self.members.insert(node_id(n), member);
        self
    }

    pub(crate) fn change(mut self, n: u8, change: impl FnOnce(&mut Member)) -> Self {
        change(self.members.get_mut(&node_id(n)).unwrap());
        self
    }

    pub(crate) fn change_node(self, n: u8, change: impl FnOnce(&mut Node)) -> Self {
        self.change(n, |member| change(member.node.as_mut().unwrap()))
    }

    /// Lets node `n` carry `network`.
    pub(crate) fn network(self, n: u8, network: &Network) -> Self {
        let record = NetworkRecord::Defined(network.clone());
        self.change(n, |member| {
            member.networks.insert(network.id, record);
        })
    }

    /// Gives node `n` an endpoint with a properly lent address.
    pub(crate) fn endpoint(mut self, n: u8, network: &Network, name: &str, ip: &str) -> Self {
        let endpoint = endpoint(network, name, ip);
        let [AddressGrant { unit, seq, .. }] = endpoint.addresses[..] else { unreachable!() };
        let lender = self.members.get_mut(&network.lenders[0]).unwrap();
        let loan = Loan { to: node_id(n), seq, except: BTreeSet::new() };
        lender.loans.entry(network.id).or_default().loans.insert(unit, loan);
        self.change(n, |member| {
            let hold = Hold { seq, ceded: BTreeSet::new() };
            member.holds.entry(network.id).or_default().held.insert(unit, hold);
            member.endpoints.entry(network.id).or_default().insert(endpoint.id, endpoint);
        })
    }

    /// Lets node `n` say that it wrote revision `revision` of a service.
    pub(crate) fn service(self, n: u8, revision: u64, service: &Service) -> Self {
        let state = ServiceState::Defined(Box::new(service.clone()));
        self.service_record(n, service.network, &service.name, revision, state)
    }

    /// Lets node `n` say that it wrote a revision of a service, or removed it.
    pub(crate) fn service_record(
        self,
        n: u8,
        network: NetworkId,
        name: &Label,
        revision: u64,
        state: ServiceState,
    ) -> Self {
        let record = ServiceRecord { name: name.clone(), revision, writer: node_id(n), state };
        self.change(n, |member| {
            member.services.entry(network).or_default().insert(name.clone(), record);
        })
    }

    /// Lends node `n` a virtual address for `service`.
    pub(crate) fn vip(mut self, n: u8, network: &Network, service: &mut Service, ip: &str) -> Self {
        let ip: IpAddr = ip.parse().unwrap();
        let (unit, seq) = (Unit::Address(ip), 1);
        let lender = self.members.get_mut(&network.lenders[0]).unwrap();
        let loan = Loan { to: node_id(n), seq, except: BTreeSet::new() };
        lender.loans.entry(network.id).or_default().loans.insert(unit, loan);
        service.vips.push(AddressGrant { ip, unit, seq });
        let id = EndpointId::from([0xee; 16]);
        service.lease = Some(VipLease { node: node_id(n), id });
        self.change(n, |member| {
            let hold = Hold { seq, ceded: BTreeSet::new() };
            member.holds.entry(network.id).or_default().held.insert(unit, hold);
        })
    }

    /// Lets the endpoint of node `n` at `ip` be what `change` makes of it.
    pub(crate) fn change_endpoint(
        self,
        n: u8,
        network: &Network,
        ip: &str,
        change: impl FnOnce(&mut Endpoint),
    ) -> Self {
        let ip: IpAddr = ip.parse().unwrap();
        self.change(n, |member| {
            let mut all = member.endpoints.get_mut(&network.id).unwrap().values_mut();
            change(all.find(|endpoint| endpoint.ips().any(|own| own == ip)).unwrap());
        })
    }

    /// Lets node `n` say something of the state of one of its endpoints.
    pub(crate) fn condition(self, n: u8, network: &Network, condition: Condition) -> Self {
        self.change(n, |member| {
            let all = member.conditions.entry(network.id).or_default();
            all.insert(condition.endpoint, condition);
        })
    }

    pub(crate) fn view(self) -> Arc<ClusterView> {
        let members = self.members.into_iter().map(|(id, member)| (id, Arc::new(member)));
        Arc::new(ClusterView { members: members.collect() })
    }

    pub(crate) fn build(self) -> Cluster {
        Cluster::resolve(self.view(), &BTreeMap::new(), &BTreeSet::new())
    }
}

/// A network lent by node 1, 10.N.0.0/24.
pub(crate) fn network(n: u8, name: &str) -> Network {
    let subnet = format!("10.{n}.0.0/24").parse().unwrap();
    Network {
        id: network_id(n),
        name: name.parse().unwrap(),
        driver: Driver::Overlay,
        vni: Vni::try_from(5000 + u32::from(n)).unwrap(),
        pools: vec![Pool {
            subnet,
            gateway: subnet.first_host(),
            range: None,
            aux: BTreeMap::new(),
        }],
        internal: false,
        encrypted: false,
        labels: BTreeMap::new(),
        options: NetworkOptions::default(),
        creator: node_id(1),
        lenders: vec![node_id(1)],
        created: 0,
    }
}

/// An endpoint whose address is lent singly.
pub(crate) fn endpoint(network: &Network, name: &str, ip: &str) -> Endpoint {
    let ip: IpAddr = ip.parse().unwrap();
    let digest = network.id.digest(format!("{name}/{ip}").as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    Endpoint {
        id: EndpointId::from(id),
        network: network.id,
        name: name.parse().unwrap(),
        aliases: Vec::new(),
        mac: MacAddr::for_address(network.id, ip),
        addresses: vec![AddressGrant { ip, unit: Unit::Address(ip), seq: 1 }],
        sandbox: format!("sandbox-{name}"),
        seq: 0,
        service: None,
        labels: BTreeMap::new(),
        default_route: true,
    }
}

/// What node 1 needs to derive its kernel's state: VTEP 192.0.2.1.
pub(crate) fn plane_context() -> PlaneContext {
    PlaneContext {
        me: node_id(1),
        local: "192.0.2.1".parse().unwrap(),
        vxlan_port: 4789,
        sealed: None,
        uplink_pool: "169.254.192.0/18".parse().unwrap(),
    }
}

/// The book of a node with one attached endpoint and uplink slot 3.
pub(crate) fn book_with(network: &Network, name: &str, ip: &str) -> Book {
    let endpoint = endpoint(network, name, ip);
    let mut book = Book::default();
    book.uplinks.insert(network.id, 3);
    let id = endpoint.id;
    let local = LocalEndpoint {
        endpoint,
        sandbox: Sandbox::Pid(1),
        ifname: None,
        state: EndpointState::Attached,
        default_route: true,
        gateway_priority: Some(0),
        ports: Vec::new(),
    };
    book.endpoints.insert(id, local);
    book
}
