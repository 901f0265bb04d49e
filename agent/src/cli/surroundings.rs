use weft_model::Label;

use super::{attach::EndpointOptions, container};

/// What a command of `weft run` has around it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Surroundings {
    /// A namespace of its own on networks, the first of which has its fixed addresses.
    Networks(Vec<Membership>),
    /// A namespace of its own, on no network.
    Nothing,
    /// The host's network.
    Host,
    /// The network namespace of a container of this host.
    Container(Label),
}

/// A network to attach to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Membership {
    /// Name or id.
    pub(super) network: String,
    pub(super) gateway_priority: i32,
}

impl Membership {
    /// Reads `NETWORK` or `NETWORK,gw-priority=N`, with Docker's `name=` before it or not.
    fn read(value: &str) -> anyhow::Result<Self> {
        let (network, priority) = match value.split_once(',') {
            None => (value, None),
            Some((network, option)) => {
                let priority = option.strip_prefix("gw-priority=");
                let priority = priority.and_then(|number| number.parse().ok());
                anyhow::ensure!(
                    priority.is_some(),
                    "--network {value}: give NETWORK or NETWORK,gw-priority=N"
                );
                (network, priority)
            }
        };
        let network = network.strip_prefix("name=").unwrap_or(network).to_owned();
        Ok(Self { network, gateway_priority: priority.unwrap_or(0) })
    }
}

impl Surroundings {
    /// Reads the values of `--network`.
    ///
    /// # Errors
    ///
    /// What is no network stands beside others, or `options` ask something of it that only a network
    /// has.
    pub(super) fn read(values: &[String], options: &EndpointOptions) -> anyhow::Result<Self> {
        let other = values.iter().find_map(|value| Some((value, special(value)?)));
        let Some((value, other)) = other else {
            let networks = values.iter().map(|value| Membership::read(value));
            return Ok(Self::Networks(networks.collect::<Result<_, _>>()?));
        };
        let other = other.map_err(|why| anyhow::anyhow!("--network {why}"))?;
        anyhow::ensure!(
            values.len() == 1,
            "--network {value} stands alone: give it without other networks"
        );
        if let Some(option) = options.first_of_network() {
            anyhow::bail!(
                "{option} is of no use with --network {value}, which is no network: leave it out"
            );
        }
        Ok(other)
    }
}

fn special(value: &str) -> Option<Result<Surroundings, String>> {
    match value {
        "host" => Some(Ok(Surroundings::Host)),
        "none" => Some(Ok(Surroundings::Nothing)),
        _ => Some(container::parse(value)?.map(Surroundings::Container)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> EndpointOptions {
        EndpointOptions {
            name: "web".parse().unwrap(),
            alias: Vec::new(),
            ip: None,
            ip6: None,
            mac: None,
            service: None,
            publish: Vec::new(),
            label: Vec::new(),
        }
    }

    fn read(values: &[&str], options: &EndpointOptions) -> anyhow::Result<Surroundings> {
        let values: Vec<_> = values.iter().map(ToString::to_string).collect();
        Surroundings::read(&values, options)
    }

    #[test]
    fn what_is_no_network_stands_alone_and_has_no_endpoint() {
        let network = |name: &str, gateway_priority| Membership {
            network: name.to_owned(),
            gateway_priority,
        };
        let two = Surroundings::Networks(vec![network("app", 0), network("db", -5)]);
        for db in ["db,gw-priority=-5", "name=db,gw-priority=-5"] {
            assert_eq!(read(&["app", db], &options()).unwrap(), two);
        }
        for bad in ["db,gw-priority=", "db,gw-priority=high", "db,driver-opt=1", "db,"] {
            assert!(read(&[bad], &options()).is_err(), "{bad}");
        }
        for (value, wanted) in [
            ("host", Surroundings::Host),
            ("none", Surroundings::Nothing),
            ("container:db", Surroundings::Container("db".parse().unwrap())),
        ] {
            assert_eq!(read(&[value], &options()).unwrap(), wanted);
            assert!(read(&[value, "app"], &options()).is_err());
            assert!(read(&["app", value], &options()).is_err());
            let fixed = EndpointOptions { ip: Some([10, 0, 0, 7].into()), ..options() };
            let refusal = read(&[value], &fixed).unwrap_err().to_string();
            assert!(refusal.contains("--ip") && refusal.contains(value), "{refusal}");
        }
        assert!(read(&["container:-"], &options()).is_err());
    }
}
