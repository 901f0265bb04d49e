//! Clients of a service that ask its backends themselves as well.

use weft_model::Protocol;

use crate::{
    lab::{Service, VIPS, eventually, in_lab, ips, mac, run},
    talk::{Answer, Conversation, Sender, ask, ask_often, serve},
};

#[test]
fn what_goes_to_a_backend_itself_goes_on() {
    in_lab(&[1, 2, 3, 11], async |lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        lab.serve(&Service::new(80, 8080, &[2, 3, 11]).balance(1)).await;
        // Its own members among them.
        for (client, station) in [(1, 2), (1, 11), (2, 3), (2, 11), (11, 2)] {
            for (family, ip) in ips(station).into_iter().enumerate() {
                for protocol in [Protocol::Tcp, Protocol::Udp] {
                    for answer in ask_often(lab.sandbox(client), protocol, (ip, 8080), 5) {
                        let client = ips(client)[family];
                        assert_eq!(answer, Ok(Answer { station, client }), "{client} to {ip}");
                    }
                }
            }
        }
        // What has come from another host's station is not lifted again.
        let tracked = run(&lab.one.network_namespace(), "conntrack -L -s 10.1.0.11 2>&1");
        assert!(!tracked.contains("dst=10.1.0.2 "), "{tracked}");
        let tracked = run(&lab.two.network_namespace(), "conntrack -L -s 10.1.0.11 2>&1");
        assert!(tracked.contains("dst=10.1.0.2 "), "{tracked}");
    });
}

#[test]
fn one_source_port_serves_for_a_virtual_address_and_for_every_backend() {
    in_lab(&[1, 2, 3, 11], async |lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let client = lab.sandbox(1);
        for (port, target, first) in [(Some(80), Some(8080), 20_000), (None, None, 22_000)] {
            let service = Service { port, target, ..Service::new(80, 8080, &[2, 3, 11]) };
            lab.serve(&service.balance(1)).await;
            let port = port.unwrap_or(8080);
            for (family, vip) in VIPS.into_iter().enumerate() {
                let mut open = Vec::new();
                for source in first..first + 20 {
                    let found = Conversation::start_from(client, source, (vip, port));
                    open.push(found.unwrap_or_else(|silence| panic!("{vip} {silence:?}")));
                    let sender = Sender::start_from(client, source, (vip, port));
                    sender.ask(8).unwrap_or_else(|silence| panic!("{vip} {silence:?}"));
                }
                for source in first..first + 20 {
                    for station in [2, 3, 11] {
                        let to = (ips(station)[family], 8080);
                        let found = Conversation::start_from(client, source, to);
                        let found =
                            found.unwrap_or_else(|silence| panic!("{source} {to:?} {silence:?}"));
                        assert_eq!(found.answer.station, station);
                        open.push(found);
                        let sender = Sender::start_from(client, source, to);
                        let found = sender.ask(8);
                        assert_eq!(found.map(|answer| answer.station), Ok(station), "{to:?}");
                    }
                }
                // And the other way round: those to the virtual address come second.
                for source in first + 1000..first + 1020 {
                    for station in [2, 3, 11] {
                        let to = (ips(station)[family], 8080);
                        open.push(Conversation::start_from(client, source, to).unwrap());
                    }
                    let found = Conversation::start_from(client, source, (vip, port));
                    open.push(found.unwrap_or_else(|silence| panic!("{source} {silence:?}")));
                }
                for conversation in &mut open {
                    conversation.goes_on().unwrap();
                }
            }
            run(&lab.one.network_namespace(), "conntrack -F 2>&1");
        }
    });
}

#[test]
fn who_talked_to_a_backend_before_it_was_one_goes_on() {
    in_lab(&[1, 2, 11], async |lab| {
        let to: Vec<_> =
            [2, 11].into_iter().flat_map(|station| ips(station).map(|ip| (station, ip))).collect();
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let client = lab.sandbox(1);
        let mut open: Vec<_> =
            to.iter().map(|(_, ip)| Conversation::start(client, (*ip, 8080)).unwrap()).collect();
        let senders: Vec<_> =
            to.iter().map(|(station, ip)| (station, Sender::start(client, (*ip, 8080)))).collect();
        let mut go_on = |when: &str| {
            for conversation in &mut open {
                conversation.goes_on().unwrap_or_else(|silence| panic!("{when}: {silence:?}"));
            }
            for (station, sender) in &senders {
                assert_eq!(sender.ask(8).map(|answer| answer.station), Ok(**station), "{when}");
            }
        };
        go_on("before");
        lab.serve(&Service::new(80, 8080, &[2, 11]).balance(1)).await;
        go_on("as backends");
        lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
        go_on("after one of them has been taken out");
        lab.one.withdraw();
        go_on("when there is no service any more");
    });
}

#[test]
fn what_is_fragmented_on_its_way_to_a_backend_and_back_is_whole_there() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
            serve(station, lab.sandbox(station), 9090);
        }
        lab.serve(&Service::new(80, 8080, &[2, 11]).balance(1)).await;
        for ip in [2, 11].into_iter().flat_map(ips) {
            // The service's port, and one that is the backend's alone.
            for port in [8080, 9090] {
                let sender = Sender::start(lab.sandbox(1), (ip, port));
                for length in [8, 5_000, 20_000] {
                    let answer = sender.ask(length);
                    answer.unwrap_or_else(|silence| panic!("{length} to {ip} {port} {silence:?}"));
                }
            }
        }
    });
}

#[test]
fn the_gateway_remembers_a_station_for_days_after_its_last_request() {
    in_lab(&[1, 2], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
        let inside = lab.one.network_namespace();
        // Of the only client, in milliseconds.
        let left = || -> u64 {
            let listing = run(&inside, "nft list set bridge weft-services clients");
            let mine = listing.split(mac(1).to_string().as_str()).nth(1);
            let expires = mine.and_then(|rest| rest.split("expires ").nth(1));
            let expires = expires.unwrap_or_else(|| panic!("{listing}"));
            let text = expires.split([',', ' ', '}']).next().unwrap();
            let mut sum = 0;
            let mut rest = text;
            for (unit, factor) in
                [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)]
            {
                let at = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                let (number, tail) = rest.split_at(at);
                let whole = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
                if &tail[..whole] == unit {
                    sum += number.parse::<u64>().unwrap() * factor;
                    rest = &tail[whole..];
                }
            }
            assert!(rest.is_empty(), "{text}");
            sum
        };
        let request = || ask(lab.sandbox(1), Protocol::Tcp, (VIPS[0], 80)).unwrap();
        request();
        let first = left();
        assert!(first > 5 * 86_400_000, "{first}");
        eventually("some of the time has gone", async || match left() {
            now if now + 200 < first => Ok(()),
            now => Err(now.to_string()),
        })
        .await;
        request();
        assert!(left() + 200 > first, "{} {first}", left());
    });
}
