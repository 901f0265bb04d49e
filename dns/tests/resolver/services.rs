//! Services: virtual addresses, tasks and SRV records.

use domain::{
    base::{Message, Rtype},
    rdata::AllRecordData,
};
use weft_dns::{Asker, Backend, BackendPort, Directory, Entry, Reply, Service, Transport};
use weft_model::{Endpoint, Label, Protocol};

use crate::lab::*;

fn label(text: &str) -> Label {
    text.parse().unwrap()
}

fn port(protocol: Protocol, port: u16, target: u16) -> BackendPort {
    BackendPort { protocol, port, target }
}

fn backend(endpoint: &Endpoint, weight: u16, ports: &[BackendPort]) -> Backend {
    Backend {
        target: endpoint.id.short().parse().unwrap(),
        addresses: endpoint.ips().collect(),
        weight,
        ports: ports.to_vec(),
    }
}

/// `web` has virtual addresses and two backends, `rr` is the same without virtual addresses, `idle`
/// has none of either, and `plain` is a service of one backend without ports.
fn directory() -> Directory {
    let one = endpoint(0x11, "one", &["10.32.0.2", "fd00:32::2"]);
    let two = endpoint(0x12, "two", &["10.32.0.3"]);
    let ports = [port(Protocol::Tcp, 80, 8080), port(Protocol::Udp, 53, 53)];
    let all = vec![ip("10.32.0.2"), ip("fd00:32::2"), ip("10.32.0.3")];
    let entries = vec![
        Entry::endpoint(&one),
        Entry::endpoint(&two),
        Entry::service(label("web"), vec![ip("10.32.0.250"), ip("fd00:32::250")]),
        Entry::tasks(&label("web"), all.clone()),
        Entry::service(label("rr"), all.clone()),
        Entry::tasks(&label("rr"), all),
        Entry::service(label("idle"), Vec::new()),
        Entry::tasks(&label("idle"), Vec::new()),
        Entry::service(label("plain"), vec![ip("10.32.0.2")]),
    ];
    let both = || vec![backend(&one, 1, &ports), backend(&two, 3, &ports)];
    let services = [
        Service { name: label("web"), backends: both() },
        Service { name: label("rr"), backends: both() },
        Service { name: label("idle"), backends: Vec::new() },
        Service { name: label("plain"), backends: vec![backend(&one, 1, &[])] },
    ];
    let subnets = ["10.32.0.0/24", "fd00:32::/64"].map(|text| text.parse().unwrap());
    let names = weft_dns::NetworkNames::new(label("app"), false, subnets.to_vec(), entries);
    let mut directory = Directory::new(domain());
    directory.networks.insert(network(APP), names.with_services(services).into());
    directory
}

fn asked(name: &str, rtype: Rtype) -> String {
    line(&ask(&query(name, rtype), &directory(), APP, "10.32.0.2"))
}

fn forms(name: &str) -> [String; 5] {
    [
        name.to_owned(),
        name.to_uppercase(),
        format!("{name}.app"),
        format!("{name}.app.weft.internal"),
        format!("{name}.weft.internal"),
    ]
}

#[test]
fn a_service_is_its_virtual_addresses_and_its_tasks_are_the_backends() {
    for (name, v4, v6) in [
        ("web", "10.32.0.250", "fd00:32::250"),
        ("tasks.web", "10.32.0.2 10.32.0.3", "fd00:32::2"),
        ("rr", "10.32.0.2 10.32.0.3", "fd00:32::2"),
        ("tasks.rr", "10.32.0.2 10.32.0.3", "fd00:32::2"),
        ("one", "10.32.0.2", "fd00:32::2"),
    ] {
        for form in forms(name) {
            assert_eq!(asked(&form, Rtype::A), v4, "{form}");
            assert_eq!(asked(&form, Rtype::AAAA), v6, "{form}");
        }
    }
    let v6 = "0.5.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.3.0.0.0.0.d.f.ip6.arpa";
    for name in ["250.0.32.10.in-addr.arpa", v6] {
        assert_eq!(asked(name, Rtype::PTR), "web.app.weft.internal.");
    }
    // What a service shares with its backend is the backend's to name.
    assert_eq!(asked("2.0.32.10.in-addr.arpa", Rtype::PTR), "one.app.weft.internal.");
}

#[test]
fn a_service_without_a_backend_exists_all_the_same() {
    for (form, zone) in [
        ("idle", "idle"),
        ("tasks.idle", "tasks.idle"),
        ("idle.app", "app"),
        ("tasks.idle.app", "app"),
        ("idle.app.weft.internal", "weft.internal"),
        ("tasks.idle.weft.internal", "weft.internal"),
        ("_80._tcp.idle.app", "_80._tcp.idle.app"),
    ] {
        for rtype in [Rtype::A, Rtype::AAAA, Rtype::SRV, Rtype::TXT] {
            assert_eq!(asked(form, rtype), format!("NODATA {zone}"), "{form} {rtype}");
        }
    }
}

#[test]
fn srv_records_name_each_ready_backend_its_port_and_its_weight() {
    let http = "0 1 8080 111111111111.app.weft.internal 0 3 8080 121212121212.app.weft.internal";
    let dns = "0 1 53 111111111111.app.weft.internal 0 3 53 121212121212.app.weft.internal";
    for service in ["web", "tasks.web", "rr", "tasks.rr"] {
        for (ports, expected) in [
            ("_80._tcp", http),
            ("_http._tcp", http),
            // Where nothing is asked for by that number, who listens at it is meant.
            ("_8080._tcp", http),
            ("_domain._udp", dns),
        ] {
            for form in forms(&format!("{ports}.{service}")) {
                assert_eq!(asked(&form, Rtype::SRV), expected, "{form}");
            }
        }
        for form in forms(service) {
            let all = asked(&form, Rtype::SRV);
            assert_eq!(all.matches("8080").count(), 2, "{form}: {all}");
            assert_eq!(all.matches(" 53 ").count(), 2, "{form}: {all}");
        }
        for ports in ["_81._tcp", "_80._udp", "_nope._tcp", "_http._sctp", "_http.tcp"] {
            let form = format!("{ports}.{service}.weft.internal");
            let nothing = if ports == "_http.tcp" { "NXDOMAIN" } else { "NODATA" };
            assert_eq!(asked(&form, Rtype::SRV), format!("{nothing} weft.internal"), "{form}");
        }
    }
    assert_eq!(asked("plain", Rtype::SRV), "NODATA plain");
    assert_eq!(asked("one", Rtype::SRV), "NODATA one");
    assert_eq!(asked("_80._tcp.nope.weft.internal", Rtype::SRV), "NXDOMAIN weft.internal");
    // Whoever asks for addresses there is not told of servers.
    assert_eq!(asked("_80._tcp.web.app", Rtype::A), "NODATA _80._tcp.web.app");
}

#[test]
fn the_targets_of_srv_records_come_with_their_addresses_and_stand_for_one_backend() {
    let packet = query_with_edns("_http._tcp.web", Rtype::SRV, 1232, 0);
    let message = bytes_of(ask(&packet, &directory(), APP, "10.32.0.2"));
    let message = Message::from_slice(&message).unwrap();
    let additional = message.additional().unwrap().limit_to::<AllRecordData<_, _>>();
    let mut extra: Vec<_> = additional
        .map(Result::unwrap)
        .filter(|record| record.rtype() != Rtype::OPT)
        .map(|record| format!("{} {}", record.owner(), record.data()))
        .collect();
    extra.sort();
    let owner = |n| format!("{n}{n}{n}{n}{n}{n}.app.weft.internal");
    assert_eq!(
        extra,
        [
            format!("{} 10.32.0.2", owner("11")),
            format!("{} fd00:32::2", owner("11")),
            format!("{} 10.32.0.3", owner("12")),
        ]
    );
    assert_eq!(asked(&owner("11"), Rtype::A), "10.32.0.2");
    assert_eq!(asked(&owner("12"), Rtype::A), "10.32.0.3");
}

#[test]
fn more_srv_records_than_fit_are_cut_off_by_udp_and_complete_by_tcp() {
    let endpoints: Vec<Endpoint> =
        (1..=40).map(|n| endpoint(n, "web", &[&format!("10.32.0.{n}")])).collect();
    let ports = [port(Protocol::Tcp, 80, 80)];
    let backends = endpoints.iter().map(|endpoint| backend(endpoint, 1, &ports)).collect();
    let subnets = vec!["10.32.0.0/24".parse().unwrap()];
    let entries = vec![Entry::service(label("web"), vec![ip("10.32.0.250")])];
    let names = weft_dns::NetworkNames::new(label("app"), false, subnets, entries)
        .with_services([Service { name: label("web"), backends }]);
    let mut directory = Directory::new(domain());
    directory.networks.insert(network(APP), names.into());

    let packet = query_with_edns("web", Rtype::SRV, 4096, 0);
    let Reply::Answer { message, truncated, .. } = ask(&packet, &directory, APP, "10.32.0.2")
    else {
        panic!("no answer");
    };
    let read = Message::from_slice(&message).unwrap();
    assert!(truncated && read.header().tc() && message.len() <= 1232, "{}", message.len());
    assert!(read.header_counts().ancount() > 10);
    // The OPT record alone.
    assert_eq!(read.header_counts().arcount(), 1);

    // What does not fit beside the answer is left out, and no reason to come again by TCP.
    let packet = query_with_edns("_80._tcp.web", Rtype::SRV, 512, 0);
    let names = weft_dns::NetworkNames::new(label("app"), false, Vec::new(), Vec::new());
    let backends = endpoints[..8].iter().map(|endpoint| backend(endpoint, 1, &ports)).collect();
    let names = names.with_services([Service { name: label("web"), backends }]);
    let mut few = directory.clone();
    few.networks.insert(network(APP), names.into());
    let Reply::Answer { message, truncated, .. } = ask(&packet, &few, APP, "10.32.0.2") else {
        panic!("no answer");
    };
    let counts = Message::from_slice(&message).unwrap().header_counts();
    assert!(!truncated && message.len() <= 512);
    assert_eq!(counts.ancount(), 8);
    assert!((1..8).contains(&(counts.arcount() - 1)), "{counts:?}");

    let asker = Asker {
        network: network(APP),
        address: ip("10.32.0.2"),
        transport: Transport::Tcp,
        falls_through: false,
    };
    let reply = weft_dns::answer(&packet, &asker, &directory, TTL, &mut rand::rng());
    assert_eq!(records(&bytes_of(reply)).len(), 40);
}
