use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;
use weft_model::{Protocol, Spread};

use crate::{
    lab::{Service, VIPS, eventually, in_lab, net, run},
    talk::{Conversation, PATIENCE, Sender, Silence, ask, ask_often, serve},
};

#[test]
fn a_udp_sender_follows_a_moved_backend_and_comes_back_after_there_was_none() {
    in_lab(&[1, 2, 11], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        serve(11, lab.sandbox(11), 8080);
        for vip in VIPS {
            lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
            // One port, all the time: the kernel never takes it for another flow by itself.
            let sender = Sender::start(lab.sandbox(1), (vip, 80));
            let finds = async |station: u8| {
                let since = Instant::now();
                eventually(&format!("the sender to {vip} finds {station}"), async || match sender
                    .ask(8)
                {
                    Ok(answer) if answer.station == station => Ok(()),
                    other => Err(format!("{other:?}")),
                })
                .await;
                // Long before the kernel forgets a flow by itself.
                assert!(since.elapsed() < Duration::from_secs(10), "{:?}", since.elapsed());
            };
            finds(2).await;
            lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
            finds(11).await;
            lab.serve(&Service::new(80, 8080, &[]).balance(1)).await;
            eventually("the sender is refused", async || match sender.ask(8) {
                Err(Silence::Refused) => Ok(()),
                other => Err(format!("{other:?}")),
            })
            .await;
            lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
            finds(2).await;
            // And when there was not even a frontend.
            lab.one.withdraw();
            eventually("the sender is refused", async || match sender.ask(8) {
                Err(Silence::Refused) => Ok(()),
                other => Err(format!("{other:?}")),
            })
            .await;
            lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
            finds(11).await;
        }
    });
}

#[test]
fn connections_outlive_their_backends_place_in_the_pool() {
    in_lab(&[1, 2, 11], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        serve(11, lab.sandbox(11), 8080);
        for vip in VIPS {
            lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
            let mut old = Conversation::start(lab.sandbox(1), (vip, 80)).unwrap();
            assert_eq!(old.answer.station, 11);
            lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
            let new = ask(lab.sandbox(1), Protocol::Tcp, (vip, 80)).unwrap();
            assert_eq!(new.station, 2);
            old.goes_on().unwrap();
            lab.one.withdraw();
            eventually("nobody serves", async || {
                match ask(lab.sandbox(1), Protocol::Tcp, (vip, 80)) {
                    Err(Silence::Refused) => Ok(()),
                    other => Err(format!("{other:?}")),
                }
            })
            .await;
        }
    });
}

#[test]
fn no_connection_is_refused_or_lost_while_backends_come_and_go() {
    in_lab(&[1, 2, 3, 4, 5, 6, 11], async |lab| {
        for station in [2, 3, 4, 5, 6, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let pools: [&[u8]; 6] = [&[2], &[2, 3], &[3, 11], &[2, 3, 4, 5, 6, 11], &[4, 5, 11], &[11]];
        for spread in [Spread::Hash, Spread::Random] {
            let service =
                |stations: &[u8]| Service { spread, ..Service::new(80, 8080, stations) }.balance(1);
            lab.serve(&service(pools[0])).await;
            let mut old = VIPS.map(|vip| Conversation::start(lab.sandbox(1), (vip, 80)).unwrap());
            let done = Arc::new(AtomicBool::new(false));
            let asking = VIPS.map(|vip| {
                let (client, done) = (lab.sandbox(1).clone(), Arc::clone(&done));
                tokio::task::spawn_blocking(move || {
                    let mut asked = 0;
                    while !done.load(Ordering::Relaxed) {
                        for answer in ask_often(&client, Protocol::Tcp, (vip, 80), 20) {
                            answer.unwrap_or_else(|silence| panic!("{vip} {silence:?}"));
                            asked += 1;
                        }
                    }
                    asked
                })
            });
            for round in 0..60 {
                lab.one.serve(&service(pools[round % pools.len()])).await;
            }
            done.store(true, Ordering::Relaxed);
            for asked in asking {
                let asked: usize = asked.await.unwrap();
                assert!(asked >= 100, "{asked}");
            }
            for old in &mut old {
                old.goes_on().unwrap();
            }
            assert_eq!(lab.one.status().failures, 0, "{:?}", lab.one.status());
        }
    });
}

#[test]
fn a_client_whom_nobody_has_answered_gets_another_backend() {
    in_lab(&[1, 2, 11], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        let deaf = "add table inet deaf; add rule inet deaf in tcp dport 8080 drop";
        let chain = "add chain inet deaf in { type filter hook input priority 0; }";
        let deaf = deaf.replace("; ", &format!("; {chain}; "));
        run(lab.sandbox(11), &format!("nft '{deaf}'"));
        for vip in VIPS {
            lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
            let (client, to) = (lab.sandbox(1).clone(), (vip, 80));
            let asked = tokio::task::spawn_blocking(move || ask(&client, Protocol::Tcp, to));
            eventually("the client has asked", async || {
                let counters = lab.one.balancer.counters(net()).await.unwrap();
                let asked = counters.iter().any(|(f, c)| f.ip == vip && c.connections > 0);
                asked.then_some(()).ok_or_else(|| format!("{counters:?}"))
            })
            .await;
            // What it sends again, a second later, finds the other one.
            lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
            assert_eq!(asked.await.unwrap().unwrap().station, 2);
        }
    });
}

#[test]
fn a_frontend_without_a_backend_refuses_at_once() {
    in_lab(&[1], async |lab| {
        lab.serve(&Service::new(80, 8080, &[]).balance(1)).await;
        for vip in VIPS {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                let since = Instant::now();
                assert_eq!(ask(lab.sandbox(1), protocol, (vip, 80)), Err(Silence::Refused));
                assert!(since.elapsed() < PATIENCE, "{:?}", since.elapsed());
            }
        }
    });
}

#[test]
fn a_client_keeps_its_backend_as_long_as_it_has_it() {
    in_lab(&[1, 2, 3, 11, 12], async |lab| {
        for station in [2, 3, 11, 12] {
            serve(station, lab.sandbox(station), 8080);
        }
        let service = |stations: &[u8]| Service {
            affinity: Some(Duration::from_secs(600)),
            spread: Spread::Random,
            ..Service::new(80, 8080, stations)
        };
        for vip in VIPS {
            lab.serve(&service(&[2, 3]).balance(1)).await;
            let stations = |times| -> BTreeSet<u8> {
                let answers = ask_often(lab.sandbox(1), Protocol::Tcp, (vip, 80), times);
                answers.into_iter().map(|answer| answer.unwrap().station).collect()
            };
            let kept = stations(10);
            assert_eq!(kept.len(), 1, "{kept:?}");
            let kept = *kept.first().unwrap();
            // Others come, and one that is not its own goes.
            lab.serve(&service(&[2, 3, 11, 12]).balance(1)).await;
            assert_eq!(stations(10), [kept].into());
            lab.serve(&service(&[kept, 12]).balance(1)).await;
            assert_eq!(stations(10), [kept].into());
            // Its own goes, and comes back too late.
            lab.serve(&service(&[11, 12]).balance(1)).await;
            let next = stations(10);
            assert!(next.len() == 1 && !next.contains(&kept), "{next:?}");
            lab.serve(&service(&[2, 3, 11, 12]).balance(1)).await;
            assert_eq!(stations(10), next);
        }
    });
}

#[test]
fn an_affinity_ends_with_its_time() {
    in_lab(&[1, 2, 3], async |lab| {
        for station in [2, 3] {
            serve(station, lab.sandbox(station), 8080);
        }
        let service = Service {
            affinity: Some(Duration::from_secs(1)),
            spread: Spread::Random,
            ..Service::new(80, 8080, &[2, 3])
        };
        lab.serve(&service.balance(1)).await;
        let seen = tokio::sync::Mutex::new(BTreeSet::new());
        eventually("another backend is drawn", async || {
            // Asked again sooner, it would never end.
            tokio::time::sleep(Duration::from_millis(1100)).await;
            let answer = ask(lab.sandbox(1), Protocol::Tcp, (VIPS[0], 80)).unwrap();
            let mut seen = seen.lock().await;
            seen.insert(answer.station);
            if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
        })
        .await;
    });
}

#[test]
fn backends_get_what_their_weight_says() {
    in_lab(&[1, 2, 3, 11], async |lab| {
        for station in [2, 3, 11] {
            serve(station, lab.sandbox(station), 8080);
        }
        let backends = [(2, 3), (3, 1), (11, 0)].into();
        let service = Service { backends, ..Service::new(80, 8080, &[]) };
        lab.serve(&service.balance(1)).await;
        let answers = ask_often(lab.sandbox(1), Protocol::Tcp, (VIPS[0], 80), 400);
        let stations: Vec<u8> = answers.into_iter().map(|answer| answer.unwrap().station).collect();
        let share = |station| stations.iter().filter(|found| **found == station).count();
        assert_eq!(share(11), 0);
        // Four standard deviations of a fair draw.
        assert!((265..=335).contains(&share(2)), "{}", share(2));
    });
}

#[test]
fn what_was_needed_for_translation_goes_with_the_last_connection() {
    in_lab(&[1, 2, 11], async |lab| {
        serve(11, lab.sandbox(11), 8080);
        lab.serve(&Service::new(80, 8080, &[11]).balance(1)).await;
        let mut old = Conversation::start(lab.sandbox(1), (VIPS[0], 80)).unwrap();
        lab.serve(&Service::new(80, 8080, &[2]).balance(1)).await;
        let inside = lab.one.network_namespace();
        let listed = || run(&inside, "nft list set bridge weft-services port-replies4");
        old.goes_on().unwrap();
        assert!(listed().contains("10.1.0.11"), "{}", listed());
        drop(old);
        // Connections that were closed are tracked for a while still.
        run(&inside, "conntrack -D -p tcp");
        lab.serve(&Service::new(80, 8080, &[]).balance(1)).await;
        eventually("nothing is left of it", async || {
            let listed = listed();
            if listed.contains("10.1.0.11") { Err(listed) } else { Ok(()) }
        })
        .await;
    });
}

#[test]
fn connections_are_counted_by_backend() {
    in_lab(&[1, 2, 11], async |lab| {
        serve(2, lab.sandbox(2), 8080);
        serve(11, lab.sandbox(11), 8080);
        lab.serve(&Service::new(80, 8080, &[2, 11]).balance(1)).await;
        let open: Vec<_> =
            (0..20).map(|_| Conversation::start(lab.sandbox(1), (VIPS[0], 80)).unwrap()).collect();
        let counts = lab.one.balancer.connections(net()).await.unwrap();
        for station in [2u8, 11] {
            let wanted = open.iter().filter(|one| one.answer.station == station).count() as u64;
            let found: u64 = counts
                .values()
                .flatten()
                .filter(|(backend, _)| backend.ip() == crate::lab::ips(station)[0])
                .map(|(_, count)| count)
                .sum();
            assert_eq!(found, wanted, "{counts:?}");
        }
    });
}
