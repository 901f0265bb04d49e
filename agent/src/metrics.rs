//! Prometheus metrics: read from the parts' own counts when somebody scrapes.
//!
//! Labels are bounded: networks, services, tables, states and results; never an address or a
//! container. What a network that has gone has left behind in the counts has no row.

mod services;

use std::{collections::BTreeMap, fmt, sync::Arc};

use axum::{Router, http::header, routing::get};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Registry, Unit},
};
use weft_gossip::Gossip;
use weft_model::{Network, NetworkId};

use crate::{
    api::types::NodeLiveness,
    cluster::Cluster,
    encryption::{self, Encryption},
    ledger::{Ledger, SpaceUsage},
    listeners::Listeners,
    scrape,
    status::Report,
};

/// What is read at a scrape.
#[derive(Clone)]
pub struct Sources {
    pub report: Report,
    pub ledger: Ledger,
    pub gossip: Gossip,
    pub listeners: Listeners,
    pub plane: tokio::sync::watch::Receiver<Arc<weft_vxlan::Status>>,
    pub encryption: Encryption,
}

/// Serves `/metrics`, and what else there is to scrape.
pub fn router(sources: Sources) -> Router {
    let discovery = scrape::router(sources.report.clone());
    let answer = move || {
        let sources = sources.clone();
        async move { ([(header::CONTENT_TYPE, OPEN_METRICS)], sources.text().await) }
    };
    Router::new().route("/metrics", get(answer)).merge(discovery)
}

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl Sources {
    async fn text(&self) -> String {
        let reading = self.read().await;
        let mut registry = Registry::with_prefix("weft");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", build);
        registry.register_collector(Box::new(reading));
        let mut text = String::new();
        encode(&mut text, &registry).expect("a String takes everything");
        text
    }

    async fn read(&self) -> Reading {
        let snapshot = self.report.snapshot();
        let names = labels(&snapshot.cluster);
        let mut endpoints = BTreeMap::new();
        for network in snapshot.cluster.networks() {
            let here = snapshot.book.endpoints_of(network.id).count();
            let all = snapshot.cluster.endpoints(network.id).count();
            endpoints.insert(network.id, (here, all));
        }
        let mut nodes = BTreeMap::from([
            (NodeLiveness::Alive, 0),
            (NodeLiveness::Suspect, 0),
            (NodeLiveness::Left, 0),
        ]);
        for node in self.report.nodes() {
            *nodes.entry(node.state).or_default() += 1;
        }
        let services = services::Reading::take(&snapshot.cluster, self.report.balancer()).await;
        Reading {
            names,
            nodes,
            endpoints,
            expires: self.report.certificate_expires().unix_timestamp(),
            usage: self.ledger.usage().await.unwrap_or_default(),
            gossip: self.gossip.counters(),
            dns: self.listeners.counters().await,
            plane: self.plane.borrow().clone(),
            services,
            sealed: encryption::Reading {
                status: self.report.encryption(),
                counters: self.encryption.counters(),
            },
        }
    }
}

/// What each network is called in labels: its name, or its short id where another network has the
/// name, for two rows with the same labels make the whole text invalid.
fn labels(cluster: &Cluster) -> BTreeMap<NetworkId, String> {
    let has_name = |network: &Network| {
        let named = cluster.find_network(network.name.as_str());
        named.is_some_and(|named| named.id == network.id)
    };
    let label = |network: &Network| match has_name(network) {
        true => network.name.to_string(),
        false => network.id.short(),
    };
    cluster.networks().map(|network| (network.id, label(network))).collect()
}

/// Everything, as one moment showed it.
#[derive(Debug)]
struct Reading {
    names: BTreeMap<NetworkId, String>,
    nodes: BTreeMap<NodeLiveness, i64>,
    /// Here, and in all.
    endpoints: BTreeMap<NetworkId, (usize, usize)>,
    /// Seconds since the Unix epoch.
    expires: i64,
    usage: SpaceUsage,
    gossip: weft_gossip::Counters,
    dns: weft_dns::Snapshot,
    plane: Arc<weft_vxlan::Status>,
    services: services::Reading,
    sealed: encryption::Reading,
}

impl Collector for Reading {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let out = &mut Writer { encoder: &mut encoder };
        self.cluster(out)?;
        self.tables(out)?;
        self.gossip(out)?;
        self.dns(out)?;
        self.space(out)?;
        self.services.encode(out, |id| self.network(id))?;
        self.sealed.encode(out, |id| self.network(id))
    }
}

impl Reading {
    fn cluster(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let nodes = self.nodes.iter().map(|(state, n)| {
            let state = match state {
                NodeLiveness::Alive => "alive",
                NodeLiveness::Suspect => "suspect",
                NodeLiveness::Left => "left",
            };
            ([("state", state.to_owned())], *n)
        });
        out.gauges("gossip_nodes", "Nodes of the cluster by state", nodes)?;
        out.gauge("networks", "Networks of the cluster", self.names.len())?;
        let here = self.endpoints.iter();
        let here = here.filter_map(|(id, (here, _))| Some(([self.network(*id)?], *here)));
        out.gauges("endpoints_local", "Endpoints on this host", here)?;
        let all = self.endpoints.iter();
        let all = all.filter_map(|(id, (_, all))| Some(([self.network(*id)?], *all)));
        out.gauges("endpoints", "Endpoints on all hosts", all)?;
        out.gauge(
            "certificate_expiry_timestamp_seconds",
            "When this node's certificate ends",
            self.expires,
        )
    }

    fn tables(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let of_host = ("network", String::new());
        let host = self.plane.host.iter().map(|(table, s)| (of_host.clone(), *table, s));
        let known = self.plane.networks.iter();
        let known = known.filter_map(|(id, network)| Some((self.network(*id)?, network)));
        let networks = known.flat_map(|(label, network)| {
            network.tables.iter().map(move |(table, s)| (label.clone(), *table, s))
        });
        let rows: Vec<_> = host
            .chain(networks)
            .map(|(network, table, status)| {
                ([network, ("table", table.as_str().to_owned())], status)
            })
            .collect();
        let each = |read: fn(&weft_vxlan::TableStatus) -> u64| {
            rows.iter().map(move |(labels, status)| (labels.clone(), read(status)))
        };
        out.counters("reconcile_ops", "Operations applied to kernel tables", each(|s| s.applied))?;
        out.counters("reconcile_drift", "Repairs of foreign changes", each(|s| s.drift))?;
        out.counters("reconcile_failures", "Operations that failed", each(|s| s.failed))?;
        let lag = rows
            .iter()
            .filter_map(|(labels, status)| Some((labels.clone(), status.lag?.as_secs_f64())));
        out.float_gauges(
            "reconcile_lag_seconds",
            "From the last change to its being in the kernel",
            lag,
        )
    }

    fn gossip(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let gossip = &self.gossip;
        let flows = [("gossip", gossip.gossip), ("push", gossip.push), ("receipt", gossip.receipt)];
        let each = |read: fn(&weft_gossip::Flow) -> [(&'static str, u64); 2]| {
            flows.iter().flat_map(move |(kind, flow)| {
                read(flow).map(|(direction, n)| {
                    ([("direction", direction.to_owned()), ("kind", (*kind).to_owned())], n)
                })
            })
        };
        let bytes = each(|f| [("received", f.received_bytes), ("sent", f.sent_bytes)]);
        out.counters("gossip_bytes", "Bytes of messages between agents", bytes)?;
        let messages = each(|f| [("received", f.received_messages), ("sent", f.sent_messages)]);
        out.counters("gossip_messages", "Messages between agents", messages)?;
        let plain = |n: u64| [(NO_LABELS, n)];
        out.counters("gossip_rounds", "Rounds of anti-entropy", plain(gossip.rounds))?;
        out.counters("gossip_pushes", "Changes pushed to members", plain(gossip.pushes))?;
        out.counters("gossip_suspicions", "Peers that became suspect", plain(gossip.suspicions))?;
        out.counters("gossip_frozen", "Times that verdicts were withheld", plain(gossip.frozen))?;
        out.counters("gossip_rejected", "Messages that could not be read", plain(gossip.rejected))?;
        out.gauge("gossip_unknown_keys", "Keys of newer versions", gossip.unknown_keys)?;
        out.gauge("gossip_undecodable", "Values that cannot be read", gossip.undecodable)?;
        out.gauge("gossip_digest_bytes", "Size of the exchange's digest", gossip.digest_bytes)
    }

    fn dns(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let known = self.dns.networks.iter();
        let known = known.filter_map(|(id, counts)| Some((self.network(*id)?, counts)));
        let queries = known.flat_map(|(network, counts)| {
            [
                ("answered", counts.answered),
                ("nodata", counts.nodata),
                ("nxdomain", counts.nxdomain),
                ("forwarded", counts.forwarded),
                ("refused", counts.refused),
                ("failed", counts.failed),
                ("dropped", counts.dropped),
            ]
            .map(|(result, n)| ([network.clone(), ("result", result.to_owned())], n))
        });
        out.counters("dns_queries", "DNS queries by what became of them", queries)?;
        let upstream = &self.dns.upstream;
        let attempts = [
            ("reply", upstream.replies),
            ("timeout", upstream.timeouts),
            ("error", upstream.errors),
            ("mismatch", upstream.mismatches),
            ("over_limit", upstream.over_limit),
            ("without_server", upstream.without_server),
        ]
        .map(|(result, n)| ([("result", result.to_owned())], n));
        out.counters("dns_upstream", "Attempts at upstream resolvers", attempts)
    }

    fn space(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let rows: Vec<_> = self
            .usage
            .iter()
            .filter_map(|(id, rows)| Some((self.network(*id)?, rows)))
            .flat_map(|(network, rows)| rows.iter().map(move |row| (network.clone(), row)))
            .collect();
        let each = |read: fn(&crate::api::types::SpaceStatus) -> u64| {
            rows.iter().map(move |(network, row)| {
                let family = ("family", row.family.to_string().to_lowercase());
                ([network.clone(), family], read(row))
            })
        };
        out.gauges("ipam_owned_addresses", "Addresses this node may give out", each(|r| r.owned))?;
        out.gauges("ipam_free_addresses", "Of these, the free ones", each(|r| r.free))?;
        out.gauges("ipam_leased_addresses", "Of these, those in use", each(|r| r.leased))
    }

    /// The label of a network; none if it has gone.
    fn network(&self, id: NetworkId) -> Option<(&'static str, String)> {
        Some(("network", self.names.get(&id)?.clone()))
    }
}

pub(crate) const NO_LABELS: [(&str, String); 0] = [];

/// Writes families of values with labels.
pub(crate) struct Writer<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
}

impl Writer<'_, '_> {
    pub(crate) fn gauge(&mut self, name: &str, help: &str, value: impl Number) -> fmt::Result {
        self.gauges(name, help, [(NO_LABELS, value)])
    }

    pub(crate) fn gauges<const L: usize, N: Number>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ([(&'static str, String); L], N)>,
    ) -> fmt::Result {
        let rows = rows.into_iter().map(|(labels, n)| (labels, ConstGauge::new(n.signed())));
        self.family(name, help, MetricType::Gauge, rows)
    }

    pub(crate) fn float_gauges<const L: usize>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ([(&'static str, String); L], f64)>,
    ) -> fmt::Result {
        let rows = rows.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, MetricType::Gauge, rows)
    }

    pub(crate) fn counters<const L: usize>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = ([(&'static str, String); L], u64)>,
    ) -> fmt::Result {
        let rows = rows.into_iter().map(|(labels, n)| (labels, ConstCounter::new(n)));
        self.family(name, help, MetricType::Counter, rows)
    }

    fn family<const L: usize>(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        rows: impl IntoIterator<Item = ([(&'static str, String); L], impl EncodeMetric)>,
    ) -> fmt::Result {
        let no_unit: Option<&Unit> = None;
        let mut encoder = self.encoder.encode_descriptor(name, help, no_unit, kind)?;
        for (labels, metric) in rows {
            metric.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

/// A count that fits a gauge.
pub(crate) trait Number {
    fn signed(self) -> i64;
}

impl Number for i64 {
    fn signed(self) -> i64 {
        self
    }
}

impl Number for u64 {
    fn signed(self) -> i64 {
        i64::try_from(self).unwrap_or(i64::MAX)
    }
}

impl Number for usize {
    fn signed(self) -> i64 {
        i64::try_from(self).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Builder, network};

    #[test]
    fn two_networks_with_one_name_have_different_labels() {
        let (first, second) = (network(1, "app"), network(2, "app"));
        let cluster = Builder::default().node(1).network(1, &first).network(1, &second).build();
        let expected = [(first.id, "app".to_owned()), (second.id, second.id.short())];
        assert_eq!(labels(&cluster), BTreeMap::from(expected));
    }
}
