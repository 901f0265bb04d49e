use weft_vxlan::{AttachError, Carriage, Table};

use crate::lab::{Host, Lab, Net, Remains, Underlay, attempt, eventually, in_lab, ping, run};

/// Waits until the tunnel of `host` has the queues of the network's TAP.
pub(crate) async fn served(host: &Host, net: &Net) {
    eventually(&format!("{} is served on host {}", net.id(), host.n), async || {
        let status = host.plane.status().borrow().clone();
        match status.networks.get(&net.id()).and_then(|network| network.carriage) {
            Some(Carriage::Sealed { served: true }) => Ok(()),
            _ => Err(format!("{status:#?}")),
        }
    })
    .await;
}

/// The sockets and VXLAN devices of host 1 and of all its networks.
fn plain_ways_out(host: &Host, nets: &[&Net]) -> String {
    let look = "ip -o link show type vxlan; ss -Huanp | sed 's/ *users:.*//'";
    let inside = nets.iter().map(|net| run(&host.network_namespace(net.id()), look));
    inside.chain([run(&host.namespace, look)]).collect()
}

#[test]
fn an_encrypted_network_has_no_vxlan_device_and_no_socket_but_the_tunnels() {
    in_lab(async |lab| {
        let (_wire, one, _two) = lab.two_sealed_hosts(Underlay::V4);
        let net = Net::sealed(1, &[(1, 1), (2, 2)]);
        let before = run(&one.namespace, "ss -Huan | wc -l");
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        one.settled(net.id()).await;
        served(&one, &net).await;

        let ways = plain_ways_out(&one, &[&net]);
        assert!(!ways.contains("vxlan") && !ways.contains("4789"), "{ways}");
        let sockets: Vec<_> = ways.lines().filter(|line| line.contains("192.0.2.1:")).collect();
        assert_eq!(sockets.len(), 2, "{ways}");
        assert_eq!(run(&one.namespace, "ss -Huan | wc -l"), before, "{ways}");

        let inside = one.network_namespace(net.id());
        let tap = run(&inside, "ip -d -o link show tap0");
        for word in [
            "mtu 1418 ",
            "master br0 ",
            "LOWER_UP",
            "qlen 2000",
            "multi_queue numqueues 2 ",
            "persist on",
        ] {
            assert!(tap.contains(word), "{word}: {tap}");
        }
        let port = run(&inside, "bridge -d -o link show dev tap0");
        assert!(port.contains("learning off flood off mcast_flood on"), "{port}");
        let fdb = run(&inside, "bridge fdb show dev tap0");
        assert!(fdb.contains(&format!("{} master br0 static", net.mac(2))), "{fdb}");
        // What the sandbox hands over at once is one send of the tunnel.
        let eth0 = run(&sandbox, "ip -d -o link show eth0");
        assert!(eth0.contains("gso_max_segs 44 "), "{eth0}");
        // A plain network on the same host is what the look would have shown.
        let plain = Net::new(2, &[(1, 1)]);
        one.carry(&plain, Underlay::V4);
        one.settled(plain.id()).await;
        let ways = plain_ways_out(&one, &[&net, &plain]);
        assert!(ways.contains("vxlan id 4098") || ways.contains("vx0"), "{ways}");
        assert!(ways.contains(":4789"), "{ways}");
    });
}

#[test]
fn without_a_tunnel_an_encrypted_network_stays_on_its_host_and_says_why() {
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::sealed(1, &[(1, 1), (2, 2)]);
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        let refused = one.plane.attach(net.spec(1, &sandbox)).await;
        let Err(AttachError::NotReady { reason, .. }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("encrypted networks"), "{reason}");
        assert!(reason.contains("switch encryption on"), "{reason}");
        assert!(attempt(&sandbox, "ip link show eth0").is_err());

        let status = one.plane.status().borrow().clone();
        let network = &status.networks[&net.id()];
        assert_eq!(network.carriage, Some(Carriage::Sealed { served: false }));
        assert_eq!(network.reached, None);
        let errors: Vec<_> = network.tables.iter().filter(|(_, t)| t.error.is_some()).collect();
        assert_eq!(errors.iter().map(|(table, _)| **table).collect::<Vec<_>>(), [Table::Links]);
        let inside = one.network_namespace(net.id());
        let links = run(&inside, "ip -o link");
        assert!(!links.contains("tap0") && !links.contains("vx0"), "{links}");
    });
}

#[test]
fn an_agent_without_a_tunnel_takes_an_encrypted_network_off_the_air_and_leaves_its_ports() {
    in_lab(async |lab| {
        let (_wire, one, _two) = lab.two_sealed_hosts(Underlay::V4);
        let net = Net::sealed(1, &[(1, 1), (2, 1), (3, 2)]);
        one.carry(&net, Underlay::V4);
        let sandboxes = [lab.namespace("first"), lab.namespace("second")];
        for (n, sandbox) in (1..).zip(&sandboxes) {
            one.attach(net.spec(n, sandbox)).await;
        }
        one.settled(net.id()).await;
        served(&one, &net).await;
        let remains = one.crash().await;
        let one = Host::start(Remains { sealed: None, ..remains });
        let inside = one.network_namespace(net.id());
        eventually("the TAP goes", async || match run(&inside, "ip -o link") {
            links if links.contains("tap0") => Err(links),
            _ => Ok(()),
        })
        .await;
        eventually("the table of links says why", async || {
            let status = one.plane.status().borrow().clone();
            let links = status.networks.get(&net.id()).and_then(|n| n.tables.get(&Table::Links));
            match links.and_then(|table| table.error.as_ref()) {
                Some(error) if error.contains("the sealed tunnel not available") => Ok(()),
                _ => Err(format!("{status:#?}")),
            }
        })
        .await;
        ping(&sandboxes[0], net.ips(2)[0]).unwrap();
    });
}

/// Host 1 carries `net` while something of the other kind, which `command` makes, is in its place.
async fn rid_of(lab: &Lab, net: Net, command: &str, wrong: &str, right: &str) {
    let (_wire, one, _two) = lab.two_sealed_hosts(Underlay::V4);
    one.carry(&net, Underlay::V4);
    one.settled(net.id()).await;
    let inside = one.network_namespace(net.id());
    let gone = async || {
        eventually(&format!("{wrong} goes and {right} stays"), async || {
            let links = run(&inside, "ip -o link");
            match !links.contains(wrong) && links.contains(right) {
                true => Ok(()),
                false => Err(links),
            }
        })
        .await;
    };
    // Under the eyes of a running agent, and before its start.
    run(&inside, command);
    gone().await;
    let remains = one.crash().await;
    run(&inside, command);
    let one = Host::start(remains);
    gone().await;
    one.settled(net.id()).await;
}

#[test]
fn a_vxlan_device_in_an_encrypted_network_is_removed() {
    in_lab(async |lab| {
        let link = "ip link add vx0 type vxlan id 77 remote 192.0.2.2 dstport 4789";
        let command = format!("{link} && ip link set vx0 master br0 up");
        rid_of(lab, Net::sealed(1, &[(1, 1)]), &command, "vx0", "tap0").await;
    });
}

#[test]
fn a_tap_in_a_plain_network_is_removed() {
    in_lab(async |lab| {
        let command = "ip tuntap add tap0 mode tap multi_queue && ip link set tap0 master br0 up";
        rid_of(lab, Net::new(1, &[(1, 1)]), command, "tap0", "vx0").await;
    });
}

#[test]
fn a_tap_that_cannot_serve_is_replaced() {
    in_lab(async |lab| {
        let (_wire, one, _two) = lab.two_sealed_hosts(Underlay::V4);
        let net = Net::sealed(1, &[(1, 1)]);
        one.carry(&net, Underlay::V4);
        one.settled(net.id()).await;
        let inside = one.network_namespace(net.id());
        let remains = one.crash().await;
        for kind in ["mode tap", "mode tun multi_queue", "mode tun"] {
            run(&inside, &format!("ip link del tap0; ip tuntap add tap0 {kind}"));
        }
        let one = Host::start(remains);
        one.settled(net.id()).await;
        served(&one, &net).await;
        let tap = run(&inside, "ip -d -o link show tap0");
        assert!(tap.contains("type tap") && tap.contains("multi_queue numqueues 2 "), "{tap}");
    });
}

#[test]
fn an_encrypted_network_leaves_nothing_behind() {
    in_lab(async |lab| {
        let (_wire, one, _two) = lab.two_sealed_hosts(Underlay::V4);
        let net = Net::sealed(1, &[(1, 1), (2, 2)]);
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        served(&one, &net).await;
        // Somebody who holds the namespace keeps no TAP in it.
        let held = one.network_namespace(net.id());
        one.desire(|desired| drop(desired.networks.remove(&net.id())));
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        eventually("the network goes", async || match one.plane.namespace(net.id()) {
            Err(_) => Ok(()),
            Ok(_) => Err(format!("{:#?}", one.plane.status().borrow())),
        })
        .await;
        let links = run(&held, "ip -o link");
        assert!(links.lines().all(|line| line.contains(": lo:")), "{links}");
        assert!(one.tunnel.as_ref().unwrap().handle.broken().borrow().is_empty());
    });
}
