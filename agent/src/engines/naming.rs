//! From what an engine calls a container to the names of its endpoint. Pure.

use weft_model::{DnsName, InvalidName, Label};

/// What an endpoint is to be called.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Names {
    pub(crate) name: Label,
    pub(crate) aliases: Vec<DnsName>,
    pub(crate) service: Option<Label>,
}

impl Names {
    /// Names a container by `name`, or by its id where it has none. A name that is no label, as with
    /// dots, becomes an alias.
    ///
    /// # Errors
    ///
    /// The name is none that could be asked for.
    pub(crate) fn of(name: Option<&str>, id: &str) -> Result<Self, InvalidName> {
        let plain = |name| Self { name, aliases: Vec::new(), service: None };
        match name.map(|name| (name, name.parse::<Label>())) {
            None => Ok(plain(of_id(id))),
            Some((_, Ok(label))) => Ok(plain(label)),
            Some((name, Err(_))) => Ok(Self { aliases: vec![name.parse()?], ..plain(of_id(id)) }),
        }
    }

    /// Adds aliases; engines add the short id, which is no name that anybody chose.
    ///
    /// # Errors
    ///
    /// One of them is no name.
    pub(crate) fn with_aliases<'a>(
        mut self,
        aliases: impl IntoIterator<Item = &'a String>,
        id: &str,
    ) -> Result<Self, InvalidName> {
        for text in aliases {
            let alias: DnsName = text.parse()?;
            let own = alias.as_str() == self.name.as_str() || self.aliases.contains(&alias);
            if !own && Some(text.as_str()) != id.get(..SHORT) {
                self.aliases.push(alias);
            }
        }
        Ok(self)
    }
}

/// How much of a long id is shown.
const SHORT: usize = 12;

/// A label that stands for a container's id, always the same one.
fn of_id(id: &str) -> Label {
    let long = id.len() > 2 * SHORT;
    let short = if long { id.get(..SHORT).unwrap_or(id) } else { id };
    short.parse().unwrap_or_else(|_| {
        // FNV-1a, 64 bits.
        let hash = id.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        format!("c-{hash:016x}").parse().expect("letters, digits and a hyphen")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "2b66a0af3096c5c8f6e1d3a94b4f4a8a2b66a0af3096c5c8f6e1d3a94b4f4a8a";

    fn names(name: Option<&str>, aliases: &[&str]) -> (String, Vec<String>) {
        let aliases: Vec<String> = aliases.iter().map(ToString::to_string).collect();
        let names = Names::of(name, ID).unwrap().with_aliases(&aliases, ID).unwrap();
        (names.name.to_string(), names.aliases.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_short_id_is_a_name_only_where_there_is_no_other() {
        assert_eq!(names(Some("c1"), &["al1", "2b66a0af3096"]), ("c1".into(), vec!["al1".into()]));
        assert_eq!(names(None, &[]), ("2b66a0af3096".into(), vec![]));
        assert_eq!(names(Some("web.1"), &[]), ("2b66a0af3096".into(), vec!["web.1".into()]));
    }

    #[test]
    fn every_id_gives_a_label_and_the_same_one_each_time() {
        assert_eq!(Names::of(None, "default-ct1").unwrap().name.as_str(), "default-ct1");
        for odd in ["a.b", "x_", "0.", &"é".repeat(40)] {
            let name = Names::of(None, odd).unwrap().name;
            assert!(name.as_str().starts_with("c-"), "{odd}: {name}");
            assert_eq!(Names::of(None, odd).unwrap().name, name);
        }
    }

    #[test]
    fn what_nobody_could_ask_for_is_refused() {
        assert!(Names::of(Some("a b"), ID).is_err());
        let aliases = ["a b".to_owned()];
        assert!(Names::of(None, ID).unwrap().with_aliases(&aliases, ID).is_err());
    }
}
