use std::{net::IpAddr, time::Duration};

use anyhow::Context as _;

use crate::{Attachment, Container, Lab, eventually};

/// A container on each of two hosts, on one network, which reach each other.
#[derive(Debug)]
pub struct Pair {
    pub one: Container,
    pub two: Container,
    /// IPv4, of `one`.
    pub near: IpAddr,
    /// IPv4, of `two`.
    pub far: IpAddr,
}

impl Pair {
    /// `NAME-one` on the first host, `NAME-two` on the second.
    ///
    /// # Errors
    ///
    /// An attach is refused, or they do not reach each other within 10 s.
    pub fn attach(lab: &Lab, network: &str, name: &str) -> anyhow::Result<Self> {
        let one = lab.host(1).container(&format!("{name}-one"))?;
        let two = lab.host(2).container(&format!("{name}-two"))?;
        let [near, far] = [&one, &two].map(|container| address(container, network));
        let pair = Self { near: near?, far: far?, one, two };
        pair.reach_each_other()?;
        Ok(pair)
    }

    /// Waits until each reaches the other by name and by all addresses.
    ///
    /// # Errors
    ///
    /// One does not within 10 s.
    pub fn reach_each_other(&self) -> anyhow::Result<()> {
        for (from, to) in [(&self.one, &self.two), (&self.two, &self.one)] {
            // A name may be known before the path is there; a lookup that waits would hide that.
            for ip in to.attachments().iter().flat_map(Attachment::ips) {
                from.reaches(&ip.to_string(), SOON)?;
            }
            let what = format!("{} resolves {}", from.name(), to.name());
            eventually(SOON, &what, || from.resolve(to.name()).map(drop))?;
        }
        Ok(())
    }
}

fn address(container: &Container, network: &str) -> anyhow::Result<IpAddr> {
    Ok(container.attach(network, "")?.ip4.context("no IPv4 address")?.into())
}

const SOON: Duration = Duration::from_secs(20);
