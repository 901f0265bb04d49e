use std::{collections::BTreeSet, net::IpAddr};

use weft_model::{BlockIndex, Family, Network, NodeId, Pool, Unit};

/// How the address space of a network is cut into units, and which node lends which unit: a pure
/// function of the network's definition, so every node has the same.
#[derive(Clone, Copy, Debug)]
pub struct Layout<'a> {
    network: &'a Network,
}

impl<'a> Layout<'a> {
    pub fn of(network: &'a Network) -> Self {
        Self { network }
    }

    pub fn network(self) -> &'a Network {
        self.network
    }

    /// The blocks of the pool of `family`, if the network has one.
    pub fn blocks(self, family: Family) -> Option<Blocks<'a>> {
        self.network.pool(family).map(Blocks::of)
    }

    /// Whether an endpoint may have `ip`: a host address of a pool that is not reserved.
    pub fn is_usable(self, ip: IpAddr) -> bool {
        self.network.pool_of(ip).is_some_and(|pool| pool.subnet.is_host(ip) && !reserved(pool, ip))
    }

    /// The block that `ip` lies in; none outside the range that is cut into blocks.
    pub fn block_of(self, ip: IpAddr) -> Option<Unit> {
        let blocks = self.blocks(Family::of(ip))?;
        Some(Unit::Block(Family::of(ip), blocks.index_of(ip)?))
    }

    /// Whether `ip` is one of the addresses of `unit`.
    pub fn covers(self, unit: Unit, ip: IpAddr) -> bool {
        match unit {
            Unit::Block(..) => self.block_of(ip) == Some(unit),
            Unit::Address(single) => single == ip && self.network.pool_of(ip).is_some(),
        }
    }

    /// The one node that lends `unit`, for as long as the network exists. None if the network has
    /// no such unit.
    pub fn lender(self, unit: Unit) -> Option<NodeId> {
        let lenders = &self.network.lenders;
        let at = |turn: u64| lenders[(turn % lenders.len() as u64) as usize];
        match unit {
            Unit::Block(family, index) => {
                (index < self.blocks(family)?.count).then(|| at(index.into()))
            }
            Unit::Address(ip) => {
                self.network.pool_of(ip)?;
                match self.block_of(ip) {
                    Some(block) => self.lender(block),
                    None => Some(at(self.hash(ip))),
                }
            }
        }
    }

    /// The lenders in the order in which `node` asks them: itself first, then round from a place
    /// that its id gives, so that the nodes spread over the lenders.
    pub fn lenders_for(self, node: NodeId) -> Vec<NodeId> {
        let lenders = &self.network.lenders;
        let first = leading_u64(node.as_bytes()) % lenders.len() as u64;
        let mut order = Vec::with_capacity(lenders.len());
        let round = lenders.iter().cycle().skip(first as usize).take(lenders.len());
        for &lender in lenders.iter().filter(|&&lender| lender == node).chain(round) {
            if !order.contains(&lender) {
                order.push(lender);
            }
        }
        order
    }

    /// The addresses of a block that an endpoint may have, in order.
    pub fn usable_in(self, family: Family, index: BlockIndex) -> impl Iterator<Item = IpAddr> {
        let blocks = self.blocks(family).filter(|blocks| index < blocks.count);
        let span = blocks.map_or(0..0, |blocks| blocks.span(index));
        span.map(move |number| address(family, number)).filter(move |&ip| self.is_usable(ip))
    }

    /// The blocks that `lender` lends, in order.
    pub(crate) fn share(
        self,
        lender: NodeId,
        family: Family,
    ) -> impl Iterator<Item = BlockIndex> + use<'a> {
        let count = self.blocks(family).map_or(0, |blocks| blocks.count);
        let lenders = &self.network.lenders;
        (0..count).filter(move |&index| lenders[index as usize % lenders.len()] == lender)
    }

    /// How many blocks `lender` lends that have at least one usable address.
    pub(crate) fn share_size(self, lender: NodeId, family: Family) -> usize {
        let Some(blocks) = self.blocks(family) else { return 0 };
        let lenders = &self.network.lenders;
        let count = blocks.count as usize;
        let places = lenders.iter().enumerate().filter(|(_, other)| **other == lender);
        let all: usize =
            places.map(|(place, _)| count.saturating_sub(place).div_ceil(lenders.len())).sum();
        let barren = self.barren_blocks(family).into_iter();
        all - barren.filter(|&b| self.lender(Unit::Block(family, b)) == Some(lender)).count()
    }

    /// How many blocks the pool has that have at least one usable address.
    pub(crate) fn usable_blocks(self, family: Family) -> usize {
        let count = self.blocks(family).map_or(0, |blocks| blocks.count as usize);
        count - self.barren_blocks(family).len()
    }

    /// Blocks in which no address is usable. Only those that touch an unusable address can be.
    fn barren_blocks(self, family: Family) -> BTreeSet<BlockIndex> {
        let Some(pool) = self.network.pool(family) else { return BTreeSet::new() };
        let net = pool.subnet.net();
        let unusable = pool.reserved().into_iter().chain([net.network(), net.broadcast()]);
        unusable
            .filter_map(|ip| Blocks::of(pool).index_of(ip))
            .filter(|&index| self.usable_in(family, index).next().is_none())
            .collect()
    }

    fn hash(self, ip: IpAddr) -> u64 {
        let digest = match ip {
            IpAddr::V4(ip) => self.network.id.digest(&ip.octets()),
            IpAddr::V6(ip) => self.network.id.digest(&ip.octets()),
        };
        leading_u64(&digest)
    }
}

/// The aligned, equal blocks of one pool's dynamic range.
#[derive(Clone, Copy, Debug)]
pub struct Blocks<'a> {
    pool: &'a Pool,
    /// The first address of the range, as a number.
    base: u128,
    /// Block size, as a power of two.
    size_log2: u32,
    count: BlockIndex,
}

impl<'a> Blocks<'a> {
    /// Cuts a range of 2^n addresses into 32 blocks or more, where it has that many addresses.
    ///
    /// IPv4: 8 addresses a block in a /24, twice as many for each four-fold size, 64 from /18 on.
    /// IPv6: 256 addresses, and no more than 2^16 blocks: what lies above them in the range is
    /// given out only by number.
    fn of(pool: &'a Pool) -> Self {
        let range = pool.range.unwrap_or_else(|| pool.subnet.net());
        let range_log2 = u32::from(range.max_prefix_len() - range.prefix_len());
        let thirty_second = range_log2.saturating_sub(5);
        let (size_log2, most_log2) = match pool.subnet.family() {
            Family::V4 if range_log2 < 8 => (thirty_second, 32),
            Family::V4 => (3 + (range_log2.min(14) - 8) / 2, 32),
            Family::V6 => (thirty_second.min(8), 16),
        };
        let count = 1 << (range_log2 - size_log2).min(most_log2);
        Self { pool, base: number(range.network()), size_log2, count }
    }

    pub fn pool(&self) -> &'a Pool {
        self.pool
    }

    pub fn count(&self) -> u32 {
        self.count
    }

    /// Addresses a block, the unusable ones included.
    pub fn size(&self) -> u32 {
        1 << self.size_log2
    }

    fn index_of(&self, ip: IpAddr) -> Option<BlockIndex> {
        if !self.pool.subnet.contains(ip) {
            return None;
        }
        let index = number(ip).checked_sub(self.base)? >> self.size_log2;
        BlockIndex::try_from(index).ok().filter(|&index| index < self.count)
    }

    /// The addresses of one block, as numbers.
    fn span(&self, index: BlockIndex) -> std::ops::Range<u128> {
        let first = self.base + (u128::from(index) << self.size_log2);
        first..first + u128::from(self.size())
    }
}

pub(crate) fn reserved(pool: &Pool, ip: IpAddr) -> bool {
    pool.gateway == ip || pool.aux.values().any(|&aux| aux == ip)
}

fn number(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u32::from(ip).into(),
        IpAddr::V6(ip) => ip.into(),
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        Family::V4 => {
            IpAddr::V4(u32::try_from(number).expect("a block lies inside its subnet").into())
        }
        Family::V6 => IpAddr::V6(number.into()),
    }
}

fn leading_u64(bytes: &[u8]) -> u64 {
    let head = bytes.first_chunk().expect("identifiers and digests have at least 8 bytes");
    u64::from_be_bytes(*head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_cut_into_many_equal_blocks() {
        for (subnet, range, size, count) in [
            ("10.0.0.0/29", None, 1, 8),
            ("10.0.0.0/27", None, 1, 32),
            ("10.0.0.0/26", None, 2, 32),
            ("10.0.0.0/25", None, 4, 32),
            ("10.0.0.0/24", None, 8, 32),
            ("10.0.0.0/20", None, 32, 128),
            ("10.0.0.0/18", None, 64, 256),
            ("10.0.0.0/16", None, 64, 1024),
            ("10.0.0.0/8", None, 64, 1 << 18),
            ("10.0.0.0/16", Some("10.0.7.0/24"), 8, 32),
            ("10.0.0.0/24", Some("10.0.0.9/32"), 1, 1),
            ("fd00::/120", None, 8, 32),
            ("fd00::/64", None, 256, 1 << 16),
            ("fd00::/32", None, 256, 1 << 16),
        ] {
            let network = network(subnet, range, 1);
            let blocks = Blocks::of(&network.pools[0]);
            assert_eq!((blocks.size(), blocks.count()), (size, count), "{subnet} {range:?}");
        }
    }

    #[test]
    fn every_address_has_one_lender_and_every_block_is_in_one_share() {
        for (subnet, range) in [
            ("10.0.0.0/29", None),
            ("10.0.0.0/24", None),
            ("10.0.0.0/24", Some("10.0.0.128/26")),
            ("fd00::/120", None),
        ] {
            let network = network(subnet, range, 3);
            let layout = Layout::of(&network);
            let pool = &network.pools[0];
            let family = pool.subnet.family();
            for ip in (0..).map_while(|offset| pool.subnet.nth(offset)) {
                let single = layout.lender(Unit::Address(ip)).unwrap();
                assert!(network.lenders.contains(&single));
                if let Some(block) = layout.block_of(ip) {
                    assert_eq!(layout.lender(block), Some(single), "{ip}");
                    assert!(layout.covers(block, ip));
                }
            }
            for &lender in &network.lenders {
                let fruitful = |index: &u32| layout.usable_in(family, *index).next().is_some();
                let share = layout.share(lender, family).filter(fruitful);
                assert_eq!(share.count(), layout.share_size(lender, family), "{subnet}");
            }
        }
    }

    #[test]
    fn what_is_not_in_the_network_has_no_lender() {
        let network = network("10.0.0.0/24", None, 2);
        let layout = Layout::of(&network);
        for unit in [
            Unit::Block(Family::V4, 32),
            Unit::Block(Family::V6, 0),
            Unit::Address("10.0.1.0".parse().unwrap()),
            Unit::Address("fd00::1".parse().unwrap()),
        ] {
            assert_eq!(layout.lender(unit), None, "{unit}");
        }
    }

    #[test]
    fn a_node_asks_itself_first_and_each_lender_once() {
        let network = network("10.0.0.0/24", None, 3);
        let layout = Layout::of(&network);
        for &lender in &network.lenders {
            let order = layout.lenders_for(lender);
            assert_eq!(order[0], lender);
            assert_eq!(BTreeSet::from_iter(order), BTreeSet::from_iter(network.lenders.clone()));
        }
    }

    fn network(subnet: &str, range: Option<&str>, lenders: u8) -> Network {
        let net: weft_model::Subnet = subnet.parse().unwrap();
        let lenders: Vec<_> = (1..=lenders).map(|n| NodeId::from([n; 16])).collect();
        let pool = serde_json::json!({
            "subnet": subnet, "range": range, "gateway": net.first_host(),
        });
        serde_json::from_value(serde_json::json!({
            "id": "0a".repeat(16), "name": "app", "vni": 5000, "pools": [pool],
            "creator": lenders[0], "lenders": lenders,
        }))
        .unwrap()
    }
}
