use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use weft_model::{Label, NodeId, Sealing};

use crate::key::Root;

/// Everybody that this node may share an encrypted network with: an immutable snapshot.
#[derive(Clone, Debug, Default)]
pub struct Members {
    pub peers: BTreeMap<NodeId, Peer>,
}

/// Another node, as the cluster's records and the sessions with it say.
#[derive(Clone, Debug)]
pub struct Peer {
    pub name: Label,
    /// Its VTEP's.
    pub address: IpAddr,
    /// How it takes part in encrypted networks; none if it does not.
    pub offer: Option<Sealing>,
    /// The secrets shared with it, oldest first; none while there is no session. A root stays the
    /// same object for as long as it lives: its counters are in it.
    pub roots: Vec<Arc<Root>>,
    /// Why there is no session, if the gossip's side knows.
    pub fault: Option<String>,
}
