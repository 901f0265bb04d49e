use std::fmt;

use weft_model::NetworkId;
use weft_seal::{Counters, Traffic};

use crate::{
    api::types::{EncryptionStatus, OffloadReport, SealedPeer},
    metrics::{NO_LABELS, Writer},
};

/// What the sealed data path showed at one moment.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) status: EncryptionStatus,
    pub(crate) counters: Counters,
}

impl Reading {
    /// Writes all of it; `label` is the label of a network, if it is still there.
    pub(crate) fn encode(
        &self,
        out: &mut Writer<'_, '_>,
        label: impl Fn(NetworkId) -> Option<(&'static str, String)>,
    ) -> fmt::Result {
        self.traffic(out, label)?;
        self.peers(out)?;
        let state = |offload: &OffloadReport| {
            ([("offload", offload.offload.clone())], i64::from(offload.on))
        };
        out.gauges(
            "sealed_offload",
            "Whether an offload of the sealed data path is on",
            self.status.offloads.iter().map(state),
        )?;
        out.gauge(
            "sealed_available",
            "Whether this node takes part in encrypted networks",
            i64::from(self.status.available),
        )
    }

    /// Traffic of no network, such as what could not be opened, has an empty label.
    fn traffic(
        &self,
        out: &mut Writer<'_, '_>,
        label: impl Fn(NetworkId) -> Option<(&'static str, String)>,
    ) -> fmt::Result {
        let networks = self.counters.networks.iter();
        let networks = networks.filter_map(|(id, traffic)| Some((label(*id)?, traffic)));
        let rows: Vec<_> =
            networks.chain([(("network", String::new()), &self.counters.tunnel)]).collect();
        let both = |read: fn(&Traffic) -> [u64; 2]| {
            rows.iter().flat_map(move |(network, traffic)| {
                let [sealed, opened] = read(traffic);
                [("sent", sealed), ("received", opened)].map(|(direction, n)| {
                    ([network.clone(), ("direction", direction.to_owned())], n)
                })
            })
        };
        let packets = both(|t| [t.sealed_packets, t.opened_packets]);
        out.counters("sealed_packets", "Sealed packets on the underlay", packets)?;
        let bytes = both(|t| [t.sealed_bytes, t.opened_bytes]);
        out.counters("sealed_bytes", "Bytes of frames in sealed packets", bytes)?;
        let drops = rows.iter().flat_map(|(network, traffic)| {
            let one = |(why, n): (&weft_seal::DropReason, &u64)| {
                ([network.clone(), ("reason", why.as_str().to_owned())], *n)
            };
            traffic.drops.iter().map(one)
        });
        out.counters("sealed_drops", "Frames and packets that went no further", drops)?;
        let rekeys = [(NO_LABELS, self.counters.rekeys)];
        out.counters("sealed_rekeys", "Steps to a next key of this node's", rekeys)?;
        let carried =
            self.status.networks.iter().filter_map(|network| {
                Some(([label(network.network_id)?], i64::from(network.carried)))
            });
        out.gauges("sealed_network_carried", "Whether an encrypted network is carried", carried)
    }

    fn peers(&self, out: &mut Writer<'_, '_>) -> fmt::Result {
        let peers = &self.status.peers;
        let name = |peer: &SealedPeer| ("peer", peer.node.to_string());
        let rtt = peers.iter().filter_map(|peer| Some(([name(peer)], peer.rtt_ms? / 1e3)));
        out.float_gauges("sealed_peer_rtt_seconds", "Round-trip time of probes", rtt)?;
        let mtu = peers.iter().filter_map(|peer| Some(([name(peer)], i64::from(peer.path_mtu?))));
        out.gauges("sealed_path_mtu_bytes", "The largest packet that reaches the peer", mtu)?;
        let path = peers.iter().map(|peer| ([name(peer), ("kind", peer.path.clone())], 1_i64));
        out.gauges("sealed_path", "Which kind of path leads to the peer", path)
    }
}
