use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use weft_model::NetworkId;

use crate::{HostPort, HostPublish, NetworkBalance};

/// What is in force, as last seen by the reconcilers.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Status {
    pub networks: BTreeMap<NetworkId, NetworkStatus>,
    pub host: HostStatus,
}

/// The services of one network. Counts are since the agent's start.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct NetworkStatus {
    /// The last desired state that the kernel took over whole: no backend that is not in it gets
    /// new connections.
    pub applied: Option<Arc<NetworkBalance>>,
    /// Transactions that a change of the desired state asked for.
    pub changes: u64,
    /// Transactions that put back what somebody else had changed.
    pub repairs: u64,
    /// Passes that failed.
    pub failures: u64,
    /// Connections of UDP clients to backends that are none any more, forgotten.
    pub forgotten: u64,
    /// From the last change of the desired state until it was in force.
    pub lag: Option<Duration>,
    /// Why the last pass failed, if it did.
    pub error: Option<String>,
}

/// The published ports of the host. Counts are since the agent's start.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct HostStatus {
    /// The last desired state that the kernel took over whole, ports of others left out.
    pub applied: Option<Arc<HostPublish>>,
    /// The ports that are in force.
    pub open: BTreeSet<HostPort>,
    /// The ports that somebody else has, and who as far as can be told.
    pub taken: BTreeMap<HostPort, String>,
    /// Transactions that put back what somebody else had changed.
    pub repairs: u64,
    /// Passes that failed.
    pub failures: u64,
    /// Why the last pass failed, if it did.
    pub error: Option<String>,
}

/// What the traffic of a frontend has come to since it is there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// New connections; of UDP, flows.
    pub connections: u64,
    /// From clients.
    pub requests: Traffic,
    /// To clients.
    pub answers: Traffic,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, more: Self) {
        self.packets += more.packets;
        self.bytes += more.bytes;
    }
}
