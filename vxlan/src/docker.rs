//! Docker's firewall: it drops what it does not know of between the host's interfaces, and an
//! `accept` of ours does not overrule a drop of somebody else's. The chain `DOCKER-USER` is the
//! place that Docker offers for exceptions.

use std::{collections::BTreeMap, fmt};

use crate::{
    Table,
    namespace::Namespace,
    nft,
    table::{KernelError, KernelTable},
    uplink::HOST_PREFIX,
};

/// Family → what the exceptions' chain holds, where there is one.
pub(crate) type Chains = BTreeMap<&'static str, String>;

/// Lets what our uplinks send pass the chain of one family, and the answers.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Except {
    family: &'static str,
}

/// Lists the chains that lack our exceptions.
pub(crate) fn plan(actual: &Chains) -> Vec<Except> {
    let lacking = actual.iter().filter(|(_, rules)| rules.matches(MARK).count() < RULES);
    lacking.map(|(&family, _)| Except { family }).collect()
}

/// The chains `DOCKER-USER` of the host's namespace.
pub(crate) struct DockerChains<'a>(pub(crate) &'a Namespace);

impl KernelTable for DockerChains<'_> {
    const TABLE: Table = Table::Docker;
    type State = Chains;
    type Op = Except;

    fn read(&mut self) -> Result<Chains, KernelError> {
        let mut chains = Chains::new();
        for family in ["ip", "ip6"] {
            if let Some(rules) = nft::list_chain(self.0, family, "filter", CHAIN)? {
                chains.insert(family, rules);
            }
        }
        Ok(chains)
    }

    fn apply(&mut self, ops: &[Except]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|op| nft::load(self.0, &op.script())).collect()
    }
}

impl Except {
    fn script(&self) -> String {
        let Self { family } = self;
        // iptables lists only rules that count. What may not pass, our own table drops before.
        format!(
            "insert rule {family} filter {CHAIN} iifname \"{HOST_PREFIX}*\" counter accept {MARK}\n\
             insert rule {family} filter {CHAIN} oifname \"{HOST_PREFIX}*\" counter accept {MARK}\n"
        )
    }
}

impl fmt::Display for Except {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accept {HOST_PREFIX}* in {} filter {CHAIN}", self.family)
    }
}

const CHAIN: &str = "DOCKER-USER";
const MARK: &str = "comment \"weft\"";
const RULES: usize = 2;
