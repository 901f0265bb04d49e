//! Frontends' tables in the kernel: which of their slots leads to which backend.

use std::{cmp::Ordering, collections::BTreeMap, net::IpAddr, time::Duration};

use weft_model::{EndpointId, Family, Spread};

use crate::{
    Backend, Frontend, Pool,
    expression::protocol_of,
    jhash::jhash,
    maglev::{SIZES, maglev},
    set::{Element, Key, Kind, PARTS, Set, octets},
};

/// Tables of one size whose slots are drawn in one way.
///
/// The tables of all frontends are in one map, by frontend and slot. Nothing says of which class a
/// frontend's table is but the numbers of its slots: a connection draws one of each class in turn,
/// and finds the one that there is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Class {
    pub(crate) spread: Spread,
    pub(crate) size: u32,
    /// The number of its first slot.
    pub(crate) first: u32,
}

/// Where a connection is sent; the port that it has if there is none.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct Target {
    pub(crate) ip: IpAddr,
    pub(crate) port: Option<u16>,
}

/// A table by the numbers of its slots, in their order.
pub(crate) type Slots = Vec<(u32, Target)>;

/// What differs between two tables of one frontend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Turnover {
    pub(crate) frontend: Frontend,
    /// A slot that leads elsewhere from now on is among both.
    pub(crate) gone: Vec<u32>,
    pub(crate) new: Slots,
}

impl Class {
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        // Of one slot there is nothing to draw.
        let random = SIZES.into_iter().filter(|size| *size > 1);
        let hash = SIZES.into_iter().map(|size| (Spread::Hash, size));
        let classes = hash.chain(random.map(|size| (Spread::Random, size)));
        classes.zip(0..).map(|((spread, size), index)| Self { spread, size, first: index << BITS })
    }

    fn of(spread: Spread, size: usize) -> Self {
        let fits = |class: &Self| {
            class.size as usize == size && (class.spread == spread || class.size == 1)
        };
        Self::all().find(fits).expect("every table has one of the sizes")
    }
}

impl Target {
    /// Its bytes as data of a map.
    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut bytes = octets(self.ip);
        if let Some(port) = self.port {
            bytes.extend(port.to_be_bytes());
            bytes.extend([0, 0]);
        }
        bytes
    }
}

impl Turnover {
    pub(crate) fn new(frontend: Frontend, before: &Slots, after: &Slots) -> Self {
        let (mut gone, mut new) = (Vec::new(), Vec::new());
        let (mut left, mut right) = (before.iter().peekable(), after.iter().peekable());
        loop {
            let order = match (left.peek(), right.peek()) {
                (None, None) => return Self { frontend, gone, new },
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some((held, _)), Some((wanted, _))) => held.cmp(wanted),
            };
            let held = if order.is_le() { left.next() } else { None };
            let wanted = if order.is_ge() { right.next() } else { None };
            if held != wanted {
                gone.extend(held.map(|(slot, _)| *slot));
                new.extend(wanted.copied());
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.new.is_empty()
    }
}

/// How long a pool remembers clients, if it does.
pub(crate) fn memory(pool: &Pool) -> Option<Duration> {
    pool.affinity.filter(|timeout| !timeout.is_zero())
}

/// The table of a frontend; none if it remembers clients, which takes chains of its own.
pub(crate) fn slots(frontend: Frontend, pool: &Pool, seed: u32) -> Slots {
    if memory(pool).is_some() {
        return Slots::new();
    }
    let targets = targets(frontend, pool, seed);
    match targets.len() {
        0 => Slots::new(),
        size => (Class::of(pool.spread, size).first..).zip(targets).collect(),
    }
}

/// Whom each slot of a frontend's table leads to. Backends of another family than its own are left
/// out.
pub(crate) fn targets(frontend: Frontend, pool: &Pool, seed: u32) -> Vec<Target> {
    let weights: BTreeMap<EndpointId, u16> =
        own(frontend, pool).map(|(id, backend)| (id, backend.weight)).collect();
    let table = maglev(&weights, seed);
    table.iter().map(|id| target(frontend, &pool.backends[id])).collect()
}

/// The backends that are of the frontend's family.
pub(crate) fn own(frontend: Frontend, pool: &Pool) -> impl Iterator<Item = (EndpointId, &Backend)> {
    let family = Family::of(frontend.ip);
    let backends = pool.backends.iter().map(|(id, backend)| (*id, backend));
    backends.filter(move |(_, backend)| Family::of(backend.ip) == family)
}

pub(crate) fn target(frontend: Frontend, backend: &Backend) -> Target {
    // Where every port is translated, every port is kept.
    let port = frontend.port.map(|port| backend.port.unwrap_or(port));
    Target { ip: backend.ip, port }
}

/// The map that a frontend's table is in, and what the keys of its slots begin with.
pub(crate) fn base(frontend: Frontend, seed: u32) -> Element {
    let Frontend { ip, protocol, port } = frontend;
    let kind = if port.is_some() { Kind::PortSlots } else { Kind::AddressSlots };
    let element = Element::new(kind(0), ip, protocol, port.unwrap_or_default());
    let part = jhash(&element.key, PARTS.into(), seed) as u8;
    let set = Set { kind: kind(part), ..element.set };
    Element { set, ..element }
}

/// What a slot's key ends with. Numbers that the kernel computes are in its own byte order.
pub(crate) fn tail(slot: u32) -> [u8; 4] {
    slot.to_ne_bytes()
}

/// Whose slot an element of a map is, and where it leads; none if it is nothing of ours.
pub(crate) fn parse(set: Set, key: &[u8], value: &[u8]) -> Option<(Frontend, u32, Target)> {
    let (ip, rest) = address(set.family, key)?;
    let (&[number, ..], rest) = rest.split_first_chunk::<4>()?;
    let protocol = protocol_of(number)?;
    let (port, slot) = match set.key() {
        Key::AddressProtocolPortSlot => {
            let (&[high, low, ..], slot) = rest.split_first_chunk::<4>()?;
            (Some(u16::from_be_bytes([high, low])), slot)
        }
        _ => (None, rest),
    };
    let slot = u32::from_ne_bytes(slot.try_into().ok()?);
    let (to, rest) = address(set.family, value)?;
    let target_port = rest.first_chunk().map(|bytes| u16::from_be_bytes(*bytes));
    Some((Frontend { ip, protocol, port }, slot, Target { ip: to, port: target_port }))
}

fn address(family: Family, bytes: &[u8]) -> Option<(IpAddr, &[u8])> {
    match family {
        Family::V4 => bytes.split_first_chunk::<4>().map(|(ip, rest)| ((*ip).into(), rest)),
        Family::V6 => bytes.split_first_chunk::<16>().map(|(ip, rest)| ((*ip).into(), rest)),
    }
}

/// Enough for the slots of the largest table.
const BITS: u32 = 17;

#[cfg(test)]
mod tests {
    use weft_model::Protocol;

    use super::*;

    fn frontend(ip: &str, port: Option<u16>) -> Frontend {
        Frontend { ip: ip.parse().unwrap(), protocol: Protocol::Udp, port }
    }

    #[test]
    fn classes_have_no_slot_in_common() {
        let classes: Vec<_> = Class::all().collect();
        assert_eq!(classes.len(), 2 * SIZES.len() - 1);
        for pair in classes.windows(2) {
            assert!(pair[0].first + pair[0].size <= pair[1].first, "{pair:?}");
        }
        assert_eq!(Class::of(Spread::Random, 1), Class::of(Spread::Hash, 1));
        assert_ne!(Class::of(Spread::Random, 61), Class::of(Spread::Hash, 61));
    }

    #[test]
    fn what_is_written_is_read_again() {
        for (frontend, to) in [
            (frontend("10.1.0.200", Some(53)), "10.1.0.7"),
            (frontend("10.1.0.200", None), "10.1.0.7"),
            (frontend("fd00:1::200", Some(53)), "fd00:1::7"),
            (frontend("fd00:1::200", None), "fd00:1::7"),
        ] {
            let target = Target { ip: to.parse().unwrap(), port: frontend.port.map(|_| 5353) };
            let Element { set, mut key, .. } = base(frontend, 1);
            key.extend(tail(131_075));
            assert_eq!(parse(set, &key, &target.bytes()), Some((frontend, 131_075, target)));
            assert_eq!(parse(set, &key[1..], &target.bytes()), None);
        }
    }

    #[test]
    fn a_turnover_is_what_differs() {
        let to = |n: u8| Target { ip: [10, 1, 0, n].into(), port: None };
        let turnover = |before: &[(u32, u8)], after: &[(u32, u8)]| {
            let table = |slots: &[(u32, u8)]| slots.iter().map(|(s, n)| (*s, to(*n))).collect();
            let frontend = frontend("10.1.0.200", None);
            let Turnover { gone, new, .. } = Turnover::new(frontend, &table(before), &table(after));
            (gone, new)
        };
        assert_eq!(turnover(&[(1, 1), (2, 2)], &[(1, 1), (2, 2)]), (vec![], vec![]));
        assert_eq!(turnover(&[(1, 1), (2, 2)], &[(1, 1), (2, 3)]), (vec![2], vec![(2, to(3))]));
        assert_eq!(turnover(&[(1, 1), (2, 2)], &[(2, 2), (5, 5)]), (vec![1], vec![(5, to(5))]));
        assert_eq!(turnover(&[], &[(4, 1)]), (vec![], vec![(4, to(1))]));
        assert_eq!(turnover(&[(4, 1)], &[]), (vec![4], vec![]));
    }
}
