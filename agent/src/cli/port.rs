use std::{io::Write, net::SocketAddr};

use clap::Args;
use weft_model::{Family, ServicePort};

use super::{Client, Format, client::encode, grammar, output::Output};
use crate::{api::types::PublishedPort, projection::host_ports};

/// List the ports of this host that lead to a container
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft port web
  weft port web 80/tcp")]
pub(super) struct Port {
    /// A container of this host, by name or id
    #[arg(value_name = "CONTAINER")]
    container: String,
    /// Only what leads to this port of the container
    #[arg(value_name = "PORT[/udp]", value_parser = grammar::service_port)]
    port: Option<ServicePort>,
}

impl Port {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let path = format!("/v1/endpoints/{}/ports", encode(&self.container));
        let mut ports: Vec<PublishedPort> = agent.get(&path).await?;
        if let Some(wanted) = self.port {
            let wanted = (wanted.target.get(), wanted.protocol);
            ports.retain(|port| (port.container_port, port.protocol) == wanted);
            anyhow::ensure!(
                !ports.is_empty(),
                "no port of this host leads to {}/{} of {}",
                wanted.0,
                wanted.1,
                self.container
            );
        }
        if out.format == Format::Json {
            return Ok(out.json(&ports)?);
        }
        for PublishedPort { host_ip, host_port, container_port, protocol } in ports {
            for at in host_ports(host_ip, protocol, host_port) {
                let at = at.ip.unwrap_or_else(|| match at.family {
                    Family::V4 => [0, 0, 0, 0].into(),
                    Family::V6 => [0u16; 8].into(),
                });
                let at = SocketAddr::new(at, host_port);
                match self.port {
                    // As docker port does: with a port asked for, what it is is known.
                    Some(_) => writeln!(out, "{at}")?,
                    None => writeln!(out, "{container_port}/{protocol} -> {at}")?,
                }
            }
        }
        Ok(())
    }
}
