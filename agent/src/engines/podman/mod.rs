//! `weft-netavark`: a network driver for podman's own network tool, netavark.
//!
//! Podman calls `create` when a network is made, netavark calls `setup` and `teardown` for each
//! container. Input and output are JSON. As the [CNI plugin](super::cni) it keeps nothing.

mod messages;

use std::{io::Write, path::Path, process::ExitCode, time::Duration};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use self::messages::{Network, NetworkSetup, Options};
use super::{
    attachment::AttachmentKey, input, mapping::without_those_of, naming::Names, wanted::WantedError,
};
use crate::{
    api::{
        client::{Client, ClientError},
        types::{Attach, Attached, Sandbox},
    },
    chain::Chain,
};

const ENGINE: &str = "podman";
/// Of the plugin interface that is spoken.
const API_VERSION: &str = "1.0.0";
const DEADLINE: Duration = Duration::from_secs(30);

/// What was not done, and why.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{0}")]
struct Failure(String);

/// Answers one call. Exit codes: 0 done, 1 not; then standard output says why.
pub fn run() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (text, code) = match call(&arguments) {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(answer)) => (answer, ExitCode::SUCCESS),
        Err(failure) => (json!({"error": failure.0}), ExitCode::FAILURE),
    };
    match writeln!(std::io::stdout().lock(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn call(arguments: &[&str]) -> Result<Option<Value>, Failure> {
    match arguments {
        ["info"] => {
            let version = env!("CARGO_PKG_VERSION");
            Ok(Some(json!({"version": version, "api_version": API_VERSION})))
        }
        ["create"] => {
            let input: Value = parse(&read()?)?;
            let network: Network = typed(&input)?;
            wait(create(&network))?;
            Ok(Some(input))
        }
        ["setup", netns] => {
            let setup: NetworkSetup = typed(&parse(&read()?)?)?;
            wait(set_up(&setup, Path::new(netns))).map(Some)
        }
        ["teardown", _] => {
            let setup: NetworkSetup = typed(&parse(&read()?)?)?;
            wait(tear_down(&setup)).map(|()| None)
        }
        _ => Err(Failure(format!(
            "{:?} is no call: podman and netavark call create, setup NETNS, teardown NETNS and info",
            arguments.join(" ")
        ))),
    }
}

/// Finds the cluster's network, or makes it.
async fn create(network: &Network) -> Result<(), Failure> {
    let options = network.options()?;
    let agent = Client::new(&options.socket);
    network.wanted(&options).ensure(&agent, "").await?;
    Ok(())
}

/// Attaches a container with the addresses that podman has chosen; where it has chosen none, weft
/// does.
async fn set_up(setup: &NetworkSetup, netns: &Path) -> Result<Value, Failure> {
    let options = setup.network.options()?;
    setup.check()?;
    let agent = Client::new(&options.socket);
    let mut request = request(setup, &options, netns)?;
    if !request.ports.is_empty() {
        let beside = key(setup).beside(&agent).await?;
        request.ports = without_those_of(request.ports, &beside);
    }
    // What a call that was cut off has left.
    key(setup).detach(&agent).await?;
    let attached: Attached = agent
        .post("/v1/endpoints", &request)
        .await
        .map_err(|error| explain(error, setup, &request))?;
    Ok(serde_json::to_value(setup.answer(&attached)).expect("an answer is plain data"))
}

async fn tear_down(setup: &NetworkSetup) -> Result<(), Failure> {
    let agent = Client::new(&setup.network.options()?.socket);
    Ok(key(setup).detach(&agent).await?)
}

fn key(setup: &NetworkSetup) -> AttachmentKey {
    AttachmentKey {
        engine: ENGINE,
        network: setup.network.name.clone(),
        container: setup.container_id.clone(),
        ifname: setup.network_options.interface_name.clone(),
    }
}

fn request(setup: &NetworkSetup, options: &Options, netns: &Path) -> Result<Attach, Failure> {
    let wrong = |error: weft_model::InvalidName| Failure(format!("the container's name: {error}"));
    let id = &setup.container_id;
    let given = &setup.network_options;
    let names = Names::of(setup.container_name.as_deref(), id).map_err(wrong)?;
    let names = names.with_aliases(given.aliases.iter().flatten(), id).map_err(wrong)?;
    Ok(Attach {
        network: setup.network.wanted(options).name,
        name: names.name,
        sandbox: Sandbox::Path(netns.into()),
        aliases: names.aliases,
        addresses: given.static_ips.clone().unwrap_or_default(),
        mac: given.static_mac,
        ifname: Some(given.interface_name.clone()),
        default_route: options.default_route,
        gateway_priority: options.gateway_priority,
        service: names.service,
        labels: key(setup).labels(),
        ports: setup.ports(options)?,
    })
}

/// Adds the remedy that only an operator of podman has.
fn explain(error: ClientError, setup: &NetworkSetup, request: &Attach) -> Failure {
    let field = error.refusal().and_then(|(_, problem)| problem.field.clone());
    let message = Chain(&error).to_string();
    let name = &setup.network.name;
    Failure(match field.as_deref() {
        Some("addresses") if !request.addresses.is_empty() => format!(
            "{message}; podman gives out addresses for this host alone: create {name} without --subnet, then weft gives them out, or with an --ip-range that no other host has"
        ),
        Some("ports") if error.refusal().is_some_and(|(status, _)| status.as_u16() == 400) => {
            format!(
                "{message}; or let another network of the container's publish it, and create {name} with -o ports=elsewhere"
            )
        }
        Some("network") if error.is_missing() => {
            format!("{message}; or remove {name} from podman, and create it again")
        }
        _ => message,
    })
}

fn read() -> Result<Vec<u8>, Failure> {
    input::read(&mut std::io::stdin()).map_err(|error| Failure(Chain(&error).to_string()))
}

fn parse(input: &[u8]) -> Result<Value, Failure> {
    serde_json::from_slice(input)
        .map_err(|error| Failure(format!("standard input is no JSON: {error}")))
}

fn typed<T: DeserializeOwned>(input: &Value) -> Result<T, Failure> {
    // A list would be read as one of fields.
    if !input.is_object() {
        return Err(Failure(format!("standard input is {input}: it must be an object")));
    }
    serde_path_to_error::deserialize(input.clone())
        .map_err(|error| Failure(format!("{} does not fit: {}", error.path(), error.inner())))
}

fn wait<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure(Chain(&error).to_string()))?;
    runtime.block_on(async {
        tokio::time::timeout(DEADLINE, work).await.unwrap_or_else(|_| {
            let seconds = DEADLINE.as_secs();
            Err(Failure(format!("the agent did not answer within {seconds} s: see its log")))
        })
    })
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self(Chain(&error).to_string())
    }
}

impl From<WantedError> for Failure {
    fn from(error: WantedError) -> Self {
        Self(Chain(&error).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_there_is_not_is_refused_and_the_version_is_told() {
        assert_eq!(call(&["info"]).unwrap().unwrap()["api_version"], "1.0.0");
        for wrong in [&[][..], &["setup"], &["frob"], &["info", "x"]] {
            let failure = call(wrong).unwrap_err();
            assert!(failure.0.contains("teardown NETNS"), "{failure}");
        }
        assert!(typed::<Network>(&json!([1])).is_err());
        assert!(typed::<Network>(&json!({"name": 1})).unwrap_err().0.contains("name"));
    }
}
