use crate::lab::{Net, Underlay, in_lab, ping, probe, run};

fn sandboxes_reach_each_other(underlay: Underlay) {
    in_lab(async move |lab| {
        let (_wire, one, two) = lab.two_hosts();
        // The same subnets, the same addresses: only the network tells them apart.
        let nets = [Net::new(1, &[(1, 1), (2, 2)]), Net::new(2, &[(1, 1), (2, 2)])];
        let mut sandboxes = Vec::new();
        for net in &nets {
            for host in [&one, &two] {
                host.carry(net, underlay);
                let sandbox = lab.namespace(&format!("{}-{}", net.id(), host.n));
                host.attach(net.spec(host.n, &sandbox)).await;
                sandboxes.push(sandbox);
            }
        }
        for host in [&one, &two] {
            for net in &nets {
                host.settled(net.id()).await;
            }
        }
        for pair in sandboxes.chunks(2) {
            for ip in nets[0].ips(2) {
                ping(&pair[0], ip).unwrap_or_else(|output| panic!("{ip}: {output}"));
            }
            // As large as the derived MTU allows.
            let payload = 1500 - underlay.overhead() - 28;
            run(&pair[0], &format!("ping -c 1 -W 1 -M do -s {payload} 10.1.0.2"));
        }

        // Station 2 leaves the first network only; its namesake in the second stays.
        two.plane.detach(nets[0].id(), nets[0].endpoint(2)).await.unwrap();
        let [v4, v6] = nets[0].ips(2);
        assert!(probe(&sandboxes[0], v4).is_err());
        assert!(probe(&sandboxes[0], v6).is_err());
        ping(&sandboxes[2], v4).unwrap();
        ping(&sandboxes[2], v6).unwrap();
    });
}

#[test]
fn sandboxes_reach_each_other_over_ipv4_and_networks_do_not_mix() {
    sandboxes_reach_each_other(Underlay::V4);
}

#[test]
fn sandboxes_reach_each_other_over_ipv6_and_networks_do_not_mix() {
    sandboxes_reach_each_other(Underlay::V6);
}
