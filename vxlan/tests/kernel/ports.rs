use std::net::IpAddr;

use weft_vxlan::{AttachError, AttachSpec, Sandbox, lead_out};

use crate::lab::{Host, Lab, Net, Underlay, attempt, eventually, in_lab, ping, probe, run};

async fn one_host(lab: &Lab, nets: &[Net]) -> Host {
    let wire = lab.wire();
    let one = lab.host(1, &wire);
    for net in nets {
        one.carry(net, Underlay::V4);
        one.settled(net.id()).await;
    }
    one
}

/// The bridge ports of a network, whatever they are.
fn ports(host: &Host, net: &Net) -> String {
    run(&host.network_namespace(net.id()), "ip -br link show type veth")
}

#[test]
fn a_sandbox_may_be_in_several_networks_with_one_default_route() {
    in_lab(async |lab| {
        let (red, mut blue) = (Net::new(1, &[(1, 1)]), Net::new(2, &[(1, 1), (2, 1)]));
        blue.stations.insert(2, 1);
        let one = one_host(lab, &[red.clone(), blue.clone()]).await;
        let sandbox = lab.namespace("sandbox");
        let first = one.attach(red.spec(1, &sandbox)).await;

        // The second network's default route is one too many, and leaves nothing behind.
        let refused = one.plane.attach(blue.spec(1, &sandbox)).await;
        let Err(AttachError::DefaultRouteTaken { existing, .. }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(existing, IpAddr::from([10, 1, 0, 254]));
        assert_eq!(ports(&one, &blue), "");
        assert!(attempt(&sandbox, "ip link show eth1").is_err());

        let spec = AttachSpec { gateways: Vec::new(), ..blue.spec(2, &sandbox) };
        let second = one.attach(spec.clone()).await;
        assert_eq!((first.ifname.as_str(), second.ifname.as_str()), ("eth0", "eth1"));
        let link = run(&sandbox, "ip -o link show eth1");
        assert!(link.contains("mtu 1450") && link.contains(&blue.mac(2).to_string()), "{link}");
        // Again, with the same outcome.
        assert_eq!(one.attach(spec).await, second);
    });
}

#[test]
fn a_default_route_moves_without_a_gap_and_only_if_it_is_ours() {
    in_lab(async |lab| {
        let (red, blue) = (Net::new(1, &[(1, 1)]), Net::new(2, &[(2, 1)]));
        let one = one_host(lab, &[red.clone(), blue.clone()]).await;
        let sandbox = lab.namespace("sandbox");
        one.attach(red.spec(1, &sandbox)).await;
        one.attach(AttachSpec { gateways: Vec::new(), ..blue.spec(2, &sandbox) }).await;
        let ours = [IpAddr::from([10, 1, 0, 254]), "fe80::1".parse().unwrap()];
        let gateways = [IpAddr::from([10, 1, 0, 253]), "fe80::1".parse().unwrap()];
        let routes = || run(&sandbox, "ip route show default; ip -6 route show default");

        lead_out(&sandbox, "eth1", &gateways, &[]).unwrap();
        let before = routes();
        assert_eq!(before.matches("dev eth0").count(), 2, "{before}");
        for _again in 0..2 {
            lead_out(&sandbox, "eth1", &gateways, &ours).unwrap();
            let after = routes();
            assert!(after.contains("default via 10.1.0.253 dev eth1"), "{after}");
            assert!(after.contains("default via fe80::1 dev eth1"), "{after}");
            assert_eq!(after.matches("default").count(), 2, "{after}");
        }
        run(&sandbox, "ip route del default");
        lead_out(&sandbox, "eth0", &ours[..1], &[]).unwrap();
        assert!(routes().contains("default via 10.1.0.254 dev eth0"), "{}", routes());
        assert!(lead_out(&sandbox, "eth7", &ours, &ours).is_err());
    });
}

#[test]
fn a_sandbox_that_is_none_is_refused_by_name() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1)]);
        let one = one_host(lab, std::slice::from_ref(&net)).await;
        let sandbox = lab.namespace("sandbox");
        let spec = net.spec(1, &sandbox);
        let try_with = async |sandbox, ifname: Option<&str>| {
            let ifname = ifname.map(String::from);
            one.plane.attach(AttachSpec { sandbox, ifname, ..spec.clone() }).await.unwrap_err()
        };
        let here = || Sandbox::Path(sandbox.path().to_owned());
        let missing = try_with(Sandbox::Path("/nowhere".into()), None).await;
        assert!(matches!(missing, AttachError::Sandbox { .. }), "{missing:?}");
        let dead = try_with(Sandbox::Pid(u32::MAX / 2), None).await;
        assert!(matches!(dead, AttachError::Sandbox { .. }), "{dead:?}");
        let file = try_with(Sandbox::Path("/etc/hostname".into()), None).await;
        assert!(matches!(file, AttachError::Sandbox { .. }), "{file:?}");
        let host = try_with(Sandbox::Path(one.namespace.path().to_owned()), None).await;
        assert!(matches!(host, AttachError::HostSandbox { .. }), "{host:?}");
        let long = try_with(here(), Some("sixteen-letters-")).await;
        assert!(matches!(long, AttachError::InvalidIfname { .. }), "{long:?}");
        let taken = try_with(here(), Some("lo")).await;
        assert!(matches!(taken, AttachError::IfnameTaken { .. }), "{taken:?}");
        let unknown = one.plane.attach(Net::new(9, &[(1, 1)]).spec(1, &sandbox)).await;
        assert!(matches!(unknown, Err(AttachError::UnknownNetwork { .. })), "{unknown:?}");
        assert_eq!(ports(&one, &net), "");
    });
}

#[test]
fn a_refused_attach_does_not_cost_a_change_of_the_desired_state() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1)]);
        let one = one_host(lab, std::slice::from_ref(&net)).await;
        let sandbox = lab.namespace("sandbox");
        let spec = AttachSpec { ifname: Some("lo".into()), ..net.spec(1, &sandbox) };
        let inside = one.network_namespace(net.id());
        // The task may hear of the change first, or of the attach.
        for mtu in 1400..1410 {
            one.desire_network(net.id(), |network| network.mtu = mtu);
            let refused = one.plane.attach(spec.clone()).await;
            assert!(matches!(refused, Err(AttachError::IfnameTaken { .. })), "{refused:?}");
            eventually("the change is made", async || {
                let link = run(&inside, "ip -o link show br0");
                if link.contains(&format!("mtu {mtu} ")) { Ok(()) } else { Err(link) }
            })
            .await;
        }
    });
}

#[test]
fn the_end_of_a_sandbox_is_told_and_its_detaching_is_not() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1), (2, 1)]);
        let one = one_host(lab, std::slice::from_ref(&net)).await;
        let mut gone = one.plane.gone();
        let (first, second) = (lab.namespace("first"), lab.namespace("second"));
        one.attach(net.spec(1, &first)).await;
        one.attach(net.spec(2, &second)).await;
        ping(&first, net.ips(2)[0]).unwrap();

        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        one.plane.detach(net.id(), net.endpoint(1)).await.unwrap();
        lab.kill(second);
        let told = tokio::time::timeout(std::time::Duration::from_secs(20), gone.recv()).await;
        assert_eq!(told.unwrap().unwrap().endpoint, net.endpoint(2));
        assert!(gone.try_recv().is_err());
        let present = one.plane.present_ports().await.unwrap();
        assert_eq!(present, [(net.id(), [].into())].into());
    });
}

#[test]
fn an_engine_moves_the_waiting_end_itself() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1), (2, 1)]);
        let one = one_host(lab, std::slice::from_ref(&net)).await;
        let (mine, docker) = (lab.namespace("mine"), lab.namespace("docker"));
        one.attach(net.spec(1, &mine)).await;
        let spec = AttachSpec { sandbox: Sandbox::Engine, ..net.spec(2, &docker) };
        let attached = one.attach(spec.clone()).await;
        let path = docker.path().display();
        run(&one.namespace, &format!("ip link set {} netns {path} name eth0", attached.ifname));
        run(&docker, "ip addr add 10.1.0.2/24 dev eth0 && ip link set eth0 up");
        eventually("the moved end answers", async || probe(&mine, net.ips(2)[0]).map(drop)).await;
        // A repeated join finds it in its new place.
        one.attach(spec).await;
        ping(&mine, net.ips(2)[0]).unwrap();
    });
}

#[test]
fn a_socket_of_a_network_answers_on_its_gateway() {
    in_lab(async |lab| {
        let net = Net::new(1, &[(1, 1)]);
        let one = one_host(lab, std::slice::from_ref(&net)).await;
        let sandbox = lab.namespace("sandbox");
        one.attach(net.spec(1, &sandbox)).await;
        let bind =
            || std::net::UdpSocket::bind("10.1.0.254:53").map_err(weft_vxlan::NetlinkError::Socket);
        let socket = one.plane.socket_in(net.id(), bind).await.unwrap();
        run(&sandbox, "bash -c 'echo -n hello > /dev/udp/10.1.0.254/53'");
        let mut buffer = [0; 16];
        let (length, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..length], from.ip()), (&b"hello"[..], net.ips(1)[0]));
    });
}

#[test]
fn a_network_whose_vni_is_taken_says_so_in_the_kernels_words() {
    in_lab(async |lab| {
        let wire = lab.wire();
        let one = lab.host(1, &wire);
        let other = "type vxlan id 4097 local 192.0.2.1 dstport 4789";
        run(&one.namespace, &format!("ip link add other {other} && ip link set other up"));
        let net = Net::new(1, &[(1, 1)]);
        one.carry(&net, Underlay::V4);
        let sandbox = lab.namespace("sandbox");
        let refused = one.plane.attach(net.spec(1, &sandbox)).await;
        let Err(AttachError::NotReady { reason, .. }) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("4097") && reason.contains("VNI already exists"), "{reason}");
        assert!(attempt(&sandbox, "ip link show eth0").is_err());
        // It recovers by itself.
        run(&one.namespace, "ip link del other");
        one.settled(net.id()).await;
        one.attach(net.spec(1, &sandbox)).await;
    });
}
