//! Published ports that others have, or want.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, TcpListener, UdpSocket},
    time::{Duration, Instant},
};

use weft_balance::HostPort;
use weft_model::{Family, Protocol};
use weft_vxlan::Namespace;

use crate::{
    lab::{eventually, run},
    site::{Entrance, addresses, on_site},
    talk::{Failed, Sender, ask},
};

const PORT: u16 = 8080;

fn host_port(protocol: Protocol, family: Family) -> HostPort {
    HostPort { ip: None, family, protocol, port: PORT }
}

fn listen(namespace: &Namespace, at: &str) -> Result<TcpListener, Failed> {
    namespace.run(|| Ok::<_, Failed>(TcpListener::bind((at, PORT))?))
}

fn receive(namespace: &Namespace, at: &str) -> Result<UdpSocket, Failed> {
    namespace.run(|| Ok::<_, Failed>(UdpSocket::bind((at, PORT))?))
}

#[test]
fn nobody_else_gets_a_published_port() {
    on_site(async |site| {
        site.open(&[Entrance::new(PORT, &[1])]).await;
        let gate = &site.hosts[&1];
        for at in ["0.0.0.0", "127.0.0.1", "192.0.2.1", "::", "::1", "2001:db8::1"] {
            assert!(listen(&gate.namespace, at).is_err(), "{at} tcp");
            assert!(receive(&gate.namespace, at).is_err(), "{at} udp");
        }
        // It is this host's own, for whoever declares services.
        let own = BTreeSet::from([host_port(Protocol::Tcp, Family::V4)]);
        assert_eq!(gate.balancer.host_ports().survey(&own).unwrap(), BTreeMap::new());
        gate.open(&[]);
        gate.is_open().await;
        listen(&gate.namespace, "::").unwrap();
        receive(&gate.namespace, "::").unwrap();
    });
}

#[test]
fn a_port_that_somebody_has_is_told_with_its_owner_and_taken_up_when_it_is_free() {
    on_site(async |site| {
        let gate = &site.hosts[&1];
        let listener = listen(&gate.namespace, "127.0.0.1").unwrap();
        let socket = receive(&gate.namespace, "0.0.0.0").unwrap();
        let own = std::process::id().to_string();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let port = host_port(protocol, Family::V4);
            let both = BTreeSet::from([port, host_port(protocol, Family::V6)]);
            let mut refused = gate.balancer.host_ports().survey(&both).unwrap();
            let taken = refused.remove(&port).unwrap();
            assert_eq!(refused, BTreeMap::new());
            assert_eq!(
                taken.owner.as_ref().map(|owner| owner.pid.to_string()),
                Some(own.clone()),
                "{taken:?}"
            );
            let text = taken.to_string();
            let named = format!("0.0.0.0:{PORT}/{protocol} of this host is in use by kernel-");
            assert!(text.contains(&named), "{text}");
        }

        // A service that wants it all the same leaves it to its owner, and gets the rest.
        site.open(&[Entrance::new(PORT, &[2])]).await;
        let status = gate.status();
        assert_eq!(status.taken.len(), 2, "{status:?}");
        assert!(status.taken.values().all(|owner| owner.contains(&own)), "{status:?}");
        let [v4, v6]: [IpAddr; 2] = addresses(1);
        assert!(ask(&site.client, Protocol::Tcp, (v4, PORT)).is_err());
        assert_eq!(ask(&site.client, Protocol::Tcp, (v6, PORT)).unwrap().station, 2);

        drop((listener, socket));
        eventually("the port is taken up", async || match gate.status() {
            status if status.taken.is_empty() && status.open.len() == 4 => Ok(()),
            status => Err(format!("{status:?}")),
        })
        .await;
        assert_eq!(ask(&site.client, Protocol::Tcp, (v4, PORT)).unwrap().station, 2);
        assert_eq!(ask(&site.client, Protocol::Udp, (v4, PORT)).unwrap().station, 2);
    });
}

#[test]
fn hundreds_of_ports_that_others_have_are_looked_for_in_one_walk_through_the_processes() {
    on_site(async |site| {
        let gate = &site.hosts[&1];
        let bind = |port| {
            let bound = gate.namespace.run(|| Ok::<_, Failed>(TcpListener::bind(("::", port))?));
            bound.unwrap()
        };
        let first = 20_000;
        let listeners: Vec<_> = (first..first + 400).map(bind).collect();
        let ports = |count: u16| -> BTreeSet<HostPort> {
            let numbers = first..first + count;
            let (ip, family, protocol) = (None, Family::V6, Protocol::Tcp);
            numbers.map(|port| HostPort { ip, family, protocol, port }).collect()
        };
        let survey = |count: u16| {
            let start = Instant::now();
            let taken = gate.balancer.host_ports().survey(&ports(count)).unwrap();
            let took = start.elapsed();
            let own = std::process::id();
            let is_own = |taken: &weft_balance::Taken| {
                taken.owner.as_ref().is_some_and(|owner| owner.pid == own)
            };
            assert!(taken.len() == usize::from(count) && taken.values().all(is_own), "{taken:?}");
            took
        };
        let best = |count| (0..5).map(|_| survey(count)).min().unwrap();
        let (one, all) = (best(1), best(400));
        assert!(all < one * 40 + Duration::from_millis(20), "{one:?} for one, {all:?} for 400");
        drop(listeners);
    });
}

#[test]
fn who_sends_without_a_pause_gets_to_a_port_that_is_published_meanwhile_and_to_its_successor() {
    on_site(async |site| {
        let [v4, v6]: [IpAddr; 2] = addresses(1);
        let senders = [v4, v6].map(|ip| Sender::start(&site.client, (ip, PORT)));
        // The host has tracked them since before, to itself.
        for sender in &senders {
            assert!(sender.ask(8).is_err());
        }
        let led_to = async |station: u8| {
            eventually(&format!("station {station} answers"), async || {
                let answers = senders.each_ref().map(|sender| sender.ask(8).map(|a| a.station));
                match answers.iter().all(|answer| *answer == Ok(station)) {
                    true => Ok(()),
                    false => Err(format!("{answers:?}")),
                }
            })
            .await;
        };
        site.open(&[Entrance::new(PORT, &[1])]).await;
        led_to(1).await;
        // The port leads to another service now, by another frontend.
        let other = Entrance::new(PORT + 1, &[1]);
        site.open(&[other, Entrance::new(PORT, &[2])]).await;
        led_to(2).await;
        site.open(&[]).await;
        eventually("nobody answers any more", async || {
            match senders.iter().all(|sender| sender.ask(8).is_err()) {
                true => Ok(()),
                false => Err("somebody answers".into()),
            }
        })
        .await;
    });
}

#[test]
fn a_port_at_an_address_of_another_host_is_left_to_that_host() {
    on_site(async |site| {
        let at = |host: u8| {
            addresses(host).map(|ip| Entrance { ip: Some(ip), ..Entrance::new(PORT, &[1]) })
        };
        site.open(&[at(1), at(2)].concat()).await;
        let [first, second] = [1, 2].map(|host| &site.hosts[&host].namespace);
        for (own, others) in addresses(1).into_iter().zip(addresses(2)) {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                assert_eq!(ask(&site.client, protocol, (own, PORT)).unwrap().station, 1);
                assert_eq!(ask(first, protocol, (own, PORT)).unwrap().station, 1);
            }
            // Answered by host 2, and so it sees host 1 as a client from outside.
            let sees = ask(first, Protocol::Tcp, (others, PORT)).unwrap().client;
            assert!(addresses(1).contains(&sees), "{sees}");
            run(
                second,
                "nft add table inet closed; nft add chain inet closed in '{ type filter hook prerouting priority -300; }'",
            );
            run(
                second,
                &format!("nft add rule inet closed in th dport {PORT} meta l4proto tcp drop"),
            );
            assert!(ask(first, Protocol::Tcp, (others, PORT)).is_err());
            run(second, "nft delete table inet closed");
        }
    });
}
