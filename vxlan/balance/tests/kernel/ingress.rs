//! Clients that come by a published port of a host.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use weft_model::{Protocol, Source};
use weft_vxlan::Namespace;

use crate::{
    lab::{GATEWAYS, attempt, eventually, run},
    site::{CLIENT, Entrance, addresses, on_site},
    talk::{Answer, Conversation, Failed, Silence, ask, ask_often},
};

const PORT: u16 = 8080;
const BOTH: [Protocol; 2] = [Protocol::Tcp, Protocol::Udp];
const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

#[test]
fn every_host_leads_to_stations_of_all_hosts_and_they_see_the_client() {
    on_site(async |site| {
        site.open(&[Entrance::new(PORT, &[1, 2, 3])]).await;
        for host in [1, 2, 3] {
            for (ip, client) in addresses(host).into_iter().zip(addresses(CLIENT)) {
                for protocol in BOTH {
                    let answers = ask_often(&site.client, protocol, (ip, PORT), 40);
                    let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
                    assert!(answers.iter().all(|answer| answer.client == client), "{answers:?}");
                    let stations: BTreeSet<_> = answers.iter().map(|a| a.station).collect();
                    assert_eq!(stations, [1, 2, 3].into(), "{ip} {protocol}");
                }
            }
        }
    });
}

#[test]
fn the_host_itself_and_its_containers_come_by_its_ports_too() {
    on_site(async |site| {
        let (far, near) = (Entrance::new(PORT, &[2]), Entrance::new(PORT + 1, &[1]));
        site.open(&[far, near]).await;
        let host = &site.hosts[&1].namespace;
        let cases: [(&Namespace, [IpAddr; 2], u8); 5] = [
            (host, addresses(1), 1),
            (host, LOOPBACK, 1),
            (&site.sandboxes[&1], addresses(1), 1),
            (&site.sandboxes[&1], addresses(2), 1),
            (&site.sandboxes[&3], addresses(1), 3),
        ];
        for (from, to, as_host) in cases {
            for (index, ip) in to.into_iter().enumerate() {
                for (port, station) in [(PORT, 2), (PORT + 1, 1)] {
                    for protocol in BOTH {
                        let answer = ask(from, protocol, (ip, port));
                        let client = addresses(as_host)[index];
                        let expected = Ok(Answer { station, client });
                        // By a port of another host, it is that one's network which it comes from.
                        assert_eq!(answer, expected, "{protocol} {ip} {port}");
                    }
                }
            }
        }
    });
}

#[test]
fn a_port_of_one_address_is_a_port_of_no_other() {
    on_site(async |site| {
        let local = |ip| Entrance { ip: Some(ip), ..Entrance::new(PORT, &[1, 2]) };
        let own = Entrance { ip: Some(addresses(1)[0]), ..Entrance::new(PORT + 1, &[1, 2]) };
        let entrances = [local(LOOPBACK[0]), local(LOOPBACK[1]), own];
        let gate = &site.hosts[&1];
        gate.open(&entrances);
        gate.is_open().await;
        for protocol in BOTH {
            for ip in LOOPBACK {
                ask(&gate.namespace, protocol, (ip, PORT)).unwrap();
            }
            ask(&site.client, protocol, (addresses(1)[0], PORT + 1)).unwrap();
            for ip in addresses(1) {
                for from in [&site.client, &site.sandboxes[&1]] {
                    let answer = ask(from, protocol, (ip, PORT));
                    assert!(answer.is_err(), "{protocol} {ip} {answer:?}");
                }
            }
            assert!(ask(&gate.namespace, protocol, (LOOPBACK[0], PORT + 1)).is_err());
        }
        // Nor for a client who sends what no honest one does.
        run(&site.client, "ip link set lo down; ip route flush table local type local 127.0.0.0/8");
        run(&site.client, "ip route flush table local type local 127.0.0.1");
        run(&site.client, "sysctl -qw net.ipv4.conf.all.route_localnet=1");
        run(&site.client, "ip route add 127.0.0.1 via 192.0.2.1 src 192.0.2.9");
        let answer = ask(&site.client, Protocol::Udp, (LOOPBACK[0], PORT));
        assert_eq!(answer, Err(Silence::TimedOut));
    });
}

#[test]
fn stations_whose_answers_would_go_astray_see_the_gateway() {
    on_site(async |site| {
        let entrance = Entrance { source: Source::Snat, ..Entrance::new(PORT, &[1, 2]) };
        site.open(&[entrance]).await;
        for station in [1, 2] {
            let sandbox = &site.sandboxes[&station];
            run(sandbox, "ip route del default; ip -6 route del default");
        }
        for (ip, gateway) in addresses(1).into_iter().zip(GATEWAYS) {
            for protocol in BOTH {
                let answers = ask_often(&site.client, protocol, (ip, PORT), 20);
                let answers: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
                assert!(answers.iter().all(|answer| answer.client == gateway), "{answers:?}");
                let stations: BTreeSet<_> = answers.iter().map(|a| a.station).collect();
                assert_eq!(stations, [1, 2].into(), "{ip} {protocol}");
            }
        }
    });
}

#[test]
fn a_service_without_a_backend_refuses_and_goes_on_with_the_first() {
    on_site(async |site| {
        site.open(&[Entrance::new(PORT, &[])]).await;
        for ip in addresses(1) {
            let refused = ask(&site.client, Protocol::Tcp, (ip, PORT));
            assert_eq!(refused, Err(Silence::Refused), "{ip}");
        }
        site.open(&[Entrance::new(PORT, &[3])]).await;
        for ip in addresses(1) {
            for protocol in BOTH {
                assert_eq!(ask(&site.client, protocol, (ip, PORT)).unwrap().station, 3);
            }
        }
    });
}

#[test]
fn the_other_hosts_go_on_when_one_dies() {
    on_site(async |mut site| {
        site.open(&[Entrance::new(PORT, &[3])]).await;
        let [v4, v6] = addresses(2);
        let mut stays = [v4, v6].map(|ip| Conversation::start(&site.client, (ip, PORT)).unwrap());
        let dead = site.hosts.remove(&1).unwrap();
        run(&dead.namespace, "ip link set eth0 down");
        drop(dead);
        for conversation in &mut stays {
            conversation.goes_on().unwrap();
        }
        let answers = ask_often(&site.client, Protocol::Tcp, (v4, PORT), 10);
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    });
}

#[test]
fn connections_outlive_the_agents_and_what_they_leave_is_adopted() {
    on_site(async |mut site| {
        site.open(&[Entrance::new(PORT, &[2])]).await;
        let (client, to) = (&site.client, (addresses(1)[0], PORT));
        let mut conversation = Conversation::start(client, to).unwrap();
        for n in [1, 2] {
            let gate = site.hosts.remove(&n).unwrap();
            let host = gate.namespace.clone();
            let list = || run(&host, "nft -a list table inet weft-publish");
            let before = list();
            let gate = gate
                .restart(async || {
                    conversation.goes_on().unwrap();
                    assert_eq!(ask(client, Protocol::Tcp, to).unwrap().station, 2);
                })
                .await;
            gate.is_open().await;
            // Handles of rules tell a table that was loaded anew.
            assert_eq!(list(), before);
            conversation.goes_on().unwrap();
            site.hosts.insert(n, gate);
        }
    });
}

#[test]
fn what_somebody_takes_from_the_rules_is_put_back_within_a_second() {
    on_site(async |site| {
        site.open(&[Entrance::new(PORT, &[2])]).await;
        let gate = &site.hosts[&1];
        let to = (addresses(1)[0], PORT);
        let mut conversation = Conversation::start(&site.client, to).unwrap();
        for harm in [
            "nft flush ruleset",
            "nft delete table inet weft-publish",
            "nft flush chain inet weft-publish published",
            "nft flush map inet weft-publish any4",
            "nft add element inet weft-publish any4 '{ tcp . 9 : 169.254.192.1 . 9 }'",
            "nft insert rule inet weft-publish prerouting accept",
        ] {
            let repairs = gate.status().repairs;
            let list = || attempt(&gate.namespace, "nft -s list table inet weft-publish");
            let before = Ok(list().unwrap());
            run(&gate.namespace, harm);
            let start = Instant::now();
            eventually(harm, async || match gate.status().repairs > repairs && list() == before {
                true => Ok(()),
                false => Err(format!("{:?} {:?}", gate.status(), list())),
            })
            .await;
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            // Its own rules are put back by the data plane, which may take as long.
            eventually("clients are served", async || {
                ask(&site.client, Protocol::Tcp, to)
                    .map(drop)
                    .map_err(|silence| format!("{silence:?}"))
            })
            .await;
        }
        conversation.goes_on().unwrap();
    });
}

/// A connection by a proxy: the header that the station got, and what it heard and said after.
fn proxied(from: &Namespace, to: (IpAddr, u16)) -> Result<(Vec<u8>, SocketAddr), Failed> {
    let mut stream = from.run(|| Ok::<_, Failed>(TcpStream::connect(to)?))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    // More than any buffer holds, so that both ends wait for each other.
    let words: Vec<u8> = (0..4 << 20).map(|n: u32| n.to_le_bytes()[1]).collect();
    let (mut sender, said) = (stream.try_clone()?, words.clone());
    let saying = thread::spawn(move || {
        sender.write_all(&said).and_then(|()| sender.shutdown(Shutdown::Write))
    });
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard)?;
    saying.join().unwrap()?;
    let line = heard.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let header = if to.0.is_ipv4() { 28 } else { 52 };
    assert_eq!(heard.len(), line + header + words.len());
    assert!(heard.ends_with(&words), "something else comes back");
    Ok((heard[line..line + header].to_vec(), stream.local_addr()?))
}

#[test]
fn a_proxy_tells_the_station_its_client() {
    on_site(async |site| {
        let entrance = Entrance { proxied: true, ..Entrance::new(PORT, &[1, 2]) };
        site.open(std::slice::from_ref(&entrance)).await;
        let mut destinations = addresses(1).map(|ip| (&site.client, ip)).to_vec();
        destinations.extend(LOOPBACK.map(|ip| (&site.hosts[&1].namespace, ip)));
        for (from, ip) in destinations {
            let (header, client) =
                proxied(from, (ip, PORT)).unwrap_or_else(|error| panic!("{ip}: {error:?}"));
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            let ports = [client.port().to_be_bytes(), PORT.to_be_bytes()].concat();
            let expected = [octets(client.ip()), octets(ip), ports].concat();
            assert!(header.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21"), "{header:?}");
            assert!(header.ends_with(&expected), "{header:?} of {client}");
        }

        // A port that is no longer wanted lets the connections that it has come to their end.
        let gate = &site.hosts[&1];
        let to = (addresses(1)[0], PORT);
        let mut conversation = Conversation::start(&site.client, to).unwrap();
        conversation.heard_before(28);
        gate.open(&[]);
        gate.is_open().await;
        assert_eq!(ask(&site.client, Protocol::Tcp, to), Err(Silence::Refused));
        conversation.goes_on().unwrap();

        // Without a backend, a client is refused all the same, if later than by the kernel.
        gate.open(&[Entrance { stations: Vec::new(), ..entrance }]);
        gate.is_open().await;
        assert_eq!(ask(&site.client, Protocol::Tcp, to), Err(Silence::Refused));
    });
}
