//! Services as Prometheus sees them: backends by state, traffic, what is in force in the kernel.

use std::{collections::BTreeMap, fmt, sync::Arc};

use weft_balance::{Balancer, Counters, Status};
use weft_model::{Label, NetworkId};

use super::{NO_LABELS, Writer};
use crate::cluster::Cluster;

/// A service of a network. Ports of containers that serve no service are one service without a name.
type Key = (NetworkId, String);

/// What there is to say about services, as one moment showed it.
#[derive(Debug)]
pub(super) struct Reading {
    /// How many backends are in each state.
    backends: BTreeMap<Key, BTreeMap<&'static str, usize>>,
    /// By way of this host.
    traffic: BTreeMap<Key, Counters>,
    status: Arc<Status>,
}

impl Reading {
    pub(super) async fn take(cluster: &Cluster, balancer: &Balancer) -> Self {
        let status = Arc::clone(&balancer.status().borrow());
        let mut traffic = BTreeMap::new();
        for (id, network) in &status.networks {
            let Some(applied) = network.applied.as_ref() else { continue };
            // A network that went a moment ago has no counters any more.
            let Ok(counters) = balancer.counters(*id).await else { continue };
            for (frontend, counters) in counters {
                let Some(pool) = applied.frontends.get(&frontend) else { continue };
                add(&mut traffic, key(cluster, *id, &pool.service), counters);
            }
        }
        Self { backends: backends(cluster), traffic, status }
    }

    /// Writes all of it. `label` is the label of a network, if it is still there.
    pub(super) fn encode(
        &self,
        out: &mut Writer<'_, '_>,
        label: impl Fn(NetworkId) -> Option<(&'static str, String)> + Copy,
    ) -> fmt::Result {
        let of = |(network, service): &Key| Some([label(*network)?, ("service", service.clone())]);
        let backends = self.backends.iter().filter_map(|(key, states)| Some((of(key)?, states)));
        let backends = backends.flat_map(|([network, service], states)| {
            states.iter().map(move |(state, n)| {
                ([network.clone(), service.clone(), ("state", (*state).to_owned())], *n)
            })
        });
        out.gauges("service_backends", "Backends of services on all hosts by state", backends)?;
        let traffic: Vec<_> =
            self.traffic.iter().filter_map(|(key, n)| Some((of(key)?, n))).collect();
        let connections = traffic.iter().map(|(labels, n)| (labels.clone(), n.connections));
        let help = "New connections to services by way of this host";
        out.counters("service_connections", help, connections)?;
        let bytes = traffic.iter().flat_map(|([network, service], n)| {
            [("request", n.requests.bytes), ("answer", n.answers.bytes)].map(|(direction, n)| {
                ([network.clone(), service.clone(), ("direction", direction.to_owned())], n)
            })
        });
        out.counters("service_bytes", "Bytes to and from services by way of this host", bytes)?;
        self.kernel(out, label)
    }

    fn kernel(
        &self,
        out: &mut Writer<'_, '_>,
        label: impl Fn(NetworkId) -> Option<(&'static str, String)> + Copy,
    ) -> fmt::Result {
        let rows: Vec<_> = self
            .status
            .networks
            .iter()
            .filter_map(|(id, status)| Some(([label(*id)?], status)))
            .collect();
        let host = ([("network", String::new())], &self.status.host);
        let each = |read: fn(&weft_balance::NetworkStatus) -> u64| {
            rows.iter().map(move |(labels, status)| (labels.clone(), read(status)))
        };
        out.counters("service_changes", "Changes of services in the kernel", each(|s| s.changes))?;
        let repairs = each(|s| s.repairs).chain([(host.0.clone(), host.1.repairs)]);
        out.counters("service_repairs", "Foreign changes of rules that were undone", repairs)?;
        let failures = each(|s| s.failures).chain([(host.0, host.1.failures)]);
        out.counters("service_failures", "Passes over rules that failed", failures)?;
        let help = "UDP flows to backends that are none any more, ended";
        out.counters("service_forgotten_flows", help, each(|s| s.forgotten))?;
        let lag = rows
            .iter()
            .filter_map(|(labels, status)| Some((labels.clone(), status.lag?.as_secs_f64())));
        out.float_gauges(
            "service_lag_seconds",
            "From the last change of services to its being in the kernel",
            lag,
        )?;
        let ports = [("open", host.1.open.len()), ("taken", host.1.taken.len())];
        let ports = ports.map(|(state, n)| ([("state", state.to_owned())], n));
        out.gauges("published_ports", "Ports of this host that lead to services", ports)?;
        let applied = i64::from(host.1.error.is_none());
        out.gauges(
            "published_in_force",
            "Whether they are as they should be",
            [(NO_LABELS, applied)],
        )
    }
}

/// Every state, so that a row does not go when the last backend leaves it.
fn backends(cluster: &Cluster) -> BTreeMap<Key, BTreeMap<&'static str, usize>> {
    let mut all = BTreeMap::new();
    for network in cluster.networks() {
        for service in cluster.services(network.id) {
            let mut states: BTreeMap<_, _> = STATES.into_iter().map(|state| (state, 0)).collect();
            for backend in service.backends() {
                *states.entry(backend.state.as_str()).or_default() += 1;
            }
            all.insert((network.id, service.name.to_string()), states);
        }
    }
    all
}

const STATES: [&str; 5] = ["ready", "starting", "unhealthy", "draining", "unreachable"];

/// A pool may be that of one container's own port, and containers are no labels.
fn key(cluster: &Cluster, network: NetworkId, name: &Label) -> Key {
    let known = cluster.service(network, name).map(|service| service.name.to_string());
    (network, known.unwrap_or_default())
}

fn add(traffic: &mut BTreeMap<Key, Counters>, key: Key, more: Counters) {
    let sum = traffic.entry(key).or_default();
    sum.connections += more.connections;
    for (sum, more) in [(&mut sum.requests, more.requests), (&mut sum.answers, more.answers)] {
        sum.packets += more.packets;
        sum.bytes += more.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network};

    #[test]
    fn every_state_of_a_services_backends_has_a_row_and_containers_have_none() {
        let app = network(1, "app");
        let cluster = Builder::default()
            .node(1)
            .network(1, &app)
            .endpoint(1, &app, "one", "10.1.0.8")
            .change(1, |member| {
                let mut endpoints = member.endpoints.get_mut(&app.id).unwrap().values_mut();
                endpoints.next().unwrap().service = "web".parse().ok();
            })
            .build();
        let all = backends(&cluster);
        assert_eq!(all.len(), 1);
        let states = &all[&(app.id, "web".to_owned())];
        assert_eq!(states.len(), STATES.len());
        assert_eq!((states["ready"], states["unhealthy"]), (1, 0));
        let name = |text: &str| key(&cluster, app.id, &text.parse().unwrap()).1;
        assert_eq!((name("web").as_str(), name("one").as_str()), ("web", ""));
    }
}
