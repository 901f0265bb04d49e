use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    num::NonZeroU16,
    sync::Arc,
};

use weft_model::{Check, Endpoint, EndpointId, Label, NetworkId, Probe};

use crate::{
    api::types::Sandbox,
    engines::attachment,
    ledger::{Snapshot, book::EndpointState},
};

/// Whose health, for which service.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Subject {
    pub(super) endpoint: EndpointId,
    pub(super) service: Label,
}

/// What is checked, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Target {
    pub(super) network: NetworkId,
    pub(super) check: Check,
    /// The endpoint's addresses, each with the gateway of its family, from which it is asked.
    pub(super) addresses: Vec<(IpAddr, IpAddr)>,
    pub(super) engine: Option<Engine>,
    /// What a program is told, and where it runs.
    pub(super) program: Arc<ProgramContext>,
}

/// The engine that a container belongs to, where it has checks of its own.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Engine {
    Docker,
    /// With the container's id.
    Podman(String),
}

/// What a program that checks an endpoint gets to know.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct ProgramContext {
    pub(super) sandbox: Sandbox,
    pub(super) endpoint: Endpoint,
    pub(super) network: Label,
    pub(super) service: Label,
}

impl Target {
    /// Where to connect, and from which address, for each of the endpoint's addresses.
    pub(super) fn at(&self, port: NonZeroU16) -> impl Iterator<Item = (SocketAddr, IpAddr)> {
        let socket = move |ip: IpAddr| SocketAddr::new(ip, port.get());
        self.addresses.iter().map(move |(ip, gateway)| (socket(*ip), *gateway))
    }
}

/// Every check that is this host's to make.
pub(super) fn targets(snapshot: &Snapshot) -> BTreeMap<Subject, Target> {
    let Snapshot { me, cluster, book, .. } = snapshot;
    let mut targets = BTreeMap::new();
    for id in book.active() {
        let Some(network) = cluster.network(id) else { continue };
        for service in cluster.services(id) {
            let check = service.definition().and_then(|definition| definition.check.as_ref());
            let Some(check) = check else { continue };
            for backend in service.backends().filter(|backend| backend.node == *me) {
                let Some(local) = book.endpoints.get(&backend.endpoint.id) else { continue };
                if local.state != EndpointState::Attached {
                    continue;
                }
                let gateway = |ip| network.pool_of(ip).map(|pool| (ip, pool.gateway));
                let subject =
                    Subject { endpoint: local.endpoint.id, service: service.name.clone() };
                let target = Target {
                    network: id,
                    check: check.clone(),
                    addresses: local.endpoint.ips().filter_map(gateway).collect(),
                    engine: match check.probe {
                        Probe::Engine => engine(&local.sandbox, &local.endpoint),
                        Probe::Tcp { .. } | Probe::Http { .. } | Probe::Exec { .. } => None,
                    },
                    program: Arc::new(ProgramContext {
                        sandbox: local.sandbox.clone(),
                        endpoint: local.endpoint.clone(),
                        network: network.name.clone(),
                        service: service.name.clone(),
                    }),
                };
                targets.insert(subject, target);
            }
        }
    }
    targets
}

fn engine(sandbox: &Sandbox, endpoint: &Endpoint) -> Option<Engine> {
    if let Sandbox::Engine(_) = sandbox {
        return Some(Engine::Docker);
    }
    match attachment::engine_of(&endpoint.labels)? {
        ("podman", container) => Some(Engine::Podman(container.to_owned())),
        _ => None,
    }
}
