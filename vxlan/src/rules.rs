//! nftables: the reconciler that loads our tables.

use std::fmt;

use crate::{
    Table, generation,
    namespace::Namespace,
    nft,
    ruleset::Ruleset,
    table::{self, KernelError, KernelTable, Pass},
};

/// A change of rules, by what is loaded of them.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Load {
    Whole(Ruleset),
    /// The script that adds what the ruleset has more than what is there.
    Addition(Ruleset, String),
}

/// What is known of our tables since we loaded them; how we know that nobody has changed them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Loaded {
    known: Option<Known>,
    seen: Option<String>,
}

#[derive(Clone, Debug)]
struct Known {
    ruleset: Ruleset,
    /// What the kernel printed of it, before anybody else changed any rule.
    listing: Option<String>,
    /// What the namespace's rules had come to then.
    generation: Option<u32>,
}

/// What a pass sees of our tables.
#[derive(Clone, Debug)]
enum Sight {
    /// Nobody has changed any rule since we did.
    Untouched,
    /// What `nft list table` prints; absent if a table is missing, or what is there is of no
    /// interest.
    Listing(Option<String>),
}

impl Loaded {
    /// Whether `ruleset` is what was loaded last, as far as is known without asking the kernel.
    pub(crate) fn is(&self, ruleset: &Ruleset) -> bool {
        self.known.as_ref().is_some_and(|known| known.ruleset == *ruleset)
    }

    /// Whether `ruleset` will replace what was loaded last, whatever has become of it.
    fn is_past(&self, ruleset: &Ruleset) -> bool {
        self.known.as_ref().is_some_and(|known| {
            known.ruleset != *ruleset && ruleset.addition(&known.ruleset).is_none()
        })
    }

    /// Has the kernel print what was loaded, if it has not yet. To be called when nobody waits:
    /// without it, the next change of any rule has ours loaded again.
    pub(crate) fn look(&mut self, namespace: &Namespace, tables: &[&str]) {
        let Some(known) = self.known.as_mut().filter(|known| known.listing.is_none()) else {
            return;
        };
        match nft::list(namespace, tables) {
            Ok(listing) if generation::of(namespace).ok() == known.generation => {
                known.listing = listing;
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(error = %table::Chain(&error), "failed to list the rules")
            }
        }
    }

    /// Notes that what was read last is `ruleset`: a predecessor loaded it.
    fn adopt(&mut self, ruleset: &Ruleset) {
        if self.known.is_none() {
            let listing = self.seen.take();
            self.known = listing.map(|listing| Known {
                ruleset: ruleset.clone(),
                listing: Some(listing),
                generation: None,
            });
        }
    }
}

/// Brings our tables in `namespace` to `desired`.
pub(crate) fn reconcile(
    namespace: &Namespace,
    tables: &'static [&'static str],
    loaded: &mut Loaded,
    desired: &Ruleset,
) -> Pass {
    let known = loaded.known.clone();
    let blind = loaded.is_past(desired);
    let mut kernel = KernelRules { namespace, tables, loaded, blind };
    let pass = table::reconcile(&mut kernel, |sight| plan(desired, known.as_ref(), sight));
    if pass.errors.is_empty() {
        loaded.adopt(desired);
    }
    pass
}

/// Lists what turns what is seen into `desired`.
fn plan(desired: &Ruleset, known: Option<&Known>, sight: &Sight) -> Vec<Load> {
    let whole = || vec![Load::Whole(desired.clone())];
    let Some(Known { ruleset, listing: printed, .. }) = known else {
        // A predecessor's: its digest is all that can be checked.
        let Sight::Listing(Some(listing)) = sight else { return whole() };
        return if desired.is_in(listing) { Vec::new() } else { whole() };
    };
    let intact = match sight {
        Sight::Untouched => true,
        Sight::Listing(listing) => listing.is_some() && listing == printed,
    };
    match desired.addition(ruleset) {
        _ if !intact => whole(),
        _ if ruleset == desired => Vec::new(),
        Some(script) => vec![Load::Addition(desired.clone(), script)],
        None => whole(),
    }
}

/// Our tables in one namespace.
struct KernelRules<'a> {
    namespace: &'a Namespace,
    tables: &'static [&'static str],
    loaded: &'a mut Loaded,
    /// Whether there is no use in reading.
    blind: bool,
}

impl KernelTable for KernelRules<'_> {
    const TABLE: Table = Table::Rules;
    type State = Sight;
    type Op = Load;

    fn read(&mut self) -> Result<Sight, KernelError> {
        if self.blind {
            return Ok(Sight::Listing(None));
        }
        let before = self.generation();
        let known = self.loaded.known.as_ref();
        if before.is_some() && known.is_some_and(|known| known.generation == before) {
            return Ok(Sight::Untouched);
        }
        let listing = nft::list(self.namespace, self.tables)?;
        let generation = before.filter(|_| before == self.generation());
        let same = |known: &&mut Known| listing.is_some() && known.listing == listing;
        if let Some(known) = self.loaded.known.as_mut().filter(same) {
            // Somebody changed other rules than ours.
            known.generation = generation;
        }
        self.loaded.seen.clone_from(&listing);
        Ok(Sight::Listing(listing))
    }

    fn apply(&mut self, ops: &[Load]) -> Vec<Result<(), KernelError>> {
        ops.iter().map(|load| self.load(load)).collect()
    }
}

impl KernelRules<'_> {
    fn load(&mut self, load: &Load) -> Result<(), KernelError> {
        self.loaded.known = None;
        let before = self.generation();
        let ruleset = match load {
            Load::Whole(ruleset) => {
                nft::load(self.namespace, &ruleset.script())?;
                ruleset
            }
            Load::Addition(ruleset, script) => {
                nft::load(self.namespace, script)?;
                ruleset
            }
        };
        // Ours was the only transaction: what is there needs no looking at.
        let generation = before.map(generation::next);
        let known = match generation.is_some() && generation == self.generation() {
            true => Known { ruleset: ruleset.clone(), listing: None, generation },
            false => {
                let listing = nft::list(self.namespace, self.tables)?;
                Known { ruleset: ruleset.clone(), listing, generation: None }
            }
        };
        self.loaded.known = Some(known);
        Ok(())
    }

    fn generation(&self) -> Option<u32> {
        generation::of(self.namespace).ok()
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(ruleset) => {
                write!(f, "load all rules ({})", ruleset.digest())
            }
            Self::Addition(ruleset, _) => {
                write!(f, "add rules of further ports ({})", ruleset.digest())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        HostRules,
        ruleset::tests::{network, port, vnis},
    };

    fn seen(listing: &str) -> Sight {
        Sight::Listing(Some(listing.to_owned()))
    }

    #[test]
    fn rules_that_somebody_changed_are_loaded_again() {
        let desired = Ruleset::of_host(&HostRules::default(), &vnis(&[4097]));
        let listing = desired.script();
        let known = |listing| Known { ruleset: desired.clone(), listing, generation: Some(7) };
        let (printed, unprinted) = (known(Some(listing.clone())), known(None));
        assert_eq!(plan(&desired, Some(&printed), &Sight::Untouched), []);
        assert_eq!(plan(&desired, Some(&unprinted), &Sight::Untouched), []);
        assert_eq!(plan(&desired, Some(&printed), &seen(&listing)), []);
        // A predecessor's rules are ours if their digest is.
        assert_eq!(plan(&desired, None, &seen(&listing)), []);
        for known in [Some(&printed), Some(&unprinted), None] {
            for changed in [Sight::Listing(None), seen(""), seen("table inet weft {\n}\n")] {
                assert_eq!(plan(&desired, known, &changed).len(), 1, "{changed:?}");
            }
        }
        // Where there is nothing to compare with, a digest proves nothing against a change.
        assert_eq!(plan(&desired, Some(&unprinted), &seen(&listing)).len(), 1);
        let shorter = listing.replace("drop", "accept");
        assert_eq!(plan(&desired, Some(&printed), &seen(&shorter)).len(), 1);
    }

    #[test]
    fn further_ports_are_added_and_nothing_is_deleted_for_them() {
        let with = |names: &[&str]| {
            let ports = names.iter().map(|name| ((*name).to_owned(), port(&["10.0.0.7"])));
            Ruleset::of_network(&network(true), &[], &ports.collect())
        };
        let (one, two) = (with(&["v01"]), with(&["v01", "v02"]));
        let script = two.addition(&one).unwrap();
        assert!(!script.contains("delete") && !script.contains("v01"), "{script}");
        assert_eq!(one.addition(&two), None);
        assert_eq!(one.addition(&one), None);
        assert_eq!(two.addition(&with(&["v03"])), None);

        let listing = one.script();
        let known = Known { ruleset: one, listing: Some(listing.clone()), generation: Some(7) };
        for intact in [Sight::Untouched, seen(&listing)] {
            let loads = plan(&two, Some(&known), &intact);
            assert_eq!(loads, [Load::Addition(two.clone(), script.clone())]);
        }
        // To rules that somebody changed nothing is added: they are replaced.
        let changed = seen(&listing.replace("drop", "accept"));
        assert_eq!(plan(&two, Some(&known), &changed), [Load::Whole(two)]);
    }
}
