//! Who a node is: its key, its certificates and the tokens that admit others.
//!
//! All of it lies in the directory `identity` below the agent's state directory:
//!
//! | file | content |
//! |---|---|
//! | `identity.json` | cluster id, node name, addresses of nodes to begin with |
//! | `node.key`, `node.crt` | this node's key and certificate |
//! | `ca.crt` | the cluster's authority |
//! | `ca.key`, `tokens.json` | only on the node that made the cluster |
//! | `generation` | how often the agent has started |
//!
//! The directory gets its name when it is complete, so a crash leaves either an identity or none.

mod authority;
mod certificate;
mod file;
mod key;
mod token;
mod token_store;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use weft_model::{ClusterId, Label, NodeId};

pub use authority::{Authority, NODE_VALIDITY};
pub(crate) use certificate::instant;
pub use certificate::{BACKDATING, Certificate, InvalidCertificate, Subject, Validity};
pub use file::{FileError, create_directory, read, write_atomic};
pub use key::{InvalidKey, PrivateKey, PublicKey};
pub use token::{InvalidToken, InvalidTokenId, Secret, SecretKey, Token, TokenId};
pub(crate) use token_store::ConsumeError;
pub use token_store::{Grant, TokenRecord, TokenRefusal, TokenStore, TokenStoreError, Tokens};

/// A node's membership of one cluster.
#[derive(Clone, Debug)]
pub struct Identity {
    directory: PathBuf,
    about: About,
    key: Arc<PrivateKey>,
    certificate: Certificate,
    ca: Certificate,
    issuer: Option<Issuer>,
}

impl Identity {
    /// Makes a new cluster with this node as its first, whose certificate is valid for
    /// `validity`.
    ///
    /// # Errors
    /// If there is an identity in `state_dir` already.
    pub fn init(
        state_dir: &Path,
        name: Label,
        validity: Duration,
        now: OffsetDateTime,
    ) -> Result<Self, IdentityError> {
        refuse_existing(state_dir)?;
        let cluster = ClusterId::from(random());
        let authority = Authority::generate(cluster, now);
        let key = PrivateKey::generate();
        let certificate =
            authority.issue(&key.public_key(), &name, Validity::starting(now, validity));
        let membership = Membership {
            cluster,
            name,
            key: Arc::new(key),
            certificate,
            ca: authority.certificate().clone(),
            seeds: Vec::new(),
        };
        membership.store(state_dir, Some(&authority))
    }

    /// Reads the identity in `state_dir`.
    ///
    /// # Errors
    /// Names the file that is absent, unreadable or does not fit the others.
    pub fn load(state_dir: &Path) -> Result<Self, IdentityError> {
        let directory = directory_in(state_dir);
        let about = required(&directory, ABOUT)
            .map_err(|error| match error {
                IdentityError::Absent { .. } if !directory.exists() => {
                    IdentityError::NotInitialised { state_dir: state_dir.to_owned() }
                }
                other => other,
            })
            .and_then(|(path, bytes)| {
                serde_json::from_slice::<About>(&bytes)
                    .map_err(|e| IdentityError::content(path, &e))
            })?;
        if about.version != VERSION {
            let what = format!("version {} is not {VERSION}", about.version);
            return Err(IdentityError::content(directory.join(ABOUT), &what));
        }
        let key = read_key(&directory, NODE_KEY)?;
        let ca = read_certificate(&directory, CA_CERTIFICATE)?;
        let certificate = read_certificate(&directory, NODE_CERTIFICATE)?;

        let expected = Subject::Node { cluster: about.cluster, node: key.public_key().node_id() };
        if *certificate.subject() != expected || certificate.public_key() != key.public_key() {
            return Err(IdentityError::Mismatch {
                one: directory.join(NODE_CERTIFICATE),
                other: directory.join(NODE_KEY),
            });
        }
        let issuer = Issuer::load(&directory, about.cluster, &ca)?;
        Ok(Self { directory, about, key: Arc::new(key), certificate, ca, issuer })
    }

    /// Puts `certificate`, a newer one for the same key, in place of the present one.
    pub fn renewed(&self, certificate: Certificate) -> Result<Self, IdentityError> {
        let path = self.directory.join(NODE_CERTIFICATE);
        if certificate.subject() != self.certificate.subject()
            || certificate.public_key() != self.certificate.public_key()
        {
            return Err(IdentityError::Mismatch {
                one: path,
                other: self.directory.join(NODE_KEY),
            });
        }
        write_atomic(&path, certificate.to_pem().as_bytes())?;
        Ok(Self { certificate, ..self.clone() })
    }

    /// The number of this start of the agent: greater than all before, even if the clock went
    /// back, and on the disk before it is returned.
    pub fn next_generation(&self, now: OffsetDateTime) -> Result<u32, IdentityError> {
        let path = self.directory.join(GENERATION);
        let last = match read(&path)? {
            Some(bytes) => std::str::from_utf8(&bytes)
                .ok()
                .and_then(|text| text.trim().parse::<u32>().ok())
                .ok_or_else(|| IdentityError::content(path.clone(), &"not a number"))?,
            None => 0,
        };
        let clock = u32::try_from(now.unix_timestamp()).unwrap_or(0);
        let next = clock.max(last.saturating_add(1));
        write_atomic(&path, format!("{next}\n").as_bytes())?;
        Ok(next)
    }

    pub fn cluster(&self) -> ClusterId {
        self.about.cluster
    }

    pub fn node(&self) -> NodeId {
        self.key.public_key().node_id()
    }

    pub fn name(&self) -> &Label {
        &self.about.name
    }

    /// Where other nodes were when this one joined.
    pub fn seeds(&self) -> &[SocketAddr] {
        &self.about.seeds
    }

    /// This node's key, with which it signs its records.
    pub fn key(&self) -> &Arc<PrivateKey> {
        &self.key
    }

    pub fn certificate(&self) -> &Certificate {
        &self.certificate
    }

    /// The certificate of the cluster's authority.
    pub fn ca(&self) -> &Certificate {
        &self.ca
    }

    /// What it takes to admit others; `None` on a node without the authority's key.
    pub fn issuer(&self) -> Option<&Issuer> {
        self.issuer.as_ref()
    }
}

/// The authority and its tokens, on a node that admits others.
#[derive(Clone, Debug)]
pub struct Issuer {
    pub authority: Arc<Authority>,
    pub tokens: Arc<TokenStore>,
}

impl Issuer {
    fn load(
        directory: &Path,
        cluster: ClusterId,
        ca: &Certificate,
    ) -> Result<Option<Self>, IdentityError> {
        let key = match read_key(directory, CA_KEY) {
            Ok(key) => key,
            Err(IdentityError::Absent { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        if key.public_key() != ca.public_key() {
            return Err(IdentityError::Mismatch {
                one: directory.join(CA_CERTIFICATE),
                other: directory.join(CA_KEY),
            });
        }
        Ok(Some(Self {
            authority: Arc::new(Authority::new(cluster, key, ca.clone())),
            tokens: Arc::new(TokenStore::open(token_store::path_in(directory))?),
        }))
    }
}

/// An identity that is complete in memory and not yet on disk.
pub(crate) struct Membership {
    pub(crate) cluster: ClusterId,
    pub(crate) name: Label,
    pub(crate) key: Arc<PrivateKey>,
    pub(crate) certificate: Certificate,
    pub(crate) ca: Certificate,
    pub(crate) seeds: Vec<SocketAddr>,
}

impl Membership {
    /// Writes everything beside its final place, then moves it there in one step.
    pub(crate) fn store(
        self,
        state_dir: &Path,
        authority: Option<&Authority>,
    ) -> Result<Identity, IdentityError> {
        create_directory(state_dir)?;
        let temporary = state_dir.join(format!("{UNFINISHED}{}", hex::encode(random::<6>())));
        create_directory(&temporary)?;

        let about =
            About { version: VERSION, cluster: self.cluster, name: self.name, seeds: self.seeds };
        let json = serde_json::to_vec_pretty(&about).expect("plain fields become JSON");
        let write = |name: &str, bytes: &[u8]| file::write_new(&temporary.join(name), bytes);
        write(ABOUT, &json)?;
        write(NODE_KEY, self.key.to_pem().as_bytes())?;
        write(NODE_CERTIFICATE, self.certificate.to_pem().as_bytes())?;
        write(CA_CERTIFICATE, self.ca.to_pem().as_bytes())?;
        if let Some(authority) = authority {
            write(CA_KEY, authority.key().to_pem().as_bytes())?;
        }
        let published = file::publish_directory(&temporary, &directory_in(state_dir));
        remove_unfinished(state_dir);
        if let Err(error) = published {
            // Another `init` or `join` may have been quicker.
            refuse_existing(state_dir)?;
            return Err(error.into());
        }
        Identity::load(state_dir)
    }
}

/// The key with which a join is under way: kept so that a joiner that was interrupted after it
/// had used up its token can fetch the answer again. It is not an identity.
pub(crate) struct PendingKey {
    path: PathBuf,
    pub(crate) key: Arc<PrivateKey>,
}

impl PendingKey {
    pub(crate) fn obtain(state_dir: &Path, token: TokenId) -> Result<Self, IdentityError> {
        create_directory(state_dir)?;
        let path = state_dir.join(format!(".join-{token}.key"));
        let kept = read(&path)?.and_then(|pem| PrivateKey::from_pem(&pem).ok());
        let key = match kept {
            Some(key) => key,
            None => {
                let key = PrivateKey::generate();
                write_atomic(&path, key.to_pem().as_bytes())?;
                key
            }
        };
        Ok(Self { path, key: Arc::new(key) })
    }

    pub(crate) fn discard(self) -> Result<(), IdentityError> {
        Ok(file::remove(&self.path)?)
    }
}

/// An identity that could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error(
        "no cluster in {}: make one with `weft init` or join one with `weft join TOKEN`",
        state_dir.display()
    )]
    NotInitialised { state_dir: PathBuf },
    #[error(
        "{} already holds node {name} ({node}) of cluster {cluster}: to leave that cluster for \
         good, stop the agent and remove {}",
        state_dir.display(), directory_in(state_dir).display()
    )]
    Exists { state_dir: PathBuf, name: Label, node: NodeId, cluster: ClusterId },
    #[error("{} is missing: restore it, or remove {} and join again", path.display(), path.parent().unwrap_or(path).display())]
    Absent { path: PathBuf },
    #[error("{} cannot be used: {what}; restore it, or remove {} and join again", path.display(), path.parent().unwrap_or(path).display())]
    Content { path: PathBuf, what: String },
    #[error("{} does not belong to {}: restore both from one backup, or join again", one.display(), other.display())]
    Mismatch { one: PathBuf, other: PathBuf },
    #[error(transparent)]
    Tokens(#[from] TokenStoreError),
    #[error(transparent)]
    File(#[from] FileError),
}

impl IdentityError {
    fn content(path: PathBuf, what: &dyn std::fmt::Display) -> Self {
        Self::Content { path, what: what.to_string() }
    }
}

/// Fails if `state_dir` holds an identity, and says whose.
pub(crate) fn refuse_existing(state_dir: &Path) -> Result<(), IdentityError> {
    match Identity::load(state_dir) {
        Err(IdentityError::NotInitialised { .. }) => Ok(()),
        Err(error) => Err(error),
        Ok(identity) => Err(IdentityError::Exists {
            state_dir: state_dir.to_owned(),
            name: identity.about.name.clone(),
            node: identity.node(),
            cluster: identity.cluster(),
        }),
    }
}

/// Bytes from the system's random source.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random source works");
    bytes
}

/// `identity.json`
#[derive(Clone, Debug, Deserialize, Serialize)]
struct About {
    version: u32,
    cluster: ClusterId,
    name: Label,
    seeds: Vec<SocketAddr>,
}

const VERSION: u32 = 1;
const ABOUT: &str = "identity.json";
const NODE_KEY: &str = "node.key";
const NODE_CERTIFICATE: &str = "node.crt";
const CA_CERTIFICATE: &str = "ca.crt";
const CA_KEY: &str = "ca.key";
const GENERATION: &str = "generation";
const UNFINISHED: &str = ".identity-";

fn directory_in(state_dir: &Path) -> PathBuf {
    state_dir.join("identity")
}

fn required(directory: &Path, name: &str) -> Result<(PathBuf, Vec<u8>), IdentityError> {
    let path = directory.join(name);
    match read(&path)? {
        Some(bytes) => Ok((path, bytes)),
        None => Err(IdentityError::Absent { path }),
    }
}

fn read_key(directory: &Path, name: &str) -> Result<PrivateKey, IdentityError> {
    let (path, pem) = required(directory, name)?;
    PrivateKey::from_pem(&pem).map_err(|error| IdentityError::content(path, &error))
}

fn read_certificate(directory: &Path, name: &str) -> Result<Certificate, IdentityError> {
    let (path, pem) = required(directory, name)?;
    Certificate::from_pem(&pem).map_err(|error| IdentityError::content(path, &error))
}

/// Removes what interrupted attempts left. Whatever is still being written by another process
/// can no longer get its name, because the name is taken.
fn remove_unfinished(state_dir: &Path) {
    let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(UNFINISHED)) {
        // A leftover harms nobody, so a failure is not worth an error.
        let _ = std::fs::remove_dir_all(entry.path());
    }
}

#[cfg(test)]
mod tests;
