//! A host that is on its own networks.

use weft_vxlan::{AttachSpec, Sandbox, exposed_name};

use crate::lab::{Host, Net, Underlay, attempt, in_lab, ping, run};

/// Puts `host` on `net` as `station`.
async fn expose(host: &Host, net: &Net, station: u8) -> AttachSpec {
    let spec = AttachSpec {
        sandbox: Sandbox::Host,
        gateways: Vec::new(),
        ..net.spec(station, &host.namespace)
    };
    let attached = host.attach(spec.clone()).await;
    assert_eq!(attached.ifname, exposed_name(net.id()));
    spec
}

#[test]
fn a_host_on_a_network_reaches_every_container_and_is_reached_by_it() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1), (2, 1), (3, 2), (4, 2)]);
        let (_wire, one, two) = lab.two_hosts();
        for host in [&one, &two] {
            host.carry(&net, Underlay::V4);
            host.settled(net.id()).await;
        }
        let before = run(&one.namespace, "ip route; ip -6 route show default");
        let (near, far) = (lab.namespace("near"), lab.namespace("far"));
        one.attach(net.spec(2, &near)).await;
        two.attach(net.spec(3, &far)).await;
        let spec = expose(&one, &net, 1).await;
        expose(&two, &net, 4).await;
        for (from, stations) in [
            (&one.namespace, [2, 3, 4]),
            (&near, [1, 3, 4]),
            (&far, [1, 2, 4]),
            (&two.namespace, [1, 2, 3]),
        ] {
            for ip in stations.into_iter().flat_map(|station| net.ips(station)) {
                ping(from, ip).unwrap_or_else(|error| panic!("{ip}: {error}"));
            }
        }
        let defaults = run(&one.namespace, "ip route show default; ip -6 route show default");
        assert!(!defaults.contains(&exposed_name(net.id())), "{defaults}");
        // None of the host's other addresses shows on the network.
        let vtep = Underlay::V4.vtep(1).ip();
        run(&near, &format!("ip route add {vtep} dev eth0"));
        assert!(ping(&near, vtep).is_err());

        // Again, with the same outcome; and taken back, nothing is left of it.
        one.attach(spec).await;
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        assert_eq!(run(&one.namespace, "ip route; ip -6 route show default"), before);
        assert!(ping(&near, net.ips(1)[0]).is_err());
        ping(&near, net.ips(3)[0]).unwrap();
    });
}

#[test]
fn nobody_gets_onto_a_network_or_off_it_by_way_of_a_host_that_is_on_it() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1), (2, 1)]);
        let other = Net::new(2, &[(1, 1), (3, 1)]);
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        for net in [&net, &other] {
            one.carry(net, Underlay::V4);
            one.settled(net.id()).await;
        }
        let (inside, outside) = (lab.namespace("inside"), lab.namespace("outside"));
        one.attach(net.spec(2, &inside)).await;
        one.attach(other.spec(3, &outside)).await;
        expose(&one, &net, 1).await;
        // As on a host with containers of other kinds.
        run(&one.namespace, "echo 1 > /proc/sys/net/ipv4/ip_forward");

        // By the uplink of another network.
        ping(&inside, net.ips(1)[0]).unwrap();
        ping(&one.namespace, net.ips(2)[0]).unwrap();
        assert!(ping(&outside, net.ips(2)[0]).is_err());
        // By the host's interface on the network.
        let [v4, _] = net.ips(1);
        run(&inside, &format!("ip route add 198.18.0.0/24 via {v4}"));
        run(
            &one.namespace,
            "ip link add away type veth peer name far; ip link set away up; ip link set far up",
        );
        run(&one.namespace, "ip address add 198.18.0.1/24 dev away");
        run(
            &one.namespace,
            "nft add table inet count; nft add chain inet count out '{ type filter hook postrouting priority 0; }'; nft add rule inet count out oifname away ip daddr 198.18.0.2 counter",
        );
        assert!(attempt(&inside, "ping -c 1 -W 1 198.18.0.2").is_err());
        let counted = run(&one.namespace, "nft list table inet count");
        assert!(counted.contains("packets 0"), "{counted}");
    });
}
