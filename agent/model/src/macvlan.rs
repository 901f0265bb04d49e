use std::fmt;

use serde::{Deserialize, Serialize};

/// The name of a network interface, as the kernel allows it: 1 to 15 bytes without slash, colon or
/// blank, and neither `.` nor `..` (`dev_valid_name()` in net/core/dev.c).
#[derive(Clone, Copy, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct InterfaceName {
    /// Filled up with zeros.
    bytes: [u8; Self::MAX],
}

impl InterfaceName {
    /// Bytes: `IFNAMSIZ` less the final zero.
    const MAX: usize = 15;

    pub fn as_str(&self) -> &str {
        let end = self.bytes.iter().position(|byte| *byte == 0).unwrap_or(Self::MAX);
        std::str::from_utf8(&self.bytes[..end]).expect("it was made of a str")
    }

    /// For a name such as `eth0.50`: the interface below, and the VLAN's number (IEEE 802.1Q: 1 to
    /// 4094).
    pub fn vlan(&self) -> Option<(Self, u16)> {
        let (lower, id) = self.as_str().rsplit_once('.')?;
        let is_number = id.bytes().all(|byte| byte.is_ascii_digit()) && !id.starts_with('0');
        let id = id.parse().ok().filter(|id| is_number && (1..=4094).contains(id))?;
        Some((lower.parse().ok()?, id))
    }
}

impl std::str::FromStr for InterfaceName {
    type Err = InvalidInterfaceName;

    fn from_str(text: &str) -> Result<Self, InvalidInterfaceName> {
        let odd = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        let fits = (1..=Self::MAX).contains(&text.len());
        if !fits || text == "." || text == ".." || text.contains(odd) {
            return Err(InvalidInterfaceName(text.to_owned()));
        }
        let mut bytes = [0; Self::MAX];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self { bytes })
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = InvalidInterfaceName;

    fn try_from(text: String) -> Result<Self, InvalidInterfaceName> {
        text.parse()
    }
}

impl From<InterfaceName> for String {
    fn from(name: InterfaceName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "{0:?} is no interface name: give 1 to 15 characters without slash, colon or space, such as eth0"
)]
pub struct InvalidInterfaceName(String);

/// What a macvlan network is made of.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Macvlan {
    /// The host's interface that the containers' are parts of. Without one they have a segment of
    /// their own, which nothing else is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<InterfaceName>,
    #[serde(default)]
    pub mode: MacvlanMode,
}

/// Whom the containers on one parent reach (`-o macvlan_mode`, as in Docker).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MacvlanMode {
    /// Each other, on this host, and everything else on the parent's link.
    #[default]
    Bridge,
    /// Not each other, but everything else on the link.
    Private,
    /// Everything by way of the link: each other only if what is at its other end sends frames back
    /// (IEEE 802.1Qbg).
    Vepa,
    /// The parent is one container's alone.
    Passthru,
}

impl MacvlanMode {
    pub const ALL: [Self; 4] = [Self::Bridge, Self::Private, Self::Vepa, Self::Passthru];

    /// The name in options and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Private => "private",
            Self::Vepa => "vepa",
            Self::Passthru => "passthru",
        }
    }
}

impl fmt::Display for MacvlanMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_refuses_are_no_interface_names() {
        for name in ["eth0", "eth0.50", "e", "abcdefghijklmno", "wlän0"] {
            let parsed: InterfaceName = name.parse().unwrap();
            assert_eq!((parsed.as_str(), format!("{parsed:?}")), (name, format!("{name:?}")));
            let json = serde_json::to_string(&parsed).unwrap();
            assert_eq!(serde_json::from_str::<InterfaceName>(&json).unwrap(), parsed);
        }
        for name in ["", ".", "..", "a b", "a/b", "a:b", "abcdefghijklmnop", "a\0"] {
            assert!(name.parse::<InterfaceName>().is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_vlan_is_read_off_the_name() {
        let vlan = |name: &str| {
            let (lower, id) = name.parse::<InterfaceName>().unwrap().vlan()?;
            Some((lower.as_str().to_owned(), id))
        };
        assert_eq!(vlan("eth0.50"), Some(("eth0".into(), 50)));
        assert_eq!(vlan("eth0.10.4094"), Some(("eth0.10".into(), 4094)));
        for name in ["eth0", "eth0.", ".50", "eth0.0", "eth0.4095", "eth0.+5", "eth0.05", "eth0.x"]
        {
            assert_eq!(vlan(name), None, "{name}");
        }
    }
}
