//! Address management of one network on one node, without a store and without consensus.
//!
//! The address space is cut into units ([`Layout`]). Every unit has one lender by declaration,
//! and only the lender lends it. Two registers with one writer each say who has a unit: the
//! lender's loan `{to, seq}`, and the borrower's hold or release of that turn. A unit is lent
//! again only after its borrower has released the turn, or an operator has removed the borrower;
//! it is begun only if its turn is newer than every turn released. Both sides sync their registers
//! to disk before anyone sees them, so neither partitions nor crashes nor lost, late or repeated
//! messages give one address to two nodes.
//!
//! An address asked for by number may lie in a block that another node holds. That node cedes it
//! for the rest of the block's turn, and the lender then lends it singly. While such a loan is
//! out, the address is excepted from further loans of the block.
//!
//! [`Ipam`] is the state machine of one node; [`accepts`] is the rule by which every other node
//! judges a claimed address. Nothing here does IO: time, views and disk are the caller's.

mod borrower;
mod demand;
mod layout;
mod lender;
mod machine;
mod observer;
mod refusal;
mod sight;
mod state;
mod usage;
mod view;

pub use demand::Ask;
pub use layout::{Blocks, Layout};
pub use machine::{Ipam, Records, RestoreError, Step, Timing, Unsaved};
pub use observer::accepts;
pub use refusal::{Refusal, Shortage};
pub use state::{Lease, State};
pub use usage::Usage;
pub use view::View;
