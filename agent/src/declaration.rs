//! What a request makes of a service's definition. Pure.

use std::collections::BTreeSet;

use weft_balance::HostPort;
use weft_model::{
    Check, Network, Probe, Protocol, Publication, PublishMode, Service, ServicePort, Source,
};

use crate::{
    api::types::{CreateService, UpdateService, Vip},
    bulk::{label_bytes, refuse_bulk},
    ledger::ServiceOrder,
    projection::host_ports,
    refusal::{Refusal, refuse},
};

/// A definition, and the virtual addresses that it is to have.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Change {
    pub(crate) service: Service,
    pub(crate) vip: Vip,
}

/// What `order` makes of the definition that stands, if one does; nothing if it removes it.
pub(crate) fn changed(
    standing: Option<&Service>,
    order: &ServiceOrder,
    network: &Network,
) -> Result<Option<Change>, Refusal> {
    match order {
        ServiceOrder::Create(create) => match standing {
            None => Ok(Some(created(create, network))),
            Some(_) => Err(Refusal::conflict(
                "name",
                format!(
                    "service {} of network {} is declared already: weft service update changes it",
                    create.name, network.name
                ),
            )),
        },
        ServiceOrder::Update { name, update } => {
            let standing = standing.ok_or_else(|| missing(&name.service, network))?;
            Ok(Some(updated(standing, update)))
        }
        ServiceOrder::Publish { name, publication } => {
            let bare = || Service::bare(name.service.clone(), network.id);
            let mut service = standing.cloned().unwrap_or_else(bare);
            publish(&mut service, *publication)?;
            Ok(Some(kept(service)))
        }
        ServiceOrder::Unpublish { name, port, target, protocol } => {
            let mut service = standing.cloned().ok_or_else(|| missing(&name.service, network))?;
            let before = service.published.len();
            service.published.retain(|its| {
                let is_meant = port.is_none_or(|port| its.port.get() == port)
                    && its.target.get() == *target
                    && its.protocol == *protocol;
                !is_meant
            });
            match service.published.len() < before {
                true => Ok(Some(kept(service))),
                false => Err(Refusal::missing(format!(
                    "port {target}/{protocol} of service {} is not published: weft service inspect shows what is",
                    name.service
                ))),
            }
        }
        ServiceOrder::Remove(name) => match standing {
            Some(_) => Ok(None),
            None => Err(missing(&name.service, network)),
        },
    }
}

fn missing(service: &weft_model::Label, network: &Network) -> Refusal {
    Refusal::missing(format!(
        "there is no service {service} in network {}: weft service ls lists them",
        network.name
    ))
}

fn created(create: &CreateService, network: &Network) -> Change {
    let CreateService { name, vip, ports, spread, affinity, check, published, labels, .. } =
        create.clone();
    let service = Service {
        ports,
        spread,
        affinity: affinity.filter(|seconds| *seconds > 0),
        check,
        published,
        labels,
        ..Service::bare(name, network.id)
    };
    Change { service, vip }
}

fn updated(standing: &Service, update: &UpdateService) -> Change {
    let mut service = standing.clone();
    let UpdateService { vip, ports, spread, affinity, check, published, labels } = update.clone();
    service.ports = ports.unwrap_or(service.ports);
    service.spread = spread.unwrap_or(service.spread);
    service.affinity = affinity.unwrap_or(service.affinity).filter(|seconds| *seconds > 0);
    service.check = check.unwrap_or(service.check);
    service.published = published.unwrap_or(service.published);
    service.labels = labels.unwrap_or(service.labels);
    match vip {
        Some(vip) => Change { service, vip },
        None => kept(service),
    }
}

/// The definition with the virtual addresses that it has.
fn kept(service: Service) -> Change {
    let vip = match service.vips.is_empty() {
        true => Vip::None,
        false => Vip::Addresses(service.vips.iter().map(|grant| grant.ip).collect()),
    };
    Change { service, vip }
}

/// Adds a publication. The very same one once more changes nothing.
fn publish(service: &mut Service, publication: Publication) -> Result<(), Refusal> {
    if service.published.contains(&publication) {
        return Ok(());
    }
    service.published.push(publication);
    service.published.sort();
    Ok(())
}

/// The ports of hosts at which a service is published.
pub(crate) fn ports_of(service: &Service) -> impl Iterator<Item = HostPort> {
    service.published.iter().flat_map(|its| host_ports(its.host_ip, its.protocol, its.port.get()))
}

/// Refuses a definition that no host could put into force.
pub(crate) fn check(service: &Service, vip: &Vip, network: &Network) -> Result<(), Refusal> {
    if !network.driver.has_gateway() && (*vip != Vip::None || !service.published.is_empty()) {
        return refuse(
            "network",
            format!(
                "network {} has driver {}: its traffic does not pass by weft, so that its services have no virtual addresses (--vip none) and cannot be published",
                network.name, network.driver
            ),
        );
    }
    refuse_bulk("labels", label_bytes(&service.labels))?;
    refuse_bulk("ports", service.ports.len() * PORT_BYTES)?;
    refuse_bulk("published", service.published.len() * PORT_BYTES)?;
    let mut ports = BTreeSet::new();
    for ServicePort { protocol, port, .. } in &service.ports {
        if !ports.insert((protocol, port)) {
            return refuse("ports", format!("port {port}/{protocol} stands twice: give it once"));
        }
    }
    if let Some(check) = &service.check {
        check_check(check)?;
    }
    for publication in &service.published {
        check_publication(service, publication, network)?;
    }
    Ok(())
}

/// About what one port takes in a record.
const PORT_BYTES: usize = 64;

fn check_publication(
    service: &Service,
    publication: &Publication,
    network: &Network,
) -> Result<(), Refusal> {
    let Publication { protocol, port, mode, source, host_ip, proxy_protocol, .. } = *publication;
    let at = format!("port {port}/{protocol}");
    if network.internal {
        return refuse(
            "published",
            format!("network {} is internal: nothing comes in from outside", network.name),
        );
    }
    if proxy_protocol && protocol == Protocol::Udp {
        return refuse(
            "published",
            format!("{at}: the PROXY protocol is for TCP: leave it away, or publish a tcp port"),
        );
    }
    if proxy_protocol && mode == PublishMode::Host && source == Source::Local {
        return refuse("published", format!("{at}: mode host needs no --source local"));
    }
    let family = host_ip.map(weft_model::Family::of);
    if let Some(family) = family.filter(|family| network.pool(*family).is_none()) {
        return refuse(
            "published",
            format!(
                "network {} has no {family} subnet: publish at an address of the other family",
                network.name
            ),
        );
    }
    let own = host_ports(host_ip, protocol, port.get());
    let others = service.published.iter().filter(|other| *other != publication);
    let others: Vec<HostPort> = others
        .flat_map(|other| host_ports(other.host_ip, other.protocol, other.port.get()))
        .collect();
    for one in own {
        if others.iter().any(|other| crate::projection::overlap(&one, other)) {
            return Err(Refusal::conflict(
                "published",
                format!(
                    "{at} is published by service {} already: unpublish it first",
                    service.name
                ),
            ));
        }
    }
    Ok(())
}

fn check_check(check: &Check) -> Result<(), Refusal> {
    let Check { probe, interval, timeout, rise, fall } = check;
    let wrong = match probe {
        _ if *interval < LEAST_INTERVAL => Some("give an interval of at least 100 ms"),
        _ if *timeout == 0 => Some("give a timeout"),
        _ if *rise == 0 || *fall == 0 => Some("give at least 1 for rise and fall"),
        Probe::Http { path, .. } if !path.starts_with('/') => {
            Some("give a path that begins with /")
        }
        Probe::Http { path, .. }
            if path.contains(|c: char| c.is_whitespace() || c.is_control()) =>
        {
            Some("give a path without blanks")
        }
        Probe::Exec { command } if command.is_empty() => Some("give a command"),
        Probe::Tcp { .. } | Probe::Http { .. } | Probe::Exec { .. } | Probe::Engine => None,
    };
    match wrong {
        Some(wrong) => refuse("check", format!("the check cannot be run: {wrong}")),
        None => refuse_bulk("check", serde_json::to_vec(check).map_or(0, |text| text.len())),
    }
}

/// Milliseconds.
const LEAST_INTERVAL: u32 = 100;

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use weft_model::{AddressGrant, Unit};

    use super::*;
    use crate::{fixture::network, ledger::ServiceName};

    fn port(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    fn publication(port: u16, target: u16) -> Publication {
        Publication {
            protocol: Protocol::Tcp,
            port: self::port(port),
            target: self::port(target),
            mode: PublishMode::Ingress,
            host_ip: None,
            source: Source::Preserve,
            proxy_protocol: false,
        }
    }

    fn name() -> ServiceName {
        ServiceName { service: "web".parse().unwrap(), network: None }
    }

    fn standing(network: &Network) -> Service {
        let ip = [10, 1, 0, 100].into();
        let mut service = Service::bare(name().service, network.id);
        service.vips.push(AddressGrant { ip, unit: Unit::Address(ip), seq: 1 });
        service.affinity = Some(60);
        service
    }

    #[test]
    fn publishing_what_nobody_declared_declares_it_without_an_address() {
        let app = network(1, "app");
        let order = ServiceOrder::Publish { name: name(), publication: publication(8080, 80) };
        let change = changed(None, &order, &app).unwrap().unwrap();
        assert_eq!(change.vip, Vip::None);
        assert_eq!(change.service.published, [publication(8080, 80)]);
        // Once more is no change.
        let again = changed(Some(&change.service), &order, &app).unwrap().unwrap();
        assert_eq!(again, change);
        assert!(check(&again.service, &again.vip, &app).is_ok());
    }

    #[test]
    fn a_port_of_one_service_leads_to_one_port() {
        let app = network(1, "app");
        let service = Service {
            published: vec![publication(8080, 80), publication(8080, 81)],
            ..standing(&app)
        };
        let refusal = check(&service, &Vip::None, &app).unwrap_err();
        assert!(refusal.message.contains("8080"), "{refusal}");
        let internal = Network { internal: true, ..app };
        let service = Service { published: vec![publication(8080, 80)], ..service };
        let refusal = check(&service, &Vip::None, &internal).unwrap_err();
        assert!(refusal.message.contains("internal"), "{refusal}");
    }

    #[test]
    fn what_an_update_does_not_name_stays_and_null_takes_away() {
        let app = network(1, "app");
        let update = |json: serde_json::Value| {
            let update: UpdateService = serde_json::from_value(json).unwrap();
            let order = ServiceOrder::Update { name: name(), update };
            changed(Some(&standing(&app)), &order, &app).unwrap().unwrap()
        };
        let kept = update(serde_json::json!({"labels": {"a": "b"}}));
        assert_eq!(kept.service.affinity, Some(60));
        assert_eq!(kept.vip, Vip::Addresses(vec![[10, 1, 0, 100].into()]));
        assert_eq!(update(serde_json::json!({"affinity": null})).service.affinity, None);
        assert_eq!(update(serde_json::json!({"vip": "none"})).vip, Vip::None);
    }

    #[test]
    fn what_is_unpublished_was_published_before() {
        let app = network(1, "app");
        let before = Service {
            published: vec![publication(8080, 80), publication(8081, 80)],
            ..standing(&app)
        };
        let left = |port, target| {
            let order =
                ServiceOrder::Unpublish { name: name(), port, target, protocol: Protocol::Tcp };
            changed(Some(&before), &order, &app)
                .map(|change| change.unwrap().service.published.len())
        };
        assert_eq!(left(None, 80), Ok(0));
        assert_eq!(left(Some(8081), 80), Ok(1));
        assert!(left(None, 81).is_err() && left(Some(80), 80).is_err());
    }

    #[test]
    fn a_check_that_could_not_be_run_is_refused() {
        let app = network(1, "app");
        let checked = |probe: Probe, interval: u32| {
            let probe = Check { probe, interval, timeout: 1, rise: 1, fall: 1 };
            check(&Service { check: Some(probe), ..standing(&app) }, &Vip::None, &app)
        };
        let http = |path: &str| Probe::Http {
            port: port(80),
            path: path.into(),
            status: None,
            body: None,
        };
        assert!(checked(http("/health"), 1000).is_ok());
        assert!(checked(http("/health"), 10).is_err());
        for bad in ["health", "/a b", "/\r\nX: y"] {
            assert!(checked(http(bad), 1000).is_err(), "{bad}");
        }
        assert!(checked(Probe::Exec { command: Vec::new() }, 1000).is_err());
    }
}
