use weft_vxlan::Table;

use crate::lab::{Host, Lab, Net, Underlay, eventually, in_lab, ping, probe, run};

/// Does `damage` to host 1's side and waits until station 2 answers station 1 again.
async fn heals(lab: &Lab, table: Table, damage: impl Fn(&Host, &Net)) {
    let (_wire, one, two) = lab.two_hosts();
    let net = Net::new(1, &[(1, 1), (2, 2)]);
    let mut sandboxes = Vec::new();
    for host in [&one, &two] {
        host.carry(&net, Underlay::V4);
        let sandbox = lab.namespace(&format!("sandbox{}", host.n));
        host.attach(net.spec(host.n, &sandbox)).await;
        host.settled(net.id()).await;
        sandboxes.push(sandbox);
    }
    for ip in net.ips(2) {
        ping(&sandboxes[0], ip).unwrap();
    }
    damage(&one, &net);
    let drift = || {
        let status = one.plane.status().borrow().clone();
        let network = status.networks.get(&net.id()).cloned().unwrap_or_default();
        let tables = [network.tables, status.host.clone()];
        tables.iter().filter_map(|tables| tables.get(&table)).map(|table| table.drift).sum::<u64>()
    };
    eventually("the damage is repaired and counted", async || {
        if drift() > 0 { Ok(()) } else { Err(format!("{:#?}", one.plane.status().borrow())) }
    })
    .await;
    for ip in net.ips(2) {
        eventually(&format!("{ip} answers"), async || probe(&sandboxes[0], ip).map(drop)).await;
    }
}

#[test]
fn a_deleted_tunnel_comes_back() {
    in_lab(async |lab| {
        heals(lab, Table::Links, |host, net| {
            run(&host.network_namespace(net.id()), "ip link del vx0");
        })
        .await;
    });
}

#[test]
fn a_deleted_bridge_comes_back_with_its_ports() {
    in_lab(async |lab| {
        heals(lab, Table::Ports, |host, net| {
            run(&host.network_namespace(net.id()), "ip link del br0");
        })
        .await;
    });
}

#[test]
fn a_port_that_fell_out_of_the_bridge_is_put_back() {
    in_lab(async |lab| {
        heals(lab, Table::Ports, |host, net| {
            let port = format!("v{}", net.endpoint(1).short());
            run(&host.network_namespace(net.id()), &format!("ip link set {port} nomaster"));
        })
        .await;
    });
}

#[test]
fn deleted_neighbours_and_fdb_entries_come_back() {
    in_lab(async |lab| {
        heals(lab, Table::Neighbours, |host, net| {
            run(&host.network_namespace(net.id()), "ip neigh flush dev vx0 nud permanent");
        })
        .await;
    });
    in_lab(async |lab| {
        heals(lab, Table::Fdb, |host, net| {
            let mac = net.mac(2);
            let namespace = host.network_namespace(net.id());
            run(&namespace, &format!("bridge fdb del {mac} dev vx0 self"));
        })
        .await;
    });
}

#[test]
fn flushed_rules_come_back_in_the_host_and_in_the_network() {
    in_lab(async |lab| {
        heals(lab, Table::Rules, |host, _| drop(run(&host.namespace, "nft flush ruleset"))).await;
    });
    in_lab(async |lab| {
        heals(lab, Table::Rules, |host, net| {
            run(&host.network_namespace(net.id()), "nft flush chain bridge weft prerouting");
        })
        .await;
    });
}

#[test]
fn a_removed_namespace_is_made_again_without_its_ports() {
    in_lab(async |lab| {
        let (_wire, one, _two) = lab.two_hosts();
        let net = Net::new(1, &[(1, 1)]);
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        one.settled(net.id()).await;
        let mut gone = one.plane.gone();
        let path = one.network_namespace(net.id()).path().to_owned();
        run(&one.namespace, &format!("umount -l {0} && rm {0}", path.display()));
        // Anything that wakes the network's task.
        one.desire_network(net.id(), |network| network.mtu -= 1);
        let lost = gone.recv().await.unwrap();
        assert_eq!(lost.endpoint, net.endpoint(1));
        eventually("the links are there again", async || {
            let namespace = weft_vxlan::Namespace::open(&path).map_err(|e| e.to_string())?;
            crate::lab::attempt(&namespace, "ip link show vx0 && ip link show br0").map(drop)
        })
        .await;
    });
}

#[test]
fn a_rule_that_somebody_slipped_in_does_not_outlive_the_next_attach() {
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::new(1, &[(1, 1), (2, 1), (3, 1), (4, 1)]);
        one.carry(&net, Underlay::V4);
        one.settled(net.id()).await;
        let inside = one.network_namespace(net.id());
        for station in 1..=4 {
            let sandbox = lab.namespace(&format!("sandbox{station}"));
            run(&inside, "nft insert rule bridge weft prerouting ether type 0x1234 accept");
            one.attach(net.spec(station, &sandbox)).await;
            let rules = run(&inside, "nft list table bridge weft");
            assert!(!rules.contains("0x1234"), "{rules}");
            assert!(rules.contains(&net.ips(station)[0].to_string()), "{rules}");
        }
        // And what was loaded bit by bit is adopted as a whole.
        let one = one.restart().await;
        one.settled(net.id()).await;
        assert_eq!(one.operations(), 0, "{:#?}", one.plane.status().borrow());
    });
}
