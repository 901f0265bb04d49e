use crate::{
    lab::{Host, Net, Underlay, attempt, eventually, in_lab, run},
    sealed::served,
};

/// Sends a datagram to host 1's address and `port`, from a port of its own.
fn send(from: &weft_vxlan::Namespace, port: u16) {
    let _ = attempt(from, &format!("bash -c 'echo -n stray > /dev/udp/192.0.2.1/{port}'"));
}

/// Packets that host 1 dropped because its own networks have sent them.
fn refused(host: &Host) -> u64 {
    let chain = run(&host.namespace, "nft list chain inet weft input");
    let rule = chain.lines().find(|line| line.contains("@sealed")).unwrap();
    let mut words = rule.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// Packets that have arrived at host 1's tunnel and were none of any peer's.
fn strays(host: &Host) -> u64 {
    let counters = host.tunnel.as_ref().unwrap().handle.counters();
    counters.tunnel.drops.values().sum()
}

#[test]
fn the_tunnel_hears_everybody_but_its_own_networks_workloads_and_tracks_nobody() {
    in_lab(async |lab| {
        let (_wire, one, two) = lab.two_sealed_hosts(Underlay::V4);
        let mut net = Net::sealed(1, &[(1, 1)]);
        net.internal = false;
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        one.settled(net.id()).await;
        served(&one, &net).await;
        let tracked = || {
            let list = "conntrack -L -p udp 2>/dev/null | grep -o 'dport=[0-9]*' | sort -u";
            run(&one.namespace, list)
        };

        // The workload has a way to the host, but not to the tunnel's ports.
        send(&sandbox, 6700);
        for port in [6791, 6792] {
            let (heard, before) = (strays(&one), refused(&one));
            send(&sandbox, port);
            eventually("the host drops it", async || match refused(&one) - before {
                0 => Err(run(&one.namespace, "nft list table inet weft")),
                _ => Ok(()),
            })
            .await;
            assert_eq!(strays(&one), heard);
        }
        // A host that is no peer, as behind a NAT any may be, is heard; whether it is one, its keys
        // say.
        run(&two.namespace, "ip addr add 192.0.2.77/24 dev eth0");
        run(&two.namespace, "ip route replace 192.0.2.1 dev eth0 src 192.0.2.77");
        for port in [6791, 6792] {
            let heard = strays(&one);
            send(&two.namespace, port);
            eventually("the tunnel drops it", async || match strays(&one) - heard {
                0 => Err(format!("{:#?}", one.tunnel.as_ref().unwrap().handle.counters())),
                _ => Ok(()),
            })
            .await;
        }
        // Somebody else's traffic is tracked, the tunnel's is not, whoever begins.
        let found = tracked();
        assert!(found.contains("dport=6700"), "{found}");
        assert!(!found.contains("dport=679"), "{found}");
    });
}
