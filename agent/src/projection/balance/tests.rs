use std::num::NonZeroU16;

use weft_gossip::Liveness;
use weft_model::{Condition, Service, ServicePort};

use super::*;
use crate::fixture::{Builder, book_with, endpoint, network, plane_context};

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn publication(port: u16, mode: PublishMode) -> Publication {
    Publication {
        protocol: Protocol::Tcp,
        port: self::port(port),
        target: self::port(80),
        mode,
        host_ip: None,
        source: Source::Preserve,
        proxy_protocol: false,
    }
}

fn web(network: &Network) -> Service {
    Service::bare("web".parse().unwrap(), network.id)
}

/// Node 1 has `web` at 10.1.0.8 and so has its book; node 2 has `web` at 10.1.0.9.
fn two(network: &Network) -> Builder {
    Builder::default()
        .node(1)
        .node(2)
        .network(1, network)
        .endpoint(1, network, "web", "10.1.0.8")
        .endpoint(2, network, "web", "10.1.0.9")
}

fn project(cluster: &Cluster, book: &Book, warming_up: bool) -> Desired {
    balance(plane_context(), cluster, book, None, warming_up)
}

fn backends(pool: &Pool) -> Vec<String> {
    let shown = |backend: &Backend| {
        let port = backend.port.map_or_else(String::new, |port| format!(":{port}"));
        format!("{}{port}{}", backend.ip, if backend.local { " here" } else { "" })
    };
    let mut all: Vec<_> = pool.backends.values().map(shown).collect();
    all.sort();
    all
}

#[test]
fn a_virtual_address_leads_to_ready_backends_by_every_port_or_by_some() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let mut service = web(&app);
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100");
    let desired = project(&cluster.service(1, 1, &service).build(), &book, false);
    let shown: Vec<_> =
        desired.networks[&app.id].frontends.keys().map(ToString::to_string).collect();
    assert_eq!(shown, ["10.1.0.100/tcp", "10.1.0.100/udp"]);
    let pool = desired.networks[&app.id].frontends.values().next().unwrap();
    assert_eq!(backends(pool), ["10.1.0.8 here", "10.1.0.9"]);
    assert!(desired.host.ports.is_empty());

    let mut service = web(&app);
    service.ports =
        vec![ServicePort { protocol: Protocol::Udp, port: port(53), target: port(5353) }];
    let drained = endpoint(&app, "web", "10.1.0.9").id;
    let drained = Condition { endpoint: drained, draining: true, verdicts: BTreeMap::new() };
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100");
    let cluster = cluster.condition(2, &app, drained).service(1, 1, &service).build();
    let desired = project(&cluster, &book, false);
    let (frontend, pool) = desired.networks[&app.id].frontends.iter().next().unwrap();
    assert_eq!(frontend.to_string(), "10.1.0.100:53/udp");
    assert_eq!(backends(pool), ["10.1.0.8:5353 here"]);
}

#[test]
fn a_host_that_just_started_takes_out_no_backend_that_it_has_not_heard_of_yet() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let mut service = web(&app);
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100").service(1, 1, &service);
    let cluster = cluster.change(2, |member| member.liveness = Liveness::Suspect).build();
    let count = |warming_up| {
        let desired = project(&cluster, &book, warming_up);
        desired.networks[&app.id].frontends.values().next().unwrap().backends.len()
    };
    assert_eq!((count(true), count(false)), (2, 1));
}

#[test]
fn a_port_of_every_host_leads_through_the_uplink_to_all_backends() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let service = Service { published: vec![publication(8080, PublishMode::Ingress)], ..web(&app) };
    let cluster = two(&app).service(1, 1, &service).build();
    let desired = project(&cluster, &book, false);
    let (at, to) = desired.host.ports.iter().next().unwrap();
    assert_eq!(at.to_string(), "0.0.0.0:8080/tcp");
    assert_eq!(to.ip().to_string(), "169.254.192.7");
    let balance = &desired.networks[&app.id];
    let frontend = Frontend { ip: to.ip(), protocol: Protocol::Tcp, port: Some(to.port()) };
    assert_eq!(backends(&balance.frontends[&frontend]), ["10.1.0.8:80 here", "10.1.0.9:80"]);

    // A host without an endpoint carries the network all the same.
    let mut bare = Book::default();
    bare.uplinks.insert(app.id, 0);
    assert_eq!(carried(&cluster, &bare), BTreeSet::from([app.id]));
}

#[test]
fn a_port_of_hosts_with_a_backend_is_on_those_alone_and_for_theirs() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let source = Source::Local;
    for publication in [
        publication(8080, PublishMode::Host),
        Publication { source, ..publication(8080, PublishMode::Ingress) },
    ] {
        let service = Service { published: vec![publication], ..web(&app) };
        let cluster = two(&app).service(1, 1, &service).build();
        let desired = project(&cluster, &book, false);
        let pool = desired.networks[&app.id].frontends.values().next().unwrap();
        assert_eq!(backends(pool), ["10.1.0.8:80 here"]);

        let alone = Builder::default().node(1).node(2).network(1, &app);
        let alone = alone.endpoint(2, &app, "web", "10.1.0.9").service(1, 1, &service);
        let desired = project(&alone.build(), &book, false);
        assert!(desired.host.ports.is_empty());
    }
}

#[test]
fn a_backend_that_answers_by_another_gateway_makes_clients_wear_ours() {
    let app = network(1, "app");
    let service = Service { published: vec![publication(8080, PublishMode::Ingress)], ..web(&app) };
    let source = |routed| {
        let cluster = two(&app).service(1, 1, &service);
        let cluster =
            cluster.change_endpoint(2, &app, "10.1.0.9", |own| own.default_route = routed);
        let cluster = cluster.build();
        let view = cluster.service(app.id, &service.name).unwrap();
        source_in_force(&view, &service.published[0])
    };
    assert_eq!(source(true).0, Source::Preserve);
    let (snat, why) = source(false);
    assert_eq!(snat, Source::Snat);
    assert!(why.contains("backend web"), "{why}");
}

#[test]
fn a_port_of_one_container_goes_before_a_services() {
    let app = network(1, "app");
    let mut book = book_with(&app, "web", "10.1.0.8");
    let own = PublishedPort {
        host_ip: Some([192, 0, 2, 1].into()),
        host_port: 8080,
        container_port: 7000,
        protocol: Protocol::Tcp,
    };
    book.endpoints.values_mut().for_each(|local| local.ports = vec![own]);
    let service = Service { published: vec![publication(8080, PublishMode::Ingress)], ..web(&app) };
    let desired = project(&two(&app).service(1, 1, &service).build(), &book, false);
    let shown: Vec<_> = desired.host.ports.keys().map(ToString::to_string).collect();
    assert_eq!(shown, ["192.0.2.1:8080/tcp"]);
    let pool = desired.networks[&app.id].frontends.values().next().unwrap();
    assert_eq!(backends(pool), ["10.1.0.8:7000 here"]);
}

#[test]
fn what_did_not_change_is_the_same_allocation() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let mut service = web(&app);
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100").service(1, 1, &service);
    let cluster = cluster.build();
    let first = project(&cluster, &book, false);
    let again = balance(plane_context(), &cluster, &book, Some(&first), false);
    assert!(Arc::ptr_eq(&first.networks[&app.id], &again.networks[&app.id]));
    assert!(Arc::ptr_eq(&first.host, &again.host));
}

#[test]
fn a_drain_is_acknowledged_once_what_was_asked_for_last_is_in_force() {
    let app = network(1, "app");
    let book = book_with(&app, "web", "10.1.0.8");
    let id = endpoint(&app, "web", "10.1.0.9").id;
    let mut service = web(&app);
    let before = two(&app).vip(1, &app, &mut service, "10.1.0.100").service(1, 1, &service);
    let before = project(&before.build(), &book, false);
    let condition = Condition { endpoint: id, draining: true, verdicts: BTreeMap::new() };
    let mut service = web(&app);
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100").service(1, 1, &service);
    let cluster = cluster.condition(2, &app, condition).build();
    let wanted = project(&cluster, &book, false);
    let acknowledged = |applied: &Desired, before: &Drained| {
        let mut status = weft_balance::Status::default();
        status.networks.entry(app.id).or_default().applied =
            Some(Arc::clone(&applied.networks[&app.id]));
        let before = Acknowledged { drained: before, held: false };
        drained(&cluster, &BTreeSet::from([app.id]), &wanted, &status, before)
    };
    let gone = Drained::from([(app.id, BTreeSet::from([id]))]);
    assert!(acknowledged(&before, &Drained::new()).is_empty());
    assert_eq!(acknowledged(&wanted, &Drained::new()), gone);
    assert!(acknowledged(&before, &gone).is_empty());
}

#[test]
fn what_was_acknowledged_is_not_undone_by_an_older_memory_of_its_node() {
    let app = network(1, "app");
    let mut book = book_with(&app, "web", "10.1.0.8");
    let far = endpoint(&app, "web", "10.1.0.9").id;
    let mut service = web(&app);
    // As it was remembered before it drained: fit.
    let cluster = two(&app).vip(1, &app, &mut service, "10.1.0.100").service(1, 1, &service);
    let heard = cluster.change(2, |member| member.liveness = Liveness::Suspect).build();
    let count = |book: &Book| {
        let desired = balance(plane_context(), &heard, book, None, true);
        desired.networks[&app.id].frontends.values().next().unwrap().backends.len()
    };
    assert_eq!(count(&book), 2);
    book.drained = Drained::from([(app.id, BTreeSet::from([far]))]);
    assert_eq!(count(&book), 1);

    let desired = balance(plane_context(), &heard, &book, None, true);
    let acknowledged = |held| {
        let before = Acknowledged { drained: &book.drained, held };
        let status = weft_balance::Status::default();
        drained(&heard, &BTreeSet::from([app.id]), &desired, &status, before)
    };
    assert_eq!(acknowledged(true), book.drained);
    assert!(acknowledged(false).is_empty());
}

#[test]
fn internal_ports_stay_when_others_come_and_go() {
    let at = |port| host_ports(None, Protocol::Tcp, port).next().unwrap();
    let service: Label = "web".parse().unwrap();
    let first = internal_port(&service, &at(80), |_| true).unwrap();
    assert_eq!(internal_port(&service, &at(80), |port| port != first), Some(first % 65_535 + 1));
    assert_ne!(internal_port(&service, &at(81), |_| true), Some(first));
    assert_eq!(internal_port(&service, &at(80), |_| false), None);
}

#[test]
fn ports_meet_if_a_connection_could_come_to_both() {
    let at = |ip: Option<&str>, port| {
        let ip = ip.map(|ip| ip.parse().unwrap());
        host_ports(ip, Protocol::Tcp, port).next().unwrap()
    };
    let all = at(None, 80);
    assert!(overlap(&all, &at(Some("127.0.0.1"), 80)));
    assert!(overlap(&all, &at(Some("0.0.0.0"), 80)));
    assert!(!overlap(&all, &at(Some("::"), 80)));
    assert!(!overlap(&at(Some("127.0.0.1"), 80), &at(Some("192.0.2.1"), 80)));
    assert!(!overlap(&all, &at(None, 81)));
}
