//! Which VNIs the host's rules keep strangers out of, so that no port is ahead of them.

use std::collections::BTreeSet;

use tokio::sync::watch;
use weft_model::Vni;

/// The last attempt to load the host's rules, as the networks' tasks see it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Guard {
    pub(crate) vnis: BTreeSet<Vni>,
    /// Why the rules are not as they should be, if they are not.
    pub(crate) error: Option<String>,
}

impl Guard {
    /// Waits until the host's rules have been loaded with `vni`, or could not be: the reason then.
    ///
    /// Cancel-safe.
    pub(crate) async fn fault(guard: &watch::Receiver<Self>, vni: Vni) -> Option<String> {
        match guard.clone().wait_for(|guard| guard.vnis.contains(&vni)).await {
            Ok(guard) => guard.error.clone(),
            Err(_) => Some("the task of the host's rules has ended".into()),
        }
    }
}
