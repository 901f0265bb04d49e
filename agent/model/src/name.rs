use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// One label of a name: 1 to 63 letters, digits and inner hyphens (RFC 1123 §2.1), lower-cased.
///
/// Inner underscores are allowed too: Docker Compose makes container names such as `shop_web_1`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct Label(String);

impl Label {
    pub const MAX_LEN: usize = 63;

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Label {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        let valid = bytes.len() <= Self::MAX_LEN
            && edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
        match valid {
            true => Ok(Self(text.to_ascii_lowercase())),
            false => Err(InvalidName(text.to_owned())),
        }
    }
}

/// One or more labels joined by dots, at most 253 characters (RFC 1035 §2.3.4), lower-cased,
/// without a final dot.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(String);

impl DnsName {
    pub const MAX_LEN: usize = 253;

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn labels(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('.')
    }
}

impl FromStr for DnsName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let name = text.strip_suffix('.').unwrap_or(text);
        if name.len() > Self::MAX_LEN || name.split('.').any(|l| l.parse::<Label>().is_err()) {
            return Err(InvalidName(text.to_owned()));
        }
        Ok(Self(name.to_ascii_lowercase()))
    }
}

impl From<Label> for DnsName {
    fn from(label: Label) -> Self {
        Self(label.0)
    }
}

macro_rules! text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = InvalidName;

            fn try_from(text: String) -> Result<Self, InvalidName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

text!(Label);
text!(DnsName);

#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a name: use letters, digits and inner hyphens, at most 63 characters between dots"
)]
pub struct InvalidName(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_follow_rfc_1123_and_are_lower_cased() {
        assert_eq!("Web-1".parse::<Label>().unwrap().as_str(), "web-1");
        assert_eq!("shop_web_1".parse::<Label>().unwrap().as_str(), "shop_web_1");
        for bad in ["", "-a", "a-", "_a", "a.b", "a b", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<Label>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_dns_name_is_labels_joined_by_dots() {
        assert_eq!("DB.internal.".parse::<DnsName>().unwrap().as_str(), "db.internal");
        for bad in ["", ".", "a..b", ".a", &vec!["a"; 128].join(".")] {
            assert!(bad.parse::<DnsName>().is_err(), "{bad}");
        }
    }
}
