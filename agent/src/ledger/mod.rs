//! The keeper of this node's own records: takes requests, writes the book, tells the others,
//! derives what kernel and names shall be. One task owns it all.

mod admission;
mod balance;
pub mod book;
mod drain;
mod exposure;
mod gateways;
mod keeper;
mod macvlan;
mod names;
mod networks;
mod opening;
mod ports;
mod published;
mod repeated;
mod services;
mod spaces;
mod survey;
mod waiting;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use tokio::sync::{mpsc, oneshot, watch};
use weft_ipam::Ask;
use weft_model::{DnsName, Endpoint, EndpointId, Label, Labels, NetworkId, NodeId};

use self::book::Book;
pub use self::{
    balance::Balancing,
    book::{BookError, BookFile},
    drain::{DrainTarget, Verdicts},
    keeper::{Keeper, Links, Start},
    services::{ServiceKey, ServiceName, ServiceOrder},
    spaces::{restore_spaces, timing},
};
use crate::{
    api::types::{Attach, CreateNetwork, PortRequest, PublishedPort, SpaceStatus},
    bulk::{label_bytes, refuse_bulk},
    cluster::Cluster,
    refusal::{Refusal, RefusalKind},
};

/// How long a request may wait for a lender's answer.
pub const GRANT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a request may wait for news of a network that was created elsewhere a moment ago.
const NETWORK_DEADLINE: Duration = Duration::from_secs(1);
const COMMANDS: usize = 256;

/// Asks the keeper. Cheap to clone.
#[derive(Clone)]
pub struct Ledger {
    commands: mpsc::Sender<Command>,
}

/// What the keeper knows, as one consistent value.
#[derive(Clone)]
pub struct Snapshot {
    pub me: NodeId,
    pub cluster: Arc<Cluster>,
    pub book: Arc<Book>,
    /// Whether nodes may be missing that have not been heard since this agent started.
    pub warming_up: bool,
}

pub type Snapshots = watch::Receiver<Arc<Snapshot>>;

/// Address space by network.
pub type SpaceUsage = BTreeMap<NetworkId, Vec<SpaceStatus>>;

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// An address that was set aside for an endpoint to come. An agent that starts anew knows of none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reservation {
    pub id: EndpointId,
    pub ip: IpAddr,
}

/// The names of an endpoint, and what its user says about it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Description {
    pub name: Label,
    pub aliases: Vec<DnsName>,
    pub service: Option<Label>,
    pub labels: Labels,
}

impl Description {
    /// Whether it is what `endpoint` says already.
    pub fn is_of(&self, endpoint: &Endpoint) -> bool {
        let Self { name, aliases, service, labels } = self;
        (name, aliases, service, labels)
            == (&endpoint.name, &endpoint.aliases, &endpoint.service, &endpoint.labels)
    }

    /// Refuses more than a record can carry.
    fn check(&self) -> Result<(), Refusal> {
        refuse_bulk("aliases", self.aliases.iter().map(|alias| alias.as_str().len()).sum())?;
        refuse_bulk("labels", label_bytes(&self.labels))
    }
}

/// What can be asked of the keeper.
pub(crate) enum Command {
    CreateNetwork(CreateNetwork, Reply<NetworkId>),
    RemoveNetwork { network: String, force: bool, reply: Reply<()> },
    Attach { request: Attach, reserved: Vec<EndpointId>, reply: Reply<EndpointId> },
    Reserve { network: NetworkId, ask: Ask, reply: Reply<Reservation> },
    Release(EndpointId, Reply<()>),
    Describe(EndpointId, Description, Reply<()>),
    Detach { endpoint: String, network: Option<String>, reply: Reply<()> },
    Drain { target: DrainTarget, draining: bool, reply: Reply<BTreeSet<EndpointId>> },
    Ports(EndpointId, Option<Vec<PortRequest>>, Reply<Vec<PublishedPort>>),
    Service(ServiceOrder, Reply<ServiceKey>),
    Expose { network: String, addresses: Vec<IpAddr>, reply: Reply<EndpointId> },
    Hide { network: String, reply: Reply<()> },
    Usage(Reply<SpaceUsage>),
}

impl Ledger {
    pub(crate) fn channel() -> (Self, mpsc::Receiver<Command>) {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        (Self { commands }, inbox)
    }

    /// Creates a network on all hosts.
    pub async fn create_network(&self, request: CreateNetwork) -> Result<NetworkId, Refusal> {
        self.ask(|reply| Command::CreateNetwork(request, reply)).await
    }

    /// Removes a network from all hosts; with `force` its endpoints too.
    pub async fn remove_network(&self, network: String, force: bool) -> Result<(), Refusal> {
        self.ask(|reply| Command::RemoveNetwork { network, force, reply }).await
    }

    /// Attaches a sandbox; on return its names are answered and its address is reachable.
    pub async fn attach(&self, request: Attach) -> Result<EndpointId, Refusal> {
        self.attach_reserved(request, Vec::new()).await
    }

    /// The same; the endpoint takes over the addresses that were reserved for it.
    pub async fn attach_reserved(
        &self,
        request: Attach,
        reserved: Vec<EndpointId>,
    ) -> Result<EndpointId, Refusal> {
        self.ask(|reply| Command::Attach { request, reserved, reply }).await
    }

    /// Sets an address aside for an endpoint to come.
    pub async fn reserve(&self, network: NetworkId, ask: Ask) -> Result<Reservation, Refusal> {
        self.ask(|reply| Command::Reserve { network, ask, reply }).await
    }

    /// Gives a reserved address back. Succeeds if it was given back, or taken over, already.
    pub async fn release(&self, reservation: EndpointId) -> Result<(), Refusal> {
        self.ask(|reply| Command::Release(reservation, reply)).await
    }

    /// Gives an endpoint of this host other names.
    pub async fn describe(
        &self,
        endpoint: EndpointId,
        description: Description,
    ) -> Result<(), Refusal> {
        self.ask(|reply| Command::Describe(endpoint, description, reply)).await
    }

    /// Detaches an endpoint of this host, by name or id.
    pub async fn detach(&self, endpoint: String, network: Option<String>) -> Result<(), Refusal> {
        self.ask(|reply| Command::Detach { endpoint, network, reply }).await
    }

    /// Takes note that an engine leads a container's default route through an endpoint, and opens
    /// ports of this host for it in place of those that it has; all or none. On return the kernel
    /// has them, and disk too.
    pub async fn open_ports(
        &self,
        endpoint: EndpointId,
        requests: Vec<PortRequest>,
    ) -> Result<Vec<PublishedPort>, Refusal> {
        self.ask(|reply| Command::Ports(endpoint, Some(requests), reply)).await
    }

    /// Takes note that an engine leads a container's default route elsewhere, and closes the
    /// endpoint's ports. On return others may have them.
    pub async fn close_ports(&self, endpoint: EndpointId) -> Result<(), Refusal> {
        self.ask(|reply| Command::Ports(endpoint, None, reply)).await.map(drop)
    }

    /// Declares, changes or removes a service; on return all hosts that are heard know.
    pub async fn service(&self, order: ServiceOrder) -> Result<ServiceKey, Refusal> {
        self.ask(|reply| Command::Service(order, reply)).await
    }

    /// Lets endpoints of this host get no new connections from any host, or get them again. The
    /// others hear it at once; `Member::drained` says who has done it. Returns the endpoints.
    pub async fn drain(
        &self,
        target: DrainTarget,
        draining: bool,
    ) -> Result<BTreeSet<EndpointId>, Refusal> {
        self.ask(|reply| Command::Drain { target, draining, reply }).await
    }

    /// Puts this host on a network, with fixed addresses where some are given. Succeeds if it is on
    /// it with these already.
    pub async fn expose(
        &self,
        network: String,
        addresses: Vec<IpAddr>,
    ) -> Result<EndpointId, Refusal> {
        self.ask(|reply| Command::Expose { network, addresses, reply }).await
    }

    /// Takes this host off a network. Succeeds if it is not on it.
    pub async fn hide(&self, network: String) -> Result<(), Refusal> {
        self.ask(|reply| Command::Hide { network, reply }).await
    }

    /// This node's address space in every network, a row a family.
    pub async fn usage(&self) -> Result<SpaceUsage, Refusal> {
        self.ask(Command::Usage).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, Refusal> {
        let stopping =
            || Refusal::new(RefusalKind::Unavailable, "the agent is stopping: try again");
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| stopping())?;
        answer.await.unwrap_or_else(|_| Err(stopping()))
    }
}
