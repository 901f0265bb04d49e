//! One pass of a network's task, and what callers ask of it: what is done on a blocking thread.

use std::{collections::BTreeSet, sync::Arc};

use ipnet::IpNet;
use tokio::sync::oneshot;
use weft_model::{EndpointId, NetworkId};

use crate::{
    AttachSpec, Attached, Carriage, OverlayNetwork,
    attach::AttachError,
    network::{Goal, NetworkKernel, Passes},
    plane::DetachError,
    table::{Chain, KernelError},
};

/// What one network's task is to bring about.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) network: Arc<OverlayNetwork>,
    pub(crate) pools: Arc<Vec<IpNet>>,
}

/// What callers ask of a network's task.
#[derive(Debug)]
pub(crate) enum Command {
    Attach(AttachSpec, oneshot::Sender<Result<Attached, AttachError>>),
    Detach(EndpointId, oneshot::Sender<Result<(), DetachError>>),
    /// Remove the network's namespace with all its ports, though nobody has detached them.
    Purge(oneshot::Sender<Result<(), DetachError>>),
}

/// One pass as it goes to a blocking thread.
pub(crate) struct Work {
    pub(crate) kernel: NetworkKernel,
    pub(crate) target: Option<Target>,
    pub(crate) command: Option<Command>,
    pub(crate) unguarded: Option<String>,
    pub(crate) thorough: bool,
}

/// And as it comes back.
pub(crate) struct Done {
    pub(crate) kernel: NetworkKernel,
    pub(crate) ports: Option<BTreeSet<EndpointId>>,
    pub(crate) attached: Option<EndpointId>,
    pub(crate) detached: Option<EndpointId>,
    pub(crate) passes: Passes,
    pub(crate) purge: bool,
    pub(crate) carriage: Option<Carriage>,
    pub(crate) desired: bool,
}

impl Work {
    pub(crate) fn carry_out(self) -> Done {
        let Self { mut kernel, target, command, unguarded, thorough } = self;
        let goal =
            target.as_ref().map(|Target { network, pools }| Goal { network, pools, thorough });
        let (mut attached, mut detached) = (None, None);
        let (mut purge, mut passes) = (false, Passes::new());
        match command {
            Some(Command::Attach(spec, reply)) => {
                let result = match (&goal, unguarded) {
                    (Some(goal), Some(reason)) => {
                        passes = kernel.reconcile(goal);
                        Err(AttachError::NotReady { network: kernel.id, reason })
                    }
                    (Some(goal), None) => {
                        let (result, made) = kernel.attach(goal, &spec);
                        passes = made;
                        result
                    }
                    (None, _) => Err(AttachError::UnknownNetwork { network: kernel.id }),
                };
                attached = result.is_ok().then_some(spec.endpoint);
                // A caller that has gone away finds the port by its endpoint's id later.
                let _ = reply.send(result);
            }
            Some(Command::Detach(endpoint, reply)) => {
                let result = kernel.detach(endpoint);
                detached = result.is_ok().then_some(endpoint);
                let network = kernel.id;
                let _ = reply.send(result.map_err(|source| DetachError::Kernel {
                    network,
                    endpoint,
                    source,
                }));
                passes = goal.map(|goal| kernel.reconcile(&goal)).unwrap_or_default();
            }
            Some(Command::Purge(reply)) => {
                purge = goal.is_none();
                let network = kernel.id;
                let _ = reply.send(match purge {
                    true => Ok(()),
                    false => Err(DetachError::StillDesired { network }),
                });
                passes = goal.map(|goal| kernel.reconcile(&goal)).unwrap_or_default();
            }
            None => passes = goal.map(|goal| kernel.reconcile(&goal)).unwrap_or_default(),
        }
        if thorough {
            kernel.follow_up();
        }
        let ports = match kernel.endpoints() {
            Ok(ports) => Some(ports),
            Err(error) => {
                tracing::warn!(network = %kernel.id, error = %Chain(&error), "failed to list the ports");
                None
            }
        };
        let carriage = kernel.carriage(target.as_ref().map(|target| &*target.network));
        let desired = target.is_some();
        Done { kernel, ports, attached, detached, passes, purge, carriage, desired }
    }
}

/// Answers a command for a network that is not here.
pub(crate) fn refuse(command: Command, network: NetworkId) {
    match command {
        Command::Attach(_, reply) => {
            let _ = reply.send(Err(AttachError::UnknownNetwork { network }));
        }
        // Gone already.
        Command::Detach(_, reply) | Command::Purge(reply) => {
            let _ = reply.send(Ok(()));
        }
    }
}

/// Answers a command that could not be tried.
pub(crate) fn fail(command: Command, network: NetworkId, source: KernelError) {
    match command {
        Command::Attach(_, reply) => {
            let reason = Chain(&source).to_string();
            let _ = reply.send(Err(AttachError::NotReady { network, reason }));
        }
        Command::Detach(_, reply) | Command::Purge(reply) => {
            let _ = reply.send(Err(DetachError::Open { network, source }));
        }
    }
}
