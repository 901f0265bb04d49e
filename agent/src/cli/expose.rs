use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use clap::Args;

use super::{Client, attach, client::encode, output::Output};
use crate::api::types::{self, Attached};

/// Put this host on networks: its own processes reach the containers there, and they reach it
///
/// The host gets an address and an interface, but no default route, and its resolver stays as it
/// is. Nothing is forwarded. It lasts until `weft hide`, through restarts and reboots.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft expose app
  weft expose app --ip 10.32.0.5
  curl http://10.32.0.7/metrics")]
pub(super) struct Expose {
    /// Networks, by name or id
    #[arg(value_name = "NETWORK", required = true)]
    networks: Vec<String>,
    /// A fixed IPv4 address of the subnet; for one network
    #[arg(long, value_name = "IP")]
    ip: Option<Ipv4Addr>,
    /// A fixed IPv6 address of the subnet; for one network
    #[arg(long, value_name = "IP")]
    ip6: Option<Ipv6Addr>,
}

impl Expose {
    pub(super) async fn run(self, agent: &Client, out: &mut Output<'_>) -> anyhow::Result<()> {
        let (v4, v6) = (self.ip.map(IpAddr::V4), self.ip6.map(IpAddr::V6));
        let addresses: Vec<IpAddr> = v4.into_iter().chain(v6).collect();
        anyhow::ensure!(
            addresses.is_empty() || self.networks.len() == 1,
            "an address belongs to one network: expose them one by one"
        );
        for network in self.networks {
            let request = types::Expose { network, addresses: addresses.clone() };
            let attached: Attached = agent.post("/v1/exposures", &request).await?;
            attach::show(&attached, out)?;
        }
        Ok(())
    }
}

/// Take this host off networks
///
/// Succeeds if it is not on them.
#[derive(Args, Debug)]
#[command(after_help = "Example:
  weft hide app")]
pub(super) struct Hide {
    /// Networks, by name or id
    #[arg(value_name = "NETWORK", required = true)]
    networks: Vec<String>,
}

impl Hide {
    pub(super) async fn run(self, agent: &Client, out: &mut impl Write) -> anyhow::Result<()> {
        for network in &self.networks {
            let () = agent.delete(&format!("/v1/exposures/{}", encode(network))).await?;
            writeln!(out, "{network}")?;
        }
        Ok(())
    }
}
