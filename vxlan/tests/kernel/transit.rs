//! Clients from outside that come in by one host and reach a station of another. What leads a port
//! of the host to a station is written by hand here: it is not this crate's.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use weft_vxlan::{Namespace, NetlinkError, Table};

use crate::{
    lab::{Host, Lab, Net, Underlay, attempt, eventually, in_lab, run},
    sealed::served,
    tunnels::introduce,
};

#[derive(Clone, Copy, Debug)]
enum Protocol {
    Tcp,
    Udp,
}

/// Tells every client the address that it sees of it.
struct Mirror {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Mirror {
    fn start(sandbox: &Namespace) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (listener, socket) = sandbox
            .run(|| {
                Ok::<_, NetlinkError>((TcpListener::bind("[::]:80")?, UdpSocket::bind("[::]:80")?))
            })
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let (tcp, udp) = (Arc::clone(&stop), Arc::clone(&stop));
        let streams = move || {
            while !tcp.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, peer)) => {
                        stream.set_nonblocking(false).unwrap();
                        thread::spawn(move || echo(stream, peer));
                    }
                    Err(_) => thread::park_timeout(Duration::from_millis(5)),
                }
            }
        };
        let datagrams = move || {
            let mut buffer = [0; 9000];
            while !udp.load(Ordering::Relaxed) {
                if let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                    let text = peer.ip().to_canonical().to_string();
                    let _ = socket.send_to(text.as_bytes(), peer);
                }
            }
        };
        Self { stop, threads: vec![thread::spawn(streams), thread::spawn(datagrams)] }
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// A line with the client's address, then all that it says.
fn echo(mut stream: TcpStream, peer: SocketAddr) {
    let _ = stream.write_all(format!("{}\n", peer.ip().to_canonical()).as_bytes());
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Who the client in `from` is for the station behind `to`.
fn seen(from: &Namespace, protocol: Protocol, to: SocketAddr) -> Result<String, String> {
    let ask = || {
        let patience = Some(Duration::from_secs(2));
        let mut buffer = [0; 64];
        let length = match protocol {
            Protocol::Tcp => {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
                stream.set_read_timeout(patience)?;
                stream.read(&mut buffer)?
            }
            Protocol::Udp => {
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(patience)?;
                socket.connect(to)?;
                socket.send(b"who am I")?;
                socket.recv(&mut buffer)?
            }
        };
        Ok::<_, NetlinkError>(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    };
    from.run(ask).map_err(|error| format!("{error:?}"))
}

/// Leads a port of the host's addresses (`only`: of that address alone) to port 80 of a station.
fn publish(host: &Host, net: &Net, port: u16, station: u8) {
    let (uplink, [v4, v6]) = (net.uplink(), net.ips(station));
    let (end4, end6) = (uplink.v4.unwrap().network, uplink.v6.unwrap().network);
    let outer = format!(
        "table inet p{port} {{
        chain pre {{
            type nat hook prerouting priority dstnat - 5;
            ip daddr 127.0.0.0/8 accept
            jump to
        }}
        chain out {{
            type nat hook output priority -105;
            jump to
        }}
        chain to {{
            fib daddr type local meta nfproto ipv4 meta l4proto {{ tcp, udp }} th dport {port} dnat ip to {end4}:{port}
            fib daddr type local meta nfproto ipv6 meta l4proto {{ tcp, udp }} th dport {port} dnat ip6 to [{end6}]:{port}
        }}
        chain post {{
            type nat hook postrouting priority srcnat - 5;
            oifname \"wfu*\" ct status dnat fib saddr type local masquerade
            iifname \"wfu*\" oifname \"wfu*\" ct status dnat masquerade
        }}
        }}"
    );
    let inner = format!(
        "table inet s{port} {{
        chain pre {{
            type nat hook prerouting priority dstnat;
            ip daddr {end4} meta l4proto {{ tcp, udp }} th dport {port} dnat ip to {v4}:80
            ip6 daddr {end6} meta l4proto {{ tcp, udp }} th dport {port} dnat ip6 to [{v6}]:80
        }}
        }}"
    );
    for (namespace, script) in
        [(&host.namespace, outer), (&host.network_namespace(net.id()), inner)]
    {
        run(namespace, &format!("printf '%s' '{script}' | nft -f -"));
    }
}

/// Hosts 1 to 3 with a station of each one's number, and a client of none of them.
struct Site {
    hosts: Vec<Host>,
    sandboxes: Vec<Namespace>,
    client: Host,
    net: Net,
    _mirrors: Vec<Mirror>,
    _wire: Namespace,
}

async fn site(lab: &Lab, underlay: Underlay, encrypted: bool) -> Site {
    let wire = lab.wire();
    let sealed = encrypted.then_some(underlay);
    let hosts = [1, 2, 3].map(|n| lab.host_with(n, &wire, sealed));
    if encrypted {
        for (one, two) in [(0, 1), (0, 2), (1, 2)] {
            introduce(&hosts[one], &hosts[two]);
        }
    }
    let mut net = Net::new(1, &[(1, 1), (2, 2), (3, 3)]);
    (net.internal, net.transit, net.encrypted) = (false, true, encrypted);
    let (mut sandboxes, mut mirrors) = (Vec::new(), Vec::new());
    for host in &hosts {
        host.carry(&net, underlay);
        let sandbox = lab.namespace(&format!("sandbox{}", host.n));
        host.attach(net.spec(host.n, &sandbox)).await;
        mirrors.push(Mirror::start(&sandbox));
        sandboxes.push(sandbox);
    }
    for host in &hosts {
        host.settled(net.id()).await;
        if encrypted {
            served(host, &net).await;
        }
    }
    let client = lab.host(4, &wire);
    Site { hosts: hosts.into(), sandboxes, client, net, _mirrors: mirrors, _wire: wire }
}

/// Ports of host 1: to its own station, and to host 2's.
const HERE: u16 = 8081;
const THERE: u16 = 8082;

fn clients_keep_their_addresses(underlay: Underlay, encrypted: bool) {
    in_lab(async move |lab| {
        let Site { hosts, sandboxes, client, net, .. } = &site(lab, underlay, encrypted).await;
        publish(&hosts[0], net, HERE, 1);
        publish(&hosts[0], net, THERE, 2);
        let addresses = |host| [Underlay::V4, Underlay::V6].map(|of| of.vtep(host).ip());
        let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        let cases = [
            (&client.namespace, addresses(1), addresses(4)),
            (&hosts[0].namespace, addresses(1), addresses(1)),
            (&hosts[0].namespace, loopback, addresses(1)),
            // By the uplink and back.
            (&sandboxes[0], addresses(1), addresses(1)),
            (&sandboxes[1], addresses(1), addresses(2)),
        ];
        for (from, to, as_whom) in cases {
            for (ip, as_whom) in to.into_iter().zip(as_whom) {
                for port in [HERE, THERE] {
                    for protocol in [Protocol::Tcp, Protocol::Udp] {
                        let to = SocketAddr::new(ip, port);
                        // The tunnel may have its first path only now.
                        eventually(&format!("{protocol:?} {to} sees {as_whom}"), async || {
                            let answer = seen(from, protocol, to)?;
                            match answer == as_whom.to_string() {
                                true => Ok(()),
                                false => Err(format!("{to}: {answer:?}")),
                            }
                        })
                        .await;
                    }
                }
            }
        }
        // None of it has led anybody else astray.
        run(&sandboxes[0], "ping -n -c 1 -W 1 192.0.2.4");
        run(&sandboxes[0], "ping -n -c 1 -W 1 10.1.0.2");
    });
}

#[test]
fn a_station_sees_clients_of_other_hosts_by_their_own_addresses() {
    clients_keep_their_addresses(Underlay::V4, false);
}

#[test]
fn a_station_sees_clients_of_other_hosts_by_their_own_addresses_over_ipv6() {
    clients_keep_their_addresses(Underlay::V6, false);
}

#[test]
fn a_station_of_an_encrypted_network_sees_clients_of_other_hosts_by_their_own_addresses() {
    clients_keep_their_addresses(Underlay::V4, true);
}

#[test]
fn loopback_addresses_are_the_hosts_own() {
    in_lab(async |lab| {
        let site = site(lab, Underlay::V4, false).await;
        let Site { hosts, sandboxes, client, net, .. } = &site;
        let open =
            hosts[0].namespace.run(|| Ok::<_, NetlinkError>(TcpListener::bind("127.0.0.1:90")?));
        let _open = open.unwrap();
        publish(&hosts[0], net, HERE, 1);
        let to = SocketAddr::from(([127, 0, 0, 1], 90));
        // Even one that sends what no honest one does: from the wire, and from a network.
        for (from, by) in [(&client.namespace, "192.0.2.1"), (&sandboxes[0], "10.1.0.254")] {
            run(
                from,
                "ip route del local 127.0.0.0/8 table local; ip route del local 127.0.0.1 table local",
            );
            run(from, "ip link set lo down");
            run(from, "sysctl -qw net.ipv4.conf.all.route_localnet=1");
            run(from, &format!("ip route add 127.0.0.1 via {by}"));
            assert!(seen(from, Protocol::Tcp, to).is_err());
            assert!(seen(from, Protocol::Tcp, SocketAddr::from(([127, 0, 0, 1], HERE))).is_err());
        }
        let inside = hosts[0].network_namespace(net.id());
        run(&inside, "sysctl -qw net.ipv4.conf.all.route_localnet=1");
        run(
            &inside,
            "ip route del local 127.0.0.0/8 table local; ip route del local 127.0.0.1 table local",
        );
        assert!(seen(&sandboxes[0], Protocol::Tcp, to).is_err());
        let refused = run(&hosts[0].namespace, "nft list chain inet weft loopback");
        let counted = |line: &&str| line.contains("daddr") && !line.contains("packets 0 ");
        assert!(refused.lines().any(|line| counted(&line)), "{refused}");
    });
}

/// A connection that says something, and hears it again.
fn converse(stream: &mut TcpStream, words: &[u8]) -> Result<(), String> {
    let mut heard = vec![0; words.len()];
    stream
        .write_all(words)
        .and_then(|()| stream.read_exact(&mut heard))
        .map_err(|e| e.to_string())?;
    if heard == words { Ok(()) } else { Err("something else".into()) }
}

fn connect(from: &Namespace, to: SocketAddr) -> TcpStream {
    let mut stream = from.run(|| Ok::<_, NetlinkError>(TcpStream::connect(to)?)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut greeting = [0; 1];
    while greeting != *b"\n" {
        stream.read_exact(&mut greeting).unwrap();
    }
    stream
}

#[test]
fn a_connection_goes_on_when_its_client_comes_in_by_another_host() {
    in_lab(async |lab| {
        let site = site(lab, Underlay::V4, false).await;
        let Site { hosts, client, net, .. } = &site;
        // One address that hosts 1 and 2 both have, and the station is on host 3.
        for host in &hosts[..2] {
            run(&host.namespace, "ip addr add 198.51.100.7/32 dev lo");
            publish(host, net, THERE, 3);
        }
        run(&client.namespace, "ip route add 198.51.100.7 via 192.0.2.1");
        let to = SocketAddr::from(([198, 51, 100, 7], THERE));
        let mut stream = connect(&client.namespace, to);
        converse(&mut stream, b"by the first").unwrap();
        run(&client.namespace, "ip route replace 198.51.100.7 via 192.0.2.2");
        run(&hosts[0].namespace, "ip link set eth0 down");
        converse(&mut stream, b"by the second").unwrap();
        assert_eq!(seen(&client.namespace, Protocol::Tcp, to).unwrap(), "192.0.2.4");
    });
}

#[test]
fn connections_outlive_the_agent_and_what_somebody_removes_is_put_back() {
    in_lab(async |lab| {
        let site = site(lab, Underlay::V4, false).await;
        let Site { hosts, client, net, .. } = site;
        publish(&hosts[0], &net, THERE, 2);
        let to = SocketAddr::from(([192, 0, 2, 1], THERE));
        let mut stream = connect(&client.namespace, to);
        converse(&mut stream, b"before").unwrap();

        let mut restarted = Vec::new();
        for host in hosts {
            let remains = host.crash().await;
            converse(&mut stream, b"without an agent").unwrap();
            // The new one knows no other host yet.
            let mut remains = remains;
            let network = remains.desired.as_mut().unwrap().networks.get_mut(&net.id()).unwrap();
            let whole = Arc::clone(network);
            let some = Arc::make_mut(network);
            some.provisional = true;
            some.transit.as_mut().unwrap().routers.clear();
            some.remotes.clear();
            let host = Host::start(remains);
            host.settled(net.id()).await;
            assert_eq!(host.operations(), 0, "{:#?}", host.plane.status().borrow());
            converse(&mut stream, b"adopted").unwrap();
            host.desire_network(net.id(), |network| *network = (*whole).clone());
            host.settled(net.id()).await;
            assert_eq!(host.operations(), 0, "{:#?}", host.plane.status().borrow());
            restarted.push(host);
        }

        for harm in [
            "nft flush ruleset",
            "nft delete table bridge weft-transit",
            "nft flush map bridge weft-transit routers",
            "ip rule del priority 100",
            "ip -6 rule del priority 100",
            "ip route flush table 100; ip rule del priority 100",
            "ip neigh del 169.254.0.1 dev br0",
        ] {
            for host in &restarted[..2] {
                let inside = host.network_namespace(net.id());
                let look = || {
                    let rules = "nft -s list table bridge weft-transit && nft -s list table inet weft-transit && nft -s list table inet weft";
                    let routes = "ip rule && ip -6 rule && ip route show table 100 && ip neigh show dev br0 nud permanent";
                    attempt(&inside, &format!("{rules} && {routes}"))
                };
                let before = look().unwrap();
                run(&inside, harm);
                eventually(&format!("{harm}: put back"), async || match look() {
                    Ok(after) if after == before => Ok(()),
                    other => Err(format!("{other:?} is not {before}")),
                })
                .await;
                let drift = || {
                    let status = host.plane.status().borrow().clone();
                    let tables = &status.networks[&net.id()].tables;
                    tables[&Table::Transit].drift
                };
                eventually("the repair is counted", async || match drift() {
                    0 => Err("no drift".into()),
                    _ => Ok(()),
                })
                .await;
            }
        }
    });
}

#[test]
fn a_network_that_is_no_longer_open_keeps_nothing_of_it() {
    in_lab(async |lab| {
        let site = site(lab, Underlay::V4, false).await;
        let Site { hosts, net, .. } = site;
        let mut hosts = hosts.into_iter();
        let host = hosts.next().unwrap();
        host.desire_network(net.id(), |network| network.transit = None);
        let inside = host.network_namespace(net.id());
        let look = "nft list tables; ip rule; ip -6 rule; ip route show table 100; \
                    ip neigh show dev br0 nud permanent; bridge fdb show";
        eventually("all of it has gone", async || {
            let text = run(&inside, look);
            let left = ["weft-transit", "fwmark", "via 169.254.0.1", "lladdr", "0e:57"];
            match left.iter().find(|word| text.contains(**word)) {
                None => Ok(()),
                Some(word) => Err(format!("{word} in {text}")),
            }
        })
        .await;
        // The same when the agent was not there at the time.
        let other = hosts.next().unwrap();
        let other = other.restart_with(net.id(), |network| network.transit = None).await;
        let inside = other.network_namespace(net.id());
        eventually("all of it has gone", async || match run(&inside, look) {
            text if text.contains("weft-transit") || text.contains("fwmark") => Err(text),
            _ => Ok(()),
        })
        .await;
    });
}
