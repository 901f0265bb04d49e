use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use weft_model::Suite;
use weft_seal::{
    key::{Content, HEADER, Header, Lane, Limits, META, Meta, OVERHEAD, Role, Root, TAG},
    path::{Probe, Relayed, Reply},
};

/// Any bytes at the data port are refused or are what a peer sealed; any body that a peer seals
/// is read or refused.
///
/// The first bytes say where a sealed packet is changed and how; the rest is a packet as it is,
/// and the body of a sealed one.
pub fn packets(data: &[u8]) {
    let Some((&[high, low, mask, suite], body)) = data.split_first_chunk() else { return };
    let suite = Suite::ALL[usize::from(suite) % Suite::ALL.len()];
    let now = Instant::now();
    let root = |role| Arc::new(Root::new(&[7; 32], role, now + Duration::from_secs(3600)));
    let lane = Lane::CONTROL;
    let mut opener = root(Role::Acceptor).opener(lane, &Suite::ALL).expect("the first opener");

    let _ = Header::decode(body);
    assert!(opener.open(now, &mut body.to_vec()).is_err(), "nobody sealed this");

    let mut sealer =
        root(Role::Dialler).sealer(lane, suite, Limits::default()).expect("the first sealer");
    let mut packet = vec![0; OVERHEAD + body.len()];
    let room = packet[HEADER..].first_chunk_mut::<META>().expect("room for the meta");
    Meta::control(Content::Probe).encode(room);
    let end = packet.len() - TAG;
    packet[HEADER + META..end].copy_from_slice(body);
    sealer.seal(now, &mut packet).expect("a fresh key");

    if mask != 0 {
        let mut changed = packet.clone();
        let at = usize::from(u16::from_be_bytes([high, low])) % changed.len();
        changed[at] ^= mask;
        assert!(opener.open(now, &mut changed).is_err(), "byte {at} was changed by {mask:#04x}");
        let mut cut = packet.clone();
        cut.truncate(at);
        assert!(opener.open(now, &mut cut).is_err(), "cut to {at} bytes");
    }
    let mut replayed = packet.clone();
    assert!(opener.open(now, &mut packet).is_ok(), "what was sealed opens");
    assert!(opener.open(now, &mut replayed).is_err(), "and opens once");

    let _ = Probe::decode(body);
    let _ = Reply::decode(body);
    if let Ok((meta, rest)) = Meta::decode(body) {
        let _ = Relayed::decode(&meta, rest);
        if let Some(source) = rest.first_chunk::<16>() {
            let _ = Relayed::forward((*source).into(), &mut body.to_vec());
        }
    }
}
