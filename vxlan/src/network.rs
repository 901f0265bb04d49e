//! One network's namespace: everything in it, brought to the desired state.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use weft_model::{EndpointId, InterfaceName, MacvlanMode, NetworkId, Vni};

use crate::{
    AttachSpec, Attached, Carriage, OverlayNetwork, Parents, Table, Transport,
    attach::{self, AttachError, Wire},
    bridge::{self, BRIDGE},
    carrier::{self, TAP, VXLAN},
    destinations::{self, Beyond, Destinations},
    fdb::{self, KernelFdb},
    handover::Handover,
    links::{self, KernelLinks, Links},
    macvlan,
    mtu::{self, KernelWidths},
    namespace::{Directory, Namespace, NamespaceError, namespace_name},
    neighbours::{self, KernelNeighbours},
    netlink::{Netlink, NetlinkError},
    ports::{self, KernelPorts, Ports},
    rules::{self, Loaded},
    ruleset::{NETWORK_TABLES, Ruleset},
    sysctl::{self, KernelSettings},
    table::{Chain, KernelError, KernelTable, Pass, TableError, reconcile},
    task::Surroundings,
    transit::{self, KernelPolicy, KernelRouters, Ways},
    uplink::{self, KernelUplink, UplinkState},
};

/// What a pass needs to know.
#[derive(Clone, Debug)]
pub(crate) struct Goal<'a> {
    pub(crate) network: &'a OverlayNetwork,
    pub(crate) pools: &'a [IpNet],
    /// Read the tables that only another process can have changed, too.
    pub(crate) thorough: bool,
}

/// The passes over a network's tables.
pub(crate) type Passes = BTreeMap<Table, Pass>;

/// The namespace of one network and the sockets into it.
#[derive(Debug)]
pub(crate) struct NetworkKernel {
    pub(crate) id: NetworkId,
    pub(crate) namespace: Namespace,
    host_namespace: Namespace,
    inside: Netlink,
    host: Netlink,
    handover: Handover,
    loaded: Loaded,
    transit: transit::Memory,
    /// Whether something of a transit may be here: it is looked for once.
    has_transit: bool,
    settled: bool,
    /// The network's, when all ports were last seen to have it.
    mtu: Option<u16>,
    /// Whether the ports are macvlan interfaces in the sandboxes, not veths on the bridge.
    macvlan: bool,
}

impl NetworkKernel {
    /// Opens the network's namespace, or makes it if it is `wanted`.
    pub(crate) fn open(
        id: NetworkId,
        around: &Surroundings,
        wanted: bool,
    ) -> Result<Self, KernelError> {
        let Surroundings { directory, host, tunnel, .. } = around;
        let name = namespace_name(id);
        let namespace = match wanted {
            true => directory.ensure(&name)?.0,
            false => directory.open(&name)?,
        };
        let mut inside = Netlink::open(&namespace)?;
        Ok(Self {
            id,
            macvlan: is_macvlan(&mut inside)?,
            inside,
            host: Netlink::open(host)?,
            namespace,
            host_namespace: host.clone(),
            handover: Handover::new(id, tunnel.clone()),
            loaded: Loaded::default(),
            transit: transit::Memory::default(),
            has_transit: true,
            settled: false,
            mtu: None,
        })
    }

    /// One pass over all tables, in the order in which they build on each other.
    pub(crate) fn reconcile(&mut self, goal: &Goal<'_>) -> Passes {
        let Goal { network, pools, thorough } = *goal;
        let mut passes = Passes::new();
        self.macvlan = matches!(network.transport, Transport::Macvlan { .. });
        if self.macvlan {
            // Nothing is here but what says whose the namespace is.
            let wanted = Links::of(network, false);
            let pass = reconcile(&mut self.links(), |found| links::plan(&wanted, found));
            self.settled = pass.errors.is_empty();
            passes.insert(Table::Links, pass);
            return passes;
        }

        // Of no concern to a pass that nothing but other changes has woken.
        let widths = thorough || !self.settled || self.mtu != Some(network.mtu);
        let wanted = Links::of(network, self.is_connected(network));
        if widths {
            // Nothing precedes the end of what must not carry the network.
            let plan = |found: &_| links::removals(&wanted, found);
            passes.insert(Table::Links, reconcile(&mut self.links(), plan));
            let mut kernel = self.widths(network);
            let plan = |found: &_| mtu::plan_narrower(network.mtu, found);
            passes.insert(Table::Mtu, reconcile(&mut kernel, plan));
        }

        let mut pass = reconcile(&mut self.links(), |found| links::plan(&wanted, found));
        pass.errors.extend(self.prepare(network, &pass).err());
        passes.entry(Table::Links).or_default().join(pass);

        let mut kernel = KernelPorts(&mut self.inside);
        let pass = reconcile(&mut kernel, |found| ports::plan(&network.ports, found));
        passes.insert(Table::Ports, pass);
        let ports = match self.ports() {
            Ok(ports) => ports,
            // Without them nothing below is safe to plan: it would take the ports for gone.
            Err(source) => {
                let error = TableError::Read { table: Table::Ports.as_str(), source };
                passes.entry(Table::Ports).or_default().errors.push(error);
                return passes;
            }
        };

        self.reconcile_destinations(network, &ports, &mut passes);

        if thorough || !self.settled {
            let mut kernel = KernelSettings::of_network(&self.namespace);
            let wanted = sysctl::network();
            let pass = reconcile(&mut kernel, |found| sysctl::plan(&wanted, found));
            passes.insert(Table::Sysctls, pass);
        }

        // Before the uplink: a way out that nothing guards must not exist.
        let identities = ports.values().map(|port| (port.name.clone(), port.identity.clone()));
        let ruleset = Ruleset::of_network(network, pools, &identities.collect());
        if thorough || !self.loaded.is(&ruleset) {
            let pass =
                rules::reconcile(&self.namespace, NETWORK_TABLES, &mut self.loaded, &ruleset);
            passes.insert(Table::Rules, pass);
        }

        self.reconcile_transit(network, pools, &mut passes);

        let wanted = UplinkState::of(network);
        let mut kernel = KernelUplink {
            network: self.id,
            namespace: &self.namespace,
            host_namespace: &self.host_namespace,
            inside: &mut self.inside,
            host: &mut self.host,
        };
        passes.insert(Table::Uplink, reconcile(&mut kernel, |found| uplink::plan(&wanted, found)));

        let whole = [Table::Links, Table::Uplink]
            .iter()
            .all(|table| passes.get(table).is_some_and(|pass: &Pass| pass.errors.is_empty()));
        if widths && whole {
            let mut kernel = self.widths(network);
            let plan = |found: &_| mtu::plan_wider(network.mtu, found);
            let pass = reconcile(&mut kernel, plan);
            passes.entry(Table::Mtu).or_default().join(pass);
        }

        self.settled = passes.values().all(|pass| pass.errors.is_empty());
        if self.settled {
            self.mtu = Some(network.mtu);
        }
        passes
    }

    fn widths(&mut self, network: &OverlayNetwork) -> KernelWidths<'_> {
        let transport = network.transport;
        KernelWidths { inside: &mut self.inside, host: &self.host_namespace, transport }
    }

    fn links(&mut self) -> KernelLinks<'_> {
        KernelLinks {
            namespace: &self.namespace,
            inside: &mut self.inside,
            host: &mut self.host,
            handover: &mut self.handover,
        }
    }

    /// Whether there is something to carry `network` to other hosts.
    fn is_connected(&self, network: &OverlayNetwork) -> bool {
        match network.transport {
            Transport::Vxlan { .. } => true,
            Transport::Sealed => self.handover.missing().is_none(),
            Transport::Local | Transport::Macvlan { .. } => false,
        }
    }

    /// Opens for the tunnel what `links` have left in good order, if it is to carry `network`.
    fn prepare(&mut self, network: &OverlayNetwork, links: &Pass) -> Result<(), TableError> {
        let outcome = match (network.transport, self.handover.missing()) {
            (Transport::Sealed, None) if links.errors.is_empty() => {
                self.handover.prepare(&self.namespace, &mut self.inside)
            }
            (Transport::Sealed, None) => Ok(()),
            (Transport::Sealed, Some(missing)) => {
                self.handover.withdraw();
                Err(missing)
            }
            (Transport::Vxlan { .. } | Transport::Local | Transport::Macvlan { .. }, _) => {
                self.handover.withdraw();
                Ok(())
            }
        };
        outcome.map_err(|source| TableError::Apply {
            table: Table::Links.as_str(),
            op: format!("open the queues of {TAP}"),
            source,
        })
    }

    fn reconcile_destinations(
        &mut self,
        network: &OverlayNetwork,
        ports: &Ports,
        passes: &mut Passes,
    ) {
        let connected = self.is_connected(network);
        let Destinations { fdb: wanted, beyond } = Destinations::of(network, ports, connected);
        let mut kernel = KernelFdb(&mut self.inside);
        passes.insert(
            Table::Fdb,
            reconcile(&mut kernel, |found| {
                let mut ops = fdb::plan(&wanted, found);
                ops.retain(|op| !(network.provisional && op.is_removal()));
                ops
            }),
        );
        match beyond {
            Beyond::Vxlan(wanted) => {
                let mut kernel = KernelNeighbours(&mut self.inside);
                let pass = reconcile(&mut kernel, |found| {
                    let mut ops = neighbours::plan(&wanted, found);
                    ops.retain(|op| !(network.provisional && op.is_removal()));
                    ops
                });
                passes.insert(Table::Neighbours, pass);
            }
            Beyond::Nothing => {}
            Beyond::Sealed(mut forwarding) => {
                if let Some(before) = self.handover.last().filter(|_| network.provisional) {
                    destinations::keep(&mut forwarding, before, ports);
                }
                self.handover.hand_over(forwarding);
            }
        }
    }

    fn reconcile_transit(
        &mut self,
        network: &OverlayNetwork,
        pools: &[IpNet],
        passes: &mut Passes,
    ) {
        let wanted = Ways::of(network, pools).filter(|_| self.is_connected(network));
        if wanted.is_none() && !self.has_transit {
            return;
        }
        let routers = wanted.as_ref().map(|ways| &ways.routers);
        let mut kernel = KernelRouters {
            namespace: &self.namespace,
            memory: &mut self.transit,
            desired: routers,
        };
        let mut pass = reconcile(&mut kernel, |found| {
            let mut ops = transit::plan_routers(routers, found);
            ops.retain(|op| !(network.provisional && op.is_removal()));
            ops
        });
        let policy = wanted.as_ref().map(|ways| ways.policy.clone()).unwrap_or_default();
        let mut kernel = KernelPolicy(&mut self.inside);
        pass.join(reconcile(&mut kernel, |found| transit::plan_policy(&policy, found)));
        self.has_transit = wanted.is_some() || !pass.errors.is_empty();
        passes.insert(Table::Transit, pass);
    }

    /// What carries the network between hosts, as far as it is known: `network` is absent if it is
    /// not desired.
    pub(crate) fn carriage(&self, network: Option<&OverlayNetwork>) -> Option<Carriage> {
        let served = self.handover.is_served();
        match network.map(|network| network.transport) {
            Some(Transport::Vxlan { .. }) => Some(Carriage::Vxlan),
            Some(Transport::Sealed) => Some(Carriage::Sealed { served }),
            Some(Transport::Local) => Some(Carriage::Local),
            Some(Transport::Macvlan { .. }) => Some(Carriage::Macvlan),
            None => served.then_some(Carriage::Sealed { served }),
        }
    }

    /// Whether the ports are parts of a link that is somewhere else.
    pub(crate) fn is_on_parent(&self) -> bool {
        self.macvlan
    }

    /// What need not be done while somebody waits.
    pub(crate) fn follow_up(&mut self) {
        self.loaded.look(&self.namespace, NETWORK_TABLES);
    }

    /// The ports that are there.
    pub(crate) fn ports(&mut self) -> Result<Ports, KernelError> {
        KernelPorts(&mut self.inside).read()
    }

    /// The endpoints whose ports are there.
    pub(crate) fn endpoints(&mut self) -> Result<BTreeSet<EndpointId>, KernelError> {
        match self.macvlan {
            true => Ok(macvlan::endpoints(&mut self.inside)?),
            false => Ok(self.ports()?.into_keys().collect()),
        }
    }

    /// Connects a sandbox. Runs the passes that protect the port before the sandbox can send.
    pub(crate) fn attach(
        &mut self,
        goal: &Goal<'_>,
        spec: &AttachSpec,
    ) -> (Result<Attached, AttachError>, Passes) {
        if let Transport::Macvlan { parent, mode, mtu } = goal.network.transport {
            let passes = self.reconcile(goal);
            let result = match passes.get(&Table::Links).and_then(|pass| pass.errors.first()) {
                Some(error) => {
                    let reason = Chain(error).to_string();
                    Err(AttachError::NotReady { network: self.id, reason })
                }
                None => self.attach_to_parent(parent, mode, mtu, spec),
            };
            return (result, passes);
        }
        // After a pass that left nothing to do, the links are there, or the next pass sees to them.
        let ready = if self.settled { Passes::new() } else { self.reconcile(goal) };
        if let Some(error) = ready.get(&Table::Links).and_then(|pass| pass.errors.first()) {
            let reason = Chain(error).to_string();
            return (Err(AttachError::NotReady { network: self.id, reason }), ready);
        }
        let wire = Wire::ensure(spec, goal.network, &mut self.inside, &self.host_namespace);
        let wire = match wire {
            Ok(wire) => wire,
            // The pass is due all the same: the goal may be a new one.
            Err(error) => return (Err(error), merge(ready, self.reconcile(goal))),
        };
        let mut passes = self.reconcile(goal);
        if unprotected(&passes).is_some() {
            // Another sandbox that ends in the middle of a pass takes its port along, and what the
            // pass meant for it fails.
            passes = merge(passes, self.reconcile(goal));
        }
        let unprotected = unprotected(&passes)
            .map(|error| AttachError::NotReady { network: self.id, reason: error.to_string() });
        let result = match unprotected {
            Some(error) => Err(error),
            None => wire.furnish(spec, &mut self.inside),
        };
        let passes = merge(ready, passes);
        match result {
            Ok(()) => {
                let Wire { ifname, host_ifname, .. } = wire;
                (Ok(Attached { ifname, host_ifname }), passes)
            }
            Err(error) => {
                if wire.new {
                    if let Err(error) = self.inside.delete_link(&wire.host_ifname) {
                        let port = &wire.host_ifname;
                        tracing::warn!(%port, error = %Chain(&error), "a port was left behind");
                    }
                    let passes = merge(passes, self.reconcile(goal));
                    return (Err(error), passes);
                }
                (Err(error), passes)
            }
        }
    }

    fn attach_to_parent(
        &mut self,
        parent: Option<InterfaceName>,
        mode: MacvlanMode,
        mtu: Option<u16>,
        spec: &AttachSpec,
    ) -> Result<Attached, AttachError> {
        let parent = match parent {
            Some(name) => Parents::new(self.host_namespace.clone()).find_fitting(name, mtu)?,
            None => macvlan::ensure_segment(&self.namespace, mtu)
                .map_err(attach::kernel(spec.endpoint, "make the network's own segment"))?,
        };
        macvlan::ensure(macvlan::Errand {
            spec,
            mode,
            mtu,
            parent,
            namespace: &self.namespace,
            inside: &mut self.inside,
            host: &self.host_namespace,
        })
    }

    /// Removes a port, both ends. Succeeds if it has gone already.
    pub(crate) fn detach(&mut self, endpoint: EndpointId) -> Result<(), KernelError> {
        if self.macvlan {
            return Ok(macvlan::delete(&mut self.inside, endpoint)?);
        }
        Ok(self.inside.delete_link(&ports::host_name(endpoint))?)
    }

    /// Removes what would be in the way of a successor, from a namespace that somebody else has
    /// unmounted: the VNI is free at once, not when the kernel gets round to the namespace.
    pub(crate) fn abandon(mut self) {
        self.handover.withdraw();
        let delete = |netlink: &mut Netlink, name: &str| {
            if let Err(error) = netlink.delete_link(name) {
                tracing::warn!(%name, error = %Chain(&error), "a lost namespace keeps its link");
            }
        };
        delete(&mut self.host, &uplink::host_name(self.id));
        for carrier in [VXLAN, TAP] {
            delete(&mut self.inside, carrier);
        }
    }

    /// Removes the namespace and all that is in it.
    ///
    /// The links go first, one by one: a socket or a process that still holds the namespace would
    /// keep them, and the VNI with them.
    pub(crate) fn destroy(mut self, directory: &Directory) -> Result<(), KernelError> {
        self.host.delete_link(&uplink::host_name(self.id))?;
        for port in self.ports()?.into_values() {
            self.inside.delete_link(&port.name)?;
        }
        if self.macvlan {
            macvlan::delete_all(&mut self.inside)?;
        }
        self.handover.withdraw();
        for link in [VXLAN, TAP, macvlan::PARENT, BRIDGE] {
            self.inside.delete_link(link)?;
        }
        Ok(directory.remove(&namespace_name(self.id))?)
    }
}

/// The network that a namespace belongs to, as its bridge says.
pub(crate) fn marked_network(inside: &mut Netlink) -> Result<Option<NetworkId>, NetlinkError> {
    let found = inside.links()?.remove(BRIDGE);
    Ok(found.and_then(|link| bridge::marked_network(link.alias.as_deref()?)))
}

/// The endpoints whose ports are in a namespace or, on a macvlan network, in the sandboxes that it
/// has numbered.
pub(crate) fn present_endpoints(inside: &mut Netlink) -> Result<BTreeSet<EndpointId>, KernelError> {
    match is_macvlan(inside)? {
        true => Ok(macvlan::endpoints(inside)?),
        false => Ok(KernelPorts(inside).read()?.into_keys().collect()),
    }
}

fn is_macvlan(inside: &mut Netlink) -> Result<bool, NetlinkError> {
    let alias = inside.links()?.remove(BRIDGE).and_then(|link| link.alias);
    Ok(alias.as_deref().is_some_and(bridge::is_macvlan))
}

/// The VNIs that the namespaces in `directory` carry, whether or not their networks are desired.
pub(crate) fn present_vnis(directory: &Directory) -> Result<BTreeSet<Vni>, KernelError> {
    let mut found = BTreeSet::new();
    for name in directory.names()? {
        let namespace = match directory.open(&name) {
            Ok(namespace) => namespace,
            // On its way out.
            Err(NamespaceError::NotANamespace { .. } | NamespaceError::Missing { .. }) => continue,
            Err(error) => return Err(error.into()),
        };
        let device = Netlink::open(&namespace)?.links()?.remove(VXLAN);
        found.extend(device.and_then(|link| carrier::carried_vni(&link)));
    }
    Ok(found)
}

/// What keeps a new port from being protected.
fn unprotected(passes: &Passes) -> Option<Chain<'_>> {
    let tables = [Table::Links, Table::Ports, Table::Fdb, Table::Rules];
    tables.iter().find_map(|table| passes.get(table)?.errors.first()).map(|error| Chain(error))
}

/// Adds up what two rounds of passes did; the later one's errors stand.
pub(crate) fn merge(mut earlier: Passes, later: Passes) -> Passes {
    for (table, pass) in later {
        let entry = earlier.entry(table).or_default();
        entry.applied += pass.applied;
        entry.errors = pass.errors;
    }
    earlier
}
