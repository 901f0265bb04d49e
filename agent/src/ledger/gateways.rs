//! Which of a sandbox's networks its default route leads through.
//!
//! Of the endpoints that may have it, the one of the highest priority; of equals, the one that has it
//! already, else the first by its network's name. When that one is detached another takes over.

use std::{collections::BTreeMap, net::IpAddr};

use weft_model::{EndpointId, Network, NetworkId, SandboxId};
use weft_vxlan::lead_out;

use super::{
    book::{Book, EndpointState, LocalEndpoint},
    keeper::Keeper,
};
use crate::{
    api::types::{Attach, Sandbox},
    chain::Chain,
    projection::gateway_ips,
};

/// The priority of an endpoint that is asked for, if it may have the default route.
pub(super) fn priority(request: &Attach, network: &Network) -> Option<i32> {
    (request.default_route && !network.internal).then_some(request.gateway_priority)
}

/// Whether an endpoint of `priority` gets the default route of `sandbox`.
pub(super) fn goes_first(book: &Book, sandbox: &SandboxId, priority: Option<i32>) -> bool {
    let Some(priority) = priority else { return false };
    holder(book, sandbox).is_none_or(|holder| match holder.sandbox {
        // An engine sets its routes by itself, and once.
        Sandbox::Engine(_) => false,
        Sandbox::Pid(_) | Sandbox::Path(_) | Sandbox::Host => {
            priority > holder.gateway_priority.unwrap_or(0)
        }
    })
}

/// The endpoint through which the default route of `sandbox` leads.
fn holder<'a>(book: &'a Book, sandbox: &SandboxId) -> Option<&'a LocalEndpoint> {
    let mut endpoints = book.endpoints.values();
    endpoints.find(|local| local.default_route && local.endpoint.sandbox == *sandbox)
}

/// The endpoint that the default route of `sandbox` goes to if no other has it.
fn next(
    book: &Book,
    sandbox: &SandboxId,
    networks: &BTreeMap<NetworkId, Network>,
) -> Option<EndpointId> {
    if holder(book, sandbox).is_some() {
        return None;
    }
    let name = |local: &LocalEndpoint| networks.get(&local.endpoint.network).map(|n| &n.name);
    let candidates = book.endpoints.values().filter(|local| {
        local.endpoint.sandbox == *sandbox
            && local.state == EndpointState::Attached
            && local.gateway_priority.is_some()
            && !matches!(local.sandbox, Sandbox::Engine(_))
    });
    let first = candidates.min_by(|one, other| {
        let by_priority = other.gateway_priority.cmp(&one.gateway_priority);
        by_priority.then_with(|| name(one).cmp(&name(other)))
    });
    first.map(|local| local.endpoint.id)
}

/// What leads the default route of a sandbox through one of its endpoints.
pub(super) struct WayOut {
    sandbox: SandboxId,
    reference: Sandbox,
    gateways: Vec<IpAddr>,
    displaced: Vec<IpAddr>,
}

impl WayOut {
    /// Changes the sandbox's routes. A sandbox that has ended needs none.
    pub(super) async fn take(self, ifname: String) {
        let taken = tokio::task::spawn_blocking(move || self.take_now(&ifname)).await;
        match taken {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the default route was not changed"),
            Err(error) => tracing::warn!(%error, "the default route was not changed"),
        }
    }

    fn take_now(&self, ifname: &str) -> Result<(), String> {
        let opened = self.reference.open_if(&self.sandbox);
        let Some(sandbox) = opened.map_err(|error| Chain(&error).to_string())? else {
            return Err("the sandbox has ended".into());
        };
        lead_out(&sandbox, ifname, &self.gateways, &self.displaced)
            .map_err(|error| Chain(&error).to_string())
    }
}

impl Keeper {
    /// Takes the default route of `sandbox` from the endpoint that has it, in the book.
    pub(super) fn displace(&mut self, sandbox: &SandboxId) {
        if let Some(holder) = holder(&self.book, sandbox).map(|local| local.endpoint.id) {
            self.local_mut(holder).default_route = false;
        }
    }

    /// What leads the default route through `local`, if it shall have it and another one of the same
    /// sandbox may have had it.
    pub(super) fn way_out(&self, local: &LocalEndpoint) -> Option<WayOut> {
        let Endpoints { gateways, others } = self.gateways_beside(local);
        let engine = matches!(local.sandbox, Sandbox::Engine(_));
        (local.default_route && !others.is_empty() && !engine).then(|| WayOut {
            sandbox: local.endpoint.sandbox.clone(),
            reference: local.sandbox.clone(),
            gateways,
            displaced: others,
        })
    }

    /// Gives the default route of `sandbox` to another endpoint, where there is none.
    pub(super) fn hand_on(&mut self, sandbox: &SandboxId) {
        let Some(id) = next(&self.book, sandbox, &self.book.networks) else { return };
        let local = self.local_mut(id);
        local.default_route = true;
        let Some(ifname) = local.ifname.clone() else { return };
        let local = local.clone();
        let way_out = WayOut {
            sandbox: sandbox.clone(),
            reference: local.sandbox.clone(),
            gateways: self.gateways_beside(&local).gateways,
            displaced: Vec::new(),
        };
        self.links.tracker.spawn(way_out.take(ifname));
    }

    fn gateways_beside(&self, local: &LocalEndpoint) -> Endpoints {
        let of = |id: NetworkId| self.book.networks.get(&id).map_or_else(Vec::new, gateway_ips);
        let others = self.book.endpoints.values().filter(|other| {
            other.endpoint.id != local.endpoint.id
                && other.endpoint.sandbox == local.endpoint.sandbox
        });
        Endpoints {
            gateways: of(local.endpoint.network),
            others: others.flat_map(|other| of(other.endpoint.network)).collect(),
        }
    }
}

/// The gateways of an endpoint, and of the others of its sandbox.
struct Endpoints {
    gateways: Vec<IpAddr>,
    others: Vec<IpAddr>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{book_with, network};

    /// A sandbox with endpoints on networks `a`, `b` … of these priorities; one of them has the
    /// default route, or none.
    fn sandbox(priorities: &[Option<i32>], holder: Option<usize>) -> Book {
        let mut book = Book::default();
        for (n, priority) in (1..).zip(priorities) {
            let name = ["a", "b", "c"][usize::from(n) - 1];
            let network = network(n, name);
            let mut own = book_with(&network, "web", &format!("10.{n}.0.8"));
            let (id, mut local) = own.endpoints.pop_first().unwrap();
            local.default_route = holder == Some(usize::from(n) - 1);
            local.gateway_priority = *priority;
            book.endpoints.insert(id, local);
            book.networks.insert(network.id, network);
        }
        book
    }

    fn next_in(book: &Book) -> Option<&str> {
        let id = next(book, &"sandbox-web".to_owned(), &book.networks)?;
        Some(book.networks[&book.endpoints[&id].endpoint.network].name.as_str())
    }

    #[test]
    fn the_highest_priority_has_the_default_route_and_of_equals_the_one_that_has_it() {
        let id = "sandbox-web".to_owned();
        let book = sandbox(&[Some(0), Some(5)], Some(1));
        for (priority, goes) in [(None, false), (Some(4), false), (Some(5), false), (Some(6), true)]
        {
            assert_eq!(goes_first(&book, &id, priority), goes, "{priority:?}");
        }
        assert!(goes_first(&book, &"another".to_owned(), Some(-1)));
        assert!(goes_first(&sandbox(&[Some(9)], None), &id, Some(0)));
    }

    #[test]
    fn when_the_default_route_is_free_the_next_takes_over() {
        assert_eq!(next_in(&sandbox(&[Some(0), Some(5), None], None)), Some("b"));
        assert_eq!(next_in(&sandbox(&[Some(1), Some(1)], None)), Some("a"));
        assert_eq!(next_in(&sandbox(&[Some(1), Some(5)], Some(0))), None);
        assert_eq!(next_in(&sandbox(&[None], None)), None);
    }

    #[test]
    fn an_engine_keeps_the_route_that_it_has_set() {
        let mut book = sandbox(&[Some(0)], Some(0));
        let id = *book.endpoints.keys().next().unwrap();
        book.endpoints.get_mut(&id).unwrap().sandbox = Sandbox::Engine("/run/x".into());
        assert!(!goes_first(&book, &"sandbox-web".to_owned(), Some(9)));
    }
}
