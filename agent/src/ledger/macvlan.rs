//! What an endpoint on a macvlan network must fit.

use weft_model::{Endpoint, MacvlanMode, Network};

use crate::{
    api::types::{Attach, Sandbox},
    refusal::Refusal,
};

/// Refuses a sandbox whose engine moves interfaces by itself: one that is part of another cannot wait
/// for that in the host's namespace.
pub(super) fn check(network: &Network, request: &Attach) -> Result<(), Refusal> {
    let engine = matches!(request.sandbox, Sandbox::Engine(_));
    match network.options.macvlan.filter(|_| engine) {
        None => Ok(()),
        Some(_) => Err(Refusal::conflict(
            "network",
            format!(
                "network {} has driver macvlan, which weft has for weft run, weft attach, CNI and podman: docker network create -d macvlan makes one of Docker's own",
                network.name
            ),
        )),
    }
}

/// Refuses a MAC address that an endpoint of another network on the same parent has.
pub(super) fn check_mac(
    network: &Network,
    request: &Attach,
    other: &Endpoint,
    others: Option<&Network>,
) -> Result<(), Refusal> {
    let parent = |network: &Network| network.options.macvlan?.parent;
    let shared = parent(network).filter(|own| others.and_then(parent) == Some(*own));
    match (shared, request.mac) {
        (Some(parent), Some(mac)) if mac == other.mac && other.network != network.id => {
            Err(Refusal::conflict(
                "mac",
                format!(
                    "{mac} is in use by {}, which is on {parent} too: take another",
                    other.name
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// Refuses a second endpoint where one has the parent for itself.
pub(super) fn check_beside(network: &Network, other: &Endpoint) -> Result<(), Refusal> {
    let Some(macvlan) = network.options.macvlan else { return Ok(()) };
    if macvlan.mode != MacvlanMode::Passthru || other.network != network.id {
        return Ok(());
    }
    let parent = macvlan.parent.map_or_else(|| "its parent".into(), |parent| parent.to_string());
    Err(Refusal::conflict(
        "network",
        format!(
            "network {} gives {parent} to one container alone (macvlan_mode=passthru), and {} has it: detach {} first",
            network.name, other.name, other.name
        ),
    ))
}
