use domain::base::{
    Message, MessageBuilder, Name, Rtype,
    iana::{Class, Opcode},
};
use weft_dns::{Directory, Entry, NetworkNames, Outcome, Reply, Transport, UDP_PAYLOAD};

use crate::lab::*;

/// Asks as the sandbox on `app` and `back`.
fn ask_both(name: &str, rtype: Rtype) -> String {
    line(&ask(&query(name, rtype), &directory(), APP, "10.32.0.2"))
}

#[test]
fn an_endpoint_answers_to_all_its_names_in_all_their_forms() {
    for (name, addresses) in [
        ("web1", "10.32.0.2"),
        ("www", "10.32.0.2"),
        ("db.corp.example", "10.32.0.2"),
        ("111111111111", "10.32.0.2"),
        ("shop_web_2", "10.32.0.3"),
        ("web", "10.32.0.2 10.32.0.3"),
        ("tasks.web", "10.32.0.2 10.32.0.3"),
        ("cache", "10.33.0.5"),
    ] {
        let network = if name == "cache" { "back" } else { "app" };
        for form in [
            name.to_owned(),
            name.to_uppercase(),
            format!("{name}.{network}"),
            format!("{name}.{network}.weft.internal"),
            format!("{name}.weft.internal"),
        ] {
            assert_eq!(ask_both(&form, Rtype::A), addresses, "{form}");
        }
    }
}

#[test]
fn what_we_do_not_know_is_denied_in_our_names_and_forwarded_otherwise() {
    for (name, rtype, expected) in [
        ("web1", Rtype::AAAA, "fd00:32::2"),
        ("web1", Rtype::ANY, "10.32.0.2"),
        // The name exists: no NXDOMAIN, whatever the type.
        ("shop_web_2", Rtype::AAAA, "NODATA shop_web_2"),
        ("shop_web_2.app", Rtype::AAAA, "NODATA app"),
        ("shop_web_2.app.weft.internal", Rtype::AAAA, "NODATA weft.internal"),
        ("web1", Rtype::MX, "NODATA web1"),
        ("_http._tcp.web", Rtype::SRV, "NODATA _http._tcp.web"),
        ("_http._tcp.web.app", Rtype::SRV, "NODATA _http._tcp.web.app"),
        ("_http._tcp.web.app.weft.internal", Rtype::SRV, "NODATA weft.internal"),
        ("_http._tcp.nope.weft.internal", Rtype::SRV, "NXDOMAIN weft.internal"),
        ("weft.internal", Rtype::A, "NODATA weft.internal"),
        ("weft.internal", Rtype::SOA, "weft.internal. nobody.invalid. 1 5 5 5 5"),
        ("app.weft.internal", Rtype::A, "NODATA weft.internal"),
        // Something lies below it: db.corp.example.
        ("corp.example.weft.internal", Rtype::A, "NODATA weft.internal"),
        ("example.app.weft.internal", Rtype::A, "NODATA weft.internal"),
        ("example.app", Rtype::A, "NODATA app"),
        ("tasks.weft.internal", Rtype::A, "NXDOMAIN weft.internal"),
        ("nope.weft.internal", Rtype::A, "NXDOMAIN weft.internal"),
        ("web1.back.weft.internal", Rtype::A, "NXDOMAIN weft.internal"),
        ("x.web1.weft.internal", Rtype::A, "NXDOMAIN weft.internal"),
        ("nope.app", Rtype::A, "NXDOMAIN app"),
        ("tasks.nope.app", Rtype::A, "NXDOMAIN app"),
        ("web1.back", Rtype::A, "NXDOMAIN back"),
        ("nope", Rtype::A, "forward"),
        ("example.com", Rtype::A, "forward"),
        ("www.shop.app", Rtype::A, "forward"),
        ("app", Rtype::A, "forward"),
        ("corp.example", Rtype::A, "forward"),
        ("internal", Rtype::A, "forward"),
        ("xweft.internal", Rtype::A, "forward"),
        (".", Rtype::NS, "forward"),
    ] {
        assert_eq!(ask_both(name, rtype), expected, "{name} {rtype}");
    }
}

#[test]
fn addresses_have_names_and_overlay_addresses_are_never_asked_for_upstream() {
    let v6 = "2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.3.0.0.0.0.d.f.ip6.arpa";
    let missing = v6.replacen('2', "5", 1);
    let v6_zone = "0.0.0.0.0.0.0.0.2.3.0.0.0.0.d.f.ip6.arpa";
    for (name, expected) in [
        ("2.0.32.10.in-addr.arpa", "web1.app.weft.internal."),
        ("3.0.32.10.IN-ADDR.ARPA", "shop_web_2.app.weft.internal."),
        ("5.0.33.10.in-addr.arpa", "cache.back.weft.internal."),
        (v6, "web1.app.weft.internal."),
        (&missing, &format!("NXDOMAIN {v6_zone}")),
        ("77.0.32.10.in-addr.arpa", "NXDOMAIN 0.32.10.in-addr.arpa"),
        ("x.2.0.32.10.in-addr.arpa", "NXDOMAIN 0.32.10.in-addr.arpa"),
        ("0.32.10.in-addr.arpa", "NODATA 0.32.10.in-addr.arpa"),
        // A network that this asker is not on: its names stay unknown.
        ("2.0.35.10.in-addr.arpa", "NXDOMAIN 0.35.10.in-addr.arpa"),
        ("32.10.in-addr.arpa", "forward"),
        ("4.3.2.1.in-addr.arpa", "forward"),
    ] {
        assert_eq!(ask_both(name, Rtype::PTR), expected, "{name}");
    }
}

#[test]
fn an_asker_sees_its_own_networks_only() {
    for (at, address, name, expected) in [
        (APP, "10.32.0.2", "db", "10.32.0.9 10.33.0.9"),
        (APP, "10.32.0.3", "db", "10.32.0.9"),
        (APP, "10.32.0.3", "cache.back", "forward"),
        (APP, "10.32.0.3", "cache.back.weft.internal", "NXDOMAIN weft.internal"),
        (APP, "10.32.0.2", "hidden", "forward"),
        (APP, "10.32.0.2", "hidden.dark.weft.internal", "NXDOMAIN weft.internal"),
        // Not a sandbox of this host that we know: the network it asks in.
        (APP, "10.32.0.200", "db", "10.32.0.9"),
        (BACK, "10.33.0.200", "db", "10.33.0.9"),
        (APP, "::ffff:10.32.0.2", "cache", "10.33.0.5"),
    ] {
        let reply = ask(&query(name, Rtype::A), &directory(), at, address);
        assert_eq!(line(&reply), expected, "{name} for {address}");
    }
}

#[test]
fn a_name_in_two_networks_gives_the_asked_networks_addresses_first() {
    let asked =
        |at, address| records(&bytes_of(ask(&query("db", Rtype::A), &directory(), at, address)));
    assert_eq!(asked(APP, "10.32.0.2"), ["10.32.0.9", "10.33.0.9"]);
    assert_eq!(asked(BACK, "10.33.0.7"), ["10.33.0.9", "10.32.0.9"]);
}

#[test]
fn only_a_sandbox_with_no_other_network_than_internal_ones_is_cut_off_from_upstream() {
    let packet = query("example.com", Rtype::A);
    let cut_off = ask(&packet, &directory(), VAULT, "10.34.0.2");
    assert_eq!(line(&cut_off), "NXDOMAIN");
    let header = Message::from_octets(bytes_of(cut_off)).unwrap().header();
    assert!(!header.ra() && !header.aa(), "{header:?}");

    let own = ask(&query("safe", Rtype::A), &directory(), VAULT, "10.34.0.2");
    assert_eq!(line(&own), "10.34.0.2");

    let also_on_app = ask(&packet, &directory(), VAULT, "10.34.0.3");
    assert_eq!(line(&also_on_app), "forward");
}

#[test]
fn a_network_that_the_directory_does_not_know_fails_for_now() {
    let reply = ask(&query("web1", Rtype::A), &directory(), 9, "10.32.0.2");
    assert_eq!(line(&reply), "SERVFAIL");
    assert!(matches!(reply, Reply::Answer { outcome: Outcome::Failed, .. }));
}

#[test]
fn an_answer_repeats_the_question_letter_by_letter() {
    let packet = query("wEb1.APP", Rtype::A);
    let message =
        Message::from_octets(bytes_of(ask(&packet, &directory(), APP, "10.32.0.2"))).unwrap();
    assert_eq!(message.as_slice()[12..packet.len()], packet[12..]);

    let header = message.header();
    assert_eq!(header.id(), 0x1234);
    assert!(header.qr() && header.aa() && header.ra() && header.rd() && !header.tc());
    let record = message.answer().unwrap().next().unwrap().unwrap();
    assert_eq!(record.ttl().as_secs(), 5);
    assert_eq!(record.owner().to_string(), "wEb1.APP");
}

#[test]
fn what_is_no_plain_query_is_refused_with_the_code_that_says_why() {
    let plain = query("web1", Rtype::A);
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = plain.clone();
        change(&mut packet);
        packet
    };
    let class = |class| {
        let mut question = MessageBuilder::new_vec().question();
        question.push((Name::vec_from_str("web1").unwrap(), Rtype::A, class)).unwrap();
        question.finish()
    };
    let two_opts = {
        let mut additional = MessageBuilder::new_vec().question().additional();
        additional.opt(|_| Ok(())).unwrap();
        additional.opt(|_| Ok(())).unwrap();
        let tail = additional.finish()[12..].to_vec();
        with(&|packet| {
            packet[11] = 2;
            packet.extend(&tail);
        })
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("no header", plain[..11].to_vec(), "drop"),
        ("a response", with(&|p| p[2] |= 0x80), "drop"),
        ("no question", plain[..12].to_vec(), "FORMERR"),
        ("question count 0", with(&|p| p[5] = 0), "FORMERR"),
        (
            "two questions",
            with(&|p| {
                p[5] = 2;
                p.extend_from_within(12..);
            }),
            "FORMERR",
        ),
        ("an answer", with(&|p| p[7] = 1), "FORMERR"),
        ("bytes after the end", with(&|p| p.push(0)), "FORMERR"),
        (
            "a name that points to itself",
            with(&|p| p[12..14].copy_from_slice(&[0xc0, 12])),
            "FORMERR",
        ),
        ("two OPT records", two_opts, "FORMERR"),
        ("OPT as the type", query("web1", Rtype::OPT), "FORMERR"),
        ("an update", with(&|p| p[2] |= Opcode::UPDATE.to_int() << 3), "NOTIMP"),
        ("a notification", with(&|p| p[2] |= Opcode::NOTIFY.to_int() << 3), "NOTIMP"),
        ("a meta-type", query("web1", Rtype::from_int(250)), "NOTIMP"),
        ("a zone transfer", query("weft.internal", Rtype::AXFR), "REFUSED"),
        ("class CH", class(Class::CH), "REFUSED"),
        ("class ANY", class(Class::ANY), "10.32.0.2"),
    ];
    for (what, packet, expected) in cases {
        assert_eq!(line(&ask(&packet, &directory(), APP, "10.32.0.2")), expected, "{what}");
    }
}

#[test]
fn edns_is_answered_in_version_0_only() {
    let message = |version| {
        let packet = query_with_edns("web1", Rtype::A, 4096, version);
        Message::from_octets(bytes_of(ask(&packet, &directory(), APP, "10.32.0.2"))).unwrap()
    };
    let good = message(0);
    let opt = good.opt().unwrap();
    assert_eq!((opt.udp_payload_size(), opt.version(), opt.dnssec_ok()), (UDP_PAYLOAD, 0, true));
    assert_eq!(records(good.as_slice()), ["10.32.0.2"]);

    let newer = message(1);
    assert_eq!(newer.opt_rcode().to_string(), "BADVERS");
    assert_eq!(newer.opt().unwrap().version(), 0);
    assert!(records(newer.as_slice()).is_empty());
}

/// A service of `count` backends, IPv4.
fn large_service(count: u32) -> Directory {
    let base = u32::from(std::net::Ipv4Addr::new(10, 64, 0, 2));
    let addresses = (base..base + count).map(|ip| std::net::Ipv4Addr::from(ip).into());
    let web = |ip| Entry { names: vec!["web".parse().unwrap()], addresses: vec![ip] };
    let mut directory = Directory::new(domain());
    let names = NetworkNames::new(
        "app".parse().unwrap(),
        false,
        vec!["10.64.0.0/16".parse().unwrap()],
        addresses.map(web),
    );
    directory.networks.insert(network(APP), names.into());
    directory
}

#[test]
fn an_answer_too_large_for_udp_has_as_much_as_fits_and_says_so() {
    let directory = large_service(200);
    for (packet, limit) in [
        (query("web", Rtype::A), 512),
        (query_with_edns("web", Rtype::A, 100, 0), 512),
        (query_with_edns("web", Rtype::A, 700, 0), 700),
        (query_with_edns("web", Rtype::A, 4096, 0), 1232),
    ] {
        let Reply::Answer { message, truncated, .. } = ask(&packet, &directory, APP, "10.64.0.2")
        else {
            panic!("no answer");
        };
        assert!(truncated && Message::from_slice(&message).unwrap().header().tc());
        // One more record of 16 bytes would have been too much.
        assert!((limit - 15..=limit).contains(&message.len()), "{} of {limit}", message.len());
        assert_eq!(Message::from_slice(&message).unwrap().opt().is_some(), packet.len() > 21);
    }
}

#[test]
fn an_answer_by_tcp_has_what_fits_64_kib() {
    for (count, expected) in [(200, 200), (6000, (65_535 - 21) / 16)] {
        let asker = weft_dns::Asker {
            network: network(APP),
            address: ip("10.64.0.2"),
            transport: Transport::Tcp,
            falls_through: false,
        };
        let packet = query("web", Rtype::A);
        let reply = weft_dns::answer(&packet, &asker, &large_service(count), TTL, &mut rand::rng());
        let message = bytes_of(reply);
        assert_eq!(records(&message).len(), expected);
        assert!(!Message::from_slice(&message).unwrap().header().tc());
    }
}

#[test]
fn backends_come_in_another_order_each_time() {
    let directory = large_service(20);
    let asker = weft_dns::Asker {
        network: network(APP),
        address: ip("10.64.0.2"),
        transport: Transport::Udp,
        falls_through: false,
    };
    let mut rng = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(7);
    let firsts: std::collections::BTreeSet<String> = (0..200)
        .map(|_| {
            let reply =
                weft_dns::answer(&query("web", Rtype::A), &asker, &directory, TTL, &mut rng);
            records(&bytes_of(reply)).swap_remove(0)
        })
        .collect();
    assert_eq!(firsts.len(), 20, "every backend comes first at some time: {firsts:?}");
}

#[test]
fn a_forwarded_query_offers_no_more_than_fits_the_overlay() {
    let asked = query_with_edns("example.com", Rtype::A, 4096, 0);
    let Reply::Forward(forward) = ask(&asked, &directory(), APP, "10.32.0.2") else {
        panic!("not forwarded");
    };
    let sent = Message::from_slice(&forward.query).unwrap();
    assert_eq!(sent.opt().unwrap().udp_payload_size(), UDP_PAYLOAD);
    assert!(sent.opt().unwrap().dnssec_ok());
    assert_eq!(forward.limit, usize::from(UDP_PAYLOAD));

    let plain = query("example.com", Rtype::A);
    let Reply::Forward(forward) = ask(&plain, &directory(), APP, "10.32.0.2") else {
        panic!("not forwarded");
    };
    assert_eq!((forward.query, forward.limit), (plain, 512));
}

#[test]
fn nothing_is_denied_while_names_may_be_missing() {
    let asked = |incomplete: bool, name: &str, rtype, at: u8, address: &str| {
        let mut directory = directory();
        directory.incomplete = incomplete;
        match ask(&query(name, rtype), &directory, at, address) {
            Reply::Answer { message, .. } => {
                line_of(&message).split(' ').next().unwrap_or_default().to_owned()
            }
            Reply::Forward(forward) => format!("forwarded, doubtful: {}", forward.doubtful),
            Reply::Drop => "dropped".into(),
        }
    };
    let (app, vault) = ((APP, "10.32.0.3"), (VAULT, "10.34.0.99"));
    for (name, (at, address), before, after) in [
        ("new.app", app, "SERVFAIL", "NXDOMAIN"),
        ("new.weft.internal", app, "SERVFAIL", "NXDOMAIN"),
        ("new", vault, "SERVFAIL", "NXDOMAIN"),
        ("tasks.new", vault, "SERVFAIL", "NXDOMAIN"),
        ("example.com", vault, "NXDOMAIN", "NXDOMAIN"),
        ("new", app, "forwarded, doubtful: true", "forwarded, doubtful: false"),
        ("_http._tcp.tasks.new", app, "forwarded, doubtful: true", "forwarded, doubtful: false"),
        ("example.com", app, "forwarded, doubtful: false", "forwarded, doubtful: false"),
        ("db", app, "10.32.0.9", "10.32.0.9"),
    ] {
        assert_eq!(asked(true, name, Rtype::A, at, address), before, "{name}");
        assert_eq!(asked(false, name, Rtype::A, at, address), after, "{name}");
    }
    // What is known to have no such address is said to have none.
    assert_eq!(asked(true, "db", Rtype::AAAA, APP, "10.32.0.3"), "NODATA");
}
