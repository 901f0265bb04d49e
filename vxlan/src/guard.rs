//! Which VNIs the host's rules keep strangers out of, so that no port is ahead of them.

use std::collections::BTreeSet;

use tokio::sync::watch;
use weft_model::Vni;

/// The last attempt to load the host's rules, as the networks' tasks see it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Guard {
    pub(crate) vnis: BTreeSet<Vni>,
    /// Whether there has been an attempt.
    pub(crate) tried: bool,
    /// Why the rules are not as they should be, if they are not.
    pub(crate) error: Option<String>,
}

impl Guard {
    /// Waits until the host's rules have been loaded, with `vni` if the network has one, or could
    /// not be: the reason then.
    ///
    /// Cancel-safe.
    pub(crate) async fn fault(guard: &watch::Receiver<Self>, vni: Option<Vni>) -> Option<String> {
        let ready = |guard: &Self| match vni {
            Some(vni) => guard.vnis.contains(&vni),
            None => guard.tried,
        };
        match guard.clone().wait_for(ready).await {
            Ok(guard) => guard.error.clone(),
            Err(_) => Some("the task of the host's rules has ended".into()),
        }
    }
}
