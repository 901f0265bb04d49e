//! The specification's calls, each carried out by the agent.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::{Path, PathBuf},
    slice,
};

use serde_json::Value;
use weft_model::{EndpointId, Family};

use super::{
    conf::Conf,
    environment::{Args, Container, is_there},
    failure::{Code, Failure},
    result::CniResult,
};
use crate::{
    api::{
        client::{Client, ClientError},
        types::{Attach, Attached, NetworkState, NetworkStatus, PortRequest, Sandbox, Status},
    },
    engines::{
        attachment::{AttachmentKey, attachments_of, detach},
        interior::Interior,
        mapping::without_those_of,
        naming::Names,
        wanted::WantedError,
    },
};

const ENGINE: &str = "cni";
const REMEDY: &str = "\"create\": true in the network configuration";

/// A configuration, and the agent that follows it.
pub(super) struct Plugin {
    conf: Conf,
    agent: Client,
}

impl Plugin {
    pub(super) fn new(conf: Conf) -> Self {
        let agent = Client::new(&conf.socket);
        Self { conf, agent }
    }

    /// Attaches a container. An attachment that an earlier call has left is answered again if it is
    /// just what is asked for, and replaced if its container has another namespace now.
    pub(super) async fn add(
        &self,
        container: Container,
        netns: PathBuf,
        args: Args,
    ) -> Result<Value, Failure> {
        let before = self.conf.prev_result.as_ref().map(CniResult::parse).transpose()?;
        let before = before.unwrap_or_default();
        let interior = Interior::read(&netns)?;
        let request = self.request(&container, &netns, &args).await?;
        let ifname = self.ifname(&container);
        let attached = match self.left_behind(&container, &interior, &request).await? {
            Some(attached) => attached,
            None if interior.interfaces.contains_key(ifname) => {
                return Err(Failure::new(
                    Code::Environment,
                    format!(
                        "CNI_IFNAME: the container has an interface {ifname} already; name another one with the key ifname"
                    ),
                ));
            }
            None => self.attach(&request).await?,
        };
        let families = default_families(&attached, &Interior::read(&netns)?);
        if self.conf.default_gateway == Some(true) && families.is_empty() {
            let failure = Failure::new(
                Code::Conflict,
                format!(
                    "isDefaultGateway is true, but the container has a default route that goes before, or network {} is internal: leave it out, or give a higher gatewayPriority",
                    attached.endpoint.network
                ),
            );
            detach(&self.agent, &attached.endpoint).await?;
            return Err(failure);
        }
        let result = before
            .add(&attached, (&netns, ifname), &families)
            .resolve_with(&attached, &self.conf.dns);
        Ok(result.render(self.conf.version))
    }

    /// Takes a container's attachment away. Succeeds where there is none.
    pub(super) async fn del(
        &self,
        container: Container,
        netns: Option<PathBuf>,
    ) -> Result<(), Failure> {
        match self.key(&container).detach(&self.agent).await {
            Ok(()) => Ok(()),
            // An agent that starts takes away what has no namespace any more.
            Err(ClientError::Unreachable { .. }) if !is_there(netns.as_deref()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Compares what ADD answered with what the agent has, and what the kernel has.
    pub(super) async fn check(&self, container: Container, netns: PathBuf) -> Result<(), Failure> {
        let Some(prev) = &self.conf.prev_result else {
            let message = "CHECK needs prevResult: what ADD answered";
            return Err(Failure::new(Code::Configuration, message));
        };
        let prev = CniResult::parse(prev)?;
        let interior = Interior::read(&netns)?;
        let found = self.key(&container).find(&self.agent).await?;
        let endpoint = found.first().filter(|endpoint| endpoint.reachable).ok_or_else(|| {
            changed(format!("{} of container {} is not attached", container.ifname, container.id))
        })?;
        let attached = self
            .attached(endpoint.id)
            .await?
            .ok_or_else(|| changed(format!("{} was detached a moment ago", container.ifname)))?;
        compare(&prev, &attached, &interior, self.ifname(&container)).map_err(changed)?;
        let wanted = self.ports(&container).await?;
        match without_those_of(wanted, slice::from_ref(endpoint)).first() {
            None => Ok(()),
            Some(PortRequest { host_port, container_port, protocol, .. }) => {
                let host_port = host_port.unwrap_or_default();
                Err(changed(format!(
                    "port {host_port}/{protocol} of the host does not lead to port {container_port} of {} any more",
                    container.ifname
                )))
            }
        }
    }

    /// Detaches what this plugin attached to the network, but for what the runtime still has.
    pub(super) async fn gc(&self) -> Result<(), Failure> {
        let Some(valid) = &self.conf.valid else {
            let message = "GC needs cni.dev/valid-attachments: without it nothing is removed";
            return Err(Failure::new(Code::Configuration, message));
        };
        let valid: BTreeSet<(&str, &str)> =
            valid.iter().map(|(container, ifname)| (container.as_str(), ifname.as_str())).collect();
        let attachments = attachments_of(&self.agent, ENGINE, &self.conf.name).await?;
        let mut outcome = Ok(());
        for (endpoint, container, ifname) in &attachments {
            if !valid.contains(&(container.as_str(), ifname.as_str()))
                && let Err(error) = detach(&self.agent, endpoint).await
            {
                outcome = Err(error.into());
            }
        }
        outcome
    }

    /// Tells whether an ADD could succeed.
    pub(super) async fn status(&self) -> Result<(), Failure> {
        let unavailable = |message: String| Failure::new(Code::NotAvailable, message);
        let status: Status = self.agent.get("/v1/status").await.map_err(|error| {
            let Failure { message, details, .. } = error.into();
            Failure { code: Code::NotAvailable, message, details }
        })?;
        let name = &self.conf.network.name;
        let network = match self.conf.network.find(&self.agent).await {
            Ok(Some(network)) => network,
            Ok(None) if self.conf.network.create => return Ok(()),
            Ok(None) => {
                let error = WantedError::Missing { name: name.clone(), remedy: REMEDY };
                return Err(unavailable(error.to_string()));
            }
            Err(error) => return Err(unavailable(Failure::from(error).message)),
        };
        match limits(&network, &status) {
            None => Ok(()),
            Some(limit) => Err(Failure::new(Code::LimitedConnectivity, limit)),
        }
    }

    fn key(&self, container: &Container) -> AttachmentKey {
        AttachmentKey {
            engine: ENGINE,
            network: self.conf.name.clone(),
            container: container.id.clone(),
            ifname: container.ifname.clone(),
        }
    }

    /// What the interface is called in the container.
    fn ifname<'a>(&'a self, container: &'a Container) -> &'a str {
        self.conf.ifname.as_deref().unwrap_or(&container.ifname)
    }

    async fn request(
        &self,
        container: &Container,
        netns: &Path,
        args: &Args,
    ) -> Result<Attach, Failure> {
        let names = names(&self.conf, container, args)?;
        let addresses: Vec<IpAddr> = match self.conf.ips.is_empty() {
            true => args.ips.clone(),
            false => self.conf.ips.clone(),
        };
        Ok(Attach {
            network: self.conf.network.name.clone(),
            name: names.name,
            sandbox: Sandbox::Path(netns.into()),
            aliases: names.aliases,
            addresses,
            mac: self.conf.mac.or(args.mac),
            ifname: Some(self.ifname(container).to_owned()),
            default_route: self.conf.default_gateway.unwrap_or(true),
            gateway_priority: self.conf.gateway_priority,
            service: names.service,
            labels: self.key(container).labels(),
            ports: self.ports(container).await?,
        })
    }

    /// The ports that shall lead to a container on this network.
    async fn ports(&self, container: &Container) -> Result<Vec<PortRequest>, Failure> {
        if self.conf.ports.is_empty() {
            return Ok(Vec::new());
        }
        let beside = self.key(container).beside(&self.agent).await?;
        Ok(without_those_of(self.conf.ports.clone(), &beside))
    }

    /// Finds what an earlier call for the same container has left, if it is what is asked for.
    async fn left_behind(
        &self,
        container: &Container,
        interior: &Interior,
        request: &Attach,
    ) -> Result<Option<Attached>, Failure> {
        for endpoint in self.key(container).find(&self.agent).await? {
            let attached = self.attached(endpoint.id).await?;
            if let Some(attached) = attached
                && endpoint.reachable
                && attached.sandbox == interior.sandbox
            {
                if is_asked_for(&attached, request, interior) {
                    return Ok(Some(attached));
                }
                continue;
            }
            detach(&self.agent, &endpoint).await?;
        }
        Ok(None)
    }

    async fn attach(&self, request: &Attach) -> Result<Attached, Failure> {
        if !self.conf.network.is_only_named() {
            self.conf.network.ensure(&self.agent, REMEDY).await?;
        }
        let attached = self.agent.post("/v1/endpoints", request).await;
        attached.map_err(|error| match (error.is_missing(), error.refusal()) {
            (true, Some((_, problem))) if problem.field.as_deref() == Some("network") => {
                let name = request.network.clone();
                WantedError::Missing { name, remedy: REMEDY }.into()
            }
            (_, _) => error.into(),
        })
    }

    async fn attached(&self, id: EndpointId) -> Result<Option<Attached>, Failure> {
        match self.agent.get(&format!("/v1/endpoints/{id}")).await {
            Ok(attached) => Ok(Some(attached)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// What a container is called: as it was said, as Nomad calls its allocation, or by its id.
fn names(conf: &Conf, container: &Container, args: &Args) -> Result<Names, Failure> {
    let wrong = |error: weft_model::InvalidName| {
        Failure::new(Code::Configuration, format!("the container's name: {error}"))
    };
    let id = &container.id;
    let nomad = &args.nomad;
    let short = nomad.alloc.as_deref().and_then(|alloc| alloc.get(..8));
    let service = nomad.group.as_deref().and_then(|group| group.parse().ok());
    let allocation = service.as_ref().zip(short).map(|(group, short)| format!("{group}-{short}"));
    let qualified = nomad.group.iter().zip(&nomad.job).map(|(group, job)| format!("{group}.{job}"));
    // An alias that a job's name does not allow is nobody's wish.
    let qualified: Vec<String> =
        qualified.filter(|name| name.parse::<weft_model::DnsName>().is_ok()).collect();
    let name = args.name.as_deref().or(allocation.as_deref());
    let names = Names::of(name, id).map_err(wrong)?;
    let aliases = conf.aliases.iter().chain(&args.aliases).chain(&qualified);
    let names = names.with_aliases(aliases, id).map_err(wrong)?;
    Ok(Names { service, ..names })
}

/// Whether an attachment is what a request would make.
fn is_asked_for(attached: &Attached, request: &Attach, interior: &Interior) -> bool {
    let endpoint = &attached.endpoint;
    let has = |ip: &IpAddr| endpoint.addresses.iter().any(|net| net.addr() == *ip);
    endpoint.ifname == request.ifname
        && request.ifname.as_ref().is_some_and(|name| interior.interfaces.contains_key(name))
        && (request.network == endpoint.network.as_str()
            || endpoint.network_id.to_string().starts_with(&request.network))
        && request.addresses.iter().all(has)
        && request.mac.is_none_or(|mac| mac == endpoint.mac)
        && request.ports.len() == endpoint.ports.len()
        && without_those_of(request.ports.clone(), slice::from_ref(endpoint)).is_empty()
}

/// The families in which the container's default route leads through the endpoint.
fn default_families(attached: &Attached, interior: &Interior) -> BTreeSet<Family> {
    let ifname = attached.endpoint.ifname.as_deref();
    let own = interior.default_routes.iter().filter(|(_, name)| Some(name.as_str()) == ifname);
    own.map(|(family, _)| *family).collect()
}

/// Says what is not as it was answered.
fn compare(
    prev: &CniResult,
    attached: &Attached,
    interior: &Interior,
    ifname: &str,
) -> Result<(), String> {
    let Some((answered, ips)) = prev.inside(ifname) else {
        return Err(format!("prevResult has no interface {ifname} in a sandbox"));
    };
    let endpoint = &attached.endpoint;
    if attached.sandbox != interior.sandbox {
        return Err(format!("{ifname} is attached to another namespace than CNI_NETNS"));
    }
    let addresses: BTreeSet<_> = endpoint.addresses.iter().copied().collect();
    if ips != addresses {
        return Err(format!("{ifname} has {}, not {}", list(&addresses), list(&ips)));
    }
    let mac = endpoint.mac.to_string();
    if answered.mac.as_ref().is_some_and(|old| !old.eq_ignore_ascii_case(&mac)) {
        return Err(format!("{ifname} has the MAC address {mac}, not {:?}", answered.mac));
    }
    let Some(inside) = interior.interfaces.get(ifname) else {
        return Err(format!("the container has no interface {ifname}"));
    };
    if inside.mac != Some(endpoint.mac.octets()) {
        return Err(format!("{ifname} in the container does not have the MAC address {mac}"));
    }
    if let Some(lost) = addresses.iter().find(|net| !inside.addresses.contains(net)) {
        return Err(format!("{ifname} in the container has lost {lost}"));
    }
    for route in prev.routes.iter().filter(|route| route.dst.prefix_len() == 0) {
        let family = Family::of(route.dst.addr());
        if !interior.default_routes.iter().any(|(other, _)| *other == family) {
            return Err(format!("the container has lost its default route {}", route.dst));
        }
    }
    Ok(())
}

fn list(nets: &BTreeSet<ipnet::IpNet>) -> String {
    nets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// Why containers of a network do not reach all that they should.
fn limits(network: &NetworkStatus, status: &Status) -> Option<String> {
    let name = &network.network.name;
    if network.state == NetworkState::Conflict {
        return Some(format!(
            "network {name} stands back before another one of its name or number: remove one of them"
        ));
    }
    let encryption = &status.encryption;
    if network.network.encrypted && !encryption.available {
        let reason = encryption.reason.as_deref().unwrap_or("the agent does not say why");
        return Some(format!(
            "network {name} is encrypted, but this host cannot take part: {reason}"
        ));
    }
    let mut tables = status
        .tables
        .iter()
        .filter(|table| table.network.is_none() || table.network.as_ref() == Some(name));
    tables.find_map(|table| {
        let error = table.error.as_ref()?;
        Some(format!("{} of network {name}: {error}", table.table))
    })
}

fn changed(message: String) -> Failure {
    Failure::new(Code::Changed, message)
}
