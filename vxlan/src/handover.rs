//! What a sealed network gives to the tunnel.

use std::sync::Arc;

use weft_seal::Forwarding;

use crate::{Missing, namespace::Namespace, netlink::Netlink, table::KernelError};

/// The hand-over of one network's TAP, and of what it forwards, to the tunnel.
#[derive(Debug)]
pub(crate) struct Handover {
    tunnel: Result<(), Missing>,
    last: Option<Arc<Forwarding>>,
}

impl Handover {
    pub(crate) fn new(tunnel: Result<(), Missing>) -> Self {
        Self { tunnel, last: None }
    }

    /// Why there is no tunnel, if there is none.
    pub(crate) fn missing(&self) -> Option<KernelError> {
        self.tunnel.clone().err().map(KernelError::NoTunnel)
    }

    /// What was handed over last.
    pub(crate) fn last(&self) -> Option<&Forwarding> {
        self.last.as_deref()
    }

    /// Opens the queues of the network's TAP, which it makes if need be.
    pub(crate) fn open(&mut self, _namespace: &Namespace) -> Result<(), KernelError> {
        self.tunnel.clone().map_err(KernelError::NoTunnel)
    }

    /// Opens the queues of the network's TAP unless the tunnel has them.
    pub(crate) fn prepare(
        &mut self,
        _namespace: &Namespace,
        _inside: &mut Netlink,
    ) -> Result<(), KernelError> {
        self.tunnel.clone().map_err(KernelError::NoTunnel)
    }

    pub(crate) fn hand_over(&mut self, forwarding: Forwarding) {
        self.last = Some(Arc::new(forwarding));
    }

    pub(crate) fn withdraw(&mut self) {
        self.last = None;
    }
}
