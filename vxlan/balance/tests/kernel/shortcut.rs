use std::{cell::RefCell, collections::BTreeMap};

use weft_balance::{Counters, Frontend};
use weft_model::Protocol;
use weft_vxlan::Namespace;

use crate::{
    lab::{Lab, Service, VIPS, eventually, in_lab, ips, net, run},
    site::{Entrance, addresses, on_site},
    talk::{Conversation, Silence, serve, throw_fragments},
};

/// Exchanges after which a connection has lasted.
const LASTED: u32 = 40;

/// How the tests' connections find their backend.
const KINDS: [Option<u16>; 2] = [Some(80), None];

fn service(port: Option<u16>, stations: &[u8]) -> Service {
    let target = port.map(|_| 8080);
    Service { port, target, ..Service::new(0, 0, stations) }
}

/// The port at which clients find a service of `port`.
fn asked(port: Option<u16>) -> u16 {
    port.unwrap_or(8080)
}

fn talk(conversation: &mut Conversation, exchanges: u32) {
    for n in 0..exchanges {
        conversation.goes_on().unwrap_or_else(|silence| panic!("exchange {n}: {silence:?}"));
    }
}

/// Has the gateway count what it sees of TCP to the virtual address and to backends.
fn watch(inside: &Namespace) {
    let to = format!("{{ {}, 10.1.0.2, 10.1.0.11 }}", VIPS[0]);
    let rule = format!("ip daddr {to} meta l4proto tcp counter");
    run(inside, &format!("nft add rule inet weft-user prerouting {rule}"));
}

/// How many packets that were.
fn seen_by_gateway(inside: &Namespace) -> u64 {
    // … counter packets 12 bytes 600
    let rule = run(inside, "nft list chain inet weft-user prerouting");
    let mut words = rule.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).and_then(|packets| packets.parse().ok()).unwrap_or_else(|| panic!("{rule}"))
}

async fn counted(lab: &Lab) -> Counters {
    let counters: BTreeMap<Frontend, Counters> = lab.one.balancer.counters(net()).await.unwrap();
    let tcp = |frontend: &Frontend| frontend.ip == VIPS[0] && frontend.protocol == Protocol::Tcp;
    counters.into_iter().find(|(frontend, _)| tcp(frontend)).unwrap().1
}

#[test]
fn a_connection_that_has_lasted_passes_the_gateway_by_and_is_counted() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let inside = lab.one.network_namespace();
        lab.one.serve(&service(None, &[2]).balance(1)).await;
        watch(&inside);
        for port in KINDS {
            for backend in [2, 11] {
                lab.one.serve(&service(port, &[backend]).balance(1)).await;
                let to = (VIPS[0], asked(port));
                let mut conversation = Conversation::start(lab.sandbox(1), to).unwrap();
                assert_eq!(conversation.answer.client, ips(1)[0]);
                talk(&mut conversation, LASTED);

                let (before, counted_before) = (seen_by_gateway(&inside), counted(&lab).await);
                talk(&mut conversation, 500);
                let (after, counted_after) = (seen_by_gateway(&inside), counted(&lab).await);
                // Ways are forgotten every few seconds.
                assert!(after - before < 50, "{port:?} {backend}: {before} {after}");
                for (before, after) in [
                    (counted_before.requests, counted_after.requests),
                    (counted_before.answers, counted_after.answers),
                ] {
                    let packets = after.packets - before.packets;
                    assert!((500..2000).contains(&packets), "{port:?} {backend}: {packets}");
                    let bytes = after.bytes - before.bytes;
                    assert!(bytes >= 500 * (5 + 52), "{port:?} {backend}: {bytes}");
                }
            }
        }
    });
}

#[test]
fn a_connection_whose_way_is_forgotten_goes_by_the_gateway_and_gets_another_way() {
    in_lab(&[1, 11], async |lab| {
        serve(11, lab.sandbox(11), 8080);
        let inside = lab.one.network_namespace();
        lab.one.serve(&service(None, &[11]).balance(1)).await;
        watch(&inside);
        for port in KINDS {
            lab.one.serve(&service(port, &[11]).balance(1)).await;
            let to = (VIPS[0], asked(port));
            let mut conversation = Conversation::start(lab.sandbox(1), to).unwrap();
            talk(&mut conversation, 200);
            let repairs = lab.one.status().repairs;
            for forgotten in ["port-ways", "address-ways", "answer-ways"] {
                let before = seen_by_gateway(&inside);
                run(&inside, &format!("nft flush map bridge weft-services {forgotten}"));
                talk(&mut conversation, 200);
                let after = seen_by_gateway(&inside);
                assert!(after - before < 50, "{port:?} {forgotten}: {before} {after}");
            }
            // All at once, as time does it; the sequence numbers are far from what is known.
            let flush = "nft flush map bridge weft-services";
            run(&inside, &format!("{flush} port-ways; {flush} address-ways; {flush} answer-ways"));
            talk(&mut conversation, 200);
            assert_eq!(lab.one.status().repairs, repairs);
        }
    });
}

#[test]
fn the_next_connection_of_the_same_ports_may_have_another_backend() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            for port in [8080, 9090] {
                serve(station, lab.sandbox(station), port);
            }
        }
        let (client, inside) = (lab.sandbox(1), lab.one.network_namespace());
        // After a second.
        run(client, "sysctl -qw net.ipv4.tcp_tw_reuse=1");
        for (port, backends) in [
            (Some(80), &[(2, 8080), (11, 8080), (11, 9090), (2, 9090), (2, 8080)][..]),
            (None, &[(2, 8080), (11, 8080), (2, 8080)]),
        ] {
            for &(backend, target) in backends {
                let service = Service { target: port.map(|_| target), ..service(port, &[backend]) };
                lab.one.serve(&service.balance(1)).await;
                let again = || Conversation::start_from(client, 40_000, (VIPS[0], asked(port)));
                let mut conversation = at_last(again).await;
                assert_eq!(conversation.answer.station, backend);
                talk(&mut conversation, 100);
                conversation.close();
                let noted = run(
                    &inside,
                    "for map in port-ways port-targets port-stations address-ways \
                         address-stations answer-ways; do
                         nft list map bridge weft-services $map
                     done",
                );
                assert!(!noted.contains("elements"), "{noted}");
            }
        }
    });
}

/// Begins the conversation as soon as the client's port may be used again.
async fn at_last(begin: impl Fn() -> Result<Conversation, Silence>) -> Conversation {
    let begun = RefCell::new(None);
    eventually("the port may be used again", async || {
        let conversation = begin().map_err(|silence| format!("{silence:?}"))?;
        begun.replace(Some(conversation));
        Ok(())
    })
    .await;
    begun.into_inner().expect("it has begun")
}

#[test]
fn a_connection_with_a_way_outlives_its_backends_place_and_its_service() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        for port in KINDS {
            lab.one.serve(&service(port, &[11]).balance(1)).await;
            let to = (VIPS[0], asked(port));
            let mut conversation = Conversation::start(lab.sandbox(1), to).unwrap();
            talk(&mut conversation, 100);
            for stations in [&[2][..], &[]] {
                lab.one.serve(&service(port, stations).balance(1)).await;
                talk(&mut conversation, 100);
            }
            lab.one.serve(&Service::new(9, 9, &[2]).balance(1)).await;
            talk(&mut conversation, 100);
        }
    });
}

#[test]
fn nothing_is_used_that_was_noted_of_an_earlier_connection_of_the_same_ports() {
    in_lab(&[1, 11], async |lab| {
        serve(11, lab.sandbox(11), 8080);
        let inside = lab.one.network_namespace();
        lab.one.serve(&service(Some(80), &[11]).balance(1)).await;
        // … 10.1.0.200 . tcp . 80 counter packets 0 bytes 0 : 0x80000001
        let marks = run(&inside, "nft list map bridge weft-services port-marks");
        let mark = marks.split(" : ").last().and_then(|rest| rest.split_whitespace().next());
        let way = format!("10.1.0.1 . 40000 . {}", mark.unwrap());
        // Another container had the address, and the service another port.
        for (map, data) in [("port-stations", "02:00:00:00:00:99"), ("port-targets", "9090")] {
            let element = format!("{{ {way} : {data} }}");
            run(&inside, &format!("nft add element bridge weft-services {map} '{element}'"));
        }
        let begun = Conversation::start_from(lab.sandbox(1), 40_000, (VIPS[0], 80));
        talk(&mut begun.unwrap(), 100);
    });
}

#[test]
fn who_takes_the_mark_away_sees_every_packet() {
    in_lab(&[1, 11], async |lab| {
        serve(11, lab.sandbox(11), 8080);
        let inside = lab.one.network_namespace();
        lab.one.serve(&service(Some(80), &[11]).balance(1)).await;
        let rule = "ip daddr 10.1.0.11 'meta mark & 0x80000000 != 0' meta mark set 0";
        run(&inside, &format!("nft insert rule inet weft-user forward {rule}"));
        watch(&inside);
        let mut conversation = Conversation::start(lab.sandbox(1), (VIPS[0], 80)).unwrap();
        talk(&mut conversation, LASTED);
        let before = seen_by_gateway(&inside);
        talk(&mut conversation, 200);
        let after = seen_by_gateway(&inside);
        assert!(after - before >= 200, "{before} {after}");
    });
}

#[test]
fn a_connection_to_a_backend_itself_is_bridged_once_it_has_lasted() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let inside = lab.one.network_namespace();
        lab.one.serve(&service(None, &[2, 11]).balance(1)).await;
        watch(&inside);
        for port in KINDS {
            lab.one.serve(&service(port, &[2, 11]).balance(1)).await;
            for backend in [2, 11] {
                let before = seen_by_gateway(&inside);
                let to = (ips(backend)[0], 8080);
                let mut conversation = Conversation::start(lab.sandbox(1), to).unwrap();
                talk(&mut conversation, LASTED);
                let lasted = seen_by_gateway(&inside);
                assert!(lasted > before, "{port:?} {backend}: it is not lifted");
                talk(&mut conversation, 500);
                let after = seen_by_gateway(&inside);
                assert!(after - lasted < 50, "{port:?} {backend}: {lasted} {after}");
                run(&inside, "nft flush set bridge weft-services direct-ways");
                talk(&mut conversation, 100);
                conversation.close();
                let noted = run(&inside, "nft list set bridge weft-services direct-ways");
                assert!(!noted.contains("elements"), "{noted}");
            }
        }
    });
}

#[test]
fn who_came_by_another_host_and_ends_first_hears_the_rest() {
    on_site(async |site| {
        site.open(&[Entrance::new(8080, &[2])]).await;
        for ip in addresses(1) {
            let mut conversation = Conversation::start(&site.client, (ip, 8080)).unwrap();
            talk(&mut conversation, LASTED);
            // The server's own end comes after the client's.
            conversation.close();
        }
    });
}

#[test]
fn all_fragments_of_a_packet_go_by_the_gateway() {
    in_lab(&[1, 11], async |lab| {
        serve(11, lab.sandbox(11), 8080);
        lab.one.serve(&service(None, &[11]).balance(1)).await;
        let (inside, there) = (lab.one.network_namespace(), lab.sandbox(11));
        // Before they are put together again.
        run(
            there,
            "nft add table ip seen
             nft add chain ip seen prerouting '{ type filter hook prerouting priority -450; }'
             nft add rule ip seen prerouting 'ip frag-off & 0x3fff != 0' counter",
        );
        let way = "{ 10.1.0.1 . 5555 . 10.1.0.11 . 8080 }";
        run(&inside, &format!("nft add element bridge weft-services direct-ways '{way}'"));
        throw_fragments(lab.sandbox(1), 5555, "10.1.0.11:8080".parse().unwrap(), 5);
        eventually("both parts of five packets have come", async || {
            let seen = run(there, "nft list chain ip seen prerouting");
            if seen.contains("packets 10 ") { Ok(()) } else { Err(seen) }
        })
        .await;
    });
}

#[test]
fn the_connection_table_keeps_what_it_sees_little_of() {
    in_lab(&[1], async |lab| {
        let settings = "acct tcp_be_liberal tcp_ignore_invalid_rst tcp_timeout_max_retrans \
                        tcp_timeout_unacknowledged tcp_timeout_established";
        let found = run(
            &lab.one.network_namespace(),
            &format!("for s in {settings}; do sysctl -n net.netfilter.nf_conntrack_$s; done"),
        );
        let found: Vec<_> = found.split_whitespace().collect();
        assert_eq!(found, ["1", "1", "1", "432000", "432000", "432000"]);
    });
}
