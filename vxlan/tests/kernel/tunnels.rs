use std::{
    net::{IpAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{runtime::Handle, sync::watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_model::{NetworkId, Suite};
use weft_seal::{
    Members, OffloadSwitches, Peer, Tunnel, TunnelConfig,
    key::{Limits, Role, Root},
};
use weft_vxlan::{Namespace, NamespaceError};

use crate::lab::{Host, Lab, Underlay, eventually, node};

/// The tunnel of one host.
pub(crate) struct LabTunnel {
    pub(crate) handle: Tunnel,
    pub(crate) underlay: Underlay,
    members: watch::Sender<Arc<Members>>,
}

impl LabTunnel {
    pub(crate) fn start(
        n: u8,
        underlay: Underlay,
        namespace: &Namespace,
        tracker: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let (members, followed) = watch::channel(Arc::default());
        let config = TunnelConfig {
            own: node(n),
            bind: underlay.vtep(n).ip(),
            port: PORT,
            lanes: LANES,
            limits: Limits::default(),
            suites: Suite::ALL.to_vec(),
            offloads: OffloadSwitches::default(),
            underlay_mtu: 1500,
            relay: false,
        };
        let runtime = Handle::current();
        let start = || {
            let _context = runtime.enter();
            Ok::<_, NamespaceError>(Tunnel::start(config, followed, tracker, stop))
        };
        let handle = namespace.run(start).unwrap().unwrap_or_else(|error| panic!("{error:?}"));
        Self { handle, underlay, members }
    }

    /// Where it receives.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> {
        PORT..PORT + u16::from(LANES)
    }

    /// Sealed packets of `network` that it has sent.
    pub(crate) fn sent(&self, network: NetworkId) -> u64 {
        let counters = self.handle.counters();
        counters.networks.get(&network).map_or(0, |traffic| traffic.sealed_packets)
    }

    fn meet(&self, other: &Host, secret: &[u8; 32], role: Role) {
        let Self { handle, underlay, .. } = other.tunnel.as_ref().unwrap();
        let root = Arc::new(Root::new(secret, role, Instant::now() + Duration::from_secs(3600)));
        self.members.send_modify(|members| {
            let peers = &mut Arc::make_mut(members).peers;
            let peer = peers.entry(node(other.n)).or_insert_with(|| Peer {
                name: format!("host{}", other.n).parse().unwrap(),
                address: underlay.vtep(other.n).ip(),
                offer: Some(handle.offer()),
                roots: Vec::new(),
                fault: None,
            });
            peer.roots.push(root);
        });
    }
}

/// Gives the two hosts a session that they have not had before, as every restart does.
pub(crate) fn introduce(one: &Host, two: &Host) {
    static SESSIONS: AtomicU8 = AtomicU8::new(0);
    let secret = [SESSIONS.fetch_add(1, Ordering::Relaxed); 32];
    one.tunnel.as_ref().unwrap().meet(two, &secret, Role::Dialler);
    two.tunnel.as_ref().unwrap().meet(one, &secret, Role::Acceptor);
}

impl Lab {
    /// Two hosts with tunnels that know each other.
    pub(crate) fn two_sealed_hosts(&self, underlay: Underlay) -> (Namespace, Host, Host) {
        let wire = self.wire();
        let host = |n| self.host_with(n, &wire, Some(underlay));
        let (one, two) = (host(1), host(2));
        introduce(&one, &two);
        (wire, one, two)
    }
}

/// Waits until a tunnel that has ended is gone.
pub(crate) async fn ports_are_free(namespace: &Namespace, ip: IpAddr) {
    eventually("the data ports are free", async || {
        let bind = || Ok::<_, NamespaceError>(UdpSocket::bind((ip, PORT)).map(drop));
        namespace.run(bind).unwrap().map_err(|error| error.to_string())
    })
    .await;
}

pub(crate) const PORT: u16 = 6791;
pub(crate) const LANES: u8 = 2;
