//! What one asker may know: names, addresses and reverse names of the networks it is attached to.
//!
//! A [`Directory`] is an immutable snapshot that the agent replaces as a whole. Networks are shared
//! by reference, so a change in one network rebuilds that network's [`NetworkNames`] and no other.
//!
//! An entry called `web` in network `app` answers to `web`, `web.app`, `web.app.weft.internal` and
//! `web.weft.internal`. Where several of the asker's networks know a name, the answer is the union:
//! the asked network's addresses first, then the others in the order of the asker's list, each
//! network's own addresses shuffled. Docker stops at the first network that knows the name; here
//! all addresses are reachable for the asker, so none is kept back.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use rand::{Rng, seq::SliceRandom};
use weft_model::{DnsName, Endpoint, Label, NetworkId, Subnet};

use crate::{
    key::Key,
    reverse::Reverse,
    service::{Backend, BackendPort, Service, Wanted},
};

/// All that the listeners of this host answer from.
#[derive(Clone, Debug)]
pub struct Directory {
    pub networks: BTreeMap<NetworkId, Arc<NetworkNames>>,
    /// Who asks: the networks of the sandbox that has this address in this network on this host,
    /// that network first. An address that is not listed sees only the network it asks in.
    pub askers: BTreeMap<(NetworkId, IpAddr), Vec<NetworkId>>,
    /// Whether there may be names that the agent has not heard of since it started. Nothing is
    /// denied meanwhile: who asks for a name that is missing gets SERVFAIL, which is asked again and
    /// kept by nobody as the word that there is none.
    pub incomplete: bool,
    domain: DnsName,
    domain_key: Key,
}

impl Directory {
    /// Returns a directory without networks for the cluster domain `domain`.
    pub fn new(domain: DnsName) -> Self {
        let domain_key = Key::of(domain.labels());
        let (networks, askers) = (BTreeMap::new(), BTreeMap::new());
        Self { networks, askers, incomplete: false, domain, domain_key }
    }

    pub fn domain(&self) -> &DnsName {
        &self.domain
    }

    /// What `asker` sees when it asks the listener of `network`; nothing while the directory does
    /// not know that network.
    pub(crate) fn view(&self, network: NetworkId, asker: IpAddr) -> Option<View<'_>> {
        let asked = self.networks.get(&network)?;
        let attached = self.askers.get(&(network, asker.to_canonical()));
        let mut networks: Vec<_> =
            attached.into_iter().flatten().filter_map(|id| self.networks.get(id)).collect();
        if networks.is_empty() {
            networks.push(asked);
        }
        Some(View { directory: self, networks })
    }
}

/// The names of one network.
///
/// Sorted tables over one string: built in one pass and a sort, without an allocation per name.
#[derive(Clone, Debug)]
pub struct NetworkNames {
    name: Label,
    internal: bool,
    subnets: Vec<Subnet>,
    /// All keys, one after the other.
    text: String,
    /// Sorted by key, then entry.
    spans: Vec<Span>,
    entries: Vec<Entry>,
    /// Sorted by address.
    pointers: Vec<(IpAddr, u32)>,
    /// By the keys of their names and of their `tasks.` names.
    services: BTreeMap<String, Arc<Service>>,
}

impl NetworkNames {
    /// Indexes `entries`. Those without a name are left out; one without an address says that its
    /// names exist. Where two entries have one address, the first gives its reverse name.
    pub fn new(
        name: Label,
        internal: bool,
        subnets: Vec<Subnet>,
        entries: impl IntoIterator<Item = Entry>,
    ) -> Self {
        let entries: Vec<Entry> =
            entries.into_iter().filter(|entry| !entry.names.is_empty()).collect();

        let (mut text, mut spans, mut pointers) = (String::new(), Vec::new(), Vec::new());
        for (index, entry) in (0..).zip(&entries) {
            for name in &entry.names {
                let start = text.len();
                Key::write(&mut text, name.labels());
                spans.push(Span { start, end: text.len(), entry: index });
            }
            pointers.extend(entry.addresses.iter().map(|&ip| (ip, index)));
        }
        spans.sort_unstable_by(|a, b| (a.key(&text), a.entry).cmp(&(b.key(&text), b.entry)));
        spans.dedup_by(|a, b| a.entry == b.entry && a.key(&text) == b.key(&text));
        pointers.sort_unstable();
        pointers.dedup_by_key(|(ip, _)| *ip);

        let services = BTreeMap::new();
        Self { name, internal, subnets, text, spans, entries, pointers, services }
    }

    /// Adds the backends of services: their SRV records.
    pub fn with_services(mut self, services: impl IntoIterator<Item = Service>) -> Self {
        for service in services {
            let name = service.name.clone();
            let service = Arc::new(service);
            let tasks = Key::of(["tasks", name.as_str()].into_iter()).into_string();
            self.services.insert(tasks, Arc::clone(&service));
            self.services.insert(name.into(), service);
        }
        self
    }

    pub fn name(&self) -> &Label {
        &self.name
    }

    /// Whether nothing that is asked in this network goes upstream.
    pub fn is_internal(&self) -> bool {
        self.internal
    }

    pub fn subnets(&self) -> &[Subnet] {
        &self.subnets
    }

    /// The addresses of all entries that answer to `key`.
    fn addresses(&self, key: &str) -> impl Iterator<Item = IpAddr> {
        let from = self.spans.partition_point(|span| span.key(&self.text) < key);
        self.spans[from..]
            .iter()
            .take_while(move |span| span.key(&self.text) == key)
            .flat_map(|span| self.entries[span.entry as usize].addresses.iter().copied())
    }

    /// The services that `<name>` or `<name>.<network>` stands for.
    fn services(&self, key: &str) -> impl Iterator<Item = &Service> {
        let qualified = below(key, self.name.as_str()).and_then(|rest| self.services.get(rest));
        self.services.get(key).into_iter().chain(qualified).map(AsRef::as_ref)
    }

    /// Whether some entry answers to `key`, be it without an address.
    fn has(&self, key: &str) -> bool {
        let at = self.spans.partition_point(|span| span.key(&self.text) < key);
        self.spans.get(at).is_some_and(|span| span.key(&self.text) == key)
    }

    /// Whether some name lies below `key`.
    fn has_below(&self, key: &str) -> bool {
        let parent = format!("{key}.");
        let from = self.spans.partition_point(|span| span.key(&self.text) < parent.as_str());
        self.spans.get(from).is_some_and(|span| span.key(&self.text).starts_with(&parent))
    }

    fn canonical(&self, ip: IpAddr) -> Option<&DnsName> {
        let at = self.pointers.binary_search_by_key(&ip, |(ip, _)| *ip).ok()?;
        self.entries[self.pointers[at].1 as usize].names.first()
    }
}

#[derive(Clone, Copy, Debug)]
struct Span {
    start: usize,
    end: usize,
    entry: u32,
}

impl Span {
    fn key(self, text: &str) -> &str {
        &text[self.start..self.end]
    }
}

/// Some names of one network and the addresses that all of them stand for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Relative to the network. The first is the one that reverse look-ups give.
    pub names: Vec<DnsName>,
    pub addresses: Vec<IpAddr>,
}

impl Entry {
    /// The names of an endpoint by itself: its name, aliases and short id.
    pub fn endpoint(endpoint: &Endpoint) -> Self {
        let names = [DnsName::from(endpoint.name.clone())]
            .into_iter()
            .chain(endpoint.aliases.iter().cloned())
            .chain(endpoint.id.short().parse())
            .collect();
        Self { names, addresses: endpoint.ips().collect() }
    }

    /// The same, the service that nothing else is known about, and `tasks.<service>`.
    pub fn member(endpoint: &Endpoint) -> Self {
        let mut entry = Self::endpoint(endpoint);
        let tasks = endpoint.service.iter().flat_map(|name| format!("tasks.{name}").parse());
        entry.names.extend(tasks.chain(endpoint.service.clone().map(DnsName::from)));
        entry
    }

    /// A service's name and what it stands for: its virtual addresses, or its backends'.
    pub fn service(name: Label, addresses: Vec<IpAddr>) -> Self {
        Self { names: vec![name.into()], addresses }
    }

    /// `tasks.<service>` and the addresses of its backends.
    pub fn tasks(service: &Label, addresses: Vec<IpAddr>) -> Self {
        let name = format!("tasks.{service}").parse();
        Self { names: name.into_iter().collect(), addresses }
    }
}

/// The networks of one asker, the asked one first.
pub(crate) struct View<'a> {
    directory: &'a Directory,
    networks: Vec<&'a Arc<NetworkNames>>,
}

/// What the directory says about a name.
///
/// `zone` is the number of labels, counted from the root, of the name that owns the SOA record: a
/// negative answer's scope (RFC 2308 §3).
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Finding {
    Addresses {
        ips: Vec<IpAddr>,
        zone: usize,
    },
    Pointers {
        names: Vec<DnsName>,
        zone: usize,
    },
    /// Where a service is served; only for who asks for that. Not empty.
    Targets {
        targets: Vec<Target>,
        zone: usize,
    },
    /// The cluster domain itself.
    Apex {
        zone: usize,
    },
    /// The name exists and has no record of its own.
    Empty {
        zone: usize,
    },
    Missing {
        zone: usize,
    },
    /// Not ours to answer.
    Foreign,
}

/// One SRV record, and the addresses of whom it names.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Target {
    pub(crate) name: DnsName,
    pub(crate) port: u16,
    pub(crate) weight: u16,
    pub(crate) addresses: Vec<IpAddr>,
}

impl View<'_> {
    /// Whether names that are not ours may go upstream: some network of the asker is not internal.
    pub(crate) fn forwards(&self) -> bool {
        self.networks.iter().any(|network| !network.internal)
    }

    pub(crate) fn domain(&self) -> &DnsName {
        &self.directory.domain
    }

    pub(crate) fn find(&self, name: &Key, rng: &mut impl Rng) -> Finding {
        match Reverse::parse(name) {
            Some(reverse) => self.find_reverse(&reverse),
            None => match name.below(&self.directory.domain_key) {
                Some(rest) => self.find_inside(rest, rng),
                None => self.find_outside(name, rng),
            },
        }
    }

    /// Whether a name that nobody knows here may be one of ours all the same, by its form alone:
    /// `<name>`, `tasks.<name>`, or either behind `_port._protocol`.
    pub(crate) fn is_doubtful(&self, name: &Key) -> bool {
        let owner = ported(name.as_str()).map_or(name.as_str(), |(owner, ..)| owner);
        let bare = owner.strip_suffix(".tasks").unwrap_or(owner);
        self.directory.incomplete && !bare.contains('.')
    }

    pub(crate) fn is_incomplete(&self) -> bool {
        self.directory.incomplete
    }

    /// Looks for the backends of a service: `<service>`, `tasks.<service>`, or either behind
    /// `_port._protocol`. What no backend is found for is found as any other name is.
    pub(crate) fn find_backends(&self, name: &Key, rng: &mut impl Rng) -> Finding {
        let inside = name.below(&self.directory.domain_key);
        let key = inside.unwrap_or(name.as_str());
        let (owner, wanted) = match ported(key) {
            Some((owner, port, protocol)) => (owner, Some(Wanted::parse(port, protocol))),
            None => (key, None),
        };
        let ports = |backend: &Backend| -> Vec<BackendPort> {
            match wanted {
                None => backend.ports.clone(),
                Some(wanted) => wanted.map_or_else(Vec::new, |port| port.among(&backend.ports)),
            }
        };
        let mut targets = Vec::new();
        for network in &self.networks {
            let from = targets.len();
            for backend in network.services(owner).flat_map(|service| &service.backends) {
                let full = format!("{}.{}.{}", backend.target, network.name, self.domain());
                let Ok(name) = full.parse::<DnsName>() else { continue };
                targets.extend(ports(backend).into_iter().map(|port| Target {
                    name: name.clone(),
                    port: port.target,
                    weight: backend.weight,
                    addresses: backend.addresses.clone(),
                }));
            }
            targets[from..].shuffle(rng);
        }
        match targets.is_empty() {
            true => self.find(name, rng),
            false => Finding::Targets { targets, zone: name.label_count() },
        }
    }

    /// Looks for a name below the cluster domain. Here we know every name.
    fn find_inside(&self, rest: &str, rng: &mut impl Rng) -> Finding {
        let zone = self.directory.domain_key.label_count();
        if rest.is_empty() {
            return Finding::Apex { zone };
        }
        let ips = self.addresses(rest, rng);
        match () {
            () if !ips.is_empty() => Finding::Addresses { ips, zone },
            () if self.has(rest) || self.exists(rest) || self.exists_without_port(rest) => {
                Finding::Empty { zone }
            }
            () => Finding::Missing { zone },
        }
    }

    /// Looks for a bare name or `<name>.<network>`.
    ///
    /// A single label below one of the asker's networks is ours even if we do not know it: else a
    /// hidden endpoint's name could be answered by whoever owns a public domain of that name. The
    /// price: where a network has the name of a public top-level domain, the domains directly below
    /// that are out of reach. Deeper names go upstream.
    fn find_outside(&self, name: &Key, rng: &mut impl Rng) -> Finding {
        let text = name.as_str();
        let ips = self.addresses(text, rng);
        let labels = name.label_count();
        let in_network = self.networks.iter().any(|network| {
            below(text, network.name.as_str())
                .is_some_and(|rest| !rest.is_empty() && (labels == 2 || rest.ends_with(".tasks")))
        });
        let zone = if in_network { 1 } else { labels };
        match () {
            () if !ips.is_empty() => Finding::Addresses { ips, zone },
            () if self.has(text) || self.exists_without_port(text) => Finding::Empty { zone },
            () if in_network && self.exists(text) => Finding::Empty { zone },
            () if in_network => Finding::Missing { zone },
            () => Finding::Foreign,
        }
    }

    /// Looks for the names of an address. No address of any overlay subnet is asked for upstream:
    /// overlay subnets do not overlap what the hosts route, so nobody there could know it.
    fn find_reverse(&self, reverse: &Reverse) -> Finding {
        let ours = self.directory.networks.values().flat_map(|network| &network.subnets);
        let Some(subnet) = ours.copied().find(|s| s.net().contains(&reverse.range())) else {
            return Finding::Foreign;
        };
        let zone = Reverse::zone_labels(subnet);
        let Some(ip) = reverse.address() else {
            return match reverse.is_exact() {
                true => Finding::Empty { zone: zone.min(reverse.label_count()) },
                false => Finding::Missing { zone },
            };
        };
        let pointers: Vec<_> = self
            .networks
            .iter()
            .filter_map(|network| {
                Some(format!("{}.{}.{}", network.canonical(ip)?, network.name, self.domain()))
            })
            .collect();
        let names: Vec<DnsName> = pointers.iter().filter_map(|name| name.parse().ok()).collect();
        match () {
            () if !names.is_empty() => Finding::Pointers { names, zone },
            // Known, but the full name is longer than DNS permits.
            () if !pointers.is_empty() => Finding::Empty { zone },
            () => Finding::Missing { zone },
        }
    }

    /// The addresses behind `<name>` and `<name>.<network>`, in the order of the answer.
    fn addresses(&self, key: &str, rng: &mut impl Rng) -> Vec<IpAddr> {
        let mut seen = BTreeSet::new();
        let mut all = Vec::new();
        for network in &self.networks {
            let qualified = below(key, network.name.as_str());
            let from = all.len();
            all.extend(
                network
                    .addresses(key)
                    .chain(qualified.into_iter().flat_map(|rest| network.addresses(rest)))
                    .filter(|ip| seen.insert(*ip)),
            );
            all[from..].shuffle(rng);
        }
        all
    }

    /// Whether some name lies below `key`, so that it exists itself (RFC 8020 §2). Of a network's own
    /// name that is always said.
    fn exists(&self, key: &str) -> bool {
        self.networks.iter().any(|network| {
            network.has_below(key)
                || below(key, network.name.as_str())
                    .is_some_and(|rest| rest.is_empty() || network.has_below(rest))
        })
    }

    /// Whether an entry of the asker's networks answers to `<name>` or `<name>.<network>`, be it
    /// without an address.
    fn has(&self, key: &str) -> bool {
        self.networks.iter().any(|network| {
            let qualified = below(key, network.name.as_str());
            network.has(key) || qualified.is_some_and(|rest| network.has(rest))
        })
    }

    /// Whether `key` is `_port._protocol.<name>` of a name that exists: it has no SRV record, but
    /// NXDOMAIN would deny that the service exists at all.
    fn exists_without_port(&self, key: &str) -> bool {
        ported(key).is_some_and(|(owner, ..)| self.has(owner))
    }
}

/// Takes `_port._protocol.<name>` apart: the key of the name, and the two labels before it without
/// their underscores.
fn ported(key: &str) -> Option<(&str, &str, &str)> {
    let (rest, port) = key.rsplit_once('.')?;
    let (owner, protocol) = rest.rsplit_once('.')?;
    Some((owner, port.strip_prefix('_')?, protocol.strip_prefix('_')?))
}

/// What of `key` lies below `ancestor`: empty if they are the same, nothing if it lies elsewhere.
pub(crate) fn below<'a>(key: &'a str, ancestor: &str) -> Option<&'a str> {
    let rest = key.strip_prefix(ancestor)?;
    match rest.is_empty() {
        true => Some(rest),
        false => rest.strip_prefix('.'),
    }
}
