use weft_gossip::quic::LastFailure;
use weft_model::{Family, Node};

/// What decides whether this node shares a key with another one.
pub(super) struct Standing<'a> {
    /// The other node's record.
    pub(super) peer: &'a Node,
    /// The family of this node's VTEP.
    pub(super) family: Family,
    /// Whether there is a root that has not expired.
    pub(super) has_root: bool,
    /// Whether the last root that there was has expired.
    pub(super) expired: bool,
    /// What last went wrong with the peer's address, unless it was reached since.
    pub(super) failure: Option<&'a LastFailure>,
}

impl Standing<'_> {
    /// Why there is no session with the peer, in words; nothing if there are keys.
    pub(super) fn fault(&self) -> Option<String> {
        let peer = self.peer;
        let theirs = Family::of(peer.vtep.ip());
        if theirs != self.family {
            return Some(format!(
                "it is at {}, which is {theirs}, and this node has {}: advertise addresses of one family",
                peer.vtep, self.family
            ));
        }
        match (self.has_root, self.expired, self.failure) {
            (true, _, _) => None,
            (false, true, _) => Some(format!(
                "the certificate of this node or of {} has expired: renew it",
                peer.name
            )),
            (false, false, Some(last)) => {
                Some(format!("its agent at {}: {}", peer.address, last.failure.text))
            }
            (false, false, None) => Some("none was made yet".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;
    use weft_gossip::quic::{Failure, FailureReason};

    use super::*;
    use crate::fixture::{Builder, node_id};

    #[test]
    fn each_reason_for_having_no_session_has_its_sentence_and_the_lasting_ones_come_first() {
        let view = Builder::default().node(2).view();
        let peer = view.members[&node_id(2)].node.as_ref().unwrap();
        let text = "no answer within 3.0 s".to_owned();
        let failure = Failure { reason: FailureReason::Timeout, text };
        let last = LastFailure { failure, at: OffsetDateTime::UNIX_EPOCH, count: 1 };
        let fault = |family, has_root, expired, failure| {
            Standing { peer, family, has_root, expired, failure }.fault()
        };
        let v4 = Family::V4;
        assert_eq!(fault(v4, true, false, None), None);
        // What went wrong before says nothing while there is a key.
        assert_eq!(fault(v4, true, true, Some(&last)), None);
        for (found, words) in [
            (fault(Family::V6, true, false, None), ["192.0.2.2", "one family"]),
            (fault(v4, false, true, Some(&last)), ["h2 has expired", "renew"]),
            (fault(v4, false, false, Some(&last)), ["192.0.2.2:6790", "no answer"]),
            (fault(v4, false, false, None), ["none was made", "yet"]),
        ] {
            let found = found.unwrap();
            assert!(words.iter().all(|word| found.contains(word)), "{found}");
        }
    }
}
