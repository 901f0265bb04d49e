use std::{net::IpAddr, num::NonZeroU16};

use clap::Args;
use weft_model::{Label, Protocol, Publication, PublishMode, Source};

use super::{
    Client,
    client::encode,
    grammar,
    output::Output,
    service::{acknowledge, path},
};
use crate::api::types::ServiceStatus;

/// Open a port of the hosts that leads to a service, or to the containers of a name
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft publish web 80 --port 8080
  weft publish dns 53 --protocol udp --mode host
  weft publish web 443 --source snat --host-ip 192.0.2.10")]
pub(super) struct Publish {
    /// A service; one that nobody has declared is declared, without a virtual address
    #[arg(value_name = "SERVICE")]
    service: Label,
    /// The port of its containers
    #[arg(value_name = "TARGET", value_parser = grammar::number)]
    target: NonZeroU16,
    /// The port of the hosts; the same if it is not given
    #[arg(long, value_name = "PORT", value_parser = grammar::number)]
    port: Option<NonZeroU16>,
    /// Where more than one network has such a service
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    #[arg(long, value_name = "tcp|udp", default_value = "tcp", value_parser = grammar::protocol)]
    protocol: Protocol,
    /// ingress: every host, for containers of any host; host: hosts with such a container, for theirs
    #[arg(long, value_name = "ingress|host", default_value = "ingress", value_parser = grammar::mode)]
    mode: PublishMode,
    /// The one address of the hosts at which it is; 0.0.0.0 and :: stand for all of a family
    #[arg(long, value_name = "IP", value_parser = grammar::address)]
    host_ip: Option<IpAddr>,
    /// What source address containers see: preserve (the client's), snat (the gateway's), local (the
    /// client's, and only hosts with such a container accept)
    #[arg(long, value_name = "preserve|snat|local", default_value = "preserve", value_parser = grammar::source)]
    source: Source,
    /// Tell containers the client's address in front of what it says
    #[arg(long, value_name = "v2", value_parser = grammar::proxy_protocol)]
    proxy_protocol: Option<bool>,
}

/// Close a published port
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft unpublish web 80
  weft unpublish web 80 --port 8080")]
pub(super) struct Unpublish {
    #[arg(value_name = "SERVICE")]
    service: Label,
    /// The port of its containers
    #[arg(value_name = "TARGET", value_parser = grammar::number)]
    target: NonZeroU16,
    /// Only this port of the hosts
    #[arg(long, value_name = "PORT", value_parser = grammar::number)]
    port: Option<NonZeroU16>,
    /// Where more than one network has such a service
    #[arg(long, value_name = "NETWORK")]
    network: Option<String>,
    #[arg(long, value_name = "tcp|udp", default_value = "tcp", value_parser = grammar::protocol)]
    protocol: Protocol,
}

impl Publish {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let publication = Publication {
            protocol: self.protocol,
            port: self.port.unwrap_or(self.target),
            target: self.target,
            mode: self.mode,
            host_ip: self.host_ip,
            source: self.source,
            proxy_protocol: self.proxy_protocol.unwrap_or(false),
        };
        let network = self.network.map(|network| format!("?network={}", encode(&network)));
        let path =
            format!("{}/publications{}", path(&self.service, None), network.unwrap_or_default());
        let status: ServiceStatus = agent.post(&path, &publication).await?;
        acknowledge(&status, out)
    }
}

impl Unpublish {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let mut path = format!(
            "{}/publications?target={}&protocol={}",
            path(&self.service, None),
            self.target,
            self.protocol
        );
        if let Some(port) = self.port {
            path.push_str(&format!("&port={port}"));
        }
        if let Some(network) = &self.network {
            path.push_str(&format!("&network={}", encode(network)));
        }
        let status: ServiceStatus = agent.delete(&path).await?;
        acknowledge(&status, out)
    }
}
