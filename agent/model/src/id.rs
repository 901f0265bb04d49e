use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Text that is no 128-bit identifier.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} is not {what}: give 32 lower-case hexadecimal digits")]
pub struct InvalidId {
    what: &'static str,
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            pub fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }

            /// The first 12 hexadecimal digits, as tables show it.
            pub fn short(&self) -> String {
                hex::encode(&self.0[..6])
            }

            /// SHA-256 over this identifier and `context`: a stable source of derived values.
            pub fn digest(&self, context: &[u8]) -> [u8; 32] {
                Sha256::new().chain_update(self.0).chain_update(context).finalize().into()
            }
        }

        impl From<[u8; 16]> for $name {
            fn from(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let invalid = || InvalidId { what: $what, text: text.to_owned() };
                if text.bytes().any(|b| b.is_ascii_uppercase()) {
                    return Err(invalid());
                }
                let mut bytes = [0; 16];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| invalid())?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.short())
            }
        }
    };
}

id!(
    /// Names one cluster; chosen at random by `weft init`. Part of every certificate.
    ClusterId,
    "a cluster id"
);
id!(
    /// Names one node: the first half of SHA-256 over its public key (DER SubjectPublicKeyInfo).
    /// A node that has lost its key is another node.
    NodeId,
    "a node id"
);
id!(
    /// Names one network; chosen at random by its creator, so that two networks which were given
    /// the same name on two sides of a partition stay two networks.
    NetworkId,
    "a network id"
);
id!(
    /// Names one attachment of a sandbox to a network; chosen at random.
    EndpointId,
    "an endpoint id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_what_it_prints_and_nothing_else() {
        let id = NodeId::from([0xab; 16]);
        assert_eq!(id.to_string().parse::<NodeId>().unwrap(), id);
        for bad in ["", "ab", &"AB".repeat(16), &"zz".repeat(16), &"ab".repeat(17)] {
            assert!(bad.parse::<NodeId>().is_err(), "{bad}");
        }
    }
}
