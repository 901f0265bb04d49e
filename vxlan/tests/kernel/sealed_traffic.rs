use std::net::{IpAddr, Ipv6Addr};

use weft_vxlan::{Namespace, Table};

use crate::{
    capture::Capture,
    lab::{Host, Lab, Net, Underlay, attempt, eventually, in_lab, ping, probe, run},
    sealed::served,
    stream::Stream,
    tunnels::{LANES, PORT, introduce},
};

/// Station 1 of a network on host 1, and station 2 on host 2, that reach each other.
struct Pair {
    wire: Namespace,
    one: Host,
    two: Host,
    net: Net,
    sandboxes: [Namespace; 2],
}

impl Pair {
    async fn connected(lab: &Lab, net: Net, underlay: Underlay) -> Self {
        let (wire, one, two) = lab.two_sealed_hosts(underlay);
        let sandboxes = [lab.namespace("sandbox1"), lab.namespace("sandbox2")];
        for (host, sandbox) in [&one, &two].into_iter().zip(&sandboxes) {
            host.carry(&net, underlay);
            host.attach(net.spec(host.n, sandbox)).await;
            host.settled(net.id()).await;
        }
        let pair = Self { wire, one, two, net, sandboxes };
        pair.reach_each_other().await;
        pair
    }

    async fn reach_each_other(&self) {
        for (sandbox, other) in self.sandboxes.iter().zip([2, 1]) {
            for ip in self.net.ips(other) {
                eventually(&format!("{ip} answers"), async || {
                    let state = |host: &Host| {
                        let handle = &host.tunnel.as_ref().unwrap().handle;
                        format!("{:#?} {:#?}", handle.status().borrow(), handle.counters())
                    };
                    probe(sandbox, ip).map(drop).map_err(|output| {
                        format!("{output}\n{}\n{}", state(&self.one), state(&self.two))
                    })
                })
                .await;
            }
        }
    }

    /// Sealed packets of the network that host 1 sends while `action` lasts.
    fn sent(&self, action: impl FnOnce()) -> u64 {
        let tunnel = self.one.tunnel.as_ref().unwrap();
        let before = tunnel.sent(self.net.id());
        action();
        tunnel.sent(self.net.id()) - before
    }
}

const MARK: &[u8] = b"not to be seen by anybody";

/// Host 1's sandbox sends host 2's a marked packet each way over both families.
fn send_marks(sandbox: &Namespace, net: &Net) {
    let pattern: String = MARK[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    for ip in net.ips(2) {
        run(sandbox, &format!("ping -n -c 3 -i 0.05 -W 2 -s 600 -p {pattern} {ip}"));
    }
}

/// What of a network shows in `frames`.
fn shown(frames: &[Vec<u8>], net: &Net) -> Vec<&'static str> {
    let bytes = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ([near, _], [v4, v6]) = (net.ips(1).map(bytes), net.ips(2).map(bytes));
    // Four bytes turn up in ciphertext by chance: there it takes both addresses of a header.
    let pairs = [[&near[..], &v4].concat(), [&v4[..], &near].concat()];
    let inner: [(&str, &[&[u8]]); 6] = [
        ("mark", &[&MARK[..16]]),
        ("mac", &[&net.mac(2).octets()]),
        ("ipv4", &[&v4, &pairs[0], &pairs[1]]),
        ("ipv6", &[&v6]),
        ("stream", &[&[7; 16]]),
        ("gateway", &[&weft_model::MacAddr::for_gateway(net.id()).octets()]),
    ];
    let has = |needle: &[u8]| {
        let looked_through = frames.iter().filter(|f| needle.len() > 4 || !is_sealed(f));
        looked_through.into_iter().any(|f| f.windows(needle.len()).any(|w| w == needle))
    };
    let shown = inner.iter().filter(|(_, needles)| needles.iter().any(|needle| has(needle)));
    shown.map(|(name, _)| *name).collect()
}

/// Whether a frame is a datagram to one of a tunnel's ports.
fn is_sealed(frame: &[u8]) -> bool {
    let (protocol, ports) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (frame.get(23), 34),
        Some([0x86, 0xdd]) => (frame.get(20), 54),
        _ => return false,
    };
    let to = frame.get(ports + 2..ports + 4).map(|port| u16::from_be_bytes([port[0], port[1]]));
    protocol == Some(&17) && to.is_some_and(|to| (PORT..PORT + u16::from(LANES)).contains(&to))
}

fn nothing_shows_on_the_underlay(underlay: Underlay) {
    in_lab(async move |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), underlay).await;
        let capture = Capture::on(&pair.wire);
        send_marks(&pair.sandboxes[0], &pair.net);
        // As large as the MTU allows, too.
        let payload = 1500 - underlay.overhead() - 32 - 28;
        run(&pair.sandboxes[0], &format!("ping -n -c 1 -W 2 -M do -s {payload} 10.1.0.2"));
        let frames = capture.frames();
        assert!(frames.len() >= 14, "{} frames", frames.len());
        assert_eq!(shown(&frames, &pair.net), [""; 0]);
    });
}

#[test]
fn sandboxes_reach_each_other_and_nothing_of_it_shows_on_an_ipv4_underlay() {
    nothing_shows_on_the_underlay(Underlay::V4);
}

#[test]
fn sandboxes_reach_each_other_and_nothing_of_it_shows_on_an_ipv6_underlay() {
    nothing_shows_on_the_underlay(Underlay::V6);
}

#[test]
fn a_capture_shows_what_crosses_in_clear() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1), (2, 2)]);
        let pair = Pair::connected(lab, net, Underlay::V4).await;
        let capture = Capture::on(&pair.wire);
        send_marks(&pair.sandboxes[0], &pair.net);
        assert_eq!(shown(&capture.frames(), &pair.net), ["mark", "mac", "ipv4", "ipv6"]);
    });
}

#[test]
fn nothing_shows_while_the_agent_is_down_comes_back_or_has_lost_its_rules() {
    in_lab(async |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { wire, one, two, net, sandboxes } = pair;
        let capture = Capture::on(&wire);
        let stream = Stream::open(&net, &sandboxes);
        stream.goes_on().await;
        let inside = one.network_namespace(net.id());
        for namespace in [&one.namespace, &inside] {
            run(namespace, "nft flush ruleset");
        }
        let remains = one.crash().await;
        assert!(probe(&sandboxes[0], net.ips(2)[0]).is_err(), "who carries it?");
        for namespace in [&remains.namespace, &inside] {
            run(namespace, "nft flush ruleset");
        }
        assert!(probe(&sandboxes[0], net.ips(2)[1]).is_err(), "who carries it?");
        let one = Host::start(remains);
        introduce(&one, &two);
        stream.goes_on().await;
        stream.close();
        send_marks(&sandboxes[0], &net);
        assert_eq!(shown(&capture.frames(), &net), [""; 0]);
    });
}

#[test]
fn neighbours_are_answered_here_and_what_nobody_has_is_not_sealed() {
    in_lab(async |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { net, sandboxes: [sandbox, _], .. } = &pair;
        for ip in net.ips(2) {
            run(sandbox, "ip neigh flush all");
            let sent = pair.sent(|| drop(ping(sandbox, ip).unwrap()));
            assert_eq!(sent, 1, "the request to {ip}, and no question who has it");
        }
        let sent = pair.sent(|| {
            for unknown in ["10.1.0.99", "fd00:1::99", "ff02::1%eth0"] {
                let _ = attempt(sandbox, &format!("ping -n -c 2 -i 0.2 -W 1 {unknown}"));
            }
            let _ = attempt(sandbox, "ping -n -b -c 1 -W 1 10.1.0.255");
            // A station that has an address but no place.
            let entry = "10.1.0.98 lladdr 02:00:00:00:00:98 dev eth0 nud permanent";
            run(sandbox, &format!("ip neigh replace {entry}"));
            let _ = attempt(sandbox, "ping -n -c 2 -i 0.2 -W 1 10.1.0.98");
        });
        assert_eq!(sent, 0);
        pair.reach_each_other().await;
    });
}

#[test]
fn multicast_is_sealed_for_the_hosts_of_the_network_if_asked_for() {
    in_lab(async |lab| {
        let mut net = Net::sealed(1, &[(1, 1), (2, 2)]);
        net.multicast = true;
        let pair = Pair::connected(lab, net, Underlay::V4).await;
        let Pair { two, net, sandboxes, .. } = &pair;
        for sandbox in sandboxes {
            run(sandbox, "echo 0 > /proc/sys/net/ipv4/icmp_echo_ignore_broadcasts");
        }
        let answer = run(&sandboxes[0], "ping -n -b -c 1 -W 2 10.1.0.255");
        assert!(answer.contains("10.1.0.2"), "{answer}");
        // What comes out at the other end: group traffic, but no question who has an address.
        let capture = Capture::on(&two.network_namespace(net.id()));
        let _ = probe(&sandboxes[0], "10.1.0.99".parse().unwrap());
        let _ = probe(&sandboxes[0], "fd00:1::99".parse().unwrap());
        run(&sandboxes[0], "ping -n -b -c 1 -W 2 10.1.0.255");
        let frames = capture.frames();
        let of_type = |kind: [u8; 2]| {
            let theirs = |frame: &&Vec<u8>| frame[6..12] == net.mac(1).octets();
            frames.iter().filter(theirs).filter(|frame| frame[12..14] == kind).count()
        };
        assert_eq!(of_type([8, 6]), 0, "ARP stays");
        let target = "fd00:1::99".parse::<Ipv6Addr>().unwrap().octets();
        let solicits = |f: &&Vec<u8>| f.len() > 78 && f[54] == 135 && f[62..78] == target;
        assert_eq!(frames.iter().filter(solicits).count(), 0, "neighbour solicitations stay");
        assert!(of_type([8, 0]) > 0, "the broadcast came");
    });
}

#[test]
fn a_restarted_agent_adopts_the_tap_and_streams_go_on() {
    in_lab(async |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { wire: _wire, one, two, net, sandboxes } = pair;
        let inside = one.network_namespace(net.id());
        let index = || run(&inside, "ip -o link show tap0 | cut -d: -f1");
        let before = index();
        let stream = Stream::open(&net, &sandboxes);
        stream.goes_on().await;

        let one = one.restart().await;
        introduce(&one, &two);
        stream.goes_on().await;
        one.settled(net.id()).await;
        assert_eq!(index(), before);
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
        stream.close();
    });
}

/// Does `damage` to host 1's TAP and waits until it is repaired, counted, and carries again.
fn heals(damage: &'static str) {
    in_lab(async move |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { one, net, sandboxes, .. } = &pair;
        let stream = Stream::open(net, sandboxes);
        stream.goes_on().await;
        run(&one.network_namespace(net.id()), damage);
        eventually("the damage is repaired and counted", async || {
            let status = one.plane.status().borrow().clone();
            match status.networks[&net.id()].tables[&Table::Links].drift {
                0 => Err(format!("{status:#?}")),
                _ => Ok(()),
            }
        })
        .await;
        served(one, net).await;
        stream.goes_on().await;
        stream.close();
        pair.reach_each_other().await;
    });
}

#[test]
fn a_deleted_tap_comes_back_and_streams_go_on() {
    heals("ip link del tap0");
}

#[test]
fn a_tap_that_was_set_down_comes_up_and_streams_go_on() {
    heals("ip link set tap0 down");
}

#[test]
fn a_tap_that_fell_out_of_the_bridge_is_put_back_and_streams_go_on() {
    heals("ip link set tap0 nomaster");
}

#[test]
fn an_agent_that_has_heard_of_nobody_yet_forgets_no_station() {
    in_lab(async |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { one, net, sandboxes, .. } = &pair;
        let remotes = |provisional: bool| {
            one.desire_network(net.id(), |network| {
                network.provisional = provisional;
                network.remotes.clear();
                // What tells that the pass has been made.
                network.mtu -= 1;
            });
        };
        let mtu_is = async |mtu: u16| {
            eventually("the change is made", async || {
                let status = one.plane.status().borrow().clone();
                match &status.networks[&net.id()].reached {
                    Some(reached) if reached.mtu == mtu => Ok(()),
                    _ => Err(format!("{status:#?}")),
                }
            })
            .await;
        };
        remotes(true);
        mtu_is(1417).await;
        pair.reach_each_other().await;
        remotes(false);
        mtu_is(1416).await;
        let sent = pair.sent(|| net.ips(2).iter().for_each(|&ip| drop(probe(&sandboxes[0], ip))));
        assert_eq!(sent, 0);
    });
}

#[test]
fn a_removed_namespace_is_made_again_and_served() {
    in_lab(async |lab| {
        let pair = Pair::connected(lab, Net::sealed(1, &[(1, 1), (2, 2)]), Underlay::V4).await;
        let Pair { one, net, sandboxes, .. } = &pair;
        let lost = one.network_namespace(net.id());
        let path = lost.path().display();
        run(&one.namespace, &format!("umount -l {path} && rm {path}"));
        let mut gone = one.plane.gone();
        // Anything that wakes the network's task.
        one.desire_network(net.id(), |network| network.mtu -= 1);
        assert_eq!(gone.recv().await.unwrap().endpoint, net.endpoint(1));
        let links = run(&lost, "ip -o link");
        assert!(!links.contains("tap0"), "{links}");

        // Its port went with it.
        let _ = attempt(&sandboxes[0], "ip link del eth0");
        one.attach(net.spec(1, &sandboxes[0])).await;
        served(one, net).await;
        pair.reach_each_other().await;
    });
}
