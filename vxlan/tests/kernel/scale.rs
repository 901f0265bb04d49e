use std::net::IpAddr;

use tokio::time::Instant;
use weft_model::MacAddr;
use weft_vxlan::Station;

use crate::lab::{Net, Underlay, in_lab, node, run};

#[test]
#[expect(clippy::print_stdout, reason = "the rate is what one runs it for")]
fn two_thousand_remote_stations_are_programmed_within_seconds() {
    const STATIONS: usize = 2000;
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::new(1, &[(1, 1)]);
        one.carry(&net, Underlay::V4);
        one.settled(net.id()).await;

        let stations: Vec<_> = (0..STATIONS)
            .map(|n| {
                let [high, low] = u16::try_from(n).unwrap().to_be_bytes();
                let mac = MacAddr::try_from([2, 0, 0, 1, high, low]).unwrap();
                let v6 = format!("fd00:1::1:{n:x}").parse().unwrap();
                let ips = [IpAddr::from([10, 1, 16 + high, low]), v6];
                (mac, Station { node: node(2), vtep: Underlay::V4.vtep(2), ips: ips.into() })
            })
            .collect();
        let start = Instant::now();
        one.desire_network(net.id(), |network| network.remotes.extend(stations));
        let mut status = one.plane.status();
        status
            .wait_for(|status| {
                let table = &status.networks[&net.id()].tables[&weft_vxlan::Table::Neighbours];
                assert_eq!(table.error, None);
                table.applied >= 2 * STATIONS as u64
            })
            .await
            .unwrap();
        let elapsed = start.elapsed();
        println!(
            "{STATIONS} stations (two FDB and two neighbour entries each) in {elapsed:?}: {:.0} entries/s",
            4.0 * STATIONS as f64 / elapsed.as_secs_f64()
        );
        // A quarter of a second where nothing else runs.
        assert!(elapsed.as_secs_f64() < 10.0, "{elapsed:?}");
        let count = run(&one.network_namespace(net.id()), "ip neigh show dev vx0 | wc -l");
        assert_eq!(count.trim(), (2 * STATIONS).to_string());
    });
}

#[test]
#[expect(clippy::print_stdout, reason = "the time is what one runs it for")]
fn fifty_ports_are_attached_and_guarded_one_by_one() {
    const PORTS: u8 = 50;
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::new(1, &[(1, 1)]);
        one.carry(&net, Underlay::V4);
        one.settled(net.id()).await;
        let sandboxes: Vec<_> =
            (1..=PORTS).map(|n| (n, lab.namespace(&format!("sandbox{n}")))).collect();
        let mut times = Vec::new();
        for (n, sandbox) in &sandboxes {
            let start = Instant::now();
            one.attach(net.spec(*n, sandbox)).await;
            times.push(start.elapsed());
        }
        times.sort();
        let (median, last) = (times[times.len() / 2], times[times.len() - 1]);
        println!("attach: median {median:?}, worst of {PORTS} {last:?}");
        let (first, last) = (&sandboxes[0].1, net.ips(PORTS)[1]);
        crate::lab::ping(first, last).unwrap();
    });
}
