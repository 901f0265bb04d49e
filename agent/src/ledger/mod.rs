//! The keeper of this node's own records: takes requests, writes the book, tells the others,
//! derives what kernel and names shall be. One task owns it all.

mod admission;
pub mod book;
mod keeper;
mod networks;
mod ports;
mod spaces;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::sync::{mpsc, oneshot, watch};
use weft_model::{EndpointId, NetworkId, NodeId};

use self::book::Book;
pub use self::{
    book::{BookError, BookFile},
    keeper::{Keeper, Links, Start},
    spaces::{restore_spaces, timing},
};
use crate::{
    api::types::{Attach, CreateNetwork, SpaceStatus},
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
}

pub type Snapshots = watch::Receiver<Arc<Snapshot>>;

/// Address space by network.
pub type SpaceUsage = BTreeMap<NetworkId, Vec<SpaceStatus>>;

type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// What can be asked of the keeper.
pub(crate) enum Command {
    CreateNetwork(CreateNetwork, Reply<NetworkId>),
    RemoveNetwork { network: String, force: bool, reply: Reply<()> },
    Attach(Attach, Reply<EndpointId>),
    Detach { endpoint: String, network: Option<String>, reply: Reply<()> },
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
        self.ask(|reply| Command::Attach(request, reply)).await
    }

    /// Detaches an endpoint of this host, by name or id.
    pub async fn detach(&self, endpoint: String, network: Option<String>) -> Result<(), Refusal> {
        self.ask(|reply| Command::Detach { endpoint, network, reply }).await
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
