use std::{collections::BTreeMap, fmt, net::IpAddr};

use weft_model::{AddressGrant, EndpointId, Family, Label, Network, NodeId, Subnet, Unit};

use crate::{Ask, Lease, State, Usage, demand::Clock, layout::reserved, sight::Sight, usage};

/// Why an endpoint gets no address, or not yet.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    #[error("network {network} has no {family} subnet: ask for the other family")]
    NoPool { network: Label, family: Family },
    #[error("address {ip} is not in network {network} ({subnets}): ask for one inside")]
    Outside { network: Label, ip: IpAddr, subnets: String },
    #[error("address {ip} of network {network} is {what}: ask for another")]
    Reserved { network: Label, ip: IpAddr, what: String },
    #[error(
        "address {ip} of network {network} is in use by endpoint {} on node {}: remove that \
         endpoint or ask for another address", endpoint.short(), node.short()
    )]
    InUse { network: Label, ip: IpAddr, node: NodeId, endpoint: EndpointId },
    #[error(
        "endpoint {} already has address {ip} in network {network}: release it before asking for \
         {asked}", endpoint.short()
    )]
    HasOther { network: Label, endpoint: EndpointId, ip: IpAddr, asked: IpAddr },
    #[error(
        "address {ip} of endpoint {} in network {network} was lent elsewhere, because this node \
         was removed from the cluster: detach and release the endpoint", endpoint.short()
    )]
    Fenced { network: Label, endpoint: EndpointId, ip: IpAddr },
    #[error("{0}")]
    Exhausted(Box<Shortage>),
    #[error(
        "no node that lends {family} addresses of network {network} can be reached ({}), and those \
         held here are in use: {usage}; restore the connection or release endpoints here",
        list(lenders)
    )]
    LendersUnreachable { network: Label, family: Family, lenders: Vec<NodeId>, usage: Usage },
    #[error(
        "address {ip} of network {network} can be lent by node {} alone, which cannot be reached: \
         bring its agent or the connection back, or ask for another address", node.short()
    )]
    LenderUnreachable { network: Label, ip: IpAddr, node: NodeId },
    #[error(
        "address {ip} of network {network} is lent to node {}, which cannot be reached: bring its \
         agent or the connection back, or ask for another address", node.short()
    )]
    HolderUnreachable { network: Label, ip: IpAddr, node: NodeId },
    #[error(
        "address {ip} of network {network} is lent to node {}, which has not handed it over: it \
         may be in use or set aside there; try again once it is free, or ask for another address",
        node.short()
    )]
    Kept { network: Label, ip: IpAddr, node: NodeId },
    #[error(
        "node {} has not lent address space of network {network} yet: try again", asked.short()
    )]
    Waiting { network: Label, asked: NodeId },
}

impl Refusal {
    /// Whether the same ask may be met later without anyone changing it: worth another try after
    /// the next view change.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Exhausted(_)
            | Self::LendersUnreachable { .. }
            | Self::LenderUnreachable { .. }
            | Self::HolderUnreachable { .. }
            | Self::Kept { .. }
            | Self::Waiting { .. } => true,
            Self::NoPool { .. }
            | Self::Outside { .. }
            | Self::Reserved { .. }
            | Self::InUse { .. }
            | Self::HasOther { .. }
            | Self::Fenced { .. } => false,
        }
    }
}

/// A pool without a block to lend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shortage {
    pub network: Label,
    pub subnet: Subnet,
    /// Blocks of the pool, and addresses a block.
    pub blocks: usize,
    pub block_size: u32,
    /// What this node has.
    pub usage: Usage,
    /// How many blocks each other node has on loan.
    pub holders: BTreeMap<NodeId, usize>,
    /// Lenders that could not be asked.
    pub unreachable: Vec<NodeId>,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { network, subnet, blocks, block_size, usage, holders, unreachable } = self;
        let elsewhere: usize = holders.values().sum();
        write!(
            f,
            "network {network} has no free address left for this node: of the {blocks} blocks of \
             {block_size} in {subnet}, {} are here ({usage}) and {elsewhere} on {} other nodes",
            usage.blocks,
            holders.len(),
        )?;
        if !holders.is_empty() {
            let each = holders.iter().map(|(node, count)| format!("{} has {count}", node.short()));
            write!(f, " ({})", each.collect::<Vec<_>>().join(", "))?;
        }
        if !unreachable.is_empty() {
            write!(f, ", and lenders cannot be reached ({})", list(unreachable))?;
        }
        f.write_str("; release endpoints or make a network with a larger subnet")
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { leased, resting, owned, .. } = self;
        write!(f, "{leased} of {owned} addresses leased, {resting} resting")
    }
}

/// The answer for an endpoint that has `lease`.
pub(crate) fn recheck(
    network: &Network,
    own: &State,
    lease: &Lease,
    ask: Ask,
) -> Result<AddressGrant, Refusal> {
    let Lease { endpoint, grant } = *lease;
    let network = network.name.clone();
    match ask {
        _ if !own.is_backed(lease) => Err(Refusal::Fenced { network, endpoint, ip: grant.ip }),
        Ask::Fixed(asked) if asked != grant.ip => {
            Err(Refusal::HasOther { network, endpoint, ip: grant.ip, asked })
        }
        Ask::Fixed(_) | Ask::Any(_) => Ok(grant),
    }
}

/// Refuses what no waiting can bring.
pub(crate) fn check(sight: &Sight<'_>, own: &State, ask: Ask) -> Result<(), Refusal> {
    let layout = sight.layout;
    let network = || layout.network().name.clone();
    let ip = match ask {
        Ask::Any(family) if layout.blocks(family).is_some() => return Ok(()),
        Ask::Any(family) => return Err(Refusal::NoPool { network: network(), family }),
        Ask::Fixed(ip) => ip,
    };
    let Some(pool) = layout.network().pool_of(ip) else {
        let subnets = layout.network().pools.iter().map(|pool| pool.subnet.to_string());
        let subnets = subnets.collect::<Vec<_>>().join(", ");
        return Err(Refusal::Outside { network: network(), ip, subnets });
    };
    let refused = |what: String| Err(Refusal::Reserved { network: network(), ip, what });
    if !pool.subnet.is_host(ip) {
        return refused("not a host address".into());
    }
    if reserved(pool, ip) {
        return refused(match pool.aux.iter().find(|(_, aux)| **aux == ip) {
            Some((name, _)) => format!("reserved as auxiliary address {name}"),
            None => "the gateway".into(),
        });
    }
    let here = own.leases.get(&ip).map(|lease| (own.node, lease.endpoint));
    let there = sight.view.endpoints.get(&ip).copied().filter(|(node, _)| *node != own.node);
    match here.or(there) {
        Some((node, endpoint)) => Err(Refusal::InUse { network: network(), ip, node, endpoint }),
        None => Ok(()),
    }
}

/// Why an ask that passed the check was not met.
pub(crate) fn explain(sight: &Sight<'_>, own: &State, clock: &Clock<'_>, ask: Ask) -> Refusal {
    match ask {
        Ask::Any(family) => explain_any(sight, own, clock, family),
        Ask::Fixed(ip) => explain_fixed(sight, own, ip),
    }
}

fn explain_any(sight: &Sight<'_>, own: &State, clock: &Clock<'_>, family: Family) -> Refusal {
    let layout = sight.layout;
    let network = layout.network().name.clone();
    let usage = usage::of(layout.network(), own, clock, family);
    let lenders = layout.lenders_for(own.node);
    let (reachable, unreachable): (Vec<NodeId>, Vec<NodeId>) =
        lenders.iter().partition(|&&lender| sight.answers(lender));
    if reachable.is_empty() {
        return Refusal::LendersUnreachable { network, family, lenders, usage };
    }
    let has_free = |lender: &&NodeId| sight.free_blocks(**lender, family) > 0;
    if let Some(&asked) = reachable.iter().find(has_free) {
        return Refusal::Waiting { network, asked };
    }

    let mut holders = BTreeMap::new();
    for (node, count) in lenders.iter().flat_map(|&lender| sight.borrowed(lender, family)) {
        if node != own.node {
            *holders.entry(node).or_default() += count;
        }
    }
    let blocks = layout.blocks(family).expect("the check found a pool of the family");
    Refusal::Exhausted(Box::new(Shortage {
        network,
        subnet: blocks.pool().subnet,
        blocks: layout.usable_blocks(family),
        block_size: blocks.size(),
        usage,
        holders,
        unreachable,
    }))
}

fn explain_fixed(sight: &Sight<'_>, own: &State, ip: IpAddr) -> Refusal {
    let layout = sight.layout;
    let network = layout.network().name.clone();
    let lender = layout.lender(Unit::Address(ip)).expect("the check found a pool of the address");
    if !sight.answers(lender) {
        return Refusal::LenderUnreachable { network, ip, node: lender };
    }
    match sight.borrower_of(ip).filter(|&node| node != own.node) {
        Some(node) if !sight.answers(node) => Refusal::HolderUnreachable { network, ip, node },
        Some(node) => Refusal::Kept { network, ip, node },
        None => Refusal::Waiting { network, asked: lender },
    }
}

fn list(nodes: &[NodeId]) -> String {
    nodes.iter().map(NodeId::short).collect::<Vec<_>>().join(", ")
}
