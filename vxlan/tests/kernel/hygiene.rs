use std::net::IpAddr;

use weft_vxlan::Namespace;

use crate::lab::{
    Host, Lab, Net, Remains, Tally, Underlay, attempt, eventually, in_lab, ping, probe, run,
};

/// Host 1 with station 1 of a network, host 2 known to it but without a data plane of its own, and
/// a stranger on the same wire.
struct Scene {
    wire: Namespace,
    one: Host,
    two: Host,
    net: Net,
    sandbox: Namespace,
}

async fn scene(lab: &Lab) -> Scene {
    let (wire, one, two) = lab.two_hosts();
    let net = Net::new(1, &[(1, 1), (2, 2)]);
    one.carry(&net, Underlay::V4);
    let sandbox = lab.namespace("sandbox");
    one.attach(net.spec(1, &sandbox)).await;
    one.settled(net.id()).await;
    Scene { wire, one, two, net, sandbox }
}

/// Sends station 1 a frame of `net` in VXLAN from `source` to host 1, by a device like any host's:
/// a ping request that the real station 2 never sent.
fn inject(from: &Namespace, net: &Net, to: &str) {
    let (mac, here) = (net.mac(1), net.mac(2));
    for command in [
        "ip link del forge 2>/dev/null; true".to_owned(),
        format!("ip link add forge address {here} type vxlan id 4097 remote {to} dstport 4789"),
        "ip addr add 10.1.0.2/24 dev forge".into(),
        "ip link set forge mtu 1300 up".into(),
        format!("ip neigh replace 10.1.0.1 lladdr {mac} dev forge nud permanent"),
        // Nobody answers: only the arrival counts.
        "ping -n -c 3 -i 0.05 -W 1 10.1.0.1 >/dev/null; true".into(),
        "ip link del forge".into(),
    ] {
        run(from, &command);
    }
}

fn arrivals(tally: &Tally<'_>) -> u64 {
    tally.packets()
}

const FORGED: &str = "ether type ip icmp type echo-request ip saddr 10.1.0.2";

#[test]
fn a_strangers_vxlan_frames_are_dropped_and_a_peers_are_not() {
    in_lab(async |lab| {
        let Scene { wire, one, two, net, .. } = scene(lab).await;
        let stranger = stranger(lab, &wire);
        let inside = one.network_namespace(net.id());
        let tally = Tally::on(&inside, FORGED);

        inject(&stranger, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 0);
        // The same frames from the peer's address arrive: it is the rule that stops them.
        inject(&two.namespace, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 3);
        // A peer that is no longer present is a stranger.
        one.desire(|desired| desired.host.vteps.clear());
        eventually("the peer leaves the rules", async || {
            let rules = run(&one.namespace, "nft list set inet weft vteps4");
            if rules.contains("192.0.2.2") { Err(rules) } else { Ok(()) }
        })
        .await;
        inject(&two.namespace, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 3);
        // And without any rules the stranger gets in: the injection is real.
        one.desired.send_replace(None);
        run(&one.namespace, "nft add table inet other");
        let Remains { namespace, .. } = one.crash().await;
        run(&namespace, "nft flush ruleset");
        inject(&stranger, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 6);
    });
}

/// 192.0.2.66, which is no peer.
fn stranger(lab: &Lab, wire: &Namespace) -> Namespace {
    let stranger = lab.namespace("stranger");
    let at = stranger.path().display();
    run(wire, &format!("ip link add s0 type veth peer name eth0 netns {at}"));
    run(wire, "ip link set s0 master wire0 up");
    run(&stranger, "ip addr add 192.0.2.66/24 dev eth0 && ip link set eth0 up");
    stranger
}

#[test]
fn somebody_elses_vxlan_works_on_the_same_port_while_ours_is_guarded() {
    in_lab(async |lab| {
        let Scene { wire, one, net, .. } = scene(lab).await;
        let stranger = stranger(lab, &wire);
        // Both ends next to weft's VNI 4097 in number, so that no shorter comparison will do.
        for (vni, subnet) in [(4096, "10.9.1"), (4097 + 65_536, "10.9.2"), (1, "10.9.3")] {
            let (here, there) = ("192.0.2.1", "192.0.2.66");
            for (end, n, local, remote) in
                [(&one.namespace, 1, here, there), (&stranger, 2, there, here)]
            {
                let link = format!("type vxlan id {vni} local {local} remote {remote}");
                run(end, &format!("ip link add other{vni} {link} dstport 4789"));
                run(end, &format!("ip addr add {subnet}.{n}/24 dev other{vni}"));
                run(end, &format!("ip link set other{vni} up"));
            }
            ping(&stranger, format!("{subnet}.1").parse().unwrap()).unwrap();
        }
        let inside = one.network_namespace(net.id());
        let tally = Tally::on(&inside, FORGED);
        inject(&stranger, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 0);
        // A network that holds a port is guarded although nobody desires it any more.
        one.desire(|desired| drop(desired.networks.remove(&net.id())));
        let one = one.restart().await;
        eventually("the new agent has seen to the rules", async || {
            let status = one.plane.status().borrow().clone();
            match status.host.contains_key(&weft_vxlan::Table::Rules) {
                true => Ok(()),
                false => Err(format!("{status:#?}")),
            }
        })
        .await;
        inject(&stranger, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 0);
        ping(&stranger, "10.9.1.1".parse().unwrap()).unwrap();
        // A network that is gone is not.
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        eventually("the namespace goes", async || match one.plane.namespace(net.id()) {
            Err(_) => Ok(()),
            Ok(_) => Err(format!("{:#?}", one.plane.status().borrow())),
        })
        .await;
        let one = one.restart().await;
        eventually("the VNI is free for others", async || {
            let vnis = run(&one.namespace, "nft list set inet weft vnis");
            if vnis.contains("0x") { Err(vnis) } else { Ok(()) }
        })
        .await;
    });
}

/// A container of some other engine on host `host`: a bridge with addresses of its own, forwarded
/// and masqueraded, as Docker does.
fn workload(lab: &Lab, host: &Host) -> Namespace {
    let workload = lab.namespace("workload");
    let at = workload.path().display();
    for command in [
        "ip link add docker0 type bridge".to_owned(),
        "ip addr add 172.17.0.1/16 dev docker0".into(),
        "ip link set docker0 up".into(),
        format!("ip link add w0 type veth peer name eth0 netns {at}"),
        "ip link set w0 master docker0 up".into(),
        "echo 1 > /proc/sys/net/ipv4/ip_forward".into(),
        "nft add table ip engine".into(),
        "nft add chain ip engine post '{ type nat hook postrouting priority 100; }'".into(),
        "nft add rule ip engine post ip saddr 172.17.0.0/16 oifname eth0 masquerade".into(),
    ] {
        run(&host.namespace, &command);
    }
    run(&workload, "ip addr add 172.17.0.2/16 dev eth0 && ip link set eth0 up");
    run(&workload, "ip route add default via 172.17.0.1");
    workload
}

async fn leads_out(workload: &Namespace) {
    let outside = "192.0.2.1".parse().unwrap();
    eventually("the workload reaches host 1", async || probe(workload, outside).map(drop)).await;
}

#[test]
fn a_workload_cannot_inject_frames_into_its_own_host() {
    in_lab(async |lab| {
        let Scene { one, net, .. } = scene(lab).await;
        let workload = workload(lab, &one);
        leads_out(&workload).await;
        let inside = one.network_namespace(net.id());
        let tally = Tally::on(&inside, FORGED);
        for target in ["192.0.2.1", "172.17.0.1"] {
            inject(&workload, &net, target);
            assert_eq!(arrivals(&tally), 0, "{target}");
        }
        // Not even with a peer's address.
        run(&workload, "ip addr add 192.0.2.2/32 dev eth0");
        run(&workload, "ip route replace 192.0.2.1 via 172.17.0.1 src 192.0.2.2");
        run(&one.namespace, "echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter");
        run(&one.namespace, "echo 0 > /proc/sys/net/ipv4/conf/docker0/rp_filter");
        inject(&workload, &net, "192.0.2.1 local 192.0.2.2");
        assert_eq!(arrivals(&tally), 0);
    });
}

#[test]
fn a_workload_cannot_inject_frames_into_another_host_behind_its_hosts_address() {
    in_lab(async |lab| {
        let Scene { one, two, net, .. } = scene(lab).await;
        two.carry(&net, Underlay::V4);
        two.settled(net.id()).await;
        let workload = workload(lab, &two);
        leads_out(&workload).await;
        let inside = one.network_namespace(net.id());
        let tally = Tally::on(&inside, FORGED);
        inject(&workload, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 0);
        // Without host 2's rules the masqueraded packets pass for host 2's own.
        let Remains { namespace, .. } = two.crash().await;
        run(&namespace, "nft delete table inet weft");
        inject(&workload, &net, "192.0.2.1");
        assert_eq!(arrivals(&tally), 3);
    });
}

#[test]
fn what_nobody_has_leaves_no_packet_on_the_underlay() {
    in_lab(async |lab| {
        let Scene { wire, one, net, sandbox, .. } = scene(lab).await;
        let tally = Tally::on(&wire, "ether type { ip, ip6 } udp dport 4789");
        for unknown in ["10.1.0.99", "fd00:1::99", "ff02::1%eth0"] {
            let _ = attempt(&sandbox, &format!("ping -n -c 2 -i 0.2 -W 1 {unknown}"));
        }
        let _ = attempt(&sandbox, "ping -n -b -c 1 -W 1 10.1.0.255");
        // A station that has an address but no place.
        run(&sandbox, "ip neigh replace 10.1.0.98 lladdr 02:00:00:00:00:98 dev eth0 nud permanent");
        let _ = attempt(&sandbox, "ping -n -c 2 -i 0.2 -W 1 10.1.0.98");
        assert_eq!(tally.packets(), 0);
        // The one that is known is sent to; so the count can count.
        let _ = probe(&sandbox, net.ips(2)[0]);
        assert_eq!(tally.packets(), 1);
        drop(one);
    });
}

#[test]
fn multicast_reaches_the_hosts_of_the_network_if_asked_for() {
    in_lab(async |lab| {
        let (wire, one, two) = lab.two_hosts();
        let mut net = Net::new(1, &[(1, 1), (2, 2)]);
        net.multicast = true;
        let mut sandboxes = Vec::new();
        for host in [&one, &two] {
            host.carry(&net, Underlay::V4);
            let sandbox = lab.namespace(&format!("sandbox{}", host.n));
            host.attach(net.spec(host.n, &sandbox)).await;
            host.settled(net.id()).await;
            run(&sandbox, "echo 0 > /proc/sys/net/ipv4/icmp_echo_ignore_broadcasts");
            sandboxes.push(sandbox);
        }
        let answer = run(&sandboxes[0], "ping -n -b -c 1 -W 2 10.1.0.255");
        assert!(answer.contains("10.1.0.2"), "{answer}");
        // Behind outer UDP and VXLAN headers: the inner type, and the inner destination.
        let arp = Tally::on(&wire, "udp dport 4789 @th,224,16 0x0806");
        let _ = probe(&sandboxes[0], "10.1.0.99".parse().unwrap());
        assert_eq!(arp.packets(), 0, "ARP stays");
        drop(arp);
        let unknown = Tally::on(&wire, "udp dport 4789 @th,128,48 0x020000000098");
        let entry = "10.1.0.98 lladdr 02:00:00:00:00:98 dev eth0 nud permanent";
        run(&sandboxes[0], &format!("ip neigh replace {entry}"));
        let _ = probe(&sandboxes[0], "10.1.0.98".parse().unwrap());
        assert_eq!(unknown.packets(), 0, "frames to unknown stations stay");
        drop(unknown);
        // Switched off again, the flood list goes.
        one.desire_network(net.id(), |network| network.multicast = false);
        eventually("the flood list goes", async || {
            let fdb = run(&one.network_namespace(net.id()), "bridge fdb show dev vx0");
            if fdb.contains("00:00:00:00:00:00") { Err(fdb) } else { Ok(()) }
        })
        .await;
    });
}

#[test]
fn a_container_cannot_speak_from_anothers_address() {
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::new(1, &[(1, 1), (2, 1), (3, 1)]);
        one.carry(&net, Underlay::V4);
        let (honest, liar) = (lab.namespace("honest"), lab.namespace("liar"));
        one.attach(net.spec(1, &honest)).await;
        one.attach(net.spec(2, &liar)).await;
        for ip in net.ips(1) {
            ping(&liar, ip).unwrap();
        }
        // Another's IPv4 and IPv6 address, and the gateway's.
        for stolen in ["10.1.0.3", "10.1.0.254", "fd00:1::3"] {
            let len = if stolen.contains(':') { "64 nodad" } else { "24" };
            run(&liar, &format!("ip addr add {stolen}/{len} dev eth0"));
            let target = net.ips(1)[usize::from(stolen.contains(':'))];
            let spoofed = attempt(&liar, &format!("ping -n -c 1 -W 1 -I {stolen} {target}"));
            assert!(spoofed.is_err(), "{stolen}: {spoofed:?}");
            let asked: IpAddr = stolen.parse().unwrap();
            if stolen != "10.1.0.254" {
                // Nor does it answer for it.
                assert!(probe(&honest, asked).is_err(), "{stolen}");
            }
            run(&liar, &format!("ip addr del {stolen}/{} dev eth0", &len[..2]));
        }
        // The gateway's neighbours still know the gateway.
        ping(&honest, "10.1.0.254".parse().unwrap()).unwrap();
        // Another MAC.
        run(&liar, "ip link set eth0 address 02:00:00:00:00:66");
        assert!(probe(&liar, net.ips(1)[0]).is_err());
    });
}
