use weft_model::{Check, EndpointId, Hold, HoldRecord, Probe, Unit, Verdict};

use super::*;
use crate::fixture::{Builder, endpoint, network, node_id};

fn label(name: &str) -> Label {
    name.parse().unwrap()
}

fn web(network: &Network) -> Service {
    Service::bare(label("web"), network.id)
}

fn nodes(count: u8) -> Builder {
    (1..=count).fold(Builder::default(), Builder::node)
}

fn checked(network: &Network) -> Service {
    let check = Check { probe: Probe::Engine, interval: 1, timeout: 1, rise: 1, fall: 1 };
    Service { check: Some(check), ..web(network) }
}

fn states(cluster: &Cluster, network: &Network) -> Vec<(String, BackendState)> {
    let service = cluster.service(network.id, &label("web")).unwrap();
    let states = service.backends();
    states.map(|b| (b.endpoint.name.to_string(), b.state.clone())).collect()
}

#[test]
fn the_highest_revision_holds_and_of_two_alike_the_higher_writers() {
    let app = network(1, "app");
    let said = |first: u64, second: u64| {
        let of = |affinity| Service { affinity: Some(affinity), ..web(&app) };
        let cluster = nodes(3).network(1, &app);
        let cluster = cluster.service(2, first, &of(2)).service(3, second, &of(3)).build();
        let view = cluster.service(app.id, &label("web")).unwrap();
        view.definition().unwrap().affinity.unwrap()
    };
    assert_eq!((said(1, 2), said(2, 1), said(1, 1)), (3, 2, 3));
    // Nobody has the last word.
    assert_eq!(said(1, u64::MAX), 2);
}

#[test]
fn a_removal_is_a_revision_too_and_is_told() {
    let app = network(1, "app");
    let removed = |revision| {
        let cluster = nodes(3).network(1, &app).service(2, 2, &web(&app));
        cluster.service_record(3, app.id, &label("web"), revision, ServiceState::Removed).build()
    };
    assert!(removed(1).service(app.id, &label("web")).is_some());
    let gone = removed(3);
    assert!(gone.service(app.id, &label("web")).is_none());
    assert_eq!(gone.service_record(app.id, &label("web")).unwrap().revision, 3);
    assert_eq!(gone.service_records(app.id).count(), 1);
}

#[test]
fn what_is_said_of_another_name_or_network_does_not_count() {
    let (app, db) = (network(1, "app"), network(2, "db"));
    for foreign in [Service { name: label("api"), ..web(&app) }, web(&db)] {
        let state = ServiceState::Defined(Box::new(foreign));
        let cluster = nodes(2).network(1, &app).network(1, &db);
        let cluster = cluster.service_record(2, app.id, &label("web"), 1, state).build();
        assert_eq!(cluster.services(app.id).count(), 0);
    }
}

#[test]
fn an_endpoint_serves_what_it_says_and_without_a_word_what_it_is_called() {
    let app = network(1, "app");
    let cluster = nodes(2)
        .network(1, &app)
        .service(1, 1, &web(&app))
        .endpoint(1, &app, "web", "10.1.0.8")
        .endpoint(1, &app, "alias", "10.1.0.9")
        .endpoint(2, &app, "member", "10.1.0.10")
        .endpoint(2, &app, "web", "10.1.0.11")
        .change_endpoint(1, &app, "10.1.0.9", |own| own.aliases.push("web".parse().unwrap()))
        .change_endpoint(2, &app, "10.1.0.10", |own| own.service = Some(label("web")))
        .change_endpoint(2, &app, "10.1.0.11", |own| own.service = Some(label("other")))
        .build();
    let mut names: Vec<_> = states(&cluster, &app).into_iter().map(|(name, _)| name).collect();
    names.sort();
    assert_eq!(names, ["alias", "member", "web"]);
    let other = cluster.service(app.id, &label("other")).unwrap();
    assert!(other.definition().is_none() && other.record.is_none());
    assert_eq!(other.backends().count(), 1);
}

#[test]
fn a_backend_is_ready_only_if_nothing_speaks_against_it() {
    let app = network(1, "app");
    let id = endpoint(&app, "web", "10.1.0.8").id;
    let state = |service: &Service, liveness, draining, verdict: Option<Verdict>| {
        let verdicts = verdict.into_iter().map(|verdict| (label("web"), verdict)).collect();
        let cluster = nodes(2)
            .network(1, &app)
            .service(1, 1, service)
            .endpoint(2, &app, "web", "10.1.0.8")
            .condition(2, &app, Condition { endpoint: id, draining, verdicts })
            .change(2, |member| member.liveness = liveness)
            .build();
        states(&cluster, &app).remove(0).1
    };
    let (bare, checked) = (web(&app), checked(&app));
    let bad = || Some(Verdict::Unhealthy("refused".into()));
    let alive = Liveness::Alive;
    assert_eq!(state(&bare, alive, false, None), BackendState::Ready);
    assert_eq!(state(&bare, alive, false, bad()), BackendState::Ready);
    assert_eq!(state(&checked, alive, false, None), BackendState::Starting);
    assert_eq!(state(&checked, alive, false, Some(Verdict::Healthy)), BackendState::Ready);
    let unhealthy = BackendState::Unhealthy("refused".into());
    assert_eq!(state(&checked, alive, false, bad()), unhealthy);
    assert_eq!(state(&bare, alive, true, None), BackendState::Draining);
    assert_eq!(state(&bare, Liveness::Suspect, true, None), BackendState::Unreachable);
}

#[test]
fn nobody_speaks_for_the_endpoints_of_another_node() {
    let app = network(1, "app");
    let endpoint = endpoint(&app, "web", "10.1.0.8").id;
    let lie = Condition { endpoint, draining: true, verdicts: BTreeMap::new() };
    let cluster = nodes(3)
        .network(1, &app)
        .service(1, 1, &web(&app))
        .endpoint(2, &app, "web", "10.1.0.8")
        .condition(3, &app, lie)
        .build();
    assert_eq!(states(&cluster, &app), [("web".to_owned(), BackendState::Ready)]);
}

#[test]
fn a_virtual_address_counts_if_its_holder_has_it_and_no_endpoint_does() {
    let app = network(1, "app");
    let vips = |holder: u8, said: u8, taken: bool| {
        let mut service = web(&app);
        let mut cluster = nodes(3).network(1, &app);
        cluster = cluster.vip(holder, &app, &mut service, "10.1.0.8");
        service.lease =
            service.lease.map(|lease| weft_model::VipLease { node: node_id(said), ..lease });
        if taken {
            cluster = cluster.endpoint(holder, &app, "box", "10.1.0.8");
        }
        // Whoever changes a service last need not hold its addresses.
        let cluster = cluster.service(3, 1, &service).build();
        cluster.service(app.id, &label("web")).unwrap().vips.len()
    };
    assert_eq!(vips(2, 2, false), 1);
    assert_eq!(vips(2, 1, false), 0);
    assert_eq!(vips(2, 2, true), 0);
}

#[test]
fn a_virtual_address_outlives_the_records_of_its_lender_and_its_holder() {
    let app = Network { lenders: vec![node_id(3)], ..network(1, "app") };
    // Node 3 lends and node 2 holds; node 1, and perhaps others, repeat what it said.
    let vips = |gone: &[u8], held: Option<(Unit, u64)>| {
        let mut service = web(&app);
        let mut cluster = nodes(4).network(1, &app).vip(2, &app, &mut service, "10.1.0.8");
        cluster = cluster.service(2, 1, &service).service(1, 1, &service);
        cluster = cluster.change(4, |member| {
            let hold = |seq| Hold { seq, ceded: BTreeSet::new() };
            let held = held.into_iter().map(|(unit, seq)| (unit, hold(seq))).collect();
            member.holds.insert(app.id, HoldRecord { held, released: BTreeMap::new() });
        });
        let mut view = ClusterView::clone(&cluster.view());
        view.members.retain(|id, _| !gone.iter().any(|n| node_id(*n) == *id));
        let cluster = Cluster::resolve(view.into(), &BTreeMap::new(), &BTreeSet::new());
        cluster.service(app.id, &label("web")).unwrap().vips.len()
    };
    for gone in [&[][..], &[2], &[3], &[2, 3]] {
        assert_eq!(vips(gone, None), 1, "{gone:?}");
    }
    let address = Unit::Address("10.1.0.8".parse().unwrap());
    assert_eq!(vips(&[2, 3], Some((address, 2))), 0);
    let other = Unit::Address("10.1.0.9".parse().unwrap());
    assert_eq!(vips(&[2, 3], Some((other, 2))), 1);
}

#[test]
fn of_two_services_with_one_address_the_first_by_name_has_it() {
    let app = network(1, "app");
    let mut service = web(&app);
    let cluster = nodes(2).network(1, &app).vip(2, &app, &mut service, "10.1.0.8");
    let other = Service { name: label("api"), ..service.clone() };
    let cluster = cluster.service(2, 1, &service).service(2, 1, &other).build();
    let has = |name: &str| !cluster.service(app.id, &label(name)).unwrap().vips.is_empty();
    assert!(has("api") && !has("web"));
}

#[test]
fn every_node_carries_a_network_with_a_port_at_every_host() {
    let app = network(1, "app");
    let carriers = |mode: Option<PublishMode>| {
        let mut service = web(&app);
        service.published.extend(mode.map(|mode| weft_model::Publication {
            protocol: weft_model::Protocol::Tcp,
            port: 80.try_into().unwrap(),
            target: 80.try_into().unwrap(),
            mode,
            host_ip: None,
            source: weft_model::Source::Preserve,
            proxy_protocol: false,
        }));
        let cluster = nodes(3).network(1, &app).endpoint(2, &app, "web", "10.1.0.8");
        let cluster = cluster.change(3, |member| member.liveness = Liveness::Suspect);
        cluster.service(1, 1, &service).build().carriers(app.id).len()
    };
    assert_eq!(carriers(None), 1);
    assert_eq!(carriers(Some(PublishMode::Host)), 1);
    assert_eq!(carriers(Some(PublishMode::Ingress)), 3);
}

#[test]
fn a_network_that_nothing_comes_into_is_carried_by_hosts_with_endpoints_alone() {
    let mut service = web(&network(1, "app"));
    service.published.push(weft_model::Publication {
        protocol: weft_model::Protocol::Tcp,
        port: 80.try_into().unwrap(),
        target: 80.try_into().unwrap(),
        mode: PublishMode::Ingress,
        host_ip: None,
        source: weft_model::Source::Preserve,
        proxy_protocol: false,
    });
    let carriers = |app: &Network, other: Option<&Network>| {
        let mut cluster = nodes(3).network(1, app).endpoint(2, app, "web", "10.1.0.8");
        if let Some(other) = other {
            cluster = cluster.network(1, other);
        }
        let cluster = cluster.service(1, 1, &service).build();
        (cluster.carriers(app.id), cluster.has_ingress(app.id))
    };
    let app = network(1, "app");
    let (all, own) = ((1..=3).map(node_id).collect(), BTreeSet::from([node_id(2)]));
    assert_eq!(carriers(&app, None), (all, true));
    let internal = Network { internal: true, ..app.clone() };
    assert_eq!(carriers(&internal, None), (own.clone(), false));
    // Another one has its name: this one stands back, and hosts that have part in it go on.
    let before = Network { id: NetworkId::from([0; 16]), ..app.clone() };
    assert_eq!(carriers(&app, Some(&before)), (own, true));
}

#[test]
fn an_endpoint_that_nobody_confirms_serves_nothing() {
    let app = network(1, "app");
    let forged = endpoint(&app, "web", "10.1.0.9");
    let cluster = nodes(2).network(1, &app).service(1, 1, &web(&app)).change(2, |member| {
        let all: BTreeMap<EndpointId, Endpoint> = [(forged.id, forged.clone())].into();
        member.endpoints.insert(app.id, all);
    });
    assert!(states(&cluster.build(), &app).is_empty());
}
