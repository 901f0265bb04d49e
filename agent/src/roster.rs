//! Where the members of the cluster are reached: kept on disk, so that an agent that starts finds
//! them again, and given to tokens and joiners.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use weft_gossip::{
    ClusterView, Liveness,
    identity::{read, write_atomic},
};
use weft_model::NodeId;

use crate::chain::Chain;

const FILE: &str = "peers.json";

/// The addresses that were known when the agent last ran.
pub fn load(state_dir: &Path) -> Vec<SocketAddr> {
    let bytes = read(&state_dir.join(FILE)).ok().flatten().unwrap_or_default();
    serde_json::from_slice(&bytes).unwrap_or_default()
}

/// Follows the view until `stop`: publishes the addresses of live members, this node's first, and
/// keeps them on disk. A file is written only if somebody else is in it, so that a lonely start
/// does not forget the others.
pub async fn follow(
    me: NodeId,
    state_dir: PathBuf,
    mut view: watch::Receiver<Arc<ClusterView>>,
    addresses: watch::Sender<Vec<SocketAddr>>,
    stop: CancellationToken,
) {
    let path = state_dir.join(FILE);
    let mut saved = BTreeSet::new();
    loop {
        let found = live(&view.borrow_and_update(), me);
        let others: BTreeSet<SocketAddr> = found.iter().skip(1).copied().collect();
        addresses.send_if_modified(|current| {
            let changed = *current != found;
            if changed {
                current.clone_from(&found);
            }
            changed
        });
        if !others.is_empty() && others != saved {
            let bytes = serde_json::to_vec(&others).expect("addresses are plain data");
            match write_atomic(&path, &bytes) {
                Ok(()) => saved = others,
                Err(error) => tracing::warn!(error = %Chain(&error), "cannot keep the peers"),
            }
        }
        match stop.run_until_cancelled(view.changed()).await {
            Some(Ok(())) => {}
            Some(Err(_)) | None => return,
        }
    }
}

fn live(view: &ClusterView, me: NodeId) -> Vec<SocketAddr> {
    let own = view.members.get(&me).and_then(|member| member.node.as_ref());
    let others = view
        .members
        .values()
        .filter(|member| member.id != me && member.liveness == Liveness::Alive);
    own.into_iter()
        .chain(others.filter_map(|member| member.node.as_ref()))
        .map(|node| node.address)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, node_id};

    #[test]
    fn live_members_are_listed_oneself_first() {
        let view = Builder::default()
            .node(1)
            .node(2)
            .node(3)
            .change(1, |member| member.liveness = Liveness::Suspect)
            .view();
        let addresses: Vec<_> = live(&view, node_id(3)).iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["192.0.2.3:6790", "192.0.2.2:6790"]);
    }
}
