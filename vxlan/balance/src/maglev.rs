//! Which backend a client gets: a table that every host fills alike.
//!
//! Maglev hashing (Eisenbud et al., NSDI 2016, §3.4) with weights. What a backend contributes is
//! its id and its weight alone, so the order in which a host learnt of them does not matter.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use weft_model::EndpointId;

/// Fills a table with backends, each as often as its weight says; empty if nobody has a weight.
///
/// A connection whose hash is `h` goes to `table[h % table.len()]`. Shares are exact to about one
/// slot. When one of several alike backends goes, its slots change hands, and few others: of all
/// clients 0.50 move if there were 2 backends, 0.35 of 3, 0.29 of 4, 0.15 of 10, 0.07 of 30. Only
/// at some numbers of backends, from 4 to 5 first, another size of table moves most of them.
pub fn maglev(weights: &BTreeMap<EndpointId, u16>, seed: u32) -> Vec<EndpointId> {
    let mut contenders: Vec<Contender> = weights
        .iter()
        .filter(|(_, weight)| **weight > 0)
        .map(|(&id, &weight)| Contender::new(id, weight, seed))
        .collect();
    let size = table_size(contenders.iter().map(|contender| contender.weight));
    // Sainte-Laguë: the next slot is for whom it makes the least too much.
    let turn = |contender: &Contender| {
        Reverse(((2 * contender.taken + 1) << 20) / u64::from(contender.weight))
    };
    let mut turns: BinaryHeap<_> = contenders
        .iter()
        .enumerate()
        .map(|(index, contender)| (turn(contender), Reverse(index)))
        .collect();
    let mut table: Vec<Option<EndpointId>> = vec![None; size];
    for _ in 0..size {
        let (_, index) = turns.pop().expect("a size is for contenders");
        let contender = &mut contenders[index.0];
        let slot = contender.next_free(&table);
        table[slot] = Some(contender.id);
        contender.taken += 1;
        turns.push((turn(contender), index));
    }
    table.into_iter().map(|slot| slot.expect("every slot is filled")).collect()
}

/// The number of slots for backends of these weights, none of them zero: one for a single backend,
/// otherwise one of few primes, because a table of another size is another table altogether.
///
/// The kernel keeps a slot in some 150 bytes. The smallest, 10 KiB, is what 10,000 services can
/// afford: it is exact to 3 % for two to four backends.
fn table_size(weights: impl Iterator<Item = u16> + Clone) -> usize {
    let total: u64 = weights.clone().map(u64::from).sum();
    let (count, least) = (weights.clone().count(), weights.min().unwrap_or(1).max(1));
    // As many as there would be if all had the weight of the lightest.
    let [one, few, some, many, most, all] = SIZES.map(|size| size as usize);
    match (count, total.div_ceil(u64::from(least))) {
        (0, _) => 0,
        (1, _) => one,
        (_, ..=4) => few,
        (_, ..=12) => some,
        (_, ..=40) => many,
        (..=400, _) => most,
        _ => all,
    }
}

/// The sizes that tables have.
pub(crate) const SIZES: [u32; 6] = [1, 61, 251, 1_021, 8_191, 65_521];

/// A backend that takes slots in an order of its own.
struct Contender {
    id: EndpointId,
    weight: u16,
    /// How many slots it has.
    taken: u64,
    offset: u64,
    skip: u64,
    /// How many slots of its order it has looked at.
    tried: u64,
}

impl Contender {
    fn new(id: EndpointId, weight: u16, seed: u32) -> Self {
        let (high, low) = id.as_bytes().split_at(8);
        let half = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        let offset = mix(half(high) ^ mix(half(low) ^ u64::from(seed)));
        Self { id, weight, taken: 0, offset, skip: mix(offset), tried: 0 }
    }

    /// The next slot of its order that nobody has. There must be one.
    fn next_free(&mut self, table: &[Option<EndpointId>]) -> usize {
        let size = table.len() as u64;
        let skip = match size {
            // One slot has no order.
            1 => 0,
            size => self.skip % (size - 1) + 1,
        };
        loop {
            let slot = (self.offset % size + self.tried * skip) % size;
            self.tried += 1;
            if table[slot as usize].is_none() {
                return slot as usize;
            }
        }
    }
}

/// The finaliser of splitmix64: every bit of the input moves every bit of the output.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(count: usize, salt: u64) -> Vec<EndpointId> {
        let id = |n: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&mix(n ^ mix(salt)).to_be_bytes());
            bytes[8..].copy_from_slice(&mix(!n ^ salt).to_be_bytes());
            EndpointId::from(bytes)
        };
        (0..count as u64).map(id).collect()
    }

    fn alike(ids: &[EndpointId]) -> BTreeMap<EndpointId, u16> {
        ids.iter().map(|&id| (id, 1)).collect()
    }

    fn shares(table: &[EndpointId]) -> BTreeMap<EndpointId, usize> {
        let mut shares = BTreeMap::new();
        for &id in table {
            *shares.entry(id).or_default() += 1;
        }
        shares
    }

    proptest! {
        #[test]
        fn every_backend_gets_its_share_to_about_a_slot(
            weights in proptest::collection::vec(0..5u16, 1..40),
            salt: u64,
            seed: u32,
        ) {
            let weights: BTreeMap<_, _> =
                ids(weights.len(), salt).into_iter().zip(weights).collect();
            let total: u64 = weights.values().map(|weight| u64::from(*weight)).sum();
            let table = maglev(&weights, seed);
            let shares = shares(&table);
            for (id, weight) in &weights {
                let found = shares.get(id).copied().unwrap_or_default() as f64;
                if *weight == 0 {
                    prop_assert_eq!(found, 0.0);
                    continue;
                }
                let fair = table.len() as f64 * f64::from(*weight) / total as f64;
                prop_assert!((found - fair).abs() <= 1.5, "{} of {}", found, fair);
            }
        }

        #[test]
        fn another_seed_is_another_table_and_the_same_seed_the_same(salt: u64, seed: u32) {
            let weights = alike(&ids(7, salt));
            prop_assert_eq!(maglev(&weights, seed), maglev(&weights.clone(), seed));
            prop_assert_ne!(maglev(&weights, seed), maglev(&weights, !seed));
        }
    }

    #[test]
    fn one_backend_of_n_takes_little_more_than_its_own_slots_with_it() {
        for (count, bound) in
            [(2, 0.51), (3, 0.40), (4, 0.33), (6, 0.22), (10, 0.19), (30, 0.08), (100, 0.035)]
        {
            let mut moved = 0.0;
            for salt in 0..20 {
                let ids = ids(count, salt);
                let before = maglev(&alike(&ids), 1);
                let after = maglev(&alike(&ids[1..]), 1);
                // Sizes may differ, as the kernel's remainders do: compare by hash.
                let hashes = 0..10_000u64;
                let differ = hashes.clone().filter(|hash| {
                    let scaled = |table: &[EndpointId]| {
                        table[((u64::from(mix(*hash) as u32) * table.len() as u64) >> 32) as usize]
                    };
                    scaled(&before) != scaled(&after)
                });
                moved += differ.count() as f64 / hashes.count() as f64 / 20.0;
            }
            assert!(moved < bound, "{count} backends: {moved} moved");
        }
    }

    #[test]
    fn a_single_backend_needs_no_table_and_none_has_none() {
        let ids = ids(2, 0);
        assert_eq!(maglev(&alike(&ids[..1]), 1), ids[..1]);
        assert_eq!(maglev(&[(ids[0], 0), (ids[1], 3)].into(), 1), ids[1..]);
        assert_eq!(maglev(&[(ids[0], 0)].into(), 1), []);
        assert_eq!(maglev(&BTreeMap::new(), 1), []);
    }
}
