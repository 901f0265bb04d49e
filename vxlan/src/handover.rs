//! What a sealed network gives to the tunnel.

use std::sync::Arc;

use weft_model::NetworkId;
use weft_seal::{Forwarding, TapQueues, Tunnel};

use crate::{Missing, carrier::TAP, namespace::Namespace, netlink::Netlink, table::KernelError};

/// The hand-over of one network's TAP, and of what it forwards, to the tunnel.
#[derive(Debug)]
pub(crate) struct Handover {
    network: NetworkId,
    tunnel: Result<Tunnel, Missing>,
    /// Queues that the tunnel does not have yet, and the index of their TAP.
    opened: Option<(u32, TapQueues)>,
    /// The index of the TAP whose queues the tunnel has.
    served: Option<u32>,
    last: Option<Arc<Forwarding>>,
}

impl Handover {
    pub(crate) fn new(network: NetworkId, tunnel: Result<Tunnel, Missing>) -> Self {
        Self { network, tunnel, opened: None, served: None, last: None }
    }

    /// Why there is no tunnel, if there is none.
    pub(crate) fn missing(&self) -> Option<KernelError> {
        self.tunnel.as_ref().err().cloned().map(KernelError::NoTunnel)
    }

    /// What was handed over last.
    pub(crate) fn last(&self) -> Option<&Forwarding> {
        self.last.as_deref()
    }

    /// Whether the tunnel reads what the TAP is given.
    pub(crate) fn is_served(&self) -> bool {
        self.served.is_some() && !self.is_broken()
    }

    /// Opens the queues of the network's TAP, which is made if it is not there.
    pub(crate) fn open(
        &mut self,
        namespace: &Namespace,
        inside: &mut Netlink,
    ) -> Result<(), KernelError> {
        let tunnel =
            self.tunnel.as_ref().map_err(|missing| KernelError::NoTunnel(missing.clone()))?;
        let queues = namespace.run(|| Ok::<_, KernelError>(tunnel.open_tap(TAP)?))?;
        self.opened = Some((inside.index(TAP)?, queues));
        Ok(())
    }

    /// Opens the queues of the network's TAP unless they are open: those of a TAP that a
    /// predecessor left are not, nor are those that the tunnel has lost.
    pub(crate) fn prepare(
        &mut self,
        namespace: &Namespace,
        inside: &mut Netlink,
    ) -> Result<(), KernelError> {
        let index = inside.index(TAP)?;
        let opened = self.opened.as_ref().is_some_and(|(of, _)| *of == index);
        let served = self.served == Some(index) && !self.is_broken();
        match opened || served {
            true => Ok(()),
            false => self.open(namespace, inside),
        }
    }

    /// Gives the tunnel the queues, if it does not have them yet, and what to do with what comes
    /// out of them.
    pub(crate) fn hand_over(&mut self, forwarding: Forwarding) {
        let Ok(tunnel) = &self.tunnel else { return };
        if let Some((index, queues)) = self.opened.take() {
            let forwarding = Arc::new(forwarding);
            tunnel.carry(queues, Arc::clone(&forwarding));
            (self.served, self.last) = (Some(index), Some(forwarding));
        } else if self.served.is_some() && self.last.as_deref() != Some(&forwarding) {
            let forwarding = Arc::new(forwarding);
            if !tunnel.forward(Arc::clone(&forwarding)) {
                self.served = None;
            }
            self.last = Some(forwarding);
        }
    }

    /// Takes back all that was handed over: the TAP may go.
    pub(crate) fn withdraw(&mut self) {
        (self.opened, self.last) = (None, None);
        if let (Some(_), Ok(tunnel)) = (self.served.take(), &self.tunnel) {
            tunnel.drop_network(self.network);
        }
    }

    fn is_broken(&self) -> bool {
        self.tunnel.as_ref().is_ok_and(|tunnel| tunnel.broken().borrow().contains(&self.network))
    }
}
