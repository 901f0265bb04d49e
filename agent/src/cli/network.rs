use std::{collections::BTreeMap, io::Write, net::IpAddr};

use clap::{Args, Subcommand};
use ipnet::IpNet;
use serde_json::json;
use weft_model::{Driver, Label, Subnet};

use super::{
    Client,
    client::encode,
    inspect,
    output::{self, Output},
};
use crate::api::types::{CreateNetwork, NetworkState, NetworkStatus, NodeStatus};

/// Create, list, inspect and remove networks
#[derive(Args, Debug)]
pub(super) struct Network {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(Create),
    /// List the networks of the cluster, those of this host, and what is predefined
    #[command(after_help = "Example:
  weft network ls")]
    Ls,
    /// Show networks with their endpoints, as JSON in the shape of Docker's
    ///
    /// Containers are those of this host, as in Docker; what weft says of the network, with the
    /// endpoints of all hosts, stands under Weft.
    #[command(after_help = "Example:
  weft network inspect app
  weft network inspect --verbose app")]
    Inspect {
        /// Show peers and the endpoints of all hosts in Docker's shape, too
        #[arg(long, short)]
        verbose: bool,
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
    },
    /// Remove networks from the cluster
    #[command(after_help = "Example:
  weft network rm --force app")]
    Rm {
        #[arg(required = true, value_name = "NETWORK")]
        networks: Vec<String>,
        /// Detach every endpoint on every host first
        #[arg(long, short)]
        force: bool,
    },
}

/// Create a network, on all hosts of the cluster or on this one alone, and print its id
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft network create app
  weft network create db --subnet 10.40.0.0/24 --gateway 10.40.0.254 --internal
  weft network create dual --subnet 10.41.0.0/24 --subnet fd00:41::/64
  weft network create secret --encrypted
  weft network create -d bridge local --icc=false
  weft network create -d macvlan -o parent=eth0 --subnet 192.168.1.0/24 --gateway 192.168.1.1 lan")]
pub(super) struct Create {
    /// Letters, digits and inner hyphens
    name: Label,
    /// overlay: all hosts of the cluster; bridge: this host alone, unknown to the others; macvlan: the
    /// link of an interface of this host
    #[arg(long, short, value_name = "DRIVER", value_parser = parse_driver, default_value = "overlay")]
    driver: Driver,
    /// Address range, one a family; an IPv4 one is picked when there is none
    #[arg(long, value_name = "CIDR")]
    subnet: Vec<Subnet>,
    /// Gateway address in a subnet; the first address when absent
    #[arg(long, value_name = "IP")]
    gateway: Vec<IpAddr>,
    /// Where addresses that nobody asked for by number come from; a part of a subnet
    #[arg(long, value_name = "CIDR")]
    ip_range: Vec<IpNet>,
    /// An address in use by a machine outside weft
    #[arg(long, value_name = "NAME=IP", value_parser = parse_aux)]
    aux_address: Vec<(String, IpAddr)>,
    /// No way out: no egress, no names from outside
    #[arg(long)]
    internal: bool,
    /// Seal what goes between hosts; a host that cannot do so gets no endpoint in it
    #[arg(long)]
    encrypted: bool,
    /// Add an IPv6 subnet where none is given
    #[arg(long)]
    ipv6: bool,
    /// A label of yours
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    label: Vec<(String, String)>,
    /// Whether its containers reach each other, not only what is outside; false needs driver bridge
    #[arg(long, value_name = "BOOL", default_missing_value = "true", num_args = 0..=1, require_equals = true)]
    icc: Option<bool>,
    /// mtu=BYTES, multicast, encrypted, icc=BOOL; of macvlan parent=INTERFACE and
    /// macvlan_mode=bridge|private|vepa|passthru
    #[arg(long, short, value_name = "KEY[=VALUE]", value_parser = parse_option)]
    opt: Vec<(String, String)>,
}

impl Network {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        match self.command {
            Command::Create(create) => {
                create.run("/v1/networks", agent, out).await?;
            }
            Command::Ls => {
                let networks: Vec<NetworkStatus> = agent.get("/v1/networks").await?;
                let predefined = || predefined(&networks);
                let made = networks.iter().map(|status| json!(status));
                let all: Vec<_> =
                    made.chain(predefined().map(inspect::predefined_status)).collect();
                let rows = networks.iter().map(row).chain(predefined().map(row_of_predefined));
                out.show(&all, |out| out.table(HEADINGS, rows))?;
            }
            // As in Docker, inspect prints JSON whatever the format.
            Command::Inspect { networks, verbose } => {
                let nodes: Vec<NodeStatus> = agent.get("/v1/nodes").await?;
                let mut found = Vec::new();
                for network in &networks {
                    let path = format!("/v1/networks/{}", encode(network));
                    found.push(match agent.get::<NetworkStatus>(&path).await {
                        Ok(status) => inspect::describe(&status, &nodes, verbose),
                        Err(error) => match inspect::predefined(network) {
                            Some(shown) if error.is_missing() => shown,
                            _ => return Err(error.into()),
                        },
                    });
                }
                out.json(&found)?;
            }
            Command::Rm { networks, force } => {
                for network in &networks {
                    let path = format!("/v1/networks/{}?force={force}", encode(network));
                    let () = agent.delete(&path).await?;
                    writeln!(out, "{network}")?;
                }
            }
        }
        Ok(())
    }
}

impl Create {
    /// Asks for the network at `path` of the API.
    pub(super) async fn run(
        self,
        path: &str,
        agent: &Client,
        out: &mut Output<'_>,
    ) -> anyhow::Result<()> {
        let created: NetworkStatus = agent.post(path, &self.into_request()?).await?;
        Ok(out.show_line(&created, created.network.id)?)
    }

    fn into_request(self) -> anyhow::Result<CreateNetwork> {
        let icc = self.icc.map(|icc| ("icc".to_owned(), icc.to_string()));
        Ok(CreateNetwork {
            name: self.name,
            driver: self.driver,
            subnets: self.subnet,
            gateways: self.gateway,
            ip_ranges: self.ip_range,
            aux_addresses: unique("--aux-address", self.aux_address)?,
            internal: self.internal,
            encrypted: self.encrypted,
            ipv6: self.ipv6,
            labels: unique("--label", self.label)?,
            options: unique("--opt", self.opt.into_iter().chain(icc).collect())?,
        })
    }
}

const HEADINGS: [&str; 9] =
    ["NETWORK", "NAME", "DRIVER", "SCOPE", "VNI", "SUBNET", "ENCRYPTED", "ENDPOINTS", "STATE"];

/// What there is without being made; `bridge` is made when it is first asked for.
fn predefined(networks: &[NetworkStatus]) -> impl Iterator<Item = &'static str> {
    let is_made = |name: &str| networks.iter().any(|status| status.network.name.as_str() == name);
    ["bridge", "host", "none"].into_iter().filter(move |name| !is_made(name))
}

fn row_of_predefined(name: &str) -> [String; 9] {
    ["-", name, name, "local", "-", "-", "no", "-", "ready"].map(String::from)
}

fn row(status: &NetworkStatus) -> [String; 9] {
    let network = &status.network;
    [
        network.id.short(),
        network.name.to_string(),
        network.driver.to_string(),
        network.driver.scope().into(),
        match network.driver {
            Driver::Overlay => network.vni.to_string(),
            Driver::Bridge | Driver::Macvlan => "-".into(),
        },
        output::list(network.pools.iter().map(|pool| pool.subnet)),
        if network.encrypted { "yes" } else { "no" }.into(),
        status.endpoints.len().to_string(),
        match status.state {
            NetworkState::Ready => "ready",
            NetworkState::Conflict => "conflict",
        }
        .into(),
    ]
}

/// Collects pairs; a key that stands twice is a mistake that would lose one value.
pub(super) fn unique<V>(
    flag: &str,
    pairs: Vec<(String, V)>,
) -> anyhow::Result<BTreeMap<String, V>> {
    let mut map = BTreeMap::new();
    for (key, value) in pairs {
        anyhow::ensure!(!map.contains_key(&key), "{flag} {key} is given twice; give it once");
        map.insert(key, value);
    }
    Ok(map)
}

pub(super) fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.into(), value.into())),
        _ => Err("give KEY=VALUE".into()),
    }
}

fn parse_driver(name: &str) -> Result<Driver, String> {
    match name {
        "overlay" => Ok(Driver::Overlay),
        "bridge" => Ok(Driver::Bridge),
        "macvlan" => Ok(Driver::Macvlan),
        "host" | "none" | "null" => {
            Err("it is predefined: weft run --network host, or --network none".into())
        }
        "ipvlan" => Err("weft cannot do it yet: there are overlay, bridge and macvlan".into()),
        _ => Err("there are overlay, bridge and macvlan".into()),
    }
}

/// Reads an option; a switch without a value is switched on, as in Docker (`-o encrypted`).
fn parse_option(text: &str) -> Result<(String, String), String> {
    match text {
        "encrypted" | "multicast" => Ok((text.into(), String::new())),
        _ => parse_pair(text),
    }
}

fn parse_aux(text: &str) -> Result<(String, IpAddr), String> {
    let (name, ip) = parse_pair(text).map_err(|_| "give NAME=IP, such as router=10.0.0.5")?;
    let ip = ip.parse().map_err(|_| format!("{ip:?} is not an IP address"))?;
    Ok((name, ip))
}
