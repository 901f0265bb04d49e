//! Networks of one host alone.

use std::net::IpAddr;

use weft_vxlan::{Carriage, Namespace};

use crate::lab::{Host, Lab, Net, Underlay, attempt, eventually, in_lab, ping, probe, run};

/// Host 1 with stations 1 and 2 of `net` attached, and host 2 as somebody outside.
async fn two_stations(lab: &Lab, net: &Net) -> (Namespace, Host, Host, [Namespace; 2]) {
    let (wire, one, two) = lab.two_hosts();
    one.carry(net, Underlay::V4);
    let sandboxes = [lab.namespace("sandbox1"), lab.namespace("sandbox2")];
    for (station, sandbox) in (1..).zip(&sandboxes) {
        one.attach(net.spec(station, sandbox)).await;
    }
    one.settled(net.id()).await;
    (wire, one, two, sandboxes)
}

const OUTSIDE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

#[test]
fn stations_of_one_host_reach_each_other_and_the_outside_and_nothing_leads_to_other_hosts() {
    in_lab(async |lab| {
        // Whatever is said of a station on another host.
        let net = Net::local(1, &[(1, 1), (2, 1), (3, 2)]);
        let (_wire, one, _two, [first, second]) = two_stations(lab, &net).await;
        for (from, station) in [(&first, 2), (&second, 1)] {
            for ip in net.ips(station) {
                ping(from, ip).unwrap_or_else(|output| panic!("{ip}: {output}"));
            }
            ping(from, OUTSIDE).unwrap();
        }
        let namespace = one.network_namespace(net.id());
        let links = run(&namespace, "ip -o link");
        assert!(!links.contains("vx0") && !links.contains("tap0"), "{links}");
        assert_eq!(run(&namespace, "ip neigh show dev br0 nud permanent"), "");
        let fdb = run(&namespace, "bridge fdb show");
        assert!(!fdb.contains(&net.mac(3).to_string()), "{fdb}");
        let carriage = one.plane.status().borrow().networks[&net.id()].carriage;
        assert_eq!(carriage, Some(Carriage::Local));

        let one = one.restart().await;
        one.settled(net.id()).await;
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
        ping(&first, net.ips(2)[0]).unwrap();

        one.plane.detach(net.id(), net.endpoint(2)).await.unwrap();
        assert!(probe(&first, net.ips(2)[0]).is_err());
        ping(&first, OUTSIDE).unwrap();
    });
}

#[test]
fn isolated_stations_reach_the_gateway_and_the_outside_but_not_each_other() {
    in_lab(async |lab| {
        let net = Net::isolated(1, &[(1, 1), (2, 1)]);
        let (_wire, one, _two, [first, second]) = two_stations(lab, &net).await;
        let unreachable = || {
            for (from, station) in [(&first, 2), (&second, 1)] {
                for ip in net.ips(station) {
                    assert!(probe(from, ip).is_err(), "{ip} is reached");
                }
                ping(from, IpAddr::from([10, 1, 0, 254])).unwrap();
                ping(from, OUTSIDE).unwrap();
            }
        };
        unreachable();

        // Nor by way of the gateway, nor by knowing where the other one is.
        let [v4, v6] = net.ips(2);
        run(&first, &format!("ip route add {v4} via 10.1.0.254"));
        run(&first, &format!("ip route add {v6} via fe80::1 dev eth0"));
        unreachable();
        run(&first, &format!("ip route del {v4}; ip route del {v6}"));
        let mac = net.mac(2);
        run(&first, &format!("ip neigh replace {v4} lladdr {mac} dev eth0 nud permanent"));
        assert!(probe(&first, v4).is_err());
        // An agent that starts again leaves it so.
        let one = one.restart().await;
        one.settled(net.id()).await;
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
        assert!(probe(&first, v4).is_err());

        one.desire_network(net.id(), |network| network.isolated = false);
        eventually("the stations may meet", async || {
            attempt(&first, &format!("ping -n -c 1 -W 1 {v6}")).map(drop)
        })
        .await;
    });
}
