//! Ports of this host for one endpoint.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
};

use weft_balance::HostPort;
use weft_model::{Family, Network, Protocol};

use super::{
    keeper::Keeper,
    services::taken,
    survey::{Sight, Survey},
    waiting::Obstacle,
};
use crate::{
    api::types::{PortRequest, PublishedPort},
    projection::{host_ports, overlap},
    refusal::{Refusal, RefusalKind, refuse},
};

/// Where ports come from that nobody asked for by number: Linux's own (net.ipv4.ip_local_port_range).
const EPHEMERAL: RangeInclusive<u16> = 32_768..=60_999;

/// How many ports are looked at in advance where any of a range will do.
const AHEAD: usize = 64;

impl Keeper {
    /// The ports of the host for what an endpoint asks; all or none.
    pub(super) fn host_ports_for(
        &self,
        network: &Network,
        requests: &[PortRequest],
        survey: &Survey,
    ) -> Result<Vec<PublishedPort>, Obstacle> {
        for request in requests {
            check(network, request)?;
        }
        choose(requests, survey, |place| self.owner_of_port(place, None))
    }
}

/// Chooses a port of the host for each request: the first that nobody has, neither by what the
/// cluster says, whose `owner` is asked for, nor by what a survey of this host has found.
fn choose(
    requests: &[PortRequest],
    survey: &Survey,
    owner: impl Fn(&HostPort) -> Option<String>,
) -> Result<Vec<PublishedPort>, Obstacle> {
    let mut chosen = Vec::new();
    let mut own: BTreeMap<(Protocol, u16), Vec<HostPort>> = BTreeMap::new();
    let mut unseen = BTreeSet::new();
    for request in requests {
        let PortRequest { host_ip, container_port, protocol, .. } = *request;
        let candidates = candidates(request);
        let mut found = None;
        let mut obstacle = None;
        for host_port in candidates.clone() {
            let places: Vec<_> = host_ports(host_ip, protocol, host_port).collect();
            let others = own.get(&(protocol, host_port)).into_iter().flatten();
            let meets = |place: &HostPort| others.clone().any(|other| overlap(other, place));
            let in_the_way = places.iter().find_map(|place| {
                let owner = match meets(place) {
                    true => Some("the same container".to_owned()),
                    false => owner(place),
                };
                match (owner, survey.sight(place)) {
                    (Some(owner), _) => Some(taken(place, &owner)),
                    (None, Sight::Taken(why)) => Some(why.to_owned()),
                    (None, Sight::Free | Sight::Unseen) => None,
                }
            });
            match in_the_way {
                None => {
                    found = Some((host_port, places));
                    break;
                }
                Some(why) => obstacle = Some(why),
            }
        }
        let Some((host_port, places)) = found else {
            return Err(none_free(&candidates, obstacle).into());
        };
        if places.iter().any(|place| survey.sight(place) == Sight::Unseen) {
            let ahead = (host_port..=*candidates.end()).take(AHEAD);
            unseen.extend(ahead.flat_map(|port| host_ports(host_ip, protocol, port)));
        }
        own.entry((protocol, host_port)).or_default().extend(places);
        chosen.push(PublishedPort { host_ip, host_port, container_port, protocol });
    }
    match unseen.is_empty() {
        true => Ok(chosen),
        false => Err(Obstacle::Unseen(unseen)),
    }
}

fn candidates(request: &PortRequest) -> RangeInclusive<u16> {
    match request.host_port {
        Some(first) => first..=request.host_port_last.unwrap_or(first),
        None => EPHEMERAL,
    }
}

fn none_free(candidates: &RangeInclusive<u16>, obstacle: Option<String>) -> Refusal {
    let (first, last) = (candidates.start(), candidates.end());
    let why = obstacle.unwrap_or_else(|| format!("{first}-{last} has no port"));
    let message = match first == last {
        true => why,
        false => format!("no port from {first} to {last} is free: {why}"),
    };
    Refusal { field: Some("ports"), ..Refusal::new(RefusalKind::Conflict, message) }
}

fn check(network: &Network, request: &PortRequest) -> Result<(), Refusal> {
    let name = &network.name;
    if network.internal {
        return refuse(
            "ports",
            format!("network {name} is internal: nothing comes in from outside"),
        );
    }
    if !network.driver.has_gateway() {
        return refuse(
            "ports",
            format!(
                "network {name} has driver {}: its containers are on the host's link themselves",
                network.driver
            ),
        );
    }
    if request.container_port == 0 || request.host_port == Some(0) {
        return refuse("ports", "port 0 is none: give one from 1 to 65535");
    }
    let family = request.host_ip.map(Family::of);
    match family.filter(|family| network.pool(*family).is_none()) {
        Some(family) => refuse(
            "ports",
            format!(
                "network {name} has no {family} subnet: publish at an address of the other family"
            ),
        ),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use weft_balance::Taken;

    use super::*;

    fn request(host_port: Option<u16>, last: Option<u16>) -> PortRequest {
        let protocol = Protocol::Tcp;
        let host_ip = Some("192.0.2.1".parse().unwrap());
        PortRequest { host_ip, host_port, host_port_last: last, container_port: 80, protocol }
    }

    /// Chooses as the keeper does, with a survey wherever one is wanted; says how many there were.
    fn chosen(requests: &[PortRequest], in_use: &[u16]) -> (usize, Result<Vec<u16>, String>) {
        let mut survey = Survey::default();
        for surveys in 0.. {
            let owner = |place: &HostPort| (place.port == 8081).then(|| "service web".to_owned());
            match choose(requests, &survey, owner) {
                Ok(ports) => {
                    return (surveys, Ok(ports.into_iter().map(|port| port.host_port).collect()));
                }
                Err(Obstacle::Refused(refusal)) => return (surveys, Err(refusal.message)),
                Err(Obstacle::Waits { .. }) => unreachable!(),
                Err(Obstacle::Unseen(ports)) => {
                    let taken = ports.iter().filter(|port| in_use.contains(&port.port));
                    let taken = taken.map(|port| (*port, Taken { port: *port, owner: None }));
                    survey.note(ports.clone(), &taken.collect());
                }
            }
        }
        unreachable!()
    }

    #[test]
    fn a_whole_range_is_looked_at_at_once() {
        let requests: Vec<_> = (9000..10_000).map(|port| request(Some(port), None)).collect();
        let (surveys, ports) = chosen(&requests, &[]);
        assert_eq!((surveys, ports.unwrap().len()), (1, 1000));
        let (surveys, refused) = chosen(&requests, &[9500]);
        assert!(surveys == 1 && refused.unwrap_err().contains("192.0.2.1:9500/tcp"));
    }

    #[test]
    fn of_a_range_the_first_port_is_taken_that_nobody_has() {
        let any = request(Some(8080), Some(8090));
        assert_eq!(chosen(&[any, any], &[8080]), (1, Ok(vec![8082, 8083])));
        let (_, refused) = chosen(&[request(Some(8080), Some(8081))], &[8080]);
        let refused = refused.unwrap_err();
        assert!(refused.starts_with("no port from 8080 to 8081 is free: "), "{refused}");
        assert!(refused.contains("service web"), "{refused}");
        assert_eq!(chosen(&[request(None, None)], &[32_768]), (1, Ok(vec![32_769])));
    }
}
