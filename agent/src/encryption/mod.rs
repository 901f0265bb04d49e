//! This host's part in encrypted networks: the tunnel, the keys that it gets, what is told of it.

mod detour;
mod faults;
mod keyring;
mod metrics;
mod report;
mod sessions;

pub(crate) use metrics::Reading;
pub(crate) use report::{Readings, findings as findings_of};

use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

use nix::sched::{CloneFlags, unshare};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft_gossip::quic::{self, QuicCarrier};
use weft_model::{NodeId, Sealing, VtepAddr};
use weft_seal::{
    Counters, Members, OffloadSwitches, Tap, Tunnel, TunnelConfig, TunnelStatus,
    key::{Limits, offer},
};
use weft_vxlan::Missing;

use crate::{chain::Chain, config::Config, ledger::Snapshots, projection::SealedPorts};

/// The tunnel, or why this host has none. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Encryption {
    tunnel: Result<Tunnel, Missing>,
    me: NodeId,
    local: VtepAddr,
    members: watch::Sender<Arc<Members>>,
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Encryption {
    /// Starts the tunnel, bound to `address`, until [`stop`](Self::stop). A host that cannot have
    /// one goes on without: its plain networks have nothing to do with it.
    pub fn start(
        config: &Config,
        me: NodeId,
        address: IpAddr,
        underlay_mtu: u16,
        tracker: &TaskTracker,
    ) -> Self {
        let stop = CancellationToken::new();
        let (members, followed) = watch::channel(Arc::default());
        let wanted = config.encryption;
        let config = TunnelConfig {
            own: me,
            bind: address,
            port: config.sealed_port,
            lanes: config.lanes(),
            limits: Limits {
                bytes: config.sealed_rekey_bytes.get(),
                age: Duration::from_secs(u64::from(config.sealed_rekey_seconds.get())),
                ..Limits::default()
            },
            suites: match config.sealed_suites.as_slice() {
                [] => offer(has_aes()),
                chosen => chosen.to_vec(),
            },
            offloads: config.sealed_offloads,
            underlay_mtu,
            relay: config.relay,
        };
        let tunnel = match wanted {
            false => Err(switched_off()),
            true => probe().and_then(|()| {
                Tunnel::start(config, followed, tracker, &stop).map_err(|error| not_started(&error))
            }),
        };
        match &tunnel {
            Err(missing) if wanted => {
                tracing::warn!("encrypted networks are not carried here: {missing}");
            }
            Err(_) => tracing::info!("encrypted networks are not carried here: it is switched off"),
            Ok(tunnel) => tracing::info!(offer = ?tunnel.offer(), "encrypted networks are carried"),
        }
        let (local, tracker) = (VtepAddr::from(address), tracker.clone());
        Self { tunnel, me, local, members, tracker, stop }
    }

    /// Ends the tunnel. It comes last: as long as the rest of the agent is ending, packets go on.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    pub fn tunnel(&self) -> Result<&Tunnel, &Missing> {
        self.tunnel.as_ref()
    }

    /// What this node's record says of it.
    pub fn offer(&self) -> Option<Sealing> {
        self.tunnel.as_ref().ok().map(Tunnel::offer)
    }

    /// The UDP ports at which sealed packets come.
    pub fn ports(&self) -> Option<SealedPorts> {
        self.offer().map(|offer| SealedPorts { first: offer.port, lanes: offer.lanes })
    }

    /// A way for the agents' own connections where they do not reach each other directly.
    pub fn detour(&self) -> Option<quic::Detour> {
        let detour = self.tunnel.as_ref().ok()?.detour()?;
        Some(detour::join(detour, &self.tracker, self.stop.clone()))
    }

    /// Gives the tunnel its keys from now on, until `stop`. Without a tunnel there is nothing to
    /// do.
    pub fn follow(
        &self,
        carrier: Arc<QuicCarrier>,
        snapshots: Snapshots,
        revoked: watch::Receiver<BTreeSet<NodeId>>,
        stop: CancellationToken,
    ) {
        if self.tunnel.is_err() {
            return;
        }
        let sessions = sessions::Sessions {
            me: self.me,
            local: self.local,
            carrier,
            snapshots,
            revoked,
            members: self.members.clone(),
        };
        self.tracker.spawn(sessions.run(stop));
    }

    /// How peers and networks get on; nothing without a tunnel.
    pub fn status(&self) -> Arc<TunnelStatus> {
        match &self.tunnel {
            Ok(tunnel) => Arc::clone(&tunnel.status().borrow()),
            Err(_) => Arc::default(),
        }
    }

    /// What was carried since the agent started.
    pub fn counters(&self) -> Counters {
        self.tunnel.as_ref().map(Tunnel::counters).unwrap_or_default()
    }
}

/// Whether this CPU has instructions for AES and for the multiplication that GCM needs.
fn has_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// Tries whether this host can have a TAP, in a namespace that vanishes afterwards.
fn probe() -> Result<(), Missing> {
    let attempt = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| errno.to_string())?;
        let tap = Tap::ensure("probe0", 1, OffloadSwitches::ALL_OFF);
        tap.map(drop).map_err(|error| Chain(&error).to_string())
    };
    // A thread of its own, whose namespace ends with it.
    let tried = std::thread::scope(|scope| {
        scope.spawn(attempt).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    tried.map_err(|reason| Missing {
        feature: FEATURE,
        remedy: "let the agent make TAP devices, and restart it",
        reason,
    })
}

fn switched_off() -> Missing {
    Missing {
        feature: FEATURE,
        remedy: "set it to true and restart the agent",
        reason: "encryption = false in the configuration".into(),
    }
}

fn not_started(error: &weft_seal::StartError) -> Missing {
    Missing { feature: FEATURE, remedy: "then restart the agent", reason: Chain(error).to_string() }
}

const FEATURE: &str = "encryption";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::node_id;

    fn start(config: &Config) -> Encryption {
        let address = IpAddr::from([127, 0, 0, 1]);
        Encryption::start(config, node_id(1), address, 65_535, &TaskTracker::new())
    }

    #[tokio::test]
    async fn a_host_that_does_not_take_part_says_so_and_offers_nothing() {
        let config = Config { encryption: false, ..Config::default() };
        let encryption = start(&config);
        assert_eq!(encryption.offer(), None);
        let missing = encryption.tunnel().unwrap_err().to_string();
        assert!(missing.contains("encryption = false in the configuration"), "{missing}");
    }

    #[tokio::test]
    async fn a_port_that_is_taken_leaves_the_host_without_encryption_and_is_named() {
        let taken = std::net::UdpSocket::bind(("127.0.0.1", 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let config = Config { sealed_port: port, sealed_lanes: Some(1), ..Config::default() };
        let encryption = start(&config);
        assert_eq!(encryption.offer(), None);
        let missing = encryption.tunnel().unwrap_err().to_string();
        assert!(missing.contains(&format!("127.0.0.1:{port}")), "{missing}");
    }
}
