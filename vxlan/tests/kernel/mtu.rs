use std::process::Command;

use weft_vxlan::{AttachSpec, Namespace, NetlinkError, OverlayNetwork, Table};

use crate::{
    lab::{Host, Lab, Net, Underlay, attempt, eventually, in_lab, run},
    stream::Stream,
    tunnels::introduce,
};

fn mtu_of(namespace: &Namespace, link: &str) -> u16 {
    let text = run(namespace, &format!("ip -o link show {link}"));
    let mut words = text.split(' ').skip_while(|word| *word != "mtu");
    words.nth(1).unwrap().parse().unwrap()
}

/// Waits until everything that a packet of the sandbox behind `port` passes on `host` has `mtu`.
async fn has_mtu(host: &Host, net: &Net, sandbox: &Namespace, port: &str, mtu: u16) {
    let carrier = if net.encrypted { "tap0" } else { "vx0" };
    let inside = host.network_namespace(net.id());
    eventually(&format!("host {} has MTU {mtu}", host.n), async || {
        let found = [
            mtu_of(sandbox, "eth0"),
            mtu_of(&inside, port),
            mtu_of(&inside, "br0"),
            mtu_of(&inside, carrier),
            mtu_of(&inside, "up0"),
            mtu_of(&host.namespace, "wfu010101010101"),
        ];
        let state = || format!("{found:?} {:#?}", host.plane.status().borrow());
        if found == [mtu; 6] { Ok(()) } else { Err(state()) }
    })
    .await;
}

/// Whether packets of exactly `mtu` bytes get through, and larger ones do not even leave.
fn passes_exactly(mtu: u16, from: &Namespace, net: &Net, station: u8) {
    for (ip, headers) in net.ips(station).into_iter().zip([28, 48]) {
        let ping = |size: u16| attempt(from, &format!("ping -n -M do -c 1 -W 1 -s {size} {ip}"));
        ping(mtu - headers).unwrap();
        let larger = ping(mtu - headers + 1);
        assert!(larger.as_ref().is_err_and(|text| text.contains("too long")), "{larger:?}");
    }
}

#[test]
fn a_changed_mtu_reaches_running_sandboxes_and_breaks_no_connection() {
    in_lab(async |lab| {
        let (_wire, one, two) = lab.two_hosts();
        changes(lab, [one, two], Net::new(1, &[(1, 1), (2, 2), (3, 1)])).await;
    });
}

#[test]
fn a_changed_mtu_of_an_encrypted_network_does_so_too() {
    in_lab(async |lab| {
        let (_wire, one, two) = lab.two_sealed_hosts(Underlay::V4);
        changes(lab, [one, two], Net::sealed(1, &[(1, 1), (2, 2), (3, 1)])).await;
    });
}

async fn changes(lab: &Lab, [mut one, mut two]: [Host; 2], mut net: Net) {
    net.internal = false;
    let sandboxes = [lab.namespace("sandbox1"), lab.namespace("sandbox2")];
    let mut ports = Vec::new();
    for (host, sandbox) in [&one, &two].into_iter().zip(&sandboxes) {
        host.carry(&net, Underlay::V4);
        ports.push(host.attach(net.spec(host.n, sandbox)).await.host_ifname);
        host.settled(net.id()).await;
    }
    // A port that was asked to have an MTU of its own.
    let own = lab.namespace("own");
    one.attach(AttachSpec { mtu: Some(1300), ..net.spec(3, &own) }).await;
    let stream = Stream::open(&net, &sandboxes);
    stream.goes_on().await;

    // Down and up, first under a running agent, then while there is none.
    for (mtu, restart) in [(1400, false), (1418, false), (1380, true), (1410, true)] {
        let set = |network: &mut OverlayNetwork| network.mtu = mtu;
        match restart {
            false => {
                one.desire_network(net.id(), set);
                two.desire_network(net.id(), set);
            }
            true => {
                one = one.restart_with(net.id(), set).await;
                two = two.restart_with(net.id(), set).await;
                if net.encrypted {
                    introduce(&one, &two);
                }
            }
        }
        has_mtu(&one, &net, &sandboxes[0], &ports[0], mtu).await;
        has_mtu(&two, &net, &sandboxes[1], &ports[1], mtu).await;
        stream.goes_on().await;
        passes_exactly(mtu, &sandboxes[0], &net, 2);
        passes_exactly(mtu, &sandboxes[1], &net, 1);
        stream.goes_on().await;
    }
    stream.close();
    assert_eq!(mtu_of(&own, "eth0"), 1300);
    one.settled(net.id()).await;
    two.settled(net.id()).await;
}

#[test]
fn a_sandbox_that_nothing_leads_into_is_named_and_does_not_stop_the_others() {
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let net = Net::new(1, &[(1, 1), (2, 1), (3, 1)]);
        one.carry(&net, Underlay::V4);
        let (hidden, plain) = (lab.namespace("hidden"), lab.namespace("plain"));
        one.attach(net.spec(1, &hidden)).await;
        one.attach(net.spec(2, &plain)).await;
        one.settled(net.id()).await;
        let held = hidden.clone();
        lab.kill(hidden);
        one.desire_network(net.id(), |network| network.mtu = 1400);

        let error = || {
            let status = one.plane.status().borrow().clone();
            status.networks[&net.id()].tables[&Table::Mtu].error.clone()
        };
        let endpoint = net.endpoint(1).to_string();
        eventually("the table names the endpoint", async || match error() {
            Some(error) if error.contains(&endpoint) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        assert_eq!((mtu_of(&plain, "eth0"), mtu_of(&held, "eth0")), (1400, 1450));
        // It is the only thing that is amiss.
        let third = lab.namespace("third");
        one.attach(net.spec(3, &third)).await;
        assert_eq!(mtu_of(&third, "eth0"), 1400);
        let status = one.plane.status().borrow().clone();
        assert_eq!(status.networks[&net.id()].reached.as_ref().map(|net| net.mtu), Some(1400));

        // A process shows the way.
        let spawn = || Ok::<_, NetlinkError>(Command::new("sleep").arg("60").spawn()?);
        let mut process = held.run(spawn).unwrap();
        eventually("the sandbox is found", async || match error() {
            None => Ok(()),
            Some(error) => Err(error),
        })
        .await;
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(mtu_of(&held, "eth0"), 1400);
    });
}
