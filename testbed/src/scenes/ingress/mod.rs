//! Services by virtual address and by published port, against the direct way and against the
//! proxies that people use instead.

mod contender;
mod summary;

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Context as _, ensure};
use weft_testbed::{Container, Lab, Load, Place, Pressure, Requests, WebServer, eventually};

use self::{
    contender::{Handmade, PORTS, Way},
    summary::Series,
};

/// Services against direct connections, HAProxy and docker-proxy
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often everything is measured, interleaved
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// How long each measurement takes, in seconds
    #[arg(long, default_value_t = 1)]
    seconds: u32,
}

/// Where a way begins and ends.
struct Path<'a> {
    from: &'a Place,
    to: &'a Place,
    target: String,
}

#[expect(clippy::print_stdout, reason = "a benchmark reports")]
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let lab = Lab::cluster(3)?;
    lab.create_network("app --subnet 10.40.0.0/24")?;
    let handmade = Handmade::build(&lab)?;
    // On two hosts a backend, each of a service of its own.
    let (near, near_ip) = backend(&lab, 1, "near")?;
    let (far, far_ip) = backend(&lab, 2, "far")?;
    lab.host(1).sh(&format!("ip address add {REMOTE}/24 dev eth0"))?;
    let local = lab.host(1).address().to_string();
    publish(&lab, "near", &local)?;
    publish(&lab, "far", REMOTE)?;
    // What goes to a backend's own address goes by the gateway, too: this one serves nothing.
    let bare = lab.host(2).container("bare")?;
    let bare_ip = bare.attach("app", "")?.ip4.context("no IPv4 address")?.to_string();
    let client = lab.host(3).container("client")?;
    client.attach("app", "")?;
    let vip = virtual_address(&lab, &client, "far")?;
    // Clients or servers that leave processors idle measure how well they share them, and not what
    // a way costs.
    let threads = thread::available_parallelism().map_or(1, |n| n.get() as u16);
    let pressure = Pressure { connections: CONNECTIONS * threads, threads };
    let servers = [&near, &far, &bare, &handmade.container]
        .map(|container| WebServer::start_processes(container, threads));
    let _servers = servers.into_iter().collect::<anyhow::Result<Vec<_>>>()?;

    let outside = Place::Host(lab.host(3).clone());
    let inside = Place::Container(client);
    let Handmade { container: routed, proxies: _proxies } = handmade;
    let [near, far, bare, routed] = [near, far, bare, routed].map(Place::Container);
    println!("near {near_ip}, far {far_ip} with the virtual address {vip}");
    let path = |way| {
        let (from, to, target) = match way {
            Way::Direct => (&inside, &bare, bare_ip.as_str()),
            Way::Vip => (&inside, &far, vip.as_str()),
            Way::Routed => (&outside, &routed, Handmade::ADDRESS),
            Way::Ingress => (&outside, &near, local.as_str()),
            Way::Remote => (&outside, &far, REMOTE),
            Way::Haproxy => (&outside, &routed, Handmade::HAPROXY),
            Way::DockerProxy => (&outside, &routed, Handmade::DOCKER_PROXY),
        };
        Path { from, to, target: target.to_owned() }
    };
    let paths: BTreeMap<Way, Path<'_>> = Way::ALL.map(|way| (way, path(way))).into();
    for (way, Path { from, target, .. }) in &paths {
        eventually(Duration::from_secs(15), &format!("{way}: {target} answers"), || {
            Requests::Single.run(from, target, ONE, 1).map_err(|error| format!("{error:#}"))
        })?;
    }

    let mut series = Series::default();
    for round in 0..options.rounds {
        for way in order(round as usize) {
            let Path { from, to, target } = &paths[&way];
            let ip = target.parse()?;
            let bulk = Load::Tcp { flows: 1 }.run(from, to, ip, options.seconds, 0.0)?;
            let kept = Requests::Kept.run(from, target, pressure, options.seconds)?;
            let single = Requests::Single.run(from, target, pressure, options.seconds)?;
            for (requests, served) in [(Requests::Kept, kept), (Requests::Single, single)] {
                ensure!(served.failed == 0, "{way}: {} of {requests:?} failed", served.failed);
            }
            series.add(way, bulk, kept, single);
        }
    }
    println!("{} rounds of {} s each, interleaved; medians", options.rounds, options.seconds);
    println!("{}", series.table());
    for figure in series.figures() {
        println!("{figure}");
    }
    lab.finish();
    Ok(())
}

/// Who goes first changes, so that a drift of the machine favours nobody; and who goes before whom,
/// so that what one leaves behind is not always the same one's.
fn order(round: usize) -> [Way; Way::ALL.len()] {
    // Any step meets all of a prime number of ways.
    let step = 1 + round % (Way::ALL.len() - 1);
    std::array::from_fn(|place| Way::ALL[(round + place * step) % Way::ALL.len()])
}

/// A container of a service with the same name, which has a virtual address.
fn backend(lab: &Lab, host: u8, name: &str) -> anyhow::Result<(Container, String)> {
    let container = lab.host(host).container(&format!("{name}-1"))?;
    let attached = container.attach("app", &format!("--alias {name}"))?;
    lab.host(1).weft(&format!("service create {name} --network app"))?.ok()?;
    Ok((container, attached.ip4.context("no IPv4 address")?.to_string()))
}

fn publish(lab: &Lab, service: &str, at: &str) -> anyhow::Result<()> {
    PORTS.into_iter().try_for_each(|port| {
        let place = format!("--network app --port {port} --host-ip {at}");
        lab.host(1).weft(&format!("publish {service} {port} {place}"))?.ok().map(drop)
    })
}

/// What the client resolves the service to, once it is one address that no container has.
fn virtual_address(lab: &Lab, client: &Container, service: &str) -> anyhow::Result<String> {
    let json = lab.host(1).weft_json(&format!("service inspect {service} --network app"))?;
    let vips = json.pointer("/0/vips").and_then(serde_json::Value::as_array);
    let vip = vips.and_then(|vips| vips.first()?.as_str()).context("the service has no address")?;
    eventually(Duration::from_secs(5), &format!("{service} resolves to {vip}"), || {
        let found = client.resolve(service).map_err(|error| format!("{error:#}"))?;
        let right = found.iter().map(ToString::to_string).eq([vip.to_owned()]);
        if right { Ok(()) } else { Err(format!("{found:?}")) }
    })?;
    Ok(vip.to_owned())
}

/// An address of the first host at which the service of the second one's backend is.
const REMOTE: &str = "10.99.0.203";
const ONE: Pressure = Pressure { connections: 1, threads: 1 };
/// Connections at a time, for each thread of the clients.
const CONNECTIONS: u16 = 32;

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn everybody_is_measured_in_every_round() {
        for round in 0..20 {
            assert_eq!(BTreeSet::from(order(round)), BTreeSet::from(Way::ALL), "round {round}");
        }
        let first: BTreeSet<_> = (0..7).map(|round| order(round)[0]).collect();
        assert_eq!(first.len(), Way::ALL.len());
    }
}
