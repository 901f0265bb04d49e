use std::collections::BTreeMap;

use weft_model::{Protocol, Spread};

use crate::{
    lab::{Service, VIPS, in_lab, ips, run},
    talk::{Answer, Sender, Silence, ask, ask_often, serve},
};

const PROTOCOLS: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];

#[test]
fn connections_spread_over_backends_on_both_hosts_which_see_the_client() {
    in_lab(&[1, 2, 3, 11], async |lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        for spread in [Spread::Hash, Spread::Random] {
            let service = Service { spread, ..Service::new(80, 8080, &[2, 3, 11]) };
            lab.one.serve(&service.balance(1)).await;
            for (family, vip) in VIPS.into_iter().enumerate() {
                for protocol in PROTOCOLS {
                    let answers = ask_often(lab.sandbox(1), protocol, (vip, 80), 300);
                    let mut shares = BTreeMap::<u8, f64>::new();
                    for answer in answers {
                        let Answer { station, client } = answer.unwrap_or_else(|silence| {
                            panic!("{spread:?} {vip} {protocol} {silence:?}")
                        });
                        assert_eq!(client, ips(1)[family]);
                        *shares.entry(station).or_default() += 1.0;
                    }
                    // 99.99 % of fair spreads over three are below (two degrees of freedom).
                    let chi: f64 = shares.values().map(|n| (n - 100.0).powi(2) / 100.0).sum();
                    assert!(
                        shares.len() == 3 && chi < 18.4,
                        "{spread:?} {vip} {protocol} {shares:?}"
                    );
                }
            }
        }
        let counters = lab.one.balancer.counters(crate::lab::net()).await.unwrap();
        for (frontend, counters) in &counters {
            // A port that a client of UDP takes again soon is no new flow.
            let least = if frontend.protocol == Protocol::Tcp { 600 } else { 500 };
            assert!((least..=600).contains(&counters.connections), "{frontend}: {counters:?}");
            assert!(counters.requests.bytes > 0 && counters.answers.bytes > 0, "{counters:?}");
        }
    });
}

#[test]
fn a_client_may_be_its_own_backend() {
    in_lab(&[1, 11], async |lab| {
        serve(1, lab.sandbox(1), 8080);
        serve(11, lab.sandbox(11), 8080);
        for stations in [&[1][..], &[1, 11]] {
            lab.serve(&Service::new(80, 8080, stations).balance(1)).await;
            for vip in VIPS {
                for protocol in PROTOCOLS {
                    for answer in ask_often(lab.sandbox(1), protocol, (vip, 80), 30) {
                        answer.unwrap_or_else(|silence| panic!("{vip} {protocol} {silence:?}"));
                    }
                }
            }
        }
    });
}

#[test]
fn a_service_of_every_port_keeps_the_port() {
    in_lab(&[1, 2, 11], async |lab| {
        for port in [81, 9090] {
            serve(2, lab.sandbox(2), port);
            serve(11, lab.sandbox(11), port);
        }
        let service = Service { port: None, target: None, ..Service::new(0, 0, &[2, 11]) };
        lab.serve(&service.balance(1)).await;
        for (family, vip) in VIPS.into_iter().enumerate() {
            for (protocol, port) in [(Protocol::Tcp, 81), (Protocol::Udp, 9090)] {
                for client in [1, 2, 11] {
                    for answer in ask_often(lab.sandbox(client), protocol, (vip, port), 20) {
                        let answer = answer.unwrap_or_else(|silence| {
                            panic!("{client} to {vip} {protocol} {port} {silence:?}")
                        });
                        assert!(
                            answer.station == client || answer.client == ips(client)[family],
                            "{answer:?}"
                        );
                    }
                }
            }
            assert_eq!(ask(lab.sandbox(1), Protocol::Tcp, (vip, 82)), Err(Silence::Refused));
        }
    });
}

#[test]
fn packets_that_were_fragmented_come_back_whole() {
    in_lab(&[1, 2, 11], async |lab| {
        for station in [2, 11] {
            serve(station, lab.sandbox(station), 8080);
            lab.serve(&Service::new(80, 8080, &[station]).balance(1)).await;
            for vip in VIPS {
                let sender = Sender::start(lab.sandbox(1), (vip, 80));
                for length in [8, 5_000, 20_000] {
                    let answer = sender.ask(length).unwrap_or_else(|silence| {
                        panic!("{length} bytes to {vip} at {station}: {silence:?}")
                    });
                    assert_eq!(answer.station, station);
                }
            }
        }
    });
}

#[test]
fn a_virtual_address_answers_pings_and_is_nobodys_source() {
    in_lab(&[1, 11], async |lab| {
        lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
        for vip in VIPS {
            run(lab.sandbox(1), &format!("ping -n -c 1 -W 10 {vip}"));
        }
        let inside = lab.one.network_namespace();
        for (family, vip) in VIPS.into_iter().enumerate() {
            // The neighbours of the virtual address have the longest prefix in common with it.
            for station in [1, 11, 199, 201] {
                let route = run(&inside, &format!("ip route get {}", ips(station)[family]));
                assert!(!route.contains(&vip.to_string()), "{route}");
            }
        }
    });
}
