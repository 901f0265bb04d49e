use std::{collections::BTreeMap, sync::Arc, time::Instant};

use socket2::SockAddr;
use weft_model::{Label, NodeId};

use super::keyring::Keyring;
use crate::{
    DropReason, Members, PathStatus, Peer, PeerStatus,
    key::Lane,
    path::{self, Book, Kind},
    routes::{GROWTH, Hop, Route, Routes, Way},
};

/// What those that seal are told: the route to every member, or why there is none.
pub(super) fn routes(now: Instant, members: &Members, keys: &Keyring, book: &Book) -> Routes {
    let peers = members.peers.iter();
    Routes { peers: peers.map(|(&id, peer)| (id, route(now, id, peer, keys, book))).collect() }
}

fn route(
    now: Instant,
    id: NodeId,
    peer: &Peer,
    keys: &Keyring,
    book: &Book,
) -> Result<Route, DropReason> {
    peer.offer.as_ref().ok_or(DropReason::NoOffer)?;
    let suite = keys.suite(id).ok_or(DropReason::NoOffer)?;
    let root = keys.sending_root(now, id)?;
    let found = book.route(id).ok_or(DropReason::NoPath)?;
    Ok(Route {
        root: Arc::clone(root),
        suite,
        way: match found.relay {
            Some(_) => Way::Relay,
            None => Way::Straight(hops(found)),
        },
        inner_mtu: usize::from(found.packet).saturating_sub(GROWTH),
    })
}

fn hops(route: &path::Route) -> Arc<[Hop]> {
    let hop =
        |way: &path::Way| Hop { socket: usize::from(way.socket), to: SockAddr::from(way.remote) };
    route.ways.iter().map(hop).collect()
}

/// What people are told of every member.
pub(super) fn status(
    now: Instant,
    members: &Members,
    keys: &Keyring,
    book: &Book,
) -> BTreeMap<NodeId, PeerStatus> {
    let names = |id: NodeId| members.peers.get(&id).map(|peer| &peer.name);
    let peer_status = |(&id, peer): (&NodeId, &Peer)| {
        let found = book.route(id);
        let root = keys.sending_root(now, id).ok();
        let epochs = || Lane::all().filter(|lane| *lane != Lane::CONTROL);
        let status = PeerStatus {
            name: peer.name.clone(),
            address: peer.address,
            path: found.map_or(PathStatus::Down, path_status),
            confirmed: root.is_some(),
            suite: keys.suite(id),
            rtt: found.and_then(|route| route.rtt),
            path_mtu: found.map(|route| route.path_mtu(peer.address)),
            epoch: root
                .map_or(0, |root| epochs().map(|l| root.sending_epoch(l)).max().unwrap_or(0)),
            rekeys: root
                .map_or(0, |root| epochs().map(|lane| u64::from(root.sending_epoch(lane))).sum()),
            fault: fault(now, id, peer, keys, found, &names),
        };
        (id, status)
    };
    members.peers.iter().map(peer_status).collect()
}

fn path_status(route: &path::Route) -> PathStatus {
    let first = route.ways.first().map(|way| way.remote);
    match (route.relay, first) {
        _ if !route.up => PathStatus::Down,
        (Some(via), _) => PathStatus::Relay { via },
        (None, Some(remote)) if route.kind == Kind::Observed => PathStatus::Observed(remote),
        (None, Some(remote)) => PathStatus::Direct(remote),
        (None, None) => PathStatus::Down,
    }
}

/// Why nothing can be sent to a peer.
fn fault<'a>(
    now: Instant,
    id: NodeId,
    peer: &Peer,
    keys: &Keyring,
    found: Option<&path::Route>,
    names: &impl Fn(NodeId) -> Option<&'a Label>,
) -> Option<String> {
    let name = &peer.name;
    let Some(offer) = &peer.offer else {
        return Some(format!(
            "{name} takes no part in encrypted networks: it runs an older version, or its own status says why"
        ));
    };
    if keys.suite(id).is_none() {
        return Some(format!(
            "{name} and this node have no cipher suite in common: offer one of {name}'s in the configuration"
        ));
    }
    match keys.sending_root(now, id) {
        Err(DropReason::Expired) => {
            return Some(format!(
                "the certificates of the session with {name} have expired: see weft status on both nodes"
            ));
        }
        Err(_) if peer.roots.is_empty() => {
            let why = peer.fault.clone().unwrap_or_else(|| "none was made yet".into());
            return Some(format!("there is no session with {name}: {why}"));
        }
        Err(_) => {
            return Some(format!(
                "{name} has not answered under the keys of its session at {}, UDP ports {} to {}: let them through the firewalls between the two",
                peer.address,
                offer.port,
                offer.port.saturating_add(u16::from(offer.lanes.max(1)) - 1),
            ));
        }
        Ok(_) => {}
    }
    match found {
        Some(route) if route.up => None,
        Some(path::Route { relay: Some(via), .. }) => {
            let via = names(*via).map_or_else(|| via.short(), Label::to_string);
            Some(format!("{name} does not answer any more by way of {via}"))
        }
        Some(_) | None => Some(format!(
            "no path to {name} answers: neither {}, UDP port {}, nor any node that relays",
            peer.address, offer.port
        )),
    }
}
