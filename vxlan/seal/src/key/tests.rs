//! What a pair of nodes can do with one session, and what nobody else can.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use weft_model::Suite;

use super::*;

/// Both ends of a session, and the moment it began.
struct Pair {
    dialler: Arc<Root>,
    acceptor: Arc<Root>,
    start: Instant,
}

const LIFE: Duration = Duration::from_secs(7200);

fn pair() -> Pair {
    pair_of([7; 32])
}

fn pair_of(secret: [u8; 32]) -> Pair {
    let start = Instant::now();
    let root = |role| Arc::new(Root::new(&secret, role, start + LIFE));
    Pair { dialler: root(Role::Dialler), acceptor: root(Role::Acceptor), start }
}

fn lane(number: u8) -> Lane {
    Lane::try_from(number).unwrap()
}

impl Pair {
    fn sealer(&self, limits: Limits) -> Sealer {
        self.dialler.sealer(lane(0), Suite::Aes128Gcm, limits).unwrap()
    }

    fn opener(&self) -> Opener {
        self.acceptor.opener(lane(0), &Suite::ALL).unwrap()
    }

    fn packet(&self, sealer: &mut Sealer, body: &[u8]) -> Vec<u8> {
        let mut packet = unsealed(body);
        sealer.seal(self.start, &mut packet).unwrap();
        packet
    }
}

fn unsealed(body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; OVERHEAD + body.len()];
    let meta = &mut packet[HEADER..];
    Meta::control(Content::Probe).encode(meta.first_chunk_mut().unwrap());
    meta[META..META + body.len()].copy_from_slice(body);
    packet
}

fn body(opened: &[u8]) -> &[u8] {
    Meta::decode(opened).unwrap().1
}

#[test]
fn both_directions_open_with_every_suite_on_every_lane() {
    let pair = pair();
    for (from, to) in [(&pair.dialler, &pair.acceptor), (&pair.acceptor, &pair.dialler)] {
        for (lane, suite) in Lane::all().zip(Suite::ALL.into_iter().cycle()) {
            let mut sealer = from.sealer(lane, suite, Limits::default()).unwrap();
            let mut opener = to.opener(lane, &[suite]).unwrap();
            for text in [&b""[..], b"x", &[9; 9000]] {
                let mut packet = pair.packet(&mut sealer, text);
                let header = Header::decode(&packet).unwrap();
                assert_eq!((header.tag, header.lane), (to.inbound_tag(), lane));
                assert_eq!(body(opener.open(pair.start, &mut packet).unwrap()), text);
            }
        }
    }
}

#[test]
fn both_ends_name_the_session_alike_and_its_directions_differently() {
    let (one, other) = (pair(), pair_of([8; 32]));
    assert_eq!(one.dialler.id(), one.acceptor.id());
    assert_ne!(one.dialler.id(), other.dialler.id());
    assert_eq!(one.dialler.outbound_tag(), one.acceptor.inbound_tag());
    assert_eq!(one.dialler.inbound_tag(), one.acceptor.outbound_tag());
    assert_ne!(one.dialler.inbound_tag(), one.dialler.outbound_tag());
}

#[test]
fn a_session_is_confirmed_by_the_first_authentic_packet_and_by_nothing_else() {
    let pair = pair();
    let (mut sealer, mut opener) = (pair.sealer(Limits::default()), pair.opener());
    let packet = pair.packet(&mut sealer, b"hello");
    let mut forged = packet.clone();
    forged[20] ^= 1;
    opener.open(pair.start, &mut forged).unwrap_err();
    assert!(!pair.acceptor.is_confirmed());
    opener.open(pair.start, &mut packet.clone()).unwrap();
    assert!(pair.acceptor.is_confirmed());
    assert!(!pair.dialler.is_confirmed());
}

#[test]
fn a_packet_with_any_bit_flipped_is_refused_and_the_packet_itself_is_taken_afterwards() {
    for suite in Suite::ALL {
        let pair = pair();
        let mut sealer = pair.dialler.sealer(lane(0), suite, Limits::default()).unwrap();
        let mut opener = pair.opener();
        let packet = pair.packet(&mut sealer, b"some frame");
        for at in 0..packet.len() * 8 {
            let mut forged = packet.clone();
            forged[at / 8] ^= 1 << (at % 8);
            let refused = opener.open(pair.start, &mut forged).unwrap_err();
            let expected = match at / 8 {
                0 => matches!(refused, Refused::Malformed(_) | Refused::Auth),
                1 => matches!(refused, Refused::Malformed(_) | Refused::Foreign),
                2..4 => matches!(refused, Refused::Auth | Refused::Epoch),
                4..8 => refused == Refused::Foreign,
                _ => refused == Refused::Auth,
            };
            assert!(expected, "bit {at}: {refused:?}");
        }
        opener.open(pair.start, &mut packet.clone()).unwrap();
    }
}

#[test]
fn a_packet_cut_or_lengthened_anywhere_is_refused() {
    let pair = pair();
    let (mut sealer, mut opener) = (pair.sealer(Limits::default()), pair.opener());
    let packet = pair.packet(&mut sealer, b"some frame");
    for len in 0..packet.len() {
        let refused = opener.open(pair.start, &mut packet[..len].to_vec()).unwrap_err();
        let expected = match len {
            0..OVERHEAD => Refused::Malformed(Malformed::Short { len }),
            _ => Refused::Auth,
        };
        assert_eq!(refused, expected, "{len} bytes");
    }
    let mut longer = [&packet[..], &[0]].concat();
    assert_eq!(opener.open(pair.start, &mut longer).unwrap_err(), Refused::Auth);
}

#[test]
fn a_packet_is_taken_once_also_after_a_rekey_and_after_the_opener_was_returned() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits { packets: 2, ..Limits::default() });
    let packets: Vec<_> = (0..6).map(|n| pair.packet(&mut sealer, &[n])).collect();
    let mut opener = pair.opener();
    for packet in &packets {
        opener.open(pair.start, &mut packet.clone()).unwrap();
    }
    drop(opener);
    let mut opener = pair.opener();
    for packet in &packets {
        assert_eq!(opener.open(pair.start, &mut packet.clone()).unwrap_err(), Refused::Replay);
    }
}

#[test]
fn a_packet_sent_back_to_its_sender_is_refused() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits::default());
    let mut own = pair.dialler.opener(lane(0), &Suite::ALL).unwrap();
    let mut packet = pair.packet(&mut sealer, b"mirror");
    assert_eq!(own.open(pair.start, &mut packet.clone()).unwrap_err(), Refused::Foreign);

    packet[4..8].copy_from_slice(&pair.dialler.inbound_tag().to_le_bytes());
    assert_eq!(own.open(pair.start, &mut packet).unwrap_err(), Refused::Auth);
}

#[test]
fn a_packet_of_another_pair_is_refused_even_under_the_right_tag() {
    let (pair, other) = (pair(), pair_of([8; 32]));
    let (mut sealer, mut opener) = (other.sealer(Limits::default()), pair.opener());
    let mut packet = other.packet(&mut sealer, b"swapped");
    assert_eq!(opener.open(pair.start, &mut packet.clone()).unwrap_err(), Refused::Foreign);

    packet[4..8].copy_from_slice(&pair.acceptor.inbound_tag().to_le_bytes());
    assert_eq!(opener.open(pair.start, &mut packet).unwrap_err(), Refused::Auth);
}

#[test]
fn a_packet_under_another_suite_or_lane_is_refused() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits::default());
    let packet = pair.packet(&mut sealer, b"as it is");
    let mut opener = pair.opener();
    for kind in [0x12, 0x13] {
        let mut other = packet.clone();
        other[0] = kind;
        assert_eq!(opener.open(pair.start, &mut other).unwrap_err(), Refused::Auth);
    }
    drop(opener);
    let mut picky = pair.acceptor.opener(lane(0), &[Suite::Aes256Gcm]).unwrap();
    assert_eq!(picky.open(pair.start, &mut packet.clone()).unwrap_err(), Refused::Suite);

    let mut next = pair.acceptor.opener(lane(1), &Suite::ALL).unwrap();
    assert_eq!(next.open(pair.start, &mut packet.clone()).unwrap_err(), Refused::Foreign);
    let mut moved = packet;
    moved[1] = 1;
    assert_eq!(next.open(pair.start, &mut moved).unwrap_err(), Refused::Auth);
}

#[test]
fn sixteen_lost_epochs_are_made_up_for_and_more_need_a_word_of_the_peer() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits { packets: 1, ..Limits::default() });
    let mut opener = pair.opener();
    let mut packets: Vec<_> = (0..100).map(|n| pair.packet(&mut sealer, &[n])).collect();
    assert_eq!(opener.open(pair.start, &mut packets[17].clone()).unwrap_err(), Refused::Epoch);
    opener.open(pair.start, &mut packets[16].clone()).unwrap();
    assert_eq!(opener.epoch(), 16);
    assert_eq!(opener.open(pair.start, &mut packets[99].clone()).unwrap_err(), Refused::Epoch);

    opener.catch_up(20);
    assert_eq!(opener.epoch(), 16);
    opener.catch_up(pair.dialler.sending_epoch(lane(0)));
    assert_eq!(opener.epoch(), 99);
    opener.open(pair.start, &mut packets[99]).unwrap();
    assert_eq!(opener.open(pair.start, &mut packets[98]).unwrap_err(), Refused::Epoch);
}

#[test]
fn catching_up_to_the_last_epoch_of_all_is_possible() {
    let pair = pair();
    let mut opener = pair.opener();
    opener.catch_up(u16::MAX);
    assert_eq!(opener.epoch(), u16::MAX);
    let mut forged = [0x11, 0, 0xff, 0xff].to_vec();
    forged.extend(pair.acceptor.inbound_tag().to_le_bytes());
    forged.extend([0; 40]);
    assert_eq!(opener.open(pair.start, &mut forged).unwrap_err(), Refused::Auth);
}

#[test]
fn forged_epochs_move_nothing() {
    let pair = pair();
    let (mut sealer, mut opener) = (pair.sealer(Limits::default()), pair.opener());
    let packet = pair.packet(&mut sealer, b"epoch 0");
    for epoch in 0..=u16::MAX {
        let mut forged = packet.clone();
        forged[2..4].copy_from_slice(&epoch.to_le_bytes());
        forged[30] ^= 1;
        let expected = if epoch <= Opener::AHEAD { Refused::Auth } else { Refused::Epoch };
        assert_eq!(opener.open(pair.start, &mut forged).unwrap_err(), expected, "{epoch}");
    }
    opener.open(pair.start, &mut packet.clone()).unwrap();
    assert_eq!(opener.epoch(), 0);
}

#[test]
fn a_superseded_epoch_is_taken_for_half_a_minute() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits { packets: 2, ..Limits::default() });
    let mut packets: Vec<_> = (0..4).map(|n| pair.packet(&mut sealer, &[n])).collect();
    let mut opener = pair.opener();
    opener.open(pair.start, &mut packets[2]).unwrap();
    let late = pair.start + Opener::OVERLAP - Duration::from_millis(1);
    opener.open(late, &mut packets[0]).unwrap();
    let over = pair.start + Opener::OVERLAP;
    assert_eq!(opener.open(over, &mut packets[1]).unwrap_err(), Refused::Epoch);
    opener.open(over + Duration::from_secs(3600), &mut packets[3]).unwrap();
}

#[test]
fn a_lane_goes_to_the_next_epoch_by_packets_by_bytes_and_by_age() {
    let none = Limits { packets: u64::MAX, bytes: u64::MAX, age: Duration::MAX };
    let second = Duration::from_secs(1);
    let len = (OVERHEAD + 100) as u64;
    for (limits, expected) in [
        (none, [0, 0, 0, 0, 0, 0]),
        (Limits { packets: 2, ..none }, [0, 0, 1, 1, 2, 2]),
        (Limits { bytes: 3 * len, ..none }, [0, 0, 0, 1, 1, 1]),
        (Limits { bytes: 3 * len - 1, ..none }, [0, 0, 1, 1, 2, 2]),
        (Limits { bytes: 0, ..none }, [0, 1, 2, 3, 4, 5]),
        (Limits { age: 4 * second, ..none }, [0, 0, 0, 0, 1, 1]),
    ] {
        let pair = pair();
        let mut sealer = pair.sealer(limits);
        let epochs = [0, 1, 2, 3, 4, 5].map(|n| {
            let mut packet = unsealed(&[0; 100]);
            sealer.seal(pair.start + n * second, &mut packet).unwrap();
            Header::decode(&packet).unwrap().epoch
        });
        assert_eq!(epochs, expected, "{limits:?}");
        assert_eq!(sealer.rekeys(), u64::from(expected[5]));
        assert_eq!(pair.dialler.sending_epoch(lane(0)), expected[5]);
    }
}

#[test]
fn the_control_lane_keeps_its_key_for_an_hour_at_least() {
    let pair = pair();
    let limits = Limits { age: Duration::from_secs(1), ..Limits::default() };
    let mut sealer = pair.dialler.sealer(Lane::CONTROL, Suite::Aes128Gcm, limits).unwrap();
    for (seconds, epoch) in [(0, 0), (3599, 0), (3600, 1)] {
        let now = pair.start + Duration::from_secs(seconds);
        sealer.seal(now, &mut unsealed(b"probe")).unwrap();
        assert_eq!(sealer.epoch(), epoch);
    }
}

#[test]
fn a_lane_is_lent_once_and_goes_on_counting_where_it_stopped() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits::default());
    let id = pair.dialler.id();
    for _ in 0..5 {
        pair.packet(&mut sealer, b"before");
    }
    let lent = pair.dialler.sealer(lane(0), Suite::Aes128Gcm, Limits::default()).unwrap_err();
    assert_eq!(lent, Lent { root: id, lane: lane(0) });
    drop(sealer);

    let mut sealer = pair.dialler.sealer(lane(0), Suite::Aes256Gcm, Limits::default()).unwrap();
    let mut packet = pair.packet(&mut sealer, b"after");
    let header = Header::decode(&packet).unwrap();
    assert_eq!((header.epoch, header.counter), (1, 5));
    pair.opener().open(pair.start, &mut packet).unwrap();

    let _opener = pair.opener();
    assert!(pair.acceptor.opener(lane(0), &Suite::ALL).is_err());
}

#[test]
fn a_sealer_without_epochs_refuses_for_good_and_leaves_the_packet_alone() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits { packets: 1, ..Limits::default() });
    let mut packet = unsealed(b"one of many");
    for _ in 0..=u16::MAX {
        sealer.seal(pair.start, &mut packet).unwrap();
    }
    let fresh = unsealed(b"one too many");
    for _ in 0..3 {
        let mut packet = fresh.clone();
        assert_eq!(sealer.seal(pair.start, &mut packet), Err(Unsealed::Exhausted));
        assert_eq!(packet, fresh);
    }
    drop(sealer);
    let mut sealer = pair.sealer(Limits::default());
    assert_eq!(sealer.seal(pair.start, &mut packet), Err(Unsealed::Exhausted));
}

#[test]
fn an_expired_session_seals_and_opens_nothing() {
    let pair = pair();
    let (mut sealer, mut opener) = (pair.sealer(Limits::default()), pair.opener());
    let mut packet = pair.packet(&mut sealer, b"in time");
    let over = pair.start + LIFE;
    assert_eq!(opener.open(over, &mut packet).unwrap_err(), Refused::Expired);
    assert_eq!(sealer.seal(over, &mut unsealed(b"late")), Err(Unsealed::Expired));
    assert_eq!(sealer.seal(over, &mut unsealed(b"late")), Err(Unsealed::Expired));
}

#[test]
fn what_has_no_size_of_a_packet_is_not_sealed() {
    let pair = pair();
    let mut sealer = pair.sealer(Limits::default());
    for len in [0, OVERHEAD - 1, 65536] {
        assert_eq!(sealer.seal(pair.start, &mut vec![0; len]), Err(Unsealed::Size { len }));
    }
    assert_eq!(sealer.counter(), 0);
    sealer.seal(pair.start, &mut vec![0; 65535]).unwrap();
}

#[test]
fn no_secret_is_printed() {
    let pair = pair();
    let (sealer, opener) = (pair.sealer(Limits::default()), pair.opener());
    let shown = format!("{:?} {sealer:?} {opener:?}", pair.dialler);
    let id = pair.dialler.id();
    assert!(shown.contains(&format!("RootId({id})")), "{shown}");
    assert!(!shown.contains(&"07".repeat(4)) && !shown.contains("7, 7, 7"), "{shown}");
}

/// What happens to a stream of packets on its way.
#[derive(Clone, Debug)]
struct Journey {
    limits: Limits,
    /// Of each packet: how many places it comes late, and how much later than the one before it was
    /// sealed.
    packets: Vec<(usize, Duration)>,
}

fn journey() -> impl Strategy<Value = Journey> {
    let limits = (1u64..40, 1u64..20_000, 1u64..10);
    let packet = (0usize..12, 0u64..300);
    (limits, prop::collection::vec(packet, 1..300)).prop_map(|((packets, bytes, age), journey)| {
        Journey {
            limits: Limits { packets, bytes, age: Duration::from_secs(age) },
            packets: journey
                .into_iter()
                .map(|(late, ms)| (late, Duration::from_millis(ms)))
                .collect(),
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn no_rekey_loses_a_packet_and_no_counter_is_used_twice(journey in journey()) {
        let pair = pair();
        let (mut sealer, mut opener) = (pair.sealer(journey.limits), pair.opener());
        let mut now = pair.start;
        let mut counters = BTreeSet::new();
        let mut sent = Vec::new();
        for (at, (late, pause)) in journey.packets.iter().enumerate() {
            now += *pause;
            let mut packet = unsealed(&at.to_le_bytes());
            sealer.seal(now, &mut packet).unwrap();
            let header = Header::decode(&packet).unwrap();
            prop_assert!(counters.insert(header.counter));
            sent.push((at + late, at, now, packet));
            if at % 50 == 49 {
                // A worker that restarts takes its lane up again.
                drop(sealer);
                sealer = pair.sealer(journey.limits);
            }
        }
        sent.sort_by_key(|&(place, at, ..)| (place, at));
        for (_, at, _, packet) in &mut sent {
            let opened = opener.open(now, packet);
            let opened = opened.map_err(|refused| TestCaseError::fail(refused.to_string()))?;
            prop_assert_eq!(body(opened), at.to_le_bytes());
        }
    }

    #[test]
    fn random_bytes_are_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..200),
        shape in 0..4,
    ) {
        let pair = pair();
        let mut opener = pair.opener();
        // The more of the header is right, the further a random packet gets.
        let header = [&[0x11, 0, 0, 0][..], &pair.acceptor.inbound_tag().to_le_bytes()].concat();
        let right = [0, 1, 4, 8][shape as usize].min(bytes.len());
        bytes[..right].copy_from_slice(&header[..right]);
        let before = bytes.clone();
        let refused = opener.open(pair.start, &mut bytes).unwrap_err();
        prop_assert!(refused == Refused::Auth || bytes == before, "{refused:?}");
        prop_assert!(!pair.acceptor.is_confirmed());
    }
}
