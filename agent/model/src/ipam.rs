use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
};

use serde::{Deserialize, Serialize};

use crate::NodeId;

/// An address family.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// The place of a block in its pool, counted from the pool's first block.
pub type BlockIndex = u32;

/// What is lent as one piece: a block of a pool, or one address.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    Block(Family, BlockIndex),
    Address(IpAddr),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(family, index) => write!(f, "{family} block {index}"),
            Self::Address(ip) => write!(f, "address {ip}"),
        }
    }
}

/// A lender's register for one unit: who has it, at which turn.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct Loan {
    pub to: NodeId,
    /// Grows by one with each loan of the unit.
    pub seq: u64,
    /// Addresses of the block that are lent one by one and so are not the borrower's.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub except: BTreeSet<IpAddr>,
}

/// All loans of one network by one lender. Written by the lender only, fsynced before it is
/// gossiped; a unit once lent stays listed, so that its `seq` is never forgotten.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct LoanRecord {
    #[serde(default, with = "pairs")]
    pub loans: BTreeMap<Unit, Loan>,
}

/// One unit as its borrower has it.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct Hold {
    /// The loan's turn that this hold answers.
    pub seq: u64,
    /// Addresses of the block that the borrower has given up, for the lender to lend singly.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ceded: BTreeSet<IpAddr>,
}

/// What one host holds and has released of one network's space. Written by that host only,
/// fsynced before it is gossiped.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct HoldRecord {
    #[serde(default, with = "pairs")]
    pub held: BTreeMap<Unit, Hold>,
    /// The highest turn that was given back, kept as long as the network exists.
    #[serde(default, with = "pairs")]
    pub released: BTreeMap<Unit, u64>,
}

/// What one host asks of the lenders of one network. Level-triggered: it stays until it is met.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct WantRecord {
    /// How many blocks the host would like to have on loan from each lender, in all.
    #[serde(default, with = "pairs")]
    pub blocks: BTreeMap<(NodeId, Family), u32>,
    /// Fixed addresses that are asked for.
    #[serde(default)]
    pub addresses: BTreeSet<IpAddr>,
    /// Families in which an endpoint waits for an address. Lenders meet these wants first, and
    /// other hosts give up blocks for them that they only keep in reserve.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub urgent: BTreeSet<Family>,
}

/// Maps with structured keys, as lists of pairs: JSON keys are strings only.
mod pairs {
    use std::collections::BTreeMap;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<K, V, S>(map: &BTreeMap<K, V>, serializer: S) -> Result<S::Ok, S::Error>
    where
        K: Serialize,
        V: Serialize,
        S: Serializer,
    {
        serializer.collect_seq(map)
    }

    pub(super) fn deserialize<'de, K, V, D>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
    where
        K: Deserialize<'de> + Ord,
        V: Deserialize<'de>,
        D: Deserializer<'de>,
    {
        Vec::<(K, V)>::deserialize(deserializer).map(|pairs| pairs.into_iter().collect())
    }
}
