//! Pure projections of the cluster and this node's book: what others are told, what the kernel
//! shall hold, what names are answered.

mod balance;
mod names;
mod plane;
mod records;

pub(crate) use balance::{
    Acknowledged, balance, carried, drained, host_ports, is_local_only, overlap, source_in_force,
};
pub(crate) use names::weight;
pub use names::{Kernel, NamesProjection};
pub use plane::{PlaneContext, SealedPorts, mtu, plane, uplink_capacity};
pub(crate) use plane::{free_slot, gateway_ips};
pub use records::{Drained, OwnRecords, own_records, with_private};
