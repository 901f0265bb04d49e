//! Networks whose ports are parts of an interface of the host.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use weft_model::{InterfaceName, MacvlanMode};
use weft_vxlan::{
    AttachError, AttachSpec, Carriage, Gone, Namespace, OverlayNetwork, ParentError, Parents,
    Sandbox, Transport, namespace_name,
};

use crate::lab::{Host, Lab, Net, Underlay, at, attempt, eventually, in_lab, ping, probe, run};

/// Host 1 on the wire, and a machine there that is the gateway of the network.
struct Lan {
    wire: Namespace,
    host: Host,
    machine: Namespace,
    net: Net,
}

const GATEWAYS: [IpAddr; 2] = [
    IpAddr::V4(std::net::Ipv4Addr::new(10, 1, 0, 254)),
    IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 0xfe)),
];

impl Lan {
    fn build(lab: &Lab) -> Self {
        let wire = lab.wire();
        let host = lab.host(1, &wire);
        let machine = lab.namespace("machine");
        run(&wire, &format!("ip link add machine type veth peer name eth0 netns {}", at(&machine)));
        run(&wire, "ip link set machine master wire0 up");
        for command in [
            "ip addr add 10.1.0.254/24 dev eth0",
            "ip addr add fd00:1::fe/64 dev eth0 nodad",
            "ip link set eth0 up",
        ] {
            run(&machine, command);
        }
        Self { wire, host, machine, net: Net::local(1, &[]) }
    }

    /// Carries the network with `mode` on `parent`.
    fn carry(&self, parent: Option<&str>, mode: MacvlanMode, mtu: Option<u16>) {
        let parent = parent.map(|name| name.parse().unwrap());
        let network = OverlayNetwork {
            transport: Transport::Macvlan { parent, mode, mtu },
            gateways: Vec::new(),
            vips: BTreeSet::new(),
            uplink: None,
            ..self.net.on(1, Underlay::V4)
        };
        self.host.desire(|desired| {
            desired.networks.insert(network.id, Arc::new(network));
        });
    }

    fn spec(&self, station: u8, sandbox: &Namespace) -> AttachSpec {
        AttachSpec { gateways: GATEWAYS.into(), ..self.net.spec(station, sandbox) }
    }

    /// Attaches stations 1 and 2.
    async fn two_stations(&self, lab: &Lab) -> [Namespace; 2] {
        let sandboxes = [lab.namespace("sandbox1"), lab.namespace("sandbox2")];
        for (station, sandbox) in (1..).zip(&sandboxes) {
            let attached = self.host.attach(self.spec(station, sandbox)).await;
            assert_eq!(attached.ifname, "eth0");
        }
        sandboxes
    }

    fn meet(&self, [first, second]: &[Namespace; 2]) -> Result<(), String> {
        for (from, station) in [(first, 2), (second, 1)] {
            for ip in self.net.ips(station) {
                probe(from, ip)?;
            }
        }
        Ok(())
    }

    fn reach_the_machine(&self, sandboxes: &[Namespace]) {
        for sandbox in sandboxes {
            for gateway in GATEWAYS {
                ping(sandbox, gateway).unwrap_or_else(|output| panic!("{gateway}: {output}"));
            }
        }
    }
}

#[test]
fn containers_are_on_the_parents_link_with_addresses_of_their_own() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        run(&lan.host.namespace, "ip link set eth0 mtu 1400");
        lan.carry(Some("eth0"), MacvlanMode::Bridge, None);
        let sandboxes = lan.two_stations(lab).await;
        lan.meet(&sandboxes).unwrap();
        lan.reach_the_machine(&sandboxes);
        let neighbours = run(&lan.machine, "ip neigh show dev eth0");
        for station in [1, 2] {
            for ip in lan.net.ips(station) {
                let wanted = format!("{ip} lladdr {}", lan.net.mac(station));
                assert!(neighbours.contains(&wanted), "no {wanted} in {neighbours}");
            }
        }
        let link = run(&sandboxes[0], "ip -d link show eth0");
        assert!(link.contains("mtu 1400") && link.contains("macvlan mode bridge"), "{link}");
        let routes = run(&sandboxes[0], "ip route; ip -6 route");
        for wanted in ["default via 10.1.0.254 dev eth0", "default via fd00:1::fe dev eth0"] {
            assert!(routes.contains(wanted), "{routes}");
        }
        // The host has nothing of it, nor has the network's namespace.
        let links = run(&lan.host.namespace, "ip -o link");
        assert_eq!(links.lines().count(), 2, "{links}");
        let namespace = lan.host.network_namespace(lan.net.id());
        let links = run(&namespace, "ip -o link");
        assert!(links.lines().count() == 2 && links.contains("br0"), "{links}");
        let carriage = lan.host.plane.status().borrow().networks[&lan.net.id()].carriage;
        assert_eq!(carriage, Some(Carriage::Macvlan));
    });
}

#[test]
fn the_mode_says_who_reaches_whom() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        lan.carry(Some("eth0"), MacvlanMode::Private, None);
        let sandboxes = lan.two_stations(lab).await;
        assert!(lan.meet(&sandboxes).is_err());
        lan.reach_the_machine(&sandboxes);
        // Not even by way of a switch that sends frames back.
        run(&lan.wire, "bridge link set dev h1 hairpin on");
        assert!(lan.meet(&sandboxes).is_err());
        run(&lan.wire, "bridge link set dev h1 hairpin off");
        for station in [1, 2] {
            lan.host.plane.detach(lan.net.id(), lan.net.endpoint(station)).await.unwrap();
        }

        lan.carry(Some("eth0"), MacvlanMode::Vepa, None);
        for (station, sandbox) in (1..).zip(&sandboxes) {
            lan.host.attach(lan.spec(station, sandbox)).await;
        }
        assert!(lan.meet(&sandboxes).is_err());
        lan.reach_the_machine(&sandboxes);
        run(&lan.wire, "bridge link set dev h1 hairpin on");
        eventually("stations meet by way of the switch", async || lan.meet(&sandboxes)).await;
    });
}

#[test]
fn a_parent_that_is_passed_through_has_one_port_and_gets_its_mac_back() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        let mac = || {
            run(
                &lan.host.namespace,
                "cat /sys/class/net/eth0/address || true; ip -o link show eth0",
            )
        };
        let before = mac();
        lan.carry(Some("eth0"), MacvlanMode::Passthru, None);
        let [one, two] = [lab.namespace("sandbox1"), lab.namespace("sandbox2")];
        lan.host.attach(lan.spec(1, &one)).await;
        lan.reach_the_machine(std::slice::from_ref(&one));
        let neighbours = run(&lan.machine, "ip neigh show dev eth0");
        assert!(neighbours.contains(&lan.net.mac(1).to_string()), "{neighbours}");
        let refused = lan.host.plane.attach(lan.spec(2, &two)).await;
        assert!(matches!(refused, Err(AttachError::Kernel { .. })), "{refused:?}");
        assert_eq!(run(&two, "ip -o link").lines().count(), 1);
        lan.host.plane.detach(lan.net.id(), lan.net.endpoint(1)).await.unwrap();
        assert_eq!(mac(), before);
        lan.host.attach(lan.spec(2, &two)).await;
        lan.reach_the_machine(&[two]);
    });
}

#[test]
fn ports_are_found_again_and_their_end_is_noticed() {
    in_lab(async |lab| {
        let mut lan = Lan::build(lab);
        lan.carry(Some("eth0"), MacvlanMode::Bridge, None);
        let [one, two] = lan.two_stations(lab).await;
        let (net, all) = (lan.net.id(), BTreeSet::from([1, 2].map(|n| lan.net.endpoint(n))));
        lan.host = lan.host.restart().await;
        assert_eq!(lan.host.plane.present_ports().await.unwrap()[&net], all);
        let status = lan.host.plane.status();
        eventually("the new agent has its ports", async || {
            let status = status.borrow().clone();
            match status.networks.get(&net).map(|network| network.ports == all) {
                Some(true) => Ok(()),
                _ => Err(format!("{status:#?}")),
            }
        })
        .await;
        assert_eq!(lan.host.operations(), 0, "{:#?}", lan.host.plane.status().borrow());
        // Attaching again changes nothing.
        let attached = lan.host.attach(lan.spec(1, &one)).await;
        assert_eq!(attached.ifname, "eth0");
        ping(&one, lan.net.ips(2)[0]).unwrap();

        let mut gone = lan.host.plane.gone();
        lab.kill(two);
        let second = Gone { network: net, endpoint: lan.net.endpoint(2) };
        assert_eq!(gone.recv().await.unwrap(), second);
        // At once in another sandbox, with the same addresses.
        let third = lab.namespace("sandbox3");
        lan.host.attach(lan.spec(2, &third)).await;
        ping(&one, lan.net.ips(2)[0]).unwrap();

        // An endpoint that moves takes its addresses along.
        let fourth = lab.namespace("sandbox4");
        lan.host.attach(lan.spec(2, &fourth)).await;
        assert_eq!(run(&third, "ip -o link").lines().count(), 1);
        ping(&one, lan.net.ips(2)[0]).unwrap();

        for station in [1, 2] {
            lan.host.plane.detach(net, lan.net.endpoint(station)).await.unwrap();
        }
        assert_eq!(run(&one, "ip -o link").lines().count(), 1);
        assert!(gone.try_recv().is_err());
        lan.host.desire(|desired| desired.networks.clear());
        let path = lan.host.runtime_dir.join(namespace_name(net));
        eventually("the network is gone", async || match path.exists() {
            false => Ok(()),
            true => Err(path.display().to_string()),
        })
        .await;
    });
}

#[test]
fn a_network_that_is_removed_takes_its_ports_along() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        lan.carry(Some("eth0"), MacvlanMode::Bridge, None);
        let sandboxes = lan.two_stations(lab).await;
        lan.host.desire(|desired| desired.networks.clear());
        lan.host.plane.purge(lan.net.id()).await.unwrap();
        let path = lan.host.runtime_dir.join(namespace_name(lan.net.id()));
        eventually("nothing is left", async || {
            let links = sandboxes.iter().map(|sandbox| run(sandbox, "ip -o link"));
            let links: String = links.collect();
            match links.lines().count() == 2 && !path.exists() {
                true => Ok(()),
                false => Err(links),
            }
        })
        .await;
    });
}

#[test]
fn without_a_parent_containers_have_a_segment_of_their_own() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        lan.carry(None, MacvlanMode::Bridge, Some(1300));
        let sandboxes = lan.two_stations(lab).await;
        lan.meet(&sandboxes).unwrap();
        assert!(probe(&sandboxes[0], GATEWAYS[0]).is_err());
        let link = run(&sandboxes[0], "ip link show eth0");
        assert!(link.contains("mtu 1300"), "{link}");
        lan.host.desire(|desired| desired.networks.clear());
        for station in [1, 2] {
            lan.host.plane.detach(lan.net.id(), lan.net.endpoint(station)).await.unwrap();
        }
        let path = lan.host.runtime_dir.join(namespace_name(lan.net.id()));
        eventually("nothing is left", async || match path.exists() {
            false => Ok(()),
            true => Err(path.display().to_string()),
        })
        .await;
    });
}

#[test]
fn what_cannot_be_divided_is_refused_by_name() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        let host = &lan.host.namespace;
        run(host, "ip link add br7 type bridge");
        run(host, "ip link add port7 type veth peer name other7");
        run(host, "ip link set port7 master br7");
        run(host, "ip tuntap add dev tun7 mode tun");
        let parents = Parents::new(host.clone());
        let bridge = MacvlanMode::Bridge;
        for (name, mtu, words) in [
            ("eth9", None, &["eth9", "no interface"][..]),
            ("eth9.50", None, &["no interface eth9", "eth9.50"]),
            ("eth0.5000", None, &["no interface eth0.5000"]),
            ("other7.5", None, &["other7 is down", "ip link set other7 up"]),
            ("lo", None, &["lo", "loopback"]),
            ("port7", None, &["port7", "br7"]),
            ("tun7", None, &["tun7", "Ethernet"]),
            ("eth0", Some(9000), &["9000", "1500", "eth0"]),
        ] {
            let refused = parents.try_out(name.parse().unwrap(), bridge, mtu).unwrap_err();
            let text = refused.to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{name}: {text}");
        }
        let eth0: InterfaceName = "eth0".parse().unwrap();
        for mode in MacvlanMode::ALL {
            parents.try_out(eth0, mode, Some(1500)).unwrap();
        }
        // What has been tried out is as it was; what is divided cannot be passed through as well.
        assert_eq!(run(host, "ip -o link show type macvlan"), "");
        lan.carry(Some("eth0"), bridge, None);
        let sandbox = lab.namespace("sandbox1");
        lan.host.attach(lan.spec(1, &sandbox)).await;
        let refused = parents.try_out(eth0, MacvlanMode::Passthru, None).unwrap_err();
        assert!(matches!(refused, ParentError::Unusable { .. }), "{refused}");
        let engine = AttachSpec { sandbox: Sandbox::Engine, ..lan.spec(2, &sandbox) };
        let refused = lan.host.plane.attach(engine).await.unwrap_err();
        assert!(matches!(refused, AttachError::Unmovable { .. }), "{refused}");

        // The parent goes, and with it the port.
        let mut gone = lan.host.plane.gone();
        run(host, "ip link del eth0");
        let first = Gone { network: lan.net.id(), endpoint: lan.net.endpoint(1) };
        assert_eq!(gone.recv().await.unwrap(), first);
        let other = lab.namespace("sandbox2");
        let refused = lan.host.plane.attach(lan.spec(2, &other)).await.unwrap_err();
        assert!(refused.to_string().contains("no interface eth0"), "{refused}");
    });
}

#[test]
fn a_vlan_is_made_where_the_kernel_can_and_refused_with_a_remedy_where_it_cannot() {
    in_lab(async |lab| {
        let lan = Lan::build(lab);
        let host = &lan.host.namespace;
        let parents = Parents::new(host.clone());
        let vlan: InterfaceName = "eth0.50".parse().unwrap();
        let links = || run(host, "ip -o link");
        let before = links();
        let has_vlans = attempt(host, "ip link add link eth0 name probe.9 type vlan id 9").is_ok();
        let tried = parents.try_out(vlan, MacvlanMode::Bridge, None);
        if !has_vlans {
            let refused = tried.unwrap_err();
            assert!(matches!(refused, ParentError::NoVlans { .. }), "{refused}");
            let text = refused.to_string();
            for word in ["eth0.50", "802.1q", "CONFIG_VLAN_8021Q", "8021q"] {
                assert!(text.contains(word), "no {word} in {text}");
            }
            lan.carry(Some("eth0.50"), MacvlanMode::Bridge, None);
            let sandbox = lab.namespace("sandbox1");
            let refused = lan.host.plane.attach(lan.spec(1, &sandbox)).await.unwrap_err();
            assert!(matches!(refused, AttachError::Parent(ParentError::NoVlans { .. })));
            assert_eq!(run(&sandbox, "ip -o link").lines().count(), 1);
            assert_eq!(links(), before);
            return;
        }
        tried.unwrap();
        let made = run(host, "ip -d link show eth0.50");
        assert!(made.contains("protocol 802.1Q id 50") && made.contains("weft vlan"), "{made}");
        // The machine is on the VLAN, too, and nothing else reaches it there.
        run(&lan.machine, "ip link add link eth0 name eth0.50 type vlan id 50");
        run(&lan.machine, "ip addr flush dev eth0; ip addr add 10.1.0.254/24 dev eth0.50");
        run(&lan.machine, "ip link set eth0.50 up");
        lan.carry(Some("eth0.50"), MacvlanMode::Bridge, None);
        let sandboxes = lan.two_stations(lab).await;
        ping(&sandboxes[0], GATEWAYS[0]).unwrap();
        // One that somebody has taken away comes back with the next endpoint.
        run(host, "ip link del eth0.50");
        lan.host.attach(lan.spec(1, &sandboxes[0])).await;
        ping(&sandboxes[0], GATEWAYS[0]).unwrap();

        assert!(parents.release(&[vlan].into()).unwrap().is_empty());
        assert_eq!(parents.release(&BTreeSet::new()).unwrap(), [vlan]);
        run(host, "ip link del probe.9");
        assert_eq!(links(), before);
        // What somebody else has made is used, and stays.
        run(host, "ip link add link eth0 name eth0.50 type vlan id 50");
        parents.try_out(vlan, MacvlanMode::Bridge, None).unwrap();
        assert!(parents.release(&BTreeSet::new()).unwrap().is_empty());
    });
}
