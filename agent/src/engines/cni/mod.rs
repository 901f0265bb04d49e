//! `weft-cni`: a plugin of the Container Network Interface, versions 0.3.1 to 1.1.0.
//!
//! A runtime calls it once an operation: the verb and the container in the environment, the network
//! on standard input, the answer on standard output. It keeps nothing; what it does is done by the
//! agent, and found again there by [labels](super::attachment).

mod calls;
mod conf;
mod environment;
mod failure;
mod result;
mod version;

use std::{io::Write, process::ExitCode, time::Duration};

use serde_json::{Value, json};

use self::{
    calls::Plugin,
    conf::Conf,
    environment::Call,
    failure::{Code, Failure},
    version::SpecVersion,
};
use super::input::{self, InputError};
use crate::chain::Chain;

/// Answers one call of a runtime. Exit codes: 0 done, 1 not; then standard output says why.
pub fn run() -> ExitCode {
    let lookup = |name: &str| std::env::var(name).ok();
    let (version, answer) = match input::read(&mut std::io::stdin()) {
        Ok(input) => {
            let version = conf::version_in(&input);
            (version, answer(lookup, &input))
        }
        // Whoever starts it by hand learns what it is for.
        Err(error) => (None, Call::read(lookup).and_then(|_| Err(unreadable(&error)))),
    };
    let version = version.unwrap_or_else(|| SpecVersion::NEWEST.as_str().to_owned());
    let (text, code) = match answer {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(json)) => (json, ExitCode::SUCCESS),
        Err(failure) => (failure.to_json(&version), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout().lock(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn answer(lookup: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Option<Value>, Failure> {
    let call = Call::read(lookup)?;
    if call == Call::Version {
        return Ok(Some(versions(input)));
    }
    let conf = Conf::parse(input)?;
    call.check(conf.version)?;
    let deadline = call.deadline();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(Code::Io, error.to_string()))?;
    runtime.block_on(async {
        let plugin = Plugin::new(conf);
        let done = tokio::time::timeout(deadline, call.carry_out(&plugin)).await;
        done.unwrap_or_else(|_| {
            Err(Failure::new(
                Code::TryAgain,
                format!("the agent did not answer within {} s: see its log", deadline.as_secs()),
            ))
        })
    })
}

impl Call {
    /// Refuses a call that a version does not have.
    fn check(&self, version: SpecVersion) -> Result<(), Failure> {
        let (verb, since) = match self {
            Self::Check(..) => ("CHECK", SpecVersion::V0_4_0),
            Self::Gc => ("GC", SpecVersion::V1_1_0),
            Self::Status => ("STATUS", SpecVersion::V1_1_0),
            Self::Add(..) | Self::Del(..) | Self::Version => return Ok(()),
        };
        match version >= since {
            true => Ok(()),
            false => Err(Failure::new(
                Code::Version,
                format!("cniVersion {version} has no {verb}: use {since} or later"),
            )),
        }
    }

    /// How long it may take. Whoever waits for an ADD longer than the agent does takes it back.
    fn deadline(&self) -> Duration {
        Duration::from_secs(match self {
            Self::Status => 5,
            Self::Add(..) | Self::Check(..) | Self::Del(..) | Self::Gc | Self::Version => 30,
        })
    }

    async fn carry_out(self, plugin: &Plugin) -> Result<Option<Value>, Failure> {
        match self {
            Self::Add(container, netns, args) => plugin.add(container, netns, args).await.map(Some),
            Self::Check(container, netns) => plugin.check(container, netns).await.map(|()| None),
            Self::Del(container, netns) => plugin.del(container, netns).await.map(|()| None),
            Self::Gc => plugin.gc().await.map(|()| None),
            Self::Status => plugin.status().await.map(|()| None),
            Self::Version => Ok(None),
        }
    }
}

/// Answers VERSION; the version that was asked with is given back.
fn versions(input: &[u8]) -> Value {
    let asked = conf::version_in(input);
    let asked = asked.unwrap_or_else(|| SpecVersion::NEWEST.as_str().to_owned());
    json!({
        "cniVersion": asked,
        "supportedVersions": SpecVersion::ALL.map(SpecVersion::as_str),
    })
}

fn unreadable(error: &InputError) -> Failure {
    let code = match error {
        InputError::TooLong => Code::Decode,
        InputError::Late | InputError::Unreadable(_) => Code::Io,
    };
    Failure::new(code, Chain(error).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(command: &str, input: &str) -> Result<Option<Value>, Failure> {
        let lookup = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => command,
                "CNI_CONTAINERID" => "c1",
                "CNI_NETNS" => "/run/netns/nowhere",
                "CNI_IFNAME" => "eth0",
                _ => return None,
            };
            Some(value.to_owned())
        };
        answer(lookup, input.as_bytes())
    }

    #[test]
    fn the_versions_are_told_whatever_was_asked() {
        let spoken = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        for (input, version) in [
            ("{\"cniVersion\":\"1.0.0\"}", "1.0.0"),
            ("", "1.1.0"),
            ("{\"cniVersion\":\"9\"}", "9"),
        ] {
            let answer = call("VERSION", input).unwrap().unwrap();
            assert_eq!(answer, json!({"cniVersion": version, "supportedVersions": spoken}));
        }
    }

    #[test]
    fn a_call_that_a_version_does_not_have_is_refused_under_code_1() {
        for (command, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "0.4.0")] {
            let input = format!("{{\"cniVersion\":\"{version}\",\"name\":\"app\"}}");
            let failure = call(command, &input).unwrap_err();
            assert_eq!(failure.code, Code::Version, "{failure}");
            assert!(failure.message.contains(command) && failure.message.contains(version));
        }
    }

    #[test]
    fn an_agent_that_does_not_answer_is_told_from_a_container_that_is_not_there() {
        let conf = r#"{"cniVersion":"1.1.0","name":"app","agent_socket":"/nonexistent/weft.sock"}"#;
        for (command, code) in [
            ("ADD", Some(Code::UnknownContainer)),
            ("GC", Some(Code::Configuration)),
            ("STATUS", Some(Code::NotAvailable)),
            // Nothing can be left of a namespace that is not there.
            ("DEL", None),
        ] {
            let found = call(command, conf).err();
            assert_eq!(found.as_ref().map(|failure| failure.code), code, "{command}: {found:?}");
        }
    }
}
