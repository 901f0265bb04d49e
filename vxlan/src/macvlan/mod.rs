//! Networks whose ports are parts of an interface of the host: each sandbox has a macvlan interface,
//! and nothing of it is in the network's namespace or the host's.
//!
//! So nothing there tells that a sandbox has ended. What does is the number that the network's
//! namespace gives to the sandbox: the kernel takes it back, and says so, when the sandbox ends;
//! and by it what is inside can be looked at, whoever made it and wherever the sandbox is.

mod parent;
mod port;
mod segment;

pub(crate) use parent::ParentLink;
pub use parent::{ParentError, Parents};
pub(crate) use port::{Errand, delete, delete_all, endpoints, ensure};
pub(crate) use segment::{PARENT, ensure as ensure_segment};
