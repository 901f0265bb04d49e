use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use weft_model::{BlockIndex, Family, HoldRecord, Loan, LoanRecord, NodeId, Unit, WantRecord};

use crate::{Layout, State, View};

/// The registers as one node has them: its own from its state, never from what others echo, the
/// rest from its view.
#[derive(Clone, Copy)]
pub(crate) struct Sight<'a> {
    pub(crate) layout: Layout<'a>,
    pub(crate) view: &'a View<'a>,
    /// The node's own registers; none for a mere observer, which has all in its view.
    pub(crate) own: Option<&'a State>,
}

impl<'a> Sight<'a> {
    /// The lender's register for `unit`.
    pub(crate) fn loan(&self, unit: Unit) -> Option<&'a Loan> {
        self.loans(self.layout.lender(unit)?)?.loans.get(&unit)
    }

    /// The loan of `unit` that still binds its lender: neither given back by the borrower, as far
    /// as known here, nor void by the borrower's removal.
    pub(crate) fn outstanding(&self, unit: Unit) -> Option<&'a Loan> {
        self.loan(unit).filter(|loan| self.binds(unit, loan))
    }

    /// The node that may give out `ip`, as far as known here: it has the address on loan, or the
    /// block around it, which was lent with the address and of which it has not ceded it. Only an
    /// address without a borrower may be lent.
    pub(crate) fn borrower_of(&self, ip: IpAddr) -> Option<NodeId> {
        if let Some(loan) = self.outstanding(Unit::Address(ip)) {
            return Some(loan.to);
        }
        let block = self.layout.block_of(ip)?;
        let loan = self.outstanding(block)?;
        let hold = self.holds(loan.to).and_then(|holds| holds.held.get(&block));
        let ceded = hold.is_some_and(|hold| hold.seq == loan.seq && hold.ceded.contains(&ip));
        (!ceded && !loan.except.contains(&ip)).then_some(loan.to)
    }

    /// The addresses of a block that its lender may not put into a loan of the block, if the
    /// block can be lent: it is free and has usable addresses beside them.
    pub(crate) fn exceptions(&self, family: Family, index: BlockIndex) -> Option<BTreeSet<IpAddr>> {
        if self.outstanding(Unit::Block(family, index)).is_some() {
            return None;
        }
        let (except, rest): (BTreeSet<_>, BTreeSet<_>) = self
            .layout
            .usable_in(family, index)
            .partition(|&ip| self.outstanding(Unit::Address(ip)).is_some());
        (!rest.is_empty()).then_some(except)
    }

    /// How many blocks of `lender` could be lent now, as far as known here.
    pub(crate) fn free_blocks(&self, lender: NodeId, family: Family) -> usize {
        let share = self.layout.share_size(lender, family);
        let Some(record) = self.loans(lender) else { return share };

        // A block whose addresses are all lent one by one is as good as lent.
        let touched: BTreeSet<BlockIndex> = record
            .loans
            .keys()
            .filter_map(|&unit| match unit {
                Unit::Block(of, index) => (of == family).then_some(index),
                Unit::Address(ip) => match self.layout.block_of(ip)? {
                    Unit::Block(of, index) => (of == family).then_some(index),
                    Unit::Address(_) => None,
                },
            })
            .filter(|&index| self.layout.lender(Unit::Block(family, index)) == Some(lender))
            .collect();
        share - touched.into_iter().filter(|&b| self.is_taken(family, b)).count()
    }

    /// How many blocks of `lender` each node has on loan.
    pub(crate) fn borrowed(&self, lender: NodeId, family: Family) -> BTreeMap<NodeId, usize> {
        let mut borrowed = BTreeMap::new();
        let loans = self.loans(lender).into_iter().flat_map(|record| &record.loans);
        for (&unit, loan) in loans {
            let of_family = matches!(unit, Unit::Block(of, _) if of == family);
            if of_family && self.layout.lender(unit) == Some(lender) && self.binds(unit, loan) {
                *borrowed.entry(loan.to).or_default() += 1;
            }
        }
        borrowed
    }

    /// How many blocks the live nodes other than this one want of `lender` beyond what they have.
    pub(crate) fn unmet(&self, lender: NodeId, family: Family, need: Need) -> usize {
        let borrowed = self.borrowed(lender, family);
        self.wants()
            .filter(|(node, want)| {
                Some(*node) != self.me() && (need == Need::Any || want.urgent.contains(&family))
            })
            .map(|(node, want)| {
                let wanted = want.blocks.get(&(lender, family)).copied().unwrap_or(0);
                (wanted as usize).saturating_sub(borrowed.get(&node).copied().unwrap_or(0))
            })
            .sum()
    }

    /// How many blocks are wanted by other nodes in need, of lenders that have none free.
    pub(crate) fn starving(&self, family: Family) -> usize {
        let lenders: BTreeSet<NodeId> = self.layout.network().lenders.iter().copied().collect();
        let short = |lender| {
            let free = self.free_blocks(lender, family);
            self.unmet(lender, family, Need::Urgent).saturating_sub(free)
        };
        lenders.into_iter().map(short).sum()
    }

    /// The wants of the live nodes, this one included.
    pub(crate) fn wants(&self) -> impl Iterator<Item = (NodeId, &'a WantRecord)> {
        let me = self.me();
        let others = self.view.wants.iter().map(|(&node, &want)| (node, want));
        let own = self.own.map(|own| (own.node, &own.wants));
        others
            .filter(move |&(node, _)| Some(node) != me && self.view.live.contains(&node))
            .chain(own)
            .filter(|(node, _)| !self.view.revoked.contains(node))
    }

    pub(crate) fn loans(&self, lender: NodeId) -> Option<&'a LoanRecord> {
        match self.own {
            Some(own) if own.node == lender => Some(&own.loans),
            _ => self.view.loans.get(&lender).copied(),
        }
    }

    pub(crate) fn holds(&self, node: NodeId) -> Option<&'a HoldRecord> {
        match self.own {
            Some(own) if own.node == node => Some(&own.holds),
            _ => self.view.holds.get(&node).copied(),
        }
    }

    /// Whether `node` can be asked: it is this node, or a live one.
    pub(crate) fn answers(&self, node: NodeId) -> bool {
        let live = self.me() == Some(node) || self.view.live.contains(&node);
        live && !self.view.revoked.contains(&node)
    }

    pub(crate) fn me(&self) -> Option<NodeId> {
        self.own.map(|own| own.node)
    }

    fn binds(&self, unit: Unit, loan: &Loan) -> bool {
        let released = self
            .holds(loan.to)
            .and_then(|holds| holds.released.get(&unit))
            .is_some_and(|&seq| seq >= loan.seq);
        !released && !self.view.revoked.contains(&loan.to)
    }

    fn is_taken(&self, family: Family, index: BlockIndex) -> bool {
        let rest_is_empty = || self.exceptions(family, index).is_none();
        self.layout.usable_in(family, index).next().is_some() && rest_is_empty()
    }
}

/// Which wants count.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Need {
    Any,
    Urgent,
}
