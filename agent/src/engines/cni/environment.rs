//! What a runtime says in the environment.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use weft_model::MacAddr;

use super::failure::{Code, Failure};

/// One call, with what its environment says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Call {
    Add(Container, PathBuf, Args),
    Check(Container, PathBuf),
    /// The namespace may be gone, and with it its name.
    Del(Container, Option<PathBuf>),
    Gc,
    Status,
    Version,
}

/// Which interface of which container is meant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) ifname: String,
}

/// `CNI_ARGS`, as far as they are understood.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Args {
    /// What the runtime calls the container: `WEFT_NAME`, or `K8S_POD_NAME`, which podman gives too.
    pub(super) name: Option<String>,
    pub(super) aliases: Vec<String>,
    pub(super) ips: Vec<IpAddr>,
    pub(super) mac: Option<MacAddr>,
    pub(super) nomad: Nomad,
}

/// What Nomad says of an allocation.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Nomad {
    pub(super) alloc: Option<String>,
    pub(super) group: Option<String>,
    pub(super) job: Option<String>,
}

impl Call {
    /// Reads the environment by `lookup`.
    ///
    /// # Errors
    ///
    /// A variable is missing or wrong; the message names it.
    pub(super) fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, Failure> {
        let value = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let require = |names: &[&str]| {
            let missing: Vec<&str> =
                names.iter().copied().filter(|name| value(name).is_none()).collect();
            match missing.is_empty() {
                true => Ok(()),
                false => wrong(format!("{} must be set", missing.join(", "))),
            }
        };
        let container = || {
            Ok::<_, Failure>(Container {
                id: container_id(value("CNI_CONTAINERID").unwrap_or_default())?,
                ifname: interface_name("CNI_IFNAME", value("CNI_IFNAME").unwrap_or_default())?,
            })
        };
        let netns = || value("CNI_NETNS").map(PathBuf::from);
        let all = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"];
        let command = value("CNI_COMMAND").unwrap_or_default();
        match command.as_str() {
            "ADD" => {
                require(&all)?;
                let args = Args::parse(&value("CNI_ARGS").unwrap_or_default())?;
                Ok(Self::Add(container()?, absolute(netns())?, args))
            }
            "CHECK" => {
                require(&all)?;
                Ok(Self::Check(container()?, absolute(netns())?))
            }
            "DEL" => {
                require(&["CNI_CONTAINERID", "CNI_IFNAME"])?;
                Ok(Self::Del(container()?, netns()))
            }
            "GC" => Ok(Self::Gc),
            "STATUS" => Ok(Self::Status),
            "VERSION" => Ok(Self::Version),
            "" => wrong("CNI_COMMAND must be set: this is a plugin that container runtimes call"),
            other => wrong(format!(
                "CNI_COMMAND is {other:?}: it must be ADD, CHECK, DEL, GC, STATUS or VERSION"
            )),
        }
    }
}

impl Args {
    /// Reads `KEY=VALUE;KEY=VALUE`.
    fn parse(text: &str) -> Result<Self, Failure> {
        let mut args = Self::default();
        let (mut unknown, mut ignore, mut pod) = (Vec::new(), false, None);
        for pair in text.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return wrong(format!("CNI_ARGS: {pair:?} is no KEY=VALUE"));
            };
            let some = || Some(value.to_owned()).filter(|value| !value.is_empty());
            match key {
                "IgnoreUnknown" => ignore = matches!(value, "1" | "true" | "TRUE" | "True" | "t"),
                "WEFT_NAME" => args.name = some(),
                "WEFT_ALIASES" => args.aliases = list(value).map(str::to_owned).collect(),
                "K8S_POD_NAME" => pod = some(),
                "IP" => {
                    let ips = list(value).map(|ip| address("CNI_ARGS: IP", ip));
                    args.ips = ips.collect::<Result<_, _>>()?;
                }
                "MAC" if !value.is_empty() => {
                    let mac = value.parse();
                    args.mac =
                        Some(mac.map_err(|error| failed(format!("CNI_ARGS: MAC: {error}")))?);
                }
                "MAC" => {}
                "NOMAD_ALLOC_ID" => args.nomad.alloc = some(),
                "NOMAD_GROUP_NAME" => args.nomad.group = some(),
                "NOMAD_JOB_ID" => args.nomad.job = some(),
                "K8S_POD_NAMESPACE" | "K8S_POD_INFRA_CONTAINER_ID" | "K8S_POD_UID" => {}
                other => unknown.push(other),
            }
        }
        args.name = args.name.or(pod);
        match unknown.is_empty() || ignore {
            true => Ok(args),
            false => wrong(format!(
                "CNI_ARGS: {} are not understood: leave them out, or add IgnoreUnknown=1",
                unknown.join(", ")
            )),
        }
    }
}

fn list(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

/// Reads an address, with or without the length of its subnet.
pub(super) fn address(of: &str, text: &str) -> Result<IpAddr, Failure> {
    let ip = text.split_once('/').map_or(text, |(ip, _)| ip);
    ip.parse().map_err(|_| failed(format!("{of}: {text:?} is no IP address")))
}

/// CNI 1.1, section *Parameters*.
fn container_id(id: String) -> Result<String, Failure> {
    match is_name(&id) {
        true => Ok(id),
        false => wrong(format!(
            "CNI_CONTAINERID is {id:?}: it must begin with a letter or digit and go on with these, dots, hyphens or underscores"
        )),
    }
}

/// Whether `text` may name a container or a network.
pub(super) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
}

/// The kernel's own rule (net/core/dev.c, dev_valid_name).
pub(super) fn interface_name(of: &str, name: String) -> Result<String, Failure> {
    let odd = |c: char| c == '/' || c == ':' || c.is_whitespace();
    match name.is_empty()
        || name.len() > 15
        || name.contains(odd)
        || matches!(name.as_str(), "." | ".." | "lo")
    {
        false => Ok(name),
        true => wrong(format!(
            "{of} is {name:?}: it must be 1 to 15 characters without blanks, slashes and colons, and not lo"
        )),
    }
}

fn absolute(path: Option<PathBuf>) -> Result<PathBuf, Failure> {
    let path = path.unwrap_or_default();
    match path.is_absolute() {
        true => Ok(path),
        false => wrong(format!("CNI_NETNS is {path:?}: it must be an absolute path")),
    }
}

/// Whether the namespace is still there by its name.
pub(super) fn is_there(netns: Option<&Path>) -> bool {
    netns.is_some_and(Path::exists)
}

fn failed(message: impl Into<String>) -> Failure {
    Failure::new(Code::Environment, message)
}

fn wrong<T>(message: impl Into<String>) -> Result<T, Failure> {
    Err(failed(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Call, Failure> {
        Call::read(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    fn add<'a>(more: &[(&'a str, &'a str)]) -> Result<Call, Failure> {
        let base = [
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "c1"),
            ("CNI_NETNS", "/run/netns/x"),
            ("CNI_IFNAME", "eth0"),
        ];
        read(&[more, &base].concat())
    }

    #[test]
    fn what_podman_says_is_understood() {
        let args = "IgnoreUnknown=1;K8S_POD_NAME=c1;MAC=02:11:22:33:44:55;IP=10.67.0.77,fd00::5/64";
        let Ok(Call::Add(container, netns, args)) = add(&[("CNI_ARGS", args)]) else { panic!() };
        assert_eq!((container.id.as_str(), container.ifname.as_str()), ("c1", "eth0"));
        assert_eq!(netns, Path::new("/run/netns/x"));
        assert_eq!(args.name.as_deref(), Some("c1"));
        assert_eq!(args.mac.unwrap().to_string(), "02:11:22:33:44:55");
        assert_eq!(args.ips.len(), 2);
    }

    #[test]
    fn a_name_for_weft_goes_before_that_of_a_pod() {
        let args = "K8S_POD_NAME=pod;WEFT_NAME=web;WEFT_ALIASES=a, b";
        let Ok(Call::Add(.., args)) = add(&[("CNI_ARGS", args)]) else { panic!() };
        assert_eq!(args.name.as_deref(), Some("web"));
        assert_eq!(args.aliases, ["a", "b"]);
    }

    #[test]
    fn every_wrong_variable_is_named_under_code_4() {
        let cases: &[(&[(&str, &str)], &str)] = &[
            (&[], "CNI_COMMAND"),
            (&[("CNI_COMMAND", "FROB")], "FROB"),
            (&[("CNI_COMMAND", "ADD")], "CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME"),
            (&[("CNI_COMMAND", "DEL"), ("CNI_IFNAME", "eth0")], "CNI_CONTAINERID must"),
            (&[("CNI_COMMAND", "CHECK"), ("CNI_CONTAINERID", "a")], "CNI_NETNS, CNI_IFNAME"),
        ];
        for (pairs, word) in cases {
            let failure = read(pairs).unwrap_err();
            assert_eq!(failure.code, Code::Environment);
            assert!(failure.message.contains(word), "{failure}");
        }
        for (key, value) in [
            ("CNI_CONTAINERID", "../x"),
            ("CNI_CONTAINERID", "a b"),
            ("CNI_IFNAME", "sixteen-letters-"),
            ("CNI_IFNAME", "a/b"),
            ("CNI_IFNAME", "lo"),
            ("CNI_NETNS", "netns/x"),
            ("CNI_ARGS", "novalue"),
            ("CNI_ARGS", "COLOUR=red"),
            ("CNI_ARGS", "IP=10.0.0.256"),
            ("CNI_ARGS", "MAC=zz"),
        ] {
            let failure = add(&[(key, value)]).unwrap_err();
            assert_eq!(failure.code, Code::Environment);
            assert!(failure.message.contains(key), "{key}={value}: {failure}");
        }
    }

    #[test]
    fn a_del_needs_no_namespace_and_minds_no_arguments() {
        let del = [("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "c1"), ("CNI_IFNAME", "eth0")];
        assert!(matches!(read(&del), Ok(Call::Del(_, None))));
        let odd = [&del[..], &[("CNI_ARGS", "novalue"), ("CNI_NETNS", "")]].concat();
        assert!(matches!(read(&odd), Ok(Call::Del(_, None))));
    }
}
