use std::{net::IpAddr, path::PathBuf};

use clap::Args;
use weft_model::{DnsName, Label, MacAddr};

use super::{
    Client, container, grammar,
    network::{parse_pair, unique},
    output::{self, Output},
};
use crate::api::types::{self, Attached, PortRequest, Sandbox};

/// Attach a network namespace, or a container, to a network
///
/// The namespace gets an interface with an address, and its name is answered on every host.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  ip netns add box
  weft attach /run/netns/box --network app --name box --alias db
  weft attach 4711 --network app --name worker --ip 10.32.0.77
  weft attach container:worker --network db --name worker")]
pub(super) struct Attach {
    /// A process id, the path of a network namespace, or container:NAME, one of this host that is on
    /// some network already
    #[arg(value_name = "PID|NETNS|container:NAME", value_parser = parse_target)]
    target: Target,
    /// The network, by name or id
    #[arg(long, value_name = "NETWORK")]
    network: String,
    #[command(flatten)]
    endpoint: EndpointOptions,
    /// The interface's name in the namespace; the first free ethN when absent
    #[arg(long, value_name = "NAME")]
    ifname: Option<String>,
    /// Of several networks, the one with the highest gives the default route; of equals the first
    #[arg(long, value_name = "N", default_value_t, allow_negative_numbers = true)]
    gw_priority: i32,
}

/// What is attached.
#[derive(Clone, Debug)]
enum Target {
    Sandbox(Sandbox),
    Container(Label),
}

/// What `attach` and `run` say about an endpoint.
#[derive(Args, Debug)]
pub(super) struct EndpointOptions {
    /// The container's name
    #[arg(long, value_name = "NAME")]
    pub(super) name: Label,
    /// Another name for it
    #[arg(long, value_name = "NAME")]
    pub(super) alias: Vec<DnsName>,
    /// A fixed IPv4 address of the subnet
    #[arg(long, value_name = "IP")]
    pub(super) ip: Option<std::net::Ipv4Addr>,
    /// A fixed IPv6 address of the subnet
    #[arg(long, value_name = "IP")]
    pub(super) ip6: Option<std::net::Ipv6Addr>,
    /// A fixed MAC address
    #[arg(long, value_name = "MAC")]
    pub(super) mac: Option<MacAddr>,
    /// The service that it is one task of
    #[arg(long, value_name = "NAME")]
    pub(super) service: Option<Label>,
    /// A port of this host that leads to it:
    /// [IP:][HOSTPORT[-HOSTPORT]:]CONTAINERPORT[-CONTAINERPORT][/udp]
    #[arg(long, short, value_name = "PORT", value_parser = grammar::port_requests)]
    pub(super) publish: Vec<Vec<PortRequest>>,
    /// A label of yours
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    pub(super) label: Vec<(String, String)>,
}

impl EndpointOptions {
    /// The first option that only an endpoint on a network can have.
    pub(super) fn first_of_network(&self) -> Option<&'static str> {
        let given = [
            ("--alias", !self.alias.is_empty()),
            ("--ip", self.ip.is_some()),
            ("--ip6", self.ip6.is_some()),
            ("--mac", self.mac.is_some()),
            ("--service", self.service.is_some()),
            ("--publish", !self.publish.is_empty()),
            ("--label", !self.label.is_empty()),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(option, _)| option)
    }

    pub(super) fn into_request(
        self,
        network: String,
        sandbox: Sandbox,
        ifname: Option<String>,
        gateway_priority: i32,
    ) -> anyhow::Result<types::Attach> {
        let v4 = self.ip.map(IpAddr::V4);
        let v6 = self.ip6.map(IpAddr::V6);
        Ok(types::Attach {
            network,
            name: self.name,
            sandbox,
            aliases: self.alias,
            addresses: v4.into_iter().chain(v6).collect(),
            mac: self.mac,
            ifname,
            default_route: true,
            gateway_priority,
            service: self.service,
            labels: unique("--label", self.label)?,
            ports: self.publish.into_iter().flatten().collect(),
        })
    }
}

impl Attach {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let sandbox = match self.target {
            Target::Sandbox(sandbox) => sandbox,
            Target::Container(name) => match container::find(agent, &name).await?.reference {
                // Its engine has moved the interfaces; this one weft moves itself.
                Sandbox::Engine(path) => Sandbox::Path(path),
                reference => reference,
            },
        };
        let body =
            self.endpoint.into_request(self.network, sandbox, self.ifname, self.gw_priority)?;
        let attached: Attached = agent.post("/v1/endpoints", &body).await?;
        show(&attached, out)
    }
}

pub(super) fn show(attached: &Attached, out: &mut Output<'_>) -> anyhow::Result<()> {
    let endpoint = &attached.endpoint;
    let line = format!(
        "{} {} on {}: {} {}",
        endpoint.id.short(),
        endpoint.name,
        endpoint.network,
        endpoint.ifname.as_deref().unwrap_or("-"),
        output::list(&endpoint.addresses),
    );
    Ok(out.show_line(attached, line)?)
}

fn parse_target(text: &str) -> Result<Target, String> {
    if text.starts_with('/') {
        return Ok(Target::Sandbox(Sandbox::Path(PathBuf::from(text))));
    }
    if let Some(name) = container::parse(text) {
        return Ok(Target::Container(name?));
    }
    match text.parse() {
        Ok(pid) if pid > 0 => Ok(Target::Sandbox(Sandbox::Pid(pid))),
        _ => {
            Err("give a process id, an absolute path such as /run/netns/box, or container:NAME"
                .into())
        }
    }
}
