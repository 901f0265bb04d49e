//! Addresses asked for by number: from hosts that hold them, and from hosts that do not.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context as _, ensure};
use serde_json::Value;
use weft_testbed::{Host, Lab, Stop, eventually};

const SOON: Duration = Duration::from_secs(20);

/// Three hosts on one network, each with a block of its own.
struct Site {
    lab: Lab,
    /// By host, a free address of its block: the one behind that which it gave out first.
    free: Vec<IpAddr>,
}

impl Site {
    fn build() -> anyhow::Result<Self> {
        let lab = Lab::cluster(3)?;
        lab.create_network("app --subnet 10.40.0.0/24")?;
        let mut free = Vec::new();
        for host in lab.hosts() {
            let first = host.container(&format!("first-{}", host.name()))?.attach("app", "")?;
            free.push(next(first.ips().next().context("no address")?));
        }
        Ok(Self { lab, free })
    }

    /// A free address of the block of host `index`.
    fn of(&self, index: u8) -> IpAddr {
        self.free[usize::from(index) - 1]
    }
}

/// Blocks begin at multiples of eight here, so this stays inside.
fn next(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) => IpAddr::V4((u32::from(ip) + 1).into()),
        IpAddr::V6(ip) => IpAddr::V6((u128::from(ip) + 1).into()),
    }
}

fn vips(host: &Host, service: &str) -> anyhow::Result<Value> {
    let found = host.weft_json(&format!("service inspect {service}"))?;
    Ok(found[0]["vips"].clone())
}

/// `host` hears no more of `service`.
fn is_gone(host: &Host, service: &str) -> anyhow::Result<()> {
    eventually(SOON, &format!("{service} is removed at {}", host.name()), || {
        let all = host.weft_json("service ls")?;
        let found = all.as_array().context("no list")?.iter().any(|one| one["name"] == service);
        ensure!(!found, "{all}");
        Ok(())
    })
}

#[test]
fn an_address_in_the_block_of_another_host_is_had_by_number() -> anyhow::Result<()> {
    let site = Site::build()?;
    let (one, three) = (site.lab.host(1), site.lab.host(3));
    let asker = three.container("asker")?;
    asker.attach("app", "")?;

    // Never used, by a container and by a command.
    let (of_one, of_two) = (site.of(1), site.of(2));
    let attached = three.container("attached")?;
    let attachment = attached.attach("app", &format!("--ip {of_one}"))?;
    ensure!(attachment.ips().eq([of_one]), "{attachment:?}");
    let run = format!("run --network app --name once --ip {of_two} -- ip -4 -o address show eth0");
    let shown = three.weft(&run)?.ok()?;
    ensure!(shown.contains(&of_two.to_string()), "{shown}");

    // Its holder is told who has it, and by no means gives it out.
    let thief = one.container("thief")?;
    let refused = thief.try_attach("app", &format!("--ip {of_one}"))?;
    refused.refused(1, &[&of_one.to_string(), "attached", "h3"])?;
    for count in 0..8 {
        let attachment = one.container(&format!("any-{count}"))?.attach("app", "")?;
        ensure!(!attachment.ips().any(|ip| ip == of_one), "given out twice: {attachment:?}");
    }

    // Back again: from the container of h3 to a service of h1, although it rests, and from there to
    // a container of h2.
    attached.detach("app")?;
    let declared = one.weft(&format!("service create web --network app --vip {of_one}"))?;
    declared.ok().context("an address that rests at h3")?;
    ensure!(vips(one, "web")?[0] == of_one.to_string(), "{}", vips(one, "web")?);
    let two = site.lab.host(2);
    two.weft("service rm web")?.ok()?;
    for host in [one, two] {
        is_gone(host, "web")?;
    }
    let last = two.container("last")?;
    last.attach("app", &format!("--ip {of_one}")).context("an address that rests at h1")?;
    asker.reaches(&of_one.to_string(), SOON)?;
    site.lab.finish();
    Ok(())
}

/// A holder that has just started keeps what it has until it knows the cluster. Who asked meanwhile
/// gets the address as soon as it is given back.
#[test]
fn an_address_given_back_goes_to_the_host_that_waits_for_it() -> anyhow::Result<()> {
    let site = Site::build()?;
    let (one, two, three) = (site.lab.host(1), site.lab.host(2), site.lab.host(3));
    let ip = site.of(1);
    one.weft(&format!("service create web --network app --vip {ip}"))?.ok()?;
    eventually(SOON, "h2 has heard of web", || vips(two, "web"))?;
    one.stop_agent(Stop::Killed)?;
    two.weft("service rm web")?.ok()?;
    is_gone(three, "web")?;

    one.start_agent()?;
    site.lab.wait_all_alive(SOON)?;
    let ran = three.weft(&format!("service create other --network app --vip {ip}"))?;
    ran.ok()?;
    ensure!(vips(three, "other")?[0] == ip.to_string(), "{}", vips(three, "other")?);
    site.lab.finish();
    Ok(())
}

#[test]
fn an_address_of_a_host_that_is_away_is_refused_by_its_name_until_it_is_back() -> anyhow::Result<()>
{
    let site = Site::build()?;
    let three = site.lab.host(3);
    let ip = site.of(1);
    let container = three.container("asker")?;
    site.lab.cut(1)?;
    eventually(SOON, "h1 is away", || {
        let states = site.lab.node_states(3)?;
        ensure!(states["h1"] != "alive", "{states:?}");
        Ok(())
    })?;
    let remedy = "bring its agent or the connection back";
    let words = [&*ip.to_string(), "node h1", "cannot be reached", remedy];
    container.try_attach("app", &format!("--ip {ip}"))?.refused(1, &words)?;
    three.weft(&format!("service create web --network app --vip {ip}"))?.refused(1, &words)?;
    let run = format!("run --network app --name once --ip {ip} -- true");
    three.weft(&run)?.refused(1, &words)?;

    site.lab.mend(1)?;
    site.lab.wait_all_alive(SOON)?;
    container.attach("app", &format!("--ip {ip}"))?;
    site.lab.finish();
    Ok(())
}
