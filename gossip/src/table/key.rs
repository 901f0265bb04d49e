use std::{fmt, str::FromStr};

use weft_model::{EndpointId, Label, NetworkId};

/// Names one record of its writer. A key is printed and read as ASCII text: chitchat panics, at
/// every node of the cluster, over a key whose first character takes more than one byte.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Key {
    /// The writer itself.
    Node,
    /// A network as the writer knows it.
    Network(NetworkId),
    /// The writer's endpoints in a network whose ids fall in one bucket.
    Endpoints(NetworkId, Bucket),
    /// What the writer lends of a network's address space.
    Loan(NetworkId),
    /// What the writer has on loan.
    Hold(NetworkId),
    /// What the writer asks of the lenders.
    Want(NetworkId),
    /// The services of a network, as the writer knows them, whose names fall in one bucket.
    Services(NetworkId, Bucket),
    /// The state of the writer's endpoints in a network whose ids fall in one bucket.
    Conditions(NetworkId, Bucket),
    /// The draining endpoints, of all nodes, that the writer's kernel sends no new flow to.
    Drained(NetworkId),
}

impl Key {
    /// The network that the record belongs to.
    pub fn network(self) -> Option<NetworkId> {
        match self {
            Self::Node => None,
            Self::Network(network)
            | Self::Endpoints(network, _)
            | Self::Loan(network)
            | Self::Hold(network)
            | Self::Want(network)
            | Self::Services(network, _)
            | Self::Conditions(network, _)
            | Self::Drained(network) => Some(network),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Network(network) => write!(f, "net/{network}"),
            Self::Endpoints(network, bucket) => write!(f, "ep/{network}/{bucket}"),
            Self::Loan(network) => write!(f, "loan/{network}"),
            Self::Hold(network) => write!(f, "hold/{network}"),
            Self::Want(network) => write!(f, "want/{network}"),
            Self::Services(network, bucket) => write!(f, "svc/{network}/{bucket}"),
            Self::Conditions(network, bucket) => write!(f, "cond/{network}/{bucket}"),
            Self::Drained(network) => write!(f, "drained/{network}"),
        }
    }
}

impl FromStr for Key {
    type Err = UnknownKey;

    fn from_str(text: &str) -> Result<Self, UnknownKey> {
        let unknown = || UnknownKey(text.to_owned());
        let network = |text: &str| text.parse().map_err(|_| unknown());
        let bucket = |text: &str| text.parse::<Bucket>().map_err(|_| unknown());
        match *text.split('/').collect::<Vec<_>>() {
            ["node"] => Ok(Self::Node),
            ["net", id] => Ok(Self::Network(network(id)?)),
            ["ep", id, at] => Ok(Self::Endpoints(network(id)?, bucket(at)?)),
            ["loan", id] => Ok(Self::Loan(network(id)?)),
            ["hold", id] => Ok(Self::Hold(network(id)?)),
            ["want", id] => Ok(Self::Want(network(id)?)),
            ["svc", id, at] => Ok(Self::Services(network(id)?, bucket(at)?)),
            ["cond", id, at] => Ok(Self::Conditions(network(id)?, bucket(at)?)),
            ["drained", id] => Ok(Self::Drained(network(id)?)),
            _ => Err(unknown()),
        }
    }
}

/// One of the parts into which a host's endpoints of a network are split, and what else there is many
/// of, so that a change rewrites few of them. Buckets are set empty, never deleted, while the network exists: endpoint churn
/// leaves no tombstones.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Bucket(u8);

impl Bucket {
    /// How many buckets there are. Part of the wire format.
    pub const COUNT: u8 = 64;

    /// The bucket of `endpoint`.
    pub fn of(endpoint: EndpointId) -> Self {
        let [.., last] = endpoint.as_bytes();
        Self(last % Self::COUNT)
    }

    /// The bucket of what is called `name`. The sum of its bytes: part of the wire format.
    pub fn named(name: &Label) -> Self {
        Self(name.as_str().bytes().fold(0u8, u8::wrapping_add) % Self::COUNT)
    }

    /// Every bucket, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..Self::COUNT).map(Self)
    }
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}", self.0)
    }
}

impl FromStr for Bucket {
    type Err = UnknownKey;

    fn from_str(text: &str) -> Result<Self, UnknownKey> {
        let unknown = || UnknownKey(text.to_owned());
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(unknown());
        }
        let mut byte = [0];
        hex::decode_to_slice(text, &mut byte).map_err(|_| unknown())?;
        let [number] = byte;
        if number < Self::COUNT { Ok(Self(number)) } else { Err(unknown()) }
    }
}

/// A key that this version does not know: a newer peer's. It is kept and counted.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no key of this version")]
pub struct UnknownKey(String);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn key() -> impl Strategy<Value = Key> {
        (any::<[u8; 16]>(), 0..Bucket::COUNT, 0..9).prop_map(|(id, bucket, kind)| {
            let network = NetworkId::from(id);
            match kind {
                0 => Key::Node,
                1 => Key::Network(network),
                2 => Key::Endpoints(network, Bucket(bucket)),
                3 => Key::Loan(network),
                4 => Key::Hold(network),
                5 => Key::Want(network),
                6 => Key::Services(network, Bucket(bucket)),
                7 => Key::Conditions(network, Bucket(bucket)),
                _ => Key::Drained(network),
            }
        })
    }

    proptest! {
        #[test]
        fn a_key_is_ascii_and_reads_as_it_prints(key in key()) {
            let text = key.to_string();
            prop_assert!(text.is_ascii() && !text.is_empty());
            prop_assert_eq!(text.parse::<Key>().unwrap(), key);
        }

        #[test]
        fn text_that_reads_as_a_key_is_what_the_key_prints(text in "(node|net|ep|loan|hold|want|svc|cond|drained|é|)(/[0-9a-fA-F]{0,33}){0,3}") {
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn no_text_breaks_the_key_parser(text in ".*") {
            if let Ok(key) = text.parse::<Key>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }
    }

    #[test]
    fn endpoints_spread_over_all_buckets() {
        let used: std::collections::BTreeSet<_> =
            (0..=255).map(|n| Bucket::of(EndpointId::from([n; 16]))).collect();
        assert!(used.into_iter().eq(Bucket::all()));
    }

    #[test]
    fn a_bucket_beyond_the_last_is_no_key() {
        assert!("3f".parse::<Bucket>().is_ok());
        for bad in ["40", "3F", "3", "03f", "", "+1"] {
            assert!(bad.parse::<Bucket>().is_err(), "{bad}");
        }
    }
}
