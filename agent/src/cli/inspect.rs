//! A network in the shape of `docker network inspect`, as far as Docker has a field for it.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use weft_model::{Driver, Family, Network, Pool};

use crate::{
    api::types::{EndpointStatus, NetworkState, NetworkStatus, NodeStatus},
    tokens::rfc3339,
};

/// Describes a network. `nodes` are those of the cluster, among them this one.
///
/// All that weft says of it stands under `Weft`. If it is `verbose`, there are also the nodes that
/// have endpoints in it (`Peers`) and the endpoints of all nodes by service (`Services`; those of
/// none under the empty name).
pub(super) fn describe(status: &NetworkStatus, nodes: &[NodeStatus], verbose: bool) -> Value {
    let network = &status.network;
    let created = i64::try_from(network.created).ok();
    let created = created.and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok());
    let mut shown = json!({
        "Name": network.name,
        "Id": network.id,
        "Created": created.map(rfc3339),
        "Scope": network.driver.scope(),
        "Driver": network.driver,
        "EnableIPv4": network.pool(Family::V4).is_some(),
        "EnableIPv6": network.pool(Family::V6).is_some(),
        "IPAM": {"Driver": "weft", "Config": network.pools.iter().map(pool).collect::<Vec<_>>()},
        "Internal": network.internal,
        "Attachable": true,
        "Ingress": false,
        "Containers": containers(status, nodes),
        "Options": options(network),
        "Labels": network.labels,
        "Weft": status,
    });
    if verbose {
        shown["Peers"] = peers(status, nodes);
        shown["Services"] = services(status, nodes);
    }
    shown
}

/// Describes what is predefined and is no network of weft's; `None` if it is something else.
///
/// `bridge` is one, but only from its first use on.
pub(super) fn predefined(name: &str) -> Option<Value> {
    matches!(name, "bridge" | "host" | "none").then(|| {
        json!({
            "Name": name,
            "Scope": "local",
            "Driver": name,
            "IPAM": {"Driver": "weft", "Config": []},
            "Internal": name == "none",
            "Attachable": false,
            "Ingress": false,
            "Containers": {},
            "Options": {},
            "Labels": {},
        })
    })
}

/// What is predefined among networks as the agent describes them: without an id.
pub(super) fn predefined_status(name: &str) -> Value {
    json!({
        "name": name,
        "driver": name,
        "internal": name == "none",
        "encrypted": false,
        "pools": [],
        "labels": {},
        "endpoints": [],
        "state": NetworkState::Ready,
    })
}

fn pool(pool: &Pool) -> Value {
    let mut config = Map::new();
    config.insert("Subnet".into(), json!(pool.subnet));
    config.extend(pool.range.map(|range| ("IPRange".into(), json!(range))));
    config.insert("Gateway".into(), json!(pool.gateway));
    if !pool.aux.is_empty() {
        config.insert("AuxiliaryAddresses".into(), json!(pool.aux));
    }
    Value::Object(config)
}

/// The endpoints of this host, as Docker shows those of its own containers.
fn containers(status: &NetworkStatus, nodes: &[NodeStatus]) -> Value {
    let this = nodes.iter().find(|node| node.this).map(|node| node.id);
    let here = status.endpoints.iter().filter(|endpoint| Some(endpoint.node_id) == this);
    let containers = here.map(|endpoint| {
        let container = json!({
            "Name": endpoint.name,
            "EndpointID": endpoint.id,
            "MacAddress": endpoint.mac,
            "IPv4Address": address(endpoint, Family::V4),
            "IPv6Address": address(endpoint, Family::V6),
        });
        (endpoint.id.to_string(), container)
    });
    Value::Object(containers.collect())
}

/// With its prefix length; empty where there is none, as in Docker.
fn address(endpoint: &EndpointStatus, family: Family) -> String {
    let mut addresses = endpoint.addresses.iter();
    let found = addresses.find(|net| Family::of(net.addr()) == family);
    found.map(ToString::to_string).unwrap_or_default()
}

fn options(network: &Network) -> BTreeMap<&'static str, String> {
    let options = &network.options;
    let mtu = options.mtu.map(|mtu| ("mtu", mtu.to_string()));
    let switches = [
        ("multicast", options.multicast.then_some("true")),
        ("encrypted", network.encrypted.then_some("true")),
        ("icc", (network.driver == Driver::Bridge && options.isolated).then_some("false")),
    ];
    let switches = switches.into_iter().filter_map(|(key, value)| Some((key, value?.to_owned())));
    let parent = options.macvlan.and_then(|macvlan| macvlan.parent);
    let parent = parent.map(|parent| ("parent", parent.to_string()));
    let mode = options.macvlan.map(|macvlan| ("macvlan_mode", macvlan.mode.to_string()));
    switches.chain(mtu).chain(parent).chain(mode).collect()
}

fn peers(status: &NetworkStatus, nodes: &[NodeStatus]) -> Value {
    let has_endpoints =
        |node: &&NodeStatus| status.endpoints.iter().any(|endpoint| endpoint.node_id == node.id);
    let peers = nodes.iter().filter(has_endpoints);
    peers.map(|node| json!({"Name": node.name, "IP": node.vtep})).collect()
}

fn services(status: &NetworkStatus, nodes: &[NodeStatus]) -> Value {
    let mut services: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for endpoint in &status.endpoints {
        let node = nodes.iter().find(|node| node.id == endpoint.node_id);
        let service = endpoint.service.as_ref().map(ToString::to_string).unwrap_or_default();
        services.entry(service).or_default().push(json!({
            "Name": endpoint.name,
            "EndpointID": endpoint.id,
            "EndpointIP": endpoint.addresses.first().map(|net| net.addr()),
            "Info": {"Host": endpoint.node, "Host IP": node.map(|node| node.vtep)},
        }));
    }
    let services = services
        .into_iter()
        .map(|(service, tasks)| (service, json!({"Ports": [], "Tasks": tasks})));
    Value::Object(services.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(n: u8, name: &str, service: Option<&str>) -> Value {
        json!({
            "id": format!("{n:02}").repeat(16), "name": name, "aliases": [], "network": "app",
            "network_id": "09".repeat(16), "node": format!("h{n}"),
            "node_id": format!("{n:02}").repeat(16), "mac": "02:00:00:00:00:07",
            "addresses": [format!("10.32.0.{n}/24")], "reachable": true, "service": service,
        })
    }

    fn node(n: u8) -> NodeStatus {
        serde_json::from_value(json!({
            "id": format!("{n:02}").repeat(16), "name": format!("h{n}"), "state": "alive",
            "this": n == 1, "address": format!("192.0.2.{n}:6790"), "vtep": format!("192.0.2.{n}"),
            "version": "0", "underlay_mtu": 1500, "endpoints": 1,
        }))
        .unwrap()
    }

    #[test]
    fn docker_finds_its_own_fields_and_verbose_shows_all_hosts() {
        let status: NetworkStatus = serde_json::from_value(json!({
            "id": "09".repeat(16), "name": "app", "vni": 5000,
            "pools": [{"subnet": "10.32.0.0/24", "gateway": "10.32.0.254",
                "range": "10.32.0.0/25", "aux": {"nas": "10.32.0.9"}}],
            "options": {"mtu": 1400}, "creator": "01".repeat(16), "lenders": ["01".repeat(16)],
            "created": 1_700_000_000, "state": "ready", "mtu": 1400, "addresses": [],
            "endpoints": [endpoint(1, "web", Some("www")), endpoint(2, "far", None)],
        }))
        .unwrap();
        let nodes = [node(1), node(2), node(3)];
        let mut shown = describe(&status, &nodes, true);
        let peers = shown["Peers"].take();
        assert_eq!(
            peers,
            json!([{"Name": "h1", "IP": "192.0.2.1"}, {"Name": "h2", "IP": "192.0.2.2"}])
        );
        let services = shown["Services"].take();
        assert_eq!(services["www"]["Tasks"][0]["Name"], "web");
        assert_eq!(services[""]["Tasks"][0]["Info"]["Host IP"], "192.0.2.2");

        let quiet = describe(&status, &nodes, false);
        assert!(quiet.get("Peers").is_none() && quiet.get("Services").is_none(), "{quiet}");
        let containers = quiet["Containers"].as_object().unwrap();
        assert_eq!(containers.len(), 1, "{containers:?}");
        assert_eq!(containers["01".repeat(16).as_str()]["IPv4Address"], "10.32.0.1/24");
        assert_eq!(containers["01".repeat(16).as_str()]["IPv6Address"], "");
        let config = json!({"Subnet": "10.32.0.0/24", "IPRange": "10.32.0.0/25",
            "Gateway": "10.32.0.254", "AuxiliaryAddresses": {"nas": "10.32.0.9"}});
        assert_eq!(quiet["IPAM"]["Config"], json!([config]));
        assert_eq!(quiet["Options"], json!({"mtu": "1400"}));
        assert_eq!((&quiet["Driver"], &quiet["Scope"]), (&json!("overlay"), &json!("global")));
        assert_eq!(quiet["Created"], "2023-11-14T22:13:20Z");
        assert_eq!(quiet["Weft"]["vni"], 5000);
    }

    #[test]
    fn what_is_predefined_is_shown_without_being_made() {
        for name in ["bridge", "host", "none"] {
            assert_eq!(predefined(name).unwrap()["Driver"], name);
        }
        assert!(predefined("app").is_none());
    }
}
