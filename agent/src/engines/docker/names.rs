//! From what Docker calls a container to the names of its endpoint. Pure.

use weft_model::{DnsName, Label, Labels};

use super::{
    client::{ContainerInspect, EndpointSettings},
    protocol::EngineId,
};
use crate::{
    bulk::{MOST, label_bytes},
    ledger::Description,
};

const PROJECT: &str = "com.docker.compose.project";
const SERVICE: &str = "com.docker.compose.service";
const STACK: &str = "com.docker.stack.namespace";
const SWARM_SERVICE: &str = "com.docker.swarm.service.name";
/// Says of which of weft's services a container is; goes before those of compose and swarms.
const OWN_SERVICE: &str = "weft.service";
/// The labels by which services are found.
const OF_SERVICES: [&str; 5] = [PROJECT, SERVICE, STACK, SWARM_SERVICE, OWN_SERVICE];

/// What is known when a container joins a network: its name.
pub(super) fn at_join(name: Option<&str>, endpoint: &EngineId) -> Description {
    let (name, aliases) = container_name(name.unwrap_or_default(), endpoint.short());
    Description { name, aliases, service: None, labels: Labels::new() }
}

/// What an inspection tells: aliases, the service of compose or of a swarm, labels.
pub(super) fn description(
    container: &ContainerInspect,
    settings: &EndpointSettings,
) -> Description {
    let id = container.id.get(..12).unwrap_or(&container.id);
    let (name, mut aliases) = container_name(container.name.trim_start_matches('/'), id);
    let labels = container.config.labels.clone().unwrap_or_default();
    let Service { name: service, others } = Service::of(&labels);
    let given = [&settings.aliases, &settings.dns_names].into_iter().flatten().flatten();
    let mut length: usize = aliases.iter().map(|alias: &DnsName| alias.as_str().len()).sum();
    for text in given.chain(&others).map(String::as_str) {
        let Ok(alias) = text.parse::<DnsName>() else { continue };
        length += alias.as_str().len();
        let known = alias.as_str() == name.as_str() || aliases.contains(&alias) || text == id;
        // What no record could carry is left out, the last aliases first.
        if !known && length <= MOST {
            aliases.push(alias);
        }
    }
    Description { name, aliases, service, labels: fitting(labels) }
}

/// A service that a container is part of, if it is of one.
#[derive(Default)]
struct Service {
    name: Option<Label>,
    /// What else it is asked for by.
    others: Vec<String>,
}

impl Service {
    /// Swarm calls a service of a stack `STACK_SERVICE`, and its file calls it `SERVICE`.
    fn of(labels: &Labels) -> Self {
        let of_swarm = labels.get(SWARM_SERVICE).map(|whole| match labels.get(STACK) {
            Some(stack) => {
                let inner = whole.strip_prefix(stack.as_str()).and_then(|s| s.strip_prefix('_'));
                (inner.unwrap_or(whole), Some(stack), Some(whole.clone()))
            }
            None => (whole.as_str(), None, None),
        });
        let of_compose =
            || labels.get(SERVICE).map(|name| (name.as_str(), labels.get(PROJECT), None));
        let own = labels.get(OWN_SERVICE).and_then(|name| name.parse().ok());
        let Some((name, project, whole)) = of_swarm.or_else(of_compose) else {
            return Self { name: own, others: Vec::new() };
        };
        let qualified = project.map(|project| format!("{name}.{project}"));
        let others = qualified.into_iter().chain(whole).collect();
        Self { name: own.or_else(|| name.parse().ok()), others }
    }
}

/// A container's name as an endpoint's. One that is no label, as with dots, becomes an alias, if it
/// can be asked for at all.
fn container_name(name: &str, short_id: &str) -> (Label, Vec<DnsName>) {
    match name.parse() {
        Ok(label) => (label, Vec::new()),
        Err(_) => {
            let label = short_id.parse().expect("a short id is letters and digits");
            (label, name.parse().into_iter().collect())
        }
    }
}

/// The labels, if a record can carry them; else those by which others find and scrape containers;
/// else those by which services are found.
fn fitting(mut labels: Labels) -> Labels {
    let is_of_service = |key: &str| OF_SERVICES.contains(&key);
    let is_asked_for =
        |key: &str| ["weft.", "prometheus.io/"].iter().any(|own| key.starts_with(own));
    if label_bytes(&labels) > MOST {
        labels.retain(|key, _| is_of_service(key) || is_asked_for(key));
    }
    if label_bytes(&labels) > MOST {
        labels.retain(|key, _| is_of_service(key));
    }
    if label_bytes(&labels) > MOST { Labels::new() } else { labels }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn inspected(json: serde_json::Value) -> Description {
        let container: ContainerInspect = serde_json::from_value(json).unwrap();
        let settings = container.network_settings.networks["app"].clone();
        description(&container, &settings)
    }

    fn texts(names: &[DnsName]) -> Vec<&str> {
        names.iter().map(DnsName::as_str).collect()
    }

    #[test]
    fn a_label_of_wefts_own_names_the_service_before_that_of_compose() {
        let found = |labels: serde_json::Value| {
            let name = inspected(json!({
                "Id": "be8560d729bc80c8", "Name": "/web-1", "Config": {"Labels": labels},
                "NetworkSettings": {"Networks": {"app": {"EndpointID": "aa"}}},
            }));
            name.service.map(|service| service.to_string())
        };
        assert_eq!(found(json!({"weft.service": "web"})).as_deref(), Some("web"));
        let both = json!({"weft.service": "web", "com.docker.compose.service": "front"});
        assert_eq!(found(both).as_deref(), Some("web"));
        let unfit = json!({"weft.service": "no label", "com.docker.compose.service": "front"});
        assert_eq!(found(unfit).as_deref(), Some("front"));
    }

    #[test]
    fn aliases_and_the_service_of_compose_are_names_and_the_short_id_is_not() {
        let id = "be8560d729bc80c8a94c3293c8cc1195";
        let found = inspected(json!({
            "Id": id, "Name": "/shop_web_1",
            "Config": {"Labels": {"com.docker.compose.project": "shop", "com.docker.compose.service": "web"}},
            "NetworkSettings": {"Networks": {"app": {
                "EndpointID": "aa", "Aliases": ["web", "be8560d729bc"],
                "DNSNames": ["shop_web_1", "web", "be8560d729bc", "host1"],
            }}},
        }));
        assert_eq!(found.name.as_str(), "shop_web_1");
        assert_eq!(texts(&found.aliases), ["web", "host1", "web.shop"]);
        assert_eq!(found.service.unwrap().as_str(), "web");
        assert_eq!(found.labels.len(), 2);
    }

    #[test]
    fn a_task_of_a_swarm_is_found_by_its_service_as_the_stacks_file_calls_it() {
        let task = |labels: serde_json::Value| {
            inspected(json!({
                "Id": "be8560d729bc80c8", "Name": "/shop_web.1.l4r1bf6iq3ziwa989dmhpsicw",
                "Config": {"Labels": labels},
                "NetworkSettings": {"Networks": {"app": {"EndpointID": "aa"}}},
            }))
        };
        let plain = task(json!({"com.docker.swarm.service.name": "shop_web"}));
        assert_eq!(plain.service.unwrap().as_str(), "shop_web");
        assert_eq!(texts(&plain.aliases), ["shop_web.1.l4r1bf6iq3ziwa989dmhpsicw"]);
        let staged = task(json!({
            "com.docker.swarm.service.name": "shop_web", "com.docker.stack.namespace": "shop",
        }));
        assert_eq!(staged.service.unwrap().as_str(), "web");
        assert_eq!(texts(&staged.aliases)[1..], ["web.shop", "shop_web"]);
    }

    #[test]
    fn a_name_with_dots_is_an_alias_of_the_short_id() {
        let endpoint: EngineId = "6ba33e5566275fef".to_owned().try_into().unwrap();
        let dotted = at_join(Some("web.1"), &endpoint);
        assert_eq!((dotted.name.as_str(), texts(&dotted.aliases)), ("6ba33e556627", vec!["web.1"]));
        assert_eq!(at_join(Some("web_1"), &endpoint).name.as_str(), "web_1");
        assert!(at_join(Some("web_"), &endpoint).aliases.is_empty());
        assert_eq!(at_join(None, &endpoint).name.as_str(), "6ba33e556627");
    }

    #[test]
    fn labels_and_aliases_that_no_record_could_carry_are_left_out() {
        let aliases: Vec<String> = (0..1000).map(|n| format!("alias-{n}")).collect();
        let found = inspected(json!({
            "Id": "be8560d729bc80c8", "Name": "/web",
            "Config": {"Labels": {
                "big": "x".repeat(9000), "com.docker.compose.service": "web",
                "prometheus.io/scrape": "true", "weft.port": "80",
            }},
            "NetworkSettings": {"Networks": {"app": {"EndpointID": "aa", "Aliases": aliases}}},
        }));
        assert!(texts(&found.aliases).iter().map(|alias| alias.len()).sum::<usize>() <= MOST);
        assert!(found.aliases.len() > 100);
        let kept: Vec<_> = found.labels.keys().map(String::as_str).collect();
        assert_eq!(kept, ["com.docker.compose.service", "prometheus.io/scrape", "weft.port"]);
    }
}
