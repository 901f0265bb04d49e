use weft_gossip::quic::LastFailure;
use weft_model::{Family, Node, Suite};
use weft_seal::key::choose;

/// What decides whether this node shares a key with another one.
pub(super) struct Standing<'a> {
    /// The other node's record.
    pub(super) peer: &'a Node,
    /// The family of this node's VTEP.
    pub(super) family: Family,
    /// What this node offers to open.
    pub(super) suites: &'a [Suite],
    /// Whether there is a root that has not expired.
    pub(super) has_root: bool,
    /// Whether the last root that there was has expired.
    pub(super) expired: bool,
    /// What last went wrong with the peer's address, unless it was reached since.
    pub(super) failure: Option<&'a LastFailure>,
}

impl Standing<'_> {
    /// Why nothing can be sealed for the peer, in words; nothing if all is there.
    pub(super) fn fault(&self) -> Option<String> {
        let peer = self.peer;
        let name = &peer.name;
        let theirs = Family::of(peer.vtep.ip());
        if theirs != self.family {
            return Some(format!(
                "node {name} is at {}, which is {theirs}, and this one has {}: advertise addresses of one family",
                peer.vtep, self.family
            ));
        }
        let Some(offer) = &peer.sealing else {
            return Some(format!(
                "node {name} runs weft without encryption: weft status there says why"
            ));
        };
        if choose(self.suites, &offer.suites).is_none() {
            return Some(format!(
                "node {name} takes {}, and this one {}: let sealed_suites have one in common",
                list(&offer.suites),
                list(self.suites)
            ));
        }
        match (self.has_root, self.expired, self.failure) {
            (true, _, _) => None,
            (false, true, _) => Some(format!(
                "the certificate of this node or of node {name} has expired: renew it"
            )),
            (false, false, Some(last)) => Some(format!(
                "no session with node {name} at {}: {}",
                peer.address, last.failure.text
            )),
            (false, false, None) => Some(format!("no session with node {name} yet")),
        }
    }
}

fn list(suites: &[Suite]) -> String {
    match suites {
        [] => "no suite that this version knows".into(),
        _ => suites.iter().map(|suite| suite.as_str()).collect::<Vec<_>>().join(", "),
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;
    use weft_gossip::quic::{Failure, FailureReason};
    use weft_model::Sealing;

    use super::*;
    use crate::fixture::{Builder, node_id};

    fn peer(sealing: Option<Sealing>) -> Node {
        let view = Builder::default().node(2).change_node(2, |node| node.sealing = sealing).view();
        view.members[&node_id(2)].node.clone().unwrap()
    }

    fn offer(suites: &[Suite]) -> Sealing {
        Sealing { port: 6791, lanes: 1, suites: suites.to_vec(), relay: true }
    }

    #[test]
    fn each_reason_for_having_no_key_has_its_sentence_and_the_lasting_ones_come_first() {
        let suites = [Suite::Aes128Gcm];
        let (bare, willing) = (peer(None), peer(Some(offer(&Suite::ALL))));
        let other = peer(Some(offer(&[Suite::Chacha20Poly1305])));
        let unknown = peer(Some(offer(&[])));
        let failure =
            Failure { reason: FailureReason::Timeout, text: "no answer within 3.0 s".into() };
        let last = LastFailure { failure, at: OffsetDateTime::UNIX_EPOCH, count: 1 };
        let fault = |peer, family, has_root, expired, failure| {
            Standing { peer, family, suites: &suites, has_root, expired, failure }.fault()
        };
        let v4 = Family::V4;
        assert_eq!(fault(&willing, v4, true, false, None), None);
        // An old failure says nothing while there is a key.
        assert_eq!(fault(&willing, v4, true, true, Some(&last)), None);
        for (found, words) in [
            (fault(&willing, Family::V6, true, false, None), ["192.0.2.2", "one family"]),
            (fault(&bare, v4, true, false, None), ["node h2 runs weft", "without encryption"]),
            (fault(&other, v4, true, false, None), ["chacha20-poly1305", "aes128-gcm"]),
            (fault(&unknown, v4, true, false, None), ["no suite that", "sealed_suites"]),
            (fault(&willing, v4, false, true, Some(&last)), ["h2 has expired", "renew"]),
            (fault(&willing, v4, false, false, Some(&last)), ["192.0.2.2:6790", "no answer"]),
            (fault(&willing, v4, false, false, None), ["no session", "h2 yet"]),
        ] {
            let found = found.unwrap();
            assert!(words.iter().all(|word| found.contains(word)), "{found}");
        }
    }
}
