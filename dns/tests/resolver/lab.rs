//! A host's names, and queries and answers in a form that tests can compare.
//!
//! ```text
//! app   10.32.0.0/24, fd00:32::/64   web1, web2 (service web), db        sandbox 10.32.0.2: app, back
//! back  10.33.0.0/24                 db, cache                           sandbox 10.33.0.7: back, app
//! vault 10.34.0.0/24, internal       safe                                sandbox 10.34.0.3: vault, app
//! dark  10.35.0.0/24                 hidden                              nobody on this host
//! ```

use std::{net::IpAddr, sync::Arc, time::Duration};

use domain::{
    base::{Message, MessageBuilder, Name, Rtype},
    rdata::AllRecordData,
};
use rand::{SeedableRng, rngs::StdRng};
use weft_dns::{Asker, Directory, Entry, NetworkNames, Reply, Transport, answer};
use weft_model::{AddressGrant, DnsName, Endpoint, EndpointId, Labels, NetworkId, Unit};

pub(crate) const APP: u8 = 1;
pub(crate) const BACK: u8 = 2;
pub(crate) const VAULT: u8 = 3;
pub(crate) const DARK: u8 = 4;
pub(crate) const TTL: Duration = Duration::from_secs(5);

pub(crate) fn network(number: u8) -> NetworkId {
    NetworkId::from([number; 16])
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn endpoint(number: u8, name: &str, ips: &[&str]) -> Endpoint {
    let grant = |text: &&str| AddressGrant { ip: ip(text), unit: Unit::Address(ip(text)), seq: 1 };
    Endpoint {
        id: EndpointId::from([number; 16]),
        network: network(0),
        name: name.parse().unwrap(),
        aliases: Vec::new(),
        mac: "02:00:00:00:00:01".parse().unwrap(),
        addresses: ips.iter().map(grant).collect(),
        sandbox: name.to_owned(),
        seq: 0,
        service: None,
        labels: Labels::new(),
        default_route: false,
    }
}

pub(crate) fn names(
    name: &str,
    internal: bool,
    subnets: &[&str],
    entries: Vec<Entry>,
) -> Arc<NetworkNames> {
    let subnets = subnets.iter().map(|text| text.parse().unwrap()).collect();
    Arc::new(NetworkNames::new(name.parse().unwrap(), internal, subnets, entries))
}

pub(crate) fn domain() -> DnsName {
    "weft.internal".parse().unwrap()
}

pub(crate) fn directory() -> Directory {
    let web = |endpoint| Endpoint { service: "web".parse().ok(), ..endpoint };
    let mut web1 = web(endpoint(0x11, "web1", &["10.32.0.2", "fd00:32::2"]));
    web1.aliases = vec!["www".parse().unwrap(), "db.corp.example".parse().unwrap()];
    let web2 = web(endpoint(0x12, "shop_web_2", &["10.32.0.3"]));
    let app = [web1, web2, endpoint(0x13, "db", &["10.32.0.9"])];
    let back = [endpoint(0x21, "db", &["10.33.0.9"]), endpoint(0x22, "cache", &["10.33.0.5"])];
    let vault = [endpoint(0x31, "safe", &["10.34.0.2"])];
    let dark = [endpoint(0x41, "hidden", &["10.35.0.2"]), endpoint(0x42, "db", &["10.35.0.9"])];
    let entries = |endpoints: &[Endpoint]| endpoints.iter().map(Entry::member).collect();

    let mut directory = Directory::new(domain());
    directory.networks.extend([
        (network(APP), names("app", false, &["10.32.0.0/24", "fd00:32::/64"], entries(&app))),
        (network(BACK), names("back", false, &["10.33.0.0/24"], entries(&back))),
        (network(VAULT), names("vault", true, &["10.34.0.0/24"], entries(&vault))),
        (network(DARK), names("dark", false, &["10.35.0.0/24"], entries(&dark))),
    ]);
    for (at, address, attached) in [
        (APP, "10.32.0.2", vec![APP, BACK]),
        (APP, "fd00:32::2", vec![APP, BACK]),
        (APP, "10.32.0.3", vec![APP]),
        (BACK, "10.33.0.7", vec![BACK, APP]),
        (VAULT, "10.34.0.3", vec![VAULT, APP]),
    ] {
        let attached = attached.into_iter().map(network).collect();
        directory.askers.insert((network(at), ip(address)), attached);
    }
    directory
}

pub(crate) fn query(name: &str, rtype: Rtype) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(0x1234);
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question.push((Name::vec_from_str(name).unwrap(), rtype)).unwrap();
    question.finish()
}

pub(crate) fn query_with_edns(name: &str, rtype: Rtype, payload: u16, version: u8) -> Vec<u8> {
    let plain = query(name, rtype);
    let mut builder = MessageBuilder::new_vec().question();
    builder.header_mut().set_id(0x1234);
    let message = Message::from_slice(&plain).unwrap();
    builder.push(message.sole_question().unwrap()).unwrap();
    let mut additional = builder.additional();
    additional
        .opt(|opt| {
            opt.set_udp_payload_size(payload);
            opt.set_version(version);
            opt.set_dnssec_ok(true);
            Ok(())
        })
        .unwrap();
    additional.finish()
}

/// Asks `directory` by UDP as the sandbox with `address` in network `at`.
pub(crate) fn ask(packet: &[u8], directory: &Directory, at: u8, address: &str) -> Reply {
    let (network, address) = (network(at), ip(address));
    let asker = Asker { network, address, transport: Transport::Udp, falls_through: false };
    answer(packet, &asker, directory, TTL, &mut StdRng::seed_from_u64(1))
}

pub(crate) fn bytes_of(reply: Reply) -> Vec<u8> {
    match reply {
        Reply::Answer { message, .. } => message,
        other => panic!("no answer but {other:?}"),
    }
}

/// The data of all answer records, in order.
pub(crate) fn records(message: &[u8]) -> Vec<String> {
    let message = Message::from_slice(message).unwrap();
    let answers = message.answer().unwrap().limit_to::<AllRecordData<_, _>>();
    answers.map(|record| record.unwrap().data().to_string()).collect()
}

/// One line about a reply: its records, sorted, or its code and who owns the SOA record.
pub(crate) fn line(reply: &Reply) -> String {
    match reply {
        Reply::Drop => "drop".to_owned(),
        Reply::Forward(_) => "forward".to_owned(),
        Reply::Answer { message, .. } => line_of(message),
    }
}

pub(crate) fn line_of(bytes: &[u8]) -> String {
    let mut found = records(bytes);
    found.sort();
    let message = Message::from_slice(bytes).unwrap();
    let zone = message.authority().unwrap().next().map(|soa| soa.unwrap().owner().to_string());
    match (message.no_error(), found.is_empty()) {
        (true, false) => found.join(" "),
        (true, true) => format!("NODATA {}", zone.unwrap_or_default()),
        (false, _) => format!("{} {}", message.header().rcode(), zone.unwrap_or_default()),
    }
    .trim_end()
    .to_owned()
}
