use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use serde::{Deserialize, Serialize};
use weft_model::{
    AddressGrant, EndpointId, Family, Hold, HoldRecord, Loan, LoanRecord, Network, NetworkId,
    NodeId, Unit, WantRecord,
};

use crate::Layout;

/// All that one node must remember of one network's addresses, as one value for one file.
///
/// A node that comes back with less than it published gives out duplicates: forgetting `released`
/// lets it use a loan twice, forgetting `loans` lets it lend a unit twice. So the value is synced
/// to disk before its registers leave the node, and a node that has lost it needs a new identity.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct State {
    pub(crate) version: u32,
    pub(crate) network: NetworkId,
    pub(crate) node: NodeId,
    pub(crate) loans: LoanRecord,
    pub(crate) holds: HoldRecord,
    pub(crate) wants: WantRecord,
    pub(crate) leases: BTreeMap<IpAddr, Lease>,
    /// When the addresses held here were last given back, or, lent singly, arrived: seconds of
    /// this node's clock.
    pub(crate) last_used: BTreeMap<IpAddr, u64>,
}

/// An address in use by an endpoint of this node.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub struct Lease {
    pub endpoint: EndpointId,
    pub grant: AddressGrant,
}

/// A change of one register. Every rule yields these, and nothing else changes the registers.
#[derive(Clone, Debug)]
pub(crate) enum Move {
    Lend {
        unit: Unit,
        to: NodeId,
        except: BTreeSet<IpAddr>,
    },
    Start {
        unit: Unit,
        seq: u64,
        except: BTreeSet<IpAddr>,
    },
    Cede {
        block: Unit,
        ip: IpAddr,
    },
    /// Ends a hold: it is given back, or the lender has taken it.
    End {
        unit: Unit,
    },
    Want(WantRecord),
}

impl State {
    pub(crate) const VERSION: u32 = 1;

    pub(crate) fn new(network: NetworkId, node: NodeId) -> Self {
        Self {
            version: Self::VERSION,
            network,
            node,
            loans: LoanRecord::default(),
            holds: HoldRecord::default(),
            wants: WantRecord::default(),
            leases: BTreeMap::new(),
            last_used: BTreeMap::new(),
        }
    }

    pub(crate) fn apply(&mut self, network: &Network, step: Move, now: u64) {
        match step {
            Move::Lend { unit, to, except } => {
                let seq = self.loans.loans.get(&unit).map_or(0, |loan| loan.seq) + 1;
                self.loans.loans.insert(unit, Loan { to, seq, except });
            }
            Move::Start { unit, seq, except } => {
                // What was lent singly before is out of this loan for good, so it counts as ceded
                // from the start: no later view is needed to know it.
                self.holds.held.insert(unit, Hold { seq, ceded: except });
                if let Unit::Address(ip) = unit {
                    self.last_used.insert(ip, now);
                }
            }
            Move::Cede { block, ip } => {
                let hold = self.holds.held.get_mut(&block).expect("only a held block is ceded of");
                hold.ceded.insert(ip);
                self.last_used.remove(&ip);
            }
            Move::End { unit } => {
                if let Some(hold) = self.holds.held.remove(&unit) {
                    self.holds.released.insert(unit, hold.seq);
                }
                let held = |ip| self.holder_of(network, ip).is_some();
                let forgotten: Vec<_> =
                    self.last_used.keys().copied().filter(|&ip| !held(ip)).collect();
                for ip in forgotten {
                    self.last_used.remove(&ip);
                }
            }
            Move::Want(wants) => self.wants = wants,
        }
    }

    /// The hold under which this node may use `ip`, and its turn.
    pub(crate) fn holder_of(&self, network: &Network, ip: IpAddr) -> Option<(Unit, u64)> {
        let single = Unit::Address(ip);
        if let Some(hold) = self.holds.held.get(&single) {
            return Some((single, hold.seq));
        }
        let block = Layout::of(network).block_of(ip)?;
        let hold = self.holds.held.get(&block)?;
        (!hold.ceded.contains(&ip)).then_some((block, hold.seq))
    }

    /// The blocks of one family that are held.
    pub(crate) fn blocks(&self, family: Family) -> impl Iterator<Item = (u32, &Hold)> {
        self.holds.held.iter().filter_map(move |(&unit, hold)| match unit {
            Unit::Block(of, index) => (of == family).then_some((index, hold)),
            Unit::Address(_) => None,
        })
    }

    pub(crate) fn lease_of(&self, endpoint: EndpointId, family: Family) -> Option<&Lease> {
        self.leases
            .values()
            .find(|lease| lease.endpoint == endpoint && Family::of(lease.grant.ip) == family)
    }

    /// Whether the hold that a lease rests on is still this node's.
    pub(crate) fn is_backed(&self, lease: &Lease) -> bool {
        let AddressGrant { unit, seq, .. } = lease.grant;
        self.holds.held.get(&unit).is_some_and(|hold| hold.seq == seq)
    }

    /// Whether `ip` was given back less than `rest` seconds ago.
    pub(crate) fn is_resting(&self, ip: IpAddr, rest: u64, now: u64) -> bool {
        self.last_used.get(&ip).is_some_and(|&since| now < since.saturating_add(rest))
    }
}
