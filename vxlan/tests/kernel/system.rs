use weft_vxlan::{Underlay, UnderlayError, advertise_address, probe};

use crate::lab::{in_lab, run};

#[test]
fn this_system_has_all_that_is_needed() {
    assert_eq!(probe(), []);
}

#[test]
fn a_system_without_nft_is_told_to_install_it() {
    in_lab(async |lab| {
        // The probe looks for nft where everybody does; here there is none.
        let bare = lab.namespace("bare");
        for dir in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
            if std::path::Path::new(dir).join("nft").exists() {
                run(&bare, &format!("mount --bind /dev/null {dir}/nft"));
            }
        }
        let missing = probe();
        assert_eq!(missing.len(), 1, "{missing:?}");
        assert!(missing[0].to_string().contains("install nftables"), "{missing:?}");
    });
}

#[test]
fn the_underlay_is_found_by_the_vtep_and_the_default_route() {
    in_lab(async |lab| {
        let host = lab.namespace("host");
        assert!(matches!(advertise_address(&host), Err(UnderlayError::NoAddress)));
        for command in [
            "ip link add eth0 type veth peer name far0",
            "ip link set far0 up",
            "ip link set eth0 mtu 9000 up",
            "ip addr add 198.51.100.7/24 dev far0",
            "ip addr add 192.0.2.7/24 dev eth0",
            "ip addr add 192.0.2.8/24 dev eth0",
            "ip addr add 2001:db8::7/64 dev eth0 nodad",
            "ip route add 10.0.0.0/8 via 192.0.2.1",
            "ip route add default via 192.0.2.1 src 192.0.2.8",
        ] {
            run(&host, command);
        }
        let vtep = advertise_address(&host).unwrap();
        assert_eq!(vtep.to_string(), "192.0.2.8");
        let underlay = Underlay::of(vtep, &host).unwrap();
        assert_eq!((underlay.ifname.as_str(), underlay.mtu), ("eth0", 9000));
        let routes: Vec<_> = underlay.routes.iter().map(ToString::to_string).collect();
        assert_eq!(routes, ["10.0.0.0/8", "192.0.2.0/24", "198.51.100.0/24", "2001:db8::/64"]);
        let elsewhere = Underlay::of("192.0.2.99".parse().unwrap(), &host);
        assert!(matches!(elsewhere, Err(UnderlayError::NoSuchAddress { .. })));
    });
}
