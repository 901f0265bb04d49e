//! This node's own records, as they stand on disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize};
use weft_gossip::identity::{FileError, write_atomic};
use weft_ipam::State;
use weft_model::{Endpoint, EndpointId, Label, Network, NetworkId, NodeId, ServiceRecord, Verdict};

use crate::api::types::{PublishedPort, Sandbox};

/// Everything that this node must know after a crash, and nothing that it can learn again.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Book {
    /// The definitions that were heard, so that a network outlives those who carry it.
    #[serde(default)]
    pub networks: BTreeMap<NetworkId, Network>,
    /// Networks whose removal this node tells the others, for good.
    #[serde(default)]
    pub removed: BTreeSet<NetworkId>,
    /// Networks of this host alone that were removed, until all that is theirs has gone.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub ended: BTreeSet<NetworkId>,
    #[serde(default)]
    pub endpoints: BTreeMap<EndpointId, LocalEndpoint>,
    /// Address space, per network.
    #[serde(default)]
    pub spaces: BTreeMap<NetworkId, State>,
    /// Which pair of uplink addresses a network has here, counted from the pool's start.
    #[serde(default)]
    pub uplinks: BTreeMap<NetworkId, u16>,
    /// What this node says about services: those it wrote, those whose addresses it holds, and those
    /// of networks in which it has endpoints; removed ones among them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub services: BTreeMap<NetworkId, BTreeMap<Label, ServiceRecord>>,
    /// What stands for services in this node's address space, until their addresses have left the
    /// kernel.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub vips: BTreeMap<EndpointId, VipReservation>,
    /// Endpoints that get no new connections.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub draining: BTreeSet<EndpointId>,
    /// Whether no endpoint of this host gets any, those to come included.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drains_all: bool,
    /// The draining endpoints, of any node, that this host's kernel sends no new connection to. Here
    /// before anybody is told: an agent that starts again sends them none either, although what it
    /// remembers of the others may be older.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub drained: BTreeMap<NetworkId, BTreeSet<EndpointId>>,
    /// What checks last found: an agent that starts again goes on from there.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub verdicts: BTreeMap<EndpointId, BTreeMap<Label, Verdict>>,
}

/// Virtual addresses of a service in this node's address space.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct VipReservation {
    pub network: NetworkId,
    pub service: Label,
}

/// An endpoint of this host.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LocalEndpoint {
    pub endpoint: Endpoint,
    pub sandbox: Sandbox,
    /// The interface's name in the sandbox, once it is known.
    #[serde(default)]
    pub ifname: Option<String>,
    pub state: EndpointState,
    /// Whether the sandbox's default route leads through it.
    #[serde(default)]
    pub default_route: bool,
    /// How much it is to have the default route, if it may.
    #[serde(default)]
    pub gateway_priority: Option<i32>,
    /// Ports of this host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
}

#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// The kernel's part is under way; nobody else knows it yet.
    Attaching,
    Attached,
    /// Withdrawn from the others; the kernel's part is being taken away.
    Detaching,
}

impl Book {
    /// The endpoints of one network, in whatever state.
    pub fn endpoints_of(&self, network: NetworkId) -> impl Iterator<Item = &LocalEndpoint> {
        self.endpoints.values().filter(move |local| local.endpoint.network == network)
    }

    /// Takes note of what became of the endpoints while no agent ran: those without a port, and
    /// those that were being attached, are to be taken back; the host's own are to be made again.
    /// Returns how many there are.
    pub fn mark_lost(&mut self, present: &BTreeSet<(NetworkId, EndpointId)>) -> usize {
        let mut lost = 0;
        for (id, local) in &mut self.endpoints {
            let there = present.contains(&(local.endpoint.network, *id));
            if local.state != EndpointState::Attached || !there {
                let again = local.sandbox == Sandbox::Host;
                local.state = match (again, local.state) {
                    (true, EndpointState::Attaching | EndpointState::Attached) => {
                        EndpointState::Attaching
                    }
                    _ => EndpointState::Detaching,
                };
                lost += 1;
            }
        }
        lost
    }

    /// Lets go of the definitions of removed networks. Those who carried one carry the news of its
    /// end: a node that was away for long may still know the definition.
    pub fn bury(&mut self, me: NodeId, is_removed: impl Fn(NetworkId) -> bool) {
        let removed = &mut self.removed;
        self.networks.retain(|id, network| {
            let ended = is_removed(*id);
            let told = !network.driver.is_local();
            if ended && told && (network.creator == me || network.lenders.contains(&me)) {
                removed.insert(*id);
            }
            !ended
        });
    }

    /// Whether this host has acknowledged that it sends an endpoint no new connection.
    pub fn has_drained(&self, endpoint: &Endpoint) -> bool {
        self.drained.get(&endpoint.network).is_some_and(|gone| gone.contains(&endpoint.id))
    }

    /// The networks whose removal this node knows of by itself.
    pub fn gone(&self) -> BTreeSet<NetworkId> {
        self.removed.union(&self.ended).copied().collect()
    }

    /// Forgets the networks of this host alone that nothing is left of.
    pub fn forget_ended(&mut self) {
        let Self { networks, ended, endpoints, spaces, uplinks, services, .. } = self;
        ended.retain(|id| {
            networks.contains_key(id)
                || services.contains_key(id)
                || spaces.contains_key(id)
                || uplinks.contains_key(id)
                || endpoints.values().any(|local| local.endpoint.network == *id)
        });
    }

    /// Whether an endpoint gets no new connections.
    pub fn is_draining(&self, endpoint: EndpointId) -> bool {
        self.drains_all || self.draining.contains(&endpoint)
    }

    /// The networks in which this host has endpoints.
    pub fn active(&self) -> BTreeSet<NetworkId> {
        self.endpoints.values().map(|local| local.endpoint.network).collect()
    }
}

/// The book's file. What is not saved was never said to others.
pub struct BookFile {
    path: PathBuf,
    saved: Arc<Book>,
}

impl BookFile {
    /// Opens the book in `state_dir`; a new one where there is none.
    ///
    /// # Errors
    ///
    /// The file cannot be read or understood. It is never replaced by an empty one: a node that
    /// forgot which addresses it holds could give them out twice.
    pub fn open(state_dir: &Path) -> Result<(Self, Book), BookError> {
        let path = state_dir.join("book.json");
        let book = match fs::read(&path) {
            Ok(bytes) => {
                let stored: Versioned<Book> = serde_json::from_slice(&bytes)
                    .map_err(|source| BookError::Invalid { path: path.clone(), source })?;
                match stored.version {
                    VERSION => stored.book,
                    version => return Err(BookError::Version { path, version }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Book::default(),
            Err(source) => return Err(BookError::Unreadable { path, source }),
        };
        Ok((Self { path, saved: Arc::new(book.clone()) }, book))
    }

    /// Brings the file to `book`; returns whether it differed. Durable on return.
    pub fn save(&mut self, book: &Arc<Book>) -> Result<bool, BookError> {
        if Arc::ptr_eq(&self.saved, book) || self.saved == *book {
            return Ok(false);
        }
        let bytes = serde_json::to_vec(&Versioned { version: VERSION, book: book.as_ref() })
            .expect("a book is plain data");
        write_atomic(&self.path, &bytes)
            .map_err(|source| BookError::Unwritable { path: self.path.clone(), source })?;
        self.saved = Arc::clone(book);
        Ok(true)
    }
}

const VERSION: u32 = 1;

#[derive(Deserialize, Serialize)]
struct Versioned<B> {
    version: u32,
    #[serde(flatten)]
    book: B,
}

#[derive(Debug, thiserror::Error)]
pub enum BookError {
    #[error("cannot read {}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error(
        "{} is damaged: restore it from a backup, or give the host a new identity by removing its state directory and joining again",
        path.display()
    )]
    Invalid { path: PathBuf, source: serde_json::Error },
    #[error("{} has format {version}, this agent reads {VERSION}: install the version that wrote it", path.display())]
    Version { path: PathBuf, version: u32 },
    #[error("cannot write {}: free space, or make the directory writable", path.display())]
    Unwritable { path: PathBuf, source: FileError },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{network, node_id};

    #[test]
    fn a_saved_book_is_read_back_and_saved_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut file, mut book) = BookFile::open(dir.path()).unwrap();
        assert!(!file.save(&Arc::new(book.clone())).unwrap());
        book.removed.insert(NetworkId::from([1; 16]));
        book.uplinks.insert(NetworkId::from([2; 16]), 7);
        let book = Arc::new(book);
        assert!(file.save(&book).unwrap());
        assert!(!file.save(&book).unwrap());
        assert_eq!(BookFile::open(dir.path()).unwrap().1, *book);
    }

    #[test]
    fn who_carried_a_network_carries_the_news_of_its_end() {
        let (gone, kept) = (network(1, "gone"), network(2, "kept"));
        let networks = BTreeMap::from([(gone.id, gone.clone()), (kept.id, kept.clone())]);
        for (me, tells) in [(node_id(1), true), (node_id(2), false)] {
            let mut book = Book { networks: networks.clone(), ..Book::default() };
            book.bury(me, |id| id == gone.id);
            assert_eq!(book.networks.keys().copied().collect::<Vec<_>>(), [kept.id]);
            assert_eq!(book.removed.contains(&gone.id), tells);
        }
    }

    #[test]
    fn a_damaged_book_is_never_taken_for_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("book.json"), "{\"version\":1,\"netw").unwrap();
        assert!(matches!(BookFile::open(dir.path()), Err(BookError::Invalid { .. })));
        fs::write(dir.path().join("book.json"), "{\"version\":9}").unwrap();
        assert!(matches!(BookFile::open(dir.path()), Err(BookError::Version { version: 9, .. })));
    }
}
