use std::net::IpAddr;

use weft_vxlan::namespace_name;

use crate::lab::{Lab, Net, Underlay, attempt, eventually, in_lab, ping, probe, run};

/// Host 1 with station 1 of a network attached, and host 2 with station 2.
async fn connected(lab: &Lab) -> Connected {
    let (wire, one, two) = lab.two_hosts();
    let net = Net::new(1, &[(1, 1), (2, 2)]);
    let mut sandboxes = Vec::new();
    for host in [&one, &two] {
        host.carry(&net, Underlay::V4);
        let sandbox = lab.namespace(&format!("sandbox{}", host.n));
        host.attach(net.spec(host.n, &sandbox)).await;
        host.settled(net.id()).await;
        sandboxes.push(sandbox);
    }
    Connected { _wire: wire, one, two, net, sandboxes }
}

struct Connected {
    _wire: weft_vxlan::Namespace,
    one: crate::lab::Host,
    two: crate::lab::Host,
    net: Net,
    sandboxes: Vec<weft_vxlan::Namespace>,
}

#[test]
fn a_restarted_agent_adopts_everything_and_writes_nothing() {
    in_lab(async |lab| {
        let Connected { one, net, sandboxes, .. } = connected(lab).await;
        let namespace = one.network_namespace(net.id());
        let links = "ip -o link | sed 's/ state.*//'; cat /proc/sys/net/ipv4/ip_forward";
        let before = run(&namespace, links);

        let one = one.restart().await;
        one.settled(net.id()).await;
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
        assert_eq!(run(&namespace, links), before);

        // Attaching again finds the port.
        let attached = one.attach(net.spec(1, &sandboxes[0])).await;
        assert_eq!(attached.ifname, "eth0");
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
        ping(&sandboxes[0], net.ips(2)[0]).unwrap();
    });
}

#[test]
fn a_crash_and_restart_of_the_agent_lose_no_packet() {
    in_lab(async |lab| {
        let Connected { one, net, sandboxes, .. } = connected(lab).await;
        let target = net.ips(2)[0];
        let sandbox = sandboxes[0].clone();
        let pinger = tokio::task::spawn_blocking(move || {
            run(&sandbox, &format!("ping -n -i 0.005 -c 300 -W 1 {target}"))
        });
        let one = one.restart().await;
        one.settled(net.id()).await;
        let one = one.restart().await;
        one.settled(net.id()).await;
        let report = pinger.await.unwrap();
        assert!(report.contains("300 received"), "{report}");
    });
}

#[test]
fn a_moved_endpoint_costs_one_replacement_and_is_reached_at_once() {
    in_lab(async |lab| {
        let Connected { one, two, mut net, sandboxes, .. } = connected(lab).await;
        // Station 3 lives on host 2 first, then on host 1 itself.
        net.stations.insert(3, 2);
        for host in [&one, &two] {
            host.carry(&net, Underlay::V4);
        }
        let there = lab.namespace("there");
        two.attach(net.spec(3, &there)).await;
        eventually("station 3 answers from host 2", async || {
            probe(&sandboxes[0], net.ips(3)[0]).map(drop)
        })
        .await;

        two.plane.detach(net.id(), net.endpoint(3)).await.unwrap();
        net.stations.insert(3, 1);
        let here = lab.namespace("here");
        one.attach(net.spec(3, &here)).await;
        // Host 1's own port wins before the records say so.
        ping(&sandboxes[0], net.ips(3)[0]).unwrap();
        for host in [&one, &two] {
            host.carry(&net, Underlay::V4);
        }
        eventually("station 3 answers host 2 from host 1", async || {
            probe(&sandboxes[1], net.ips(3)[1]).map(drop)
        })
        .await;
        let fdb = run(&one.network_namespace(net.id()), "bridge fdb show dev vx0");
        assert!(!fdb.contains(&net.mac(3).to_string()), "{fdb}");
    });
}

#[test]
fn a_network_that_is_no_longer_desired_goes_with_its_last_port() {
    in_lab(async |lab| {
        let Connected { one, net, .. } = connected(lab).await;
        one.desire(|desired| drop(desired.networks.remove(&net.id())));
        eventually("the network is a leftover", async || {
            let status = one.plane.status().borrow().clone();
            match status.networks.get(&net.id()) {
                Some(network) if !network.desired && network.ports.len() == 1 => Ok(()),
                _ => Err(format!("{status:#?}")),
            }
        })
        .await;
        // A new agent leaves it, too, as long as it holds a port.
        let one = one.restart().await;
        let path = one.runtime_dir.join(namespace_name(net.id()));
        assert!(path.exists());
        assert_eq!(
            one.plane.present_ports().await.unwrap(),
            [(net.id(), [net.endpoint(1)].into())].into()
        );

        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        eventually("the namespace goes", async || match path.exists() {
            false => Ok(()),
            true => Err(format!("{:#?}", one.plane.status().borrow())),
        })
        .await;
        let links = run(&one.namespace, "ip -o link");
        assert!(!links.contains("wfu"), "{links}");

        // And it can come back: neither VNI nor name is taken.
        one.carry(&net, Underlay::V4);
        one.settled(net.id()).await;
    });
}

#[test]
fn nothing_is_removed_before_the_desired_state_is_known() {
    in_lab(async |lab| {
        let Connected { one, net, .. } = connected(lab).await;
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        one.desired.send_replace(None);
        let one = one.restart().await;
        let path = one.runtime_dir.join(namespace_name(net.id()));
        assert!(one.plane.present_ports().await.unwrap().contains_key(&net.id()));
        let refused = one.plane.attach(net.spec(1, &lab.namespace("early"))).await;
        assert!(refused.is_err(), "{refused:?}");
        assert!(path.exists());
        one.desire(|_| {});
        eventually("the namespace goes once it is known to be unwanted", async || {
            if path.exists() { Err("it is still there".into()) } else { Ok(()) }
        })
        .await;
    });
}

#[test]
fn egress_leaves_with_the_hosts_address_and_nothing_comes_in_unasked() {
    in_lab(async |lab| {
        let wire = lab.wire();
        run(&wire, "ip addr add 192.0.2.200/24 dev wire0");
        run(&wire, "ip addr add 2001:db8::200/64 dev wire0 nodad");
        let one = lab.host(1, &wire);
        let (mut red, mut blue) = (Net::new(1, &[(1, 1)]), Net::new(2, &[(1, 1)]));
        red.internal = false;
        blue.internal = false;
        let mut sandboxes = Vec::new();
        for net in [&red, &blue] {
            one.carry(net, Underlay::V4);
            let sandbox = lab.namespace(&format!("sandbox-{}", net.id()));
            one.attach(net.spec(1, &sandbox)).await;
            one.settled(net.id()).await;
            sandboxes.push(sandbox);
        }
        let sysctls = one.plane.status().borrow().sysctls_changed.clone();
        assert!(sysctls.contains("net/ipv4/ip_forward=1"), "{sysctls:?}");

        // The outside has no route back to any overlay or uplink address.
        for outside in ["192.0.2.200", "2001:db8::200", "192.0.2.1"] {
            let outside: IpAddr = outside.parse().unwrap();
            for sandbox in &sandboxes {
                eventually(&format!("{outside} answers"), async || {
                    probe(sandbox, outside).map(drop)
                })
                .await;
            }
        }
        // Neither uplink leads into the other network, nor to the host by its inner side.
        for inside in ["169.254.192.4", "169.254.192.5", "169.254.192.2", "169.254.192.3"] {
            let reached = probe(&sandboxes[0], inside.parse().unwrap());
            assert!(reached.is_err(), "{inside}: {reached:?}");
        }
        // The host does not get in by itself.
        for inside in ["169.254.192.3", "fd77::3"] {
            let reached = probe(&one.namespace, inside.parse().unwrap());
            assert!(reached.is_err(), "{inside}: {reached:?}");
        }
        run(&one.namespace, "ip route add 10.1.0.0/24 via 169.254.192.3");
        assert!(probe(&one.namespace, red.ips(1)[0]).is_err());
        run(&one.namespace, "ip route del 10.1.0.0/24");

        // An internal network has no way out.
        red.internal = true;
        one.carry(&red, Underlay::V4);
        eventually("the uplink goes", async || {
            attempt(&one.namespace, "ip link show wfu010101010101").map_or(Ok(()), Err)
        })
        .await;
        assert!(probe(&sandboxes[0], "192.0.2.200".parse().unwrap()).is_err());
        ping(&sandboxes[1], "192.0.2.200".parse().unwrap()).unwrap();
    });
}

#[test]
fn egress_passes_dockers_firewall() {
    in_lab(async |lab| {
        let wire = lab.wire();
        run(&wire, "ip addr add 192.0.2.200/24 dev wire0");
        let one = lab.host(1, &wire);
        // As Docker sets it up.
        for command in [
            "nft add table ip filter",
            "nft add chain ip filter DOCKER-USER",
            "nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'",
            "nft add rule ip filter FORWARD counter jump DOCKER-USER",
        ] {
            run(&one.namespace, command);
        }
        let mut net = Net::new(1, &[(1, 1)]);
        net.internal = false;
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        let outside: IpAddr = "192.0.2.200".parse().unwrap();
        eventually("the outside answers", async || probe(&sandbox, outside).map(drop)).await;
        // Docker starts anew.
        run(&one.namespace, "nft flush chain ip filter DOCKER-USER");
        eventually("the outside answers again", async || probe(&sandbox, outside).map(drop)).await;
    });
}
