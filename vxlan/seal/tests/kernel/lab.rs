use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};
use weft_model::{MacAddr, NetworkId, NodeId, Sealing, Suite};
use weft_seal::{
    Counters, Forwarding, Members, OffloadSwitches, Peer, PeerStatus, Station, Tunnel,
    TunnelConfig,
    key::{Limits, Role, Root},
};

use crate::namespace::Namespace;

/// Hosts on one switch, each with one container in one encrypted network.
///
/// ```text
///   container 1 ─ br0 ─ tap0 ┄┄ host 1 ── eth0 ─┐
///                                               ├─ switch
///   container 2 ─ br0 ─ tap0 ┄┄ host 2 ── eth0 ─┘
/// ```
pub(crate) struct Lab {
    pub(crate) switch: Namespace,
    pub(crate) hosts: BTreeMap<u8, Host>,
    router: Option<Namespace>,
    underlay: Underlay,
    sessions: u8,
}

pub(crate) struct Host {
    pub(crate) number: u8,
    pub(crate) namespace: Namespace,
    pub(crate) network: Namespace,
    pub(crate) container: Namespace,
    pub(crate) tunnel: Tunnel,
    pub(crate) members: watch::Sender<Arc<Members>>,
    tracker: TaskTracker,
    _stop: DropGuard,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Underlay {
    V4,
    V6,
}

/// What differs from test to test.
#[derive(Clone, Copy)]
pub(crate) struct Options {
    pub(crate) underlay: Underlay,
    pub(crate) hosts: u8,
    pub(crate) lanes: u8,
    pub(crate) limits: Limits,
    pub(crate) offloads: OffloadSwitches,
    /// What every host offers, the one it likes best first.
    pub(crate) suites: [Suite; 3],
    /// Host 1 is behind a router that translates its address to the switch's .99.
    pub(crate) nat: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            underlay: Underlay::V4,
            hosts: 2,
            lanes: 2,
            limits: Limits::default(),
            offloads: OffloadSwitches::ALL_ON,
            suites: Suite::ALL,
            nat: false,
        }
    }
}

pub(crate) const PORT: u16 = 6791;
pub(crate) const MTU: u16 = 1398;

impl Lab {
    /// Hosts that have no session yet.
    pub(crate) fn strangers(options: Options) -> Self {
        let switch = Namespace::new();
        switch.ip("link add br0 type bridge mcast_snooping 0");
        switch.ip("link set br0 up");
        let mut lab = Self {
            switch,
            hosts: BTreeMap::new(),
            router: options.nat.then(Namespace::new),
            underlay: options.underlay,
            sessions: 0,
        };
        if let Some(router) = &lab.router {
            lab.set_up_router(router);
        }
        for number in 1..=options.hosts {
            let namespace = match &lab.router {
                Some(router) if number == 1 => lab.plug_behind(router),
                _ => lab.plug(number),
            };
            let host = Host::start(number, namespace, lab.address(number), options);
            lab.hosts.insert(number, host);
        }
        lab
    }

    /// Hosts that all have sessions with each other, and use them.
    pub(crate) fn new(options: Options) -> Self {
        let mut lab = Self::strangers(options);
        lab.acquaint();
        lab.until_confirmed();
        lab
    }

    pub(crate) fn host(&self, number: u8) -> &Host {
        &self.hosts[&number]
    }

    /// Where a host says that it is.
    pub(crate) fn address(&self, number: u8) -> IpAddr {
        match (&self.router, number) {
            (Some(_), 1) => INSIDE.parse().unwrap(),
            _ => self.underlay.address(number),
        }
    }

    /// What host `one` knows of another without a session.
    pub(crate) fn peer(&self, one: u8, other: u8) -> Peer {
        let offer = Sealing { relay: true, ..self.host(one).tunnel.offer() };
        let name = format!("host-{other}").parse().unwrap();
        let address = self.address(other);
        Peer { name, address, offer: Some(offer), roots: Vec::new(), fault: None }
    }

    /// Gives every pair of hosts one session more.
    pub(crate) fn acquaint(&mut self) {
        self.sessions += 1;
        for (&one, host) in &self.hosts {
            let mut members = (**host.members.borrow()).clone();
            for &other in self.hosts.keys().filter(|other| **other != one) {
                let new = || self.peer(one, other);
                let peer = members.peers.entry(node(other)).or_insert_with(new);
                peer.roots.push(root(one, other, self.sessions, Duration::from_secs(600)));
            }
            host.members.send_replace(Arc::new(members));
        }
    }

    pub(crate) fn until_confirmed(&self) {
        for (&one, host) in &self.hosts {
            for &other in self.hosts.keys().filter(|other| **other != one) {
                host.until(other, |status| status.confirmed && status.fault.is_none());
            }
        }
    }

    /// A host's namespace with its end of a cable.
    fn plug(&self, number: u8) -> Namespace {
        let host = Namespace::new();
        let switch = self.switch.path();
        host.ip(&format!("link add eth0 type veth peer name p{number} netns {switch}"));
        host.ip(&format!("addr add {}/24 dev eth0 nodad", v4(number)));
        host.ip(&format!("addr add {}/64 dev eth0 nodad", v6(number)));
        host.ip("link set eth0 up");
        self.switch.ip(&format!("link set p{number} master br0 up"));
        host
    }

    /// A namespace whose cable ends at the router.
    fn plug_behind(&self, router: &Namespace) -> Namespace {
        let host = Namespace::new();
        host.ip(&format!("link add eth0 type veth peer name eth1 netns {}", router.path()));
        host.ip(&format!("addr add {INSIDE}/24 dev eth0"));
        host.ip("link set eth0 up");
        router.ip("addr add 198.51.100.254/24 dev eth1");
        router.ip("link set eth1 up");
        host.ip("route add default via 198.51.100.254");
        host
    }

    fn set_up_router(&self, router: &Namespace) {
        router.ip(&format!("link add eth0 type veth peer name p99 netns {}", self.switch.path()));
        router.ip(&format!("addr add {}/24 dev eth0", v4(99)));
        router.ip("link set eth0 up");
        self.switch.ip("link set p99 master br0 up");
        router.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
        router.nft("table ip nat {\n chain out {\n type nat hook postrouting priority 100\n oifname eth0 masquerade\n }\n }");
    }
}

/// The address that host 1 has behind the router.
const INSIDE: &str = "198.51.100.1";

impl Underlay {
    pub(crate) fn address(self, number: u8) -> IpAddr {
        match self {
            Self::V4 => v4(number).parse().unwrap(),
            Self::V6 => v6(number).parse().unwrap(),
        }
    }
}

impl Host {
    fn start(number: u8, namespace: Namespace, bind: IpAddr, options: Options) -> Self {
        let (members, watched) = watch::channel(Arc::default());
        let (tracker, stop) = (TaskTracker::new(), CancellationToken::new());
        let config = TunnelConfig {
            own: node(number),
            bind,
            port: PORT,
            lanes: options.lanes,
            limits: options.limits,
            suites: options.suites.into(),
            offloads: options.offloads,
            underlay_mtu: 1500,
            relay: true,
        };
        let tunnel = namespace.run(|| Tunnel::start(config, watched, &tracker, &stop).unwrap());
        let network = Namespace::new();
        network.ip("link add br0 type bridge mcast_snooping 0");
        network.ip(&format!("link set br0 address {} mtu {MTU} up", mac(200 + number)));
        network.ip("addr add 10.77.0.254/24 dev br0");
        let container = Namespace::new();
        container.ip(&format!("link add eth0 type veth peer name c0 netns {}", network.path()));
        container.ip(&format!("link set eth0 address {} mtu {MTU}", mac(number)));
        container.ip(&format!("addr add {}/24 dev eth0", inner_v4(number)));
        container.ip(&format!("addr add {}/64 dev eth0 nodad", inner_v6(number)));
        container.ip("link set eth0 up");
        network.ip(&format!("link set c0 mtu {MTU} master br0 up"));
        let host = Self {
            number,
            namespace,
            network,
            container,
            tunnel,
            members,
            tracker,
            _stop: stop.drop_guard(),
        };
        host.carry(options.hosts);
        host
    }

    /// Has the tunnel carry the network, by a TAP that is made if it is not there.
    pub(crate) fn carry(&self, hosts: u8) {
        let tap = self.network.run(|| self.tunnel.open_tap("tap0").unwrap());
        self.network.ip(&format!("link set tap0 mtu {MTU} txqueuelen 2000 master br0 up"));
        self.tunnel.carry(tap, Arc::new(forwarding(self.number, hosts)));
    }

    pub(crate) fn status(&self, of: u8) -> Option<PeerStatus> {
        self.tunnel.status().borrow().peers.get(&node(of)).cloned()
    }

    /// Waits until the status of a peer is as wished.
    pub(crate) fn until(&self, of: u8, wished: impl Fn(&PeerStatus) -> bool) -> PeerStatus {
        let found =
            eventually(Duration::from_secs(30), || self.status(of).filter(|status| wished(status)));
        found.unwrap_or_else(|| panic!("host {} says of {of}: {:#?}", self.number, self.status(of)))
    }

    pub(crate) fn counters(&self) -> Counters {
        self.tunnel.counters()
    }

    /// Waits until the counters are as wished.
    pub(crate) fn until_counted(&self, wished: impl Fn(&Counters) -> bool) -> Counters {
        let found = eventually(Duration::from_secs(30), || {
            Some(self.counters()).filter(|counters| wished(counters))
        });
        found.unwrap_or_else(|| panic!("host {} counts {:#?}", self.number, self.counters()))
    }

    /// Whether its container reaches another one's; asks until it does.
    pub(crate) fn reaches(&self, other: u8) {
        let answered = eventually(Duration::from_secs(30), || {
            self.container.pings(&inner_v4(other), 56).then_some(())
        });
        assert!(
            answered.is_some(),
            "{} does not reach {other}: {:#?}\n{:#?}",
            self.number,
            self.status(other),
            self.counters().total
        );
    }

    /// The threads end when they are told to.
    pub(crate) fn stop(self) {
        let Self { tracker, _stop: stop, tunnel, .. } = self;
        drop(stop);
        tracker.close();
        let ended = eventually(Duration::from_secs(30), || tracker.is_empty().then_some(()));
        assert!(ended.is_some(), "{} threads go on", tracker.len());
        drop(tunnel);
    }
}

/// Asks until there is an answer, or time is up.
pub(crate) fn eventually<T>(limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    let (_never, pause) = mpsc::channel::<()>();
    loop {
        let answer = ask();
        if answer.is_some() || Instant::now() > deadline {
            return answer;
        }
        let _ = pause.recv_timeout(Duration::from_millis(5));
    }
}

/// One session's keys, the same at both hosts.
pub(crate) fn root(own: u8, other: u8, session: u8, life: Duration) -> Arc<Root> {
    let mut secret = [session; 32];
    (secret[0], secret[1]) = (own.min(other), own.max(other));
    let role = if own < other { Role::Dialler } else { Role::Acceptor };
    Arc::new(Root::new(&secret, role, Instant::now() + life))
}

pub(crate) fn network() -> NetworkId {
    NetworkId::from([7; 16])
}

/// What host `own` knows of the stations on the others.
pub(crate) fn forwarding(own: u8, hosts: u8) -> Forwarding {
    let others = || (1..=hosts).filter(move |number| *number != own);
    let ips = |number| -> [IpAddr; 2] {
        [inner_v4(number).parse().unwrap(), inner_v6(number).parse().unwrap()]
    };
    let station = |number| Station { node: node(number), ips: ips(number).into(), router: false };
    Forwarding {
        network: network(),
        mtu: MTU,
        gateway_mac: mac(254),
        gateways: vec!["10.77.0.254".parse().unwrap(), "fd77::fe".parse().unwrap()],
        stations: others().map(|number| (mac(number), station(number))).collect(),
        neighbours: others().flat_map(|n| ips(n).map(|ip| (ip, mac(n)))).collect(),
        flood: BTreeSet::new(),
    }
}

pub(crate) fn node(number: u8) -> NodeId {
    NodeId::from([number; 16])
}

pub(crate) fn mac(number: u8) -> MacAddr {
    MacAddr::try_from([2, 0, 0, 0, 0, number]).unwrap()
}

pub(crate) fn inner_v4(number: u8) -> String {
    format!("10.77.0.{number}")
}

pub(crate) fn inner_v6(number: u8) -> String {
    format!("fd77::{number:x}")
}

fn v4(number: u8) -> String {
    format!("192.0.2.{number}")
}

fn v6(number: u8) -> String {
    format!("2001:db8::{number:x}")
}
