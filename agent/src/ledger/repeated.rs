//! What this node repeats of services, and for how long it remembers those that were removed.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use weft_gossip::Member;
use weft_model::{Label, NetworkId, NodeId, ServiceRecord, ServiceState};

use super::book::Book;
use crate::cluster::{Cluster, supersedes};

/// How long a removal is told, in seconds. A host that is not heard for a day is forgotten by the
/// others, and one that is heard has learned of it.
const TOLD_SECONDS: u64 = 2 * 86_400;
/// How many removals are told of one network: of more, the latest.
const MOST_REMOVALS: usize = 1024;

/// The revision to write after `before`: the time in seconds since the Unix epoch, or one more where
/// that is no progress. So a removal's age shows, and what is declared anew goes before what a host
/// that was off for long still says of the name.
pub(super) fn next_revision(before: Option<u64>, now: u64) -> u64 {
    before.map_or(now, |before| now.max(before + 1))
}

/// What this node says about services: what it wrote, what it holds the addresses of, and what is
/// said of networks in which it has endpoints. Of each name, the revision that holds.
///
/// A removal is told until it is old, or one of too many, and longer where some member still says
/// what it has removed. All nodes decide that alike, so none takes it up from another again.
pub(super) fn repeated(
    book: &Book,
    cluster: &Cluster,
    me: NodeId,
    now: u64,
) -> BTreeMap<NetworkId, BTreeMap<Label, ServiceRecord>> {
    let active = book.active();
    let is_mine = |network: NetworkId, record: &ServiceRecord| {
        let lease = match &record.state {
            ServiceState::Defined(service) => service.lease,
            ServiceState::Removed => None,
        };
        active.contains(&network)
            || record.writer == me
            || lease.is_some_and(|lease| lease.node == me)
    };
    let mut services = BTreeMap::new();
    for network in cluster.networks().map(|network| network.id) {
        let mut known = book.services.get(&network).cloned().unwrap_or_default();
        for heard in cluster.service_records(network) {
            match known.get(&heard.name) {
                Some(written) if !supersedes(heard, written) => {}
                _ => drop(known.insert(heard.name.clone(), heard.clone())),
            }
        }
        let spent = spent(&known, network, cluster, me, now);
        known.retain(|name, record| is_mine(network, record) && !spent.contains(name));
        if !known.is_empty() {
            services.insert(network, known);
        }
    }
    services
}

/// The removals among `known` that need not be told any more.
fn spent(
    known: &BTreeMap<Label, ServiceRecord>,
    network: NetworkId,
    cluster: &Cluster,
    me: NodeId,
    now: u64,
) -> BTreeSet<Label> {
    let removals = known.values().filter(|record| record.state == ServiceState::Removed);
    let mut removals: Vec<&ServiceRecord> = removals.collect();
    removals.sort_by_key(|record| Reverse((record.revision, &record.name)));
    let is_spent = |(place, record): &(usize, &ServiceRecord)| {
        let is_old = record.revision.saturating_add(TOLD_SECONDS) < now;
        let is_needed = |member: &Member| member.id != me && defines(member, network, &record.name);
        (is_old || *place >= MOST_REMOVALS) && !cluster.members().any(is_needed)
    };
    let spent = removals.into_iter().enumerate().filter(is_spent);
    spent.map(|(_, record)| record.name.clone()).collect()
}

/// Whether a member says that there is a service of that name.
fn defines(member: &Member, network: NetworkId, name: &Label) -> bool {
    let said = member.services.get(&network).and_then(|all| all.get(name));
    said.is_some_and(|record| record.state != ServiceState::Removed)
}

#[cfg(test)]
mod tests {
    use weft_model::Service;

    use super::*;
    use crate::fixture::{Builder, book_with, network, node_id};

    const NOW: u64 = 1_800_000_000;

    fn label(name: &str) -> Label {
        name.parse().unwrap()
    }

    fn nodes() -> Builder {
        Builder::default().node(1).node(2).network(1, &network(1, "app"))
    }

    /// The names that node 1 speaks of, if node 2 has removed what `removed` names.
    fn told(builder: Builder, removed: &[(&str, u64)]) -> Vec<String> {
        let app = network(1, "app");
        let remove = |builder: Builder, (name, at): &(&str, u64)| {
            builder.service_record(2, app.id, &label(name), *at, ServiceState::Removed)
        };
        let cluster = removed.iter().fold(builder, remove).build();
        let book = book_with(&app, "box", "10.1.0.8");
        let told = repeated(&book, &cluster, node_id(1), NOW);
        told.into_values().flat_map(BTreeMap::into_keys).map(|name| name.to_string()).collect()
    }

    #[test]
    fn a_removal_is_told_for_two_days_and_longer_where_somebody_has_not_heard_it() {
        let young = NOW - TOLD_SECONDS;
        let removed = [("young", young), ("old", young - 1), ("missed", young - 1)];
        assert_eq!(told(nodes(), &removed), ["young"]);
        let missed = Service::bare(label("missed"), network(1, "app").id);
        let missed = nodes().node(3).service(3, young - 9, &missed);
        assert_eq!(told(missed, &removed), ["missed", "young"]);
    }

    #[test]
    fn of_very_many_removals_the_latest_are_told() {
        let names: Vec<String> = (0..MOST_REMOVALS + 50).map(|n| format!("s{n:05}")).collect();
        let removed: Vec<(&str, u64)> =
            names.iter().zip(NOW - 5000..).map(|(name, at)| (name.as_str(), at)).collect();
        let told = told(nodes(), &removed);
        assert_eq!(told.len(), MOST_REMOVALS);
        assert_eq!(told[0], names[50]);
    }

    #[test]
    fn what_is_declared_anew_goes_before_all_that_was_said_earlier() {
        assert_eq!(next_revision(None, NOW), NOW);
        assert_eq!(next_revision(Some(NOW - 7), NOW), NOW);
        // Twice in one second, or after a host whose clock is ahead.
        assert_eq!(next_revision(Some(NOW), NOW), NOW + 1);
        assert_eq!(next_revision(Some(NOW + 3600), NOW), NOW + 3601);
    }
}
