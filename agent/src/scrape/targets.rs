use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
};

use serde::{Deserialize, Serialize};
use weft_model::{Endpoint, EndpointId, Label, Labels, Network, NetworkId};

use crate::cluster::{Cluster, Placed};

/// Targets with the same labels, as Prometheus reads them.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct TargetGroup {
    /// `ADDRESS:PORT`; there is always one.
    pub targets: Vec<String>,
    pub labels: BTreeMap<String, String>,
}

/// Which targets are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Selection {
    /// The containers of this network alone.
    pub network: Option<NetworkId>,
    pub role: Option<Role>,
}

/// What a target is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    Agent,
    Container,
}

/// The agents that can be scraped, by name; then the containers that ask for it, by network and
/// name. What is on a node that is not heard is left out.
pub fn targets(cluster: &Cluster, selection: Selection) -> Vec<TargetGroup> {
    let mut groups = Vec::new();
    if selection.role != Some(Role::Container) && selection.network.is_none() {
        groups.extend(agents(cluster));
    }
    if selection.role != Some(Role::Agent) {
        let wanted = |network: &&Network| selection.network.is_none_or(|id| id == network.id);
        let mut networks: Vec<&Network> =
            cluster.networks().map(AsRef::as_ref).filter(wanted).collect();
        networks.sort_by_key(|network| (&network.name, network.id));
        groups.extend(networks.into_iter().flat_map(|network| containers(cluster, network)));
    }
    groups
}

fn agents(cluster: &Cluster) -> Vec<TargetGroup> {
    let alive = cluster.members().filter(|member| cluster.is_alive(member.id));
    let mut agents: Vec<_> = alive
        .filter_map(|member| {
            let node = member.node.as_ref()?;
            Some(((node.name.clone(), member.id), node, node.metrics?))
        })
        .collect();
    agents.sort_by(|(one, ..), (other, ..)| one.cmp(other));
    let group = |node: &weft_model::Node, address: SocketAddr| {
        let labels = BTreeMap::from([
            (METRICS_PATH.into(), DEFAULT_PATH.into()),
            (SCHEME.into(), "http".into()),
            meta("role", "agent"),
            meta("host", node.name.as_str()),
            meta("version", &node.version),
        ]);
        TargetGroup { targets: vec![address.to_string()], labels }
    };
    agents.into_iter().map(|(_, node, address)| group(node, address)).collect()
}

fn containers(cluster: &Cluster, network: &Network) -> Vec<TargetGroup> {
    let mut services: BTreeMap<EndpointId, &Label> = BTreeMap::new();
    for service in cluster.services(network.id) {
        for backend in service.backends() {
            services.entry(backend.endpoint.id).or_insert(service.name);
        }
    }
    let alive = cluster.endpoints(network.id).filter(|placed| placed.alive);
    let mut asking: Vec<(Placed<'_>, Wish, IpAddr)> = alive
        .filter_map(|placed| {
            Some((placed, Wish::read(&placed.endpoint.labels)?, placed.endpoint.ips().next()?))
        })
        .collect();
    asking.sort_by(|(one, ..), (other, ..)| {
        let order = |placed: &Placed<'_>| (placed.endpoint.name.clone(), placed.endpoint.id);
        order(one).cmp(&order(other))
    });
    let group = |(placed, wish, ip): (Placed<'_>, Wish, IpAddr)| {
        let endpoint = placed.endpoint;
        let mut labels = container_labels(endpoint);
        labels.extend([
            (METRICS_PATH.into(), wish.path),
            (SCHEME.into(), wish.scheme.into()),
            meta("role", "container"),
            meta("network", network.name.as_str()),
            meta("host", &cluster.node_name(placed.node)),
            meta("container", endpoint.name.as_str()),
            meta("endpoint", &endpoint.id.short()),
        ]);
        let implied = || services.get(&endpoint.id).copied();
        if let Some(service) = endpoint.service.as_ref().or_else(implied) {
            labels.extend([meta("service", service.as_str())]);
        }
        TargetGroup { targets: vec![SocketAddr::new(ip, wish.port).to_string()], labels }
    };
    asking.into_iter().map(group).collect()
}

/// The container's own labels. Where two have one name for Prometheus, the first has it.
fn container_labels(endpoint: &Endpoint) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    for (key, value) in &endpoint.labels {
        let (name, value) = meta(&format!("label_{}", sanitized(key)), value);
        labels.entry(name).or_insert(value);
    }
    labels
}

/// What a container's labels ask for.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Wish {
    port: u16,
    path: String,
    scheme: &'static str,
}

impl Wish {
    /// Reads `prometheus.io/scrape` and its kin, or `weft.scrape` and its. Nothing if they do not ask
    /// to be scraped, or for what cannot be.
    fn read(labels: &Labels) -> Option<Self> {
        let said = |name: &str| {
            let weft = || labels.get(&format!("weft.scrape.{name}"));
            labels.get(&format!("prometheus.io/{name}")).or_else(weft).map(String::as_str)
        };
        let asks = said("scrape").or_else(|| labels.get("weft.scrape").map(String::as_str));
        if asks != Some("true") {
            return None;
        }
        let scheme = match said("scheme").unwrap_or("http") {
            "http" => "http",
            "https" => "https",
            _ => return None,
        };
        let port = match said("port") {
            Some(text) => text.parse::<NonZeroU16>().ok()?.get(),
            None if scheme == "https" => 443,
            None => 80,
        };
        let path = match said("path").unwrap_or(DEFAULT_PATH) {
            path if path.starts_with('/') => path.to_owned(),
            path => format!("/{path}"),
        };
        Some(Self { port, path, scheme })
    }
}

fn meta(name: &str, value: &str) -> (String, String) {
    (format!("__meta_weft_{name}"), value.to_owned())
}

/// As much of a label's name as Prometheus takes: letters, digits and underscores.
fn sanitized(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

const METRICS_PATH: &str = "__metrics_path__";
const SCHEME: &str = "__scheme__";
const DEFAULT_PATH: &str = "/metrics";

#[cfg(test)]
mod tests {
    use weft_gossip::{Liveness, Member};

    use super::*;
    use crate::fixture::{Builder, network};

    fn labelled(network: &Network, name: &str, pairs: &[(&str, &str)]) -> impl FnOnce(&mut Member) {
        let (id, name) = (network.id, name.to_owned());
        let pairs: Labels =
            pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        move |member| {
            let mut endpoints = member.endpoints.get_mut(&id).unwrap().values_mut();
            endpoints.find(|endpoint| endpoint.name.as_str() == name).unwrap().labels = pairs;
        }
    }

    fn built(liveness: Liveness) -> Cluster {
        let (app, db) = (network(1, "app"), network(2, "db"));
        let web = [
            ("prometheus.io/scrape", "true"),
            ("prometheus.io/port", "9100"),
            ("prometheus.io/path", "stats"),
            ("com.docker.compose.service", "web"),
        ];
        Builder::default()
            .node(1)
            .node(2)
            .change_node(1, |node| node.metrics = "192.0.2.1:9480".parse().ok())
            .change_node(2, |node| node.metrics = "192.0.2.2:9480".parse().ok())
            .network(1, &app)
            .network(1, &db)
            .endpoint(2, &app, "web", "10.1.0.9")
            .endpoint(1, &app, "mute", "10.1.0.8")
            .endpoint(1, &db, "main", "10.2.0.8")
            .change(2, labelled(&app, "web", &web))
            .change(2, |member| {
                let mut endpoints = member.endpoints.get_mut(&app.id).unwrap().values_mut();
                endpoints.next().unwrap().service = "web".parse().ok();
            })
            .change(1, labelled(&db, "main", &[("weft.scrape", "true")]))
            .change(2, |member| member.liveness = liveness)
            .build()
    }

    #[test]
    fn agents_and_the_containers_that_ask_are_told_with_all_that_is_known_of_them() {
        let cluster = built(Liveness::Alive);
        let all = targets(&cluster, Selection::default());
        insta::assert_snapshot!(serde_json::to_string_pretty(&all).unwrap());
        // In the same order each time.
        assert_eq!(targets(&built(Liveness::Alive), Selection::default()), all);

        let chosen = |network: Option<&str>, role| -> Vec<String> {
            let network = network.map(|name| cluster.find_network(name).unwrap().id);
            let found = targets(&cluster, Selection { network, role });
            found.into_iter().flat_map(|group| group.targets).collect()
        };
        assert_eq!(chosen(Some("db"), None), ["10.2.0.8:80"]);
        assert_eq!(chosen(None, Some(Role::Agent)), ["192.0.2.1:9480", "192.0.2.2:9480"]);
        assert_eq!(chosen(None, Some(Role::Container)), ["10.1.0.9:9100", "10.2.0.8:80"]);
        assert!(chosen(Some("app"), Some(Role::Agent)).is_empty());
    }

    #[test]
    fn what_is_on_a_node_that_is_not_heard_is_not_scraped() {
        for liveness in [Liveness::Suspect, Liveness::Left] {
            let found = targets(&built(liveness), Selection::default());
            let targets: Vec<_> = found.into_iter().flat_map(|group| group.targets).collect();
            assert_eq!(targets, ["192.0.2.1:9480", "10.2.0.8:80"]);
        }
    }

    #[test]
    fn a_wish_has_its_defaults_and_one_that_makes_no_sense_is_passed_over() {
        let read = |pairs: &[(&str, &str)]| {
            let wish = Wish::read(
                &pairs.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect(),
            );
            wish.map(|wish| format!("{}://:{}{}", wish.scheme, wish.port, wish.path))
        };
        let asked = ("prometheus.io/scrape", "true");
        for (pairs, expected) in [
            (vec![asked], Some("http://:80/metrics")),
            (vec![asked, ("prometheus.io/scheme", "https")], Some("https://:443/metrics")),
            (vec![asked, ("weft.scrape.port", "81")], Some("http://:81/metrics")),
            (vec![("weft.scrape.scrape", "true")], Some("http://:80/metrics")),
            (vec![("prometheus.io/scrape", "yes")], None),
            (vec![("prometheus.io/scrape", "false"), ("weft.scrape", "true")], None),
            (vec![asked, ("prometheus.io/port", "0")], None),
            (vec![asked, ("prometheus.io/port", "http")], None),
            (vec![asked, ("prometheus.io/scheme", "ftp")], None),
            (vec![("prometheus.io/port", "80")], None),
        ] {
            assert_eq!(read(&pairs).as_deref(), expected, "{pairs:?}");
        }
    }
}
