use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use tokio::sync::watch;
use weft_model::NodeId;

use super::{
    authority::Authority,
    file::{self, FileError},
    key::PublicKey,
    random,
    token::{Secret, SecretKey, Token, TokenId},
};

/// The join tokens that this node has given out, on disk, without their secrets.
///
/// Every change is on the disk before its call returns.
#[derive(Debug)]
pub struct TokenStore {
    path: PathBuf,
    /// Held while a change is written, so that two joiners cannot take the same use.
    writing: Mutex<()>,
    published: watch::Sender<Arc<Tokens>>,
}

impl TokenStore {
    /// Opens the store in the agent's `state_dir`; an absent file is an empty store.
    pub(super) fn open(path: PathBuf) -> Result<Self, TokenStoreError> {
        let tokens = match file::read(&path)? {
            Some(bytes) => serde_json::from_slice(&bytes)
                .map_err(|source| TokenStoreError::Content { path: path.clone(), source })?,
            None => Tokens::default(),
        };
        let published = watch::Sender::new(Arc::new(tokens));
        Ok(Self { path, writing: Mutex::new(()), published })
    }

    /// Makes a token that admits `uses` nodes until `now + ttl`.
    pub fn create(
        &self,
        authority: &Authority,
        seeds: &[SocketAddr],
        grant: Grant,
        now: OffsetDateTime,
    ) -> Result<Token, TokenStoreError> {
        if seeds.is_empty() {
            return Err(TokenStoreError::NoSeed);
        }
        if grant.uses == 0 || grant.ttl.is_zero() {
            return Err(TokenStoreError::Useless);
        }
        let token = Token {
            cluster: authority.cluster(),
            authority: authority.certificate().public_key().fingerprint(),
            id: TokenId::from(random()),
            secret: Secret::from(random()),
            seeds: seeds.iter().copied().take(Token::MAX_SEEDS).collect(),
        };
        let record = TokenRecord {
            key: token.secret.key(),
            expires: now + grant.ttl,
            uses_left: grant.uses,
            admitted: BTreeSet::new(),
        };
        self.change(now, |tokens| tokens.0.insert(token.id, record))?;
        Ok(token)
    }

    /// The tokens with which a node can join at `now`.
    pub fn list(&self, now: OffsetDateTime) -> BTreeMap<TokenId, TokenRecord> {
        let tokens = self.tokens();
        let live = tokens.0.iter().filter(|(_, t)| t.uses_left > 0 && now < t.expires);
        live.map(|(id, record)| (*id, record.clone())).collect()
    }

    /// Makes `id` useless at once; false if there is no such token.
    pub fn remove(&self, id: TokenId, now: OffsetDateTime) -> Result<bool, TokenStoreError> {
        self.change(now, |tokens| tokens.0.remove(&id).is_some())
    }

    /// What is known of all tokens at this moment.
    pub fn tokens(&self) -> Arc<Tokens> {
        self.published.borrow().clone()
    }

    /// Takes one use of `id` for `node`. A node that holds a use already needs no other, so an
    /// answer that was lost on its way does not cost the token.
    pub(crate) fn consume(
        &self,
        id: TokenId,
        node: NodeId,
        now: OffsetDateTime,
    ) -> Result<(), ConsumeError> {
        let writing = self.lock();
        let mut tokens = Tokens::clone(&self.tokens());
        tokens.usable(id, Some(node), now)?;
        let record = tokens.0.get_mut(&id).expect("a usable token exists");
        if record.admitted.insert(node) {
            record.uses_left -= 1;
            self.write(&writing, tokens)?;
        }
        Ok(())
    }

    fn change<T>(
        &self,
        now: OffsetDateTime,
        edit: impl FnOnce(&mut Tokens) -> T,
    ) -> Result<T, TokenStoreError> {
        let writing = self.lock();
        let mut tokens = Tokens::clone(&self.tokens());
        tokens.0.retain(|_, token| now < token.expires + REMEMBERED);
        let result = edit(&mut tokens);
        self.write(&writing, tokens)?;
        Ok(result)
    }

    fn write(&self, _writing: &MutexGuard<'_, ()>, tokens: Tokens) -> Result<(), FileError> {
        let json = serde_json::to_vec_pretty(&tokens).expect("maps with text keys become JSON");
        file::write_atomic(&self.path, &json)?;
        self.published.send_replace(Arc::new(tokens));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How much a new token admits.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    pub ttl: Duration,
    pub uses: u32,
}

impl Default for Grant {
    fn default() -> Self {
        Self { ttl: Duration::from_secs(3600), uses: 1 }
    }
}

/// What the issuer keeps of its tokens: used-up and expired ones for a while too, so that a
/// refusal can say which of the two a token is.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Tokens(BTreeMap<TokenId, TokenRecord>);

impl Tokens {
    /// Whether the holder of `joiner`, who offers `proof`, may join with token `id` at `now`.
    pub fn judge(
        &self,
        id: TokenId,
        joiner: &PublicKey,
        proof: &[u8; 32],
        now: OffsetDateTime,
    ) -> Result<(), TokenRefusal> {
        match self.0.get(&id) {
            Some(record) if record.key.accepts(joiner, proof) => {
                self.usable(id, Some(joiner.node_id()), now)
            }
            // Whoever does not know the secret does not learn whether the token exists.
            Some(_) | None => Err(TokenRefusal::Unknown(id)),
        }
    }

    fn usable(
        &self,
        id: TokenId,
        node: Option<NodeId>,
        now: OffsetDateTime,
    ) -> Result<(), TokenRefusal> {
        let record = self.0.get(&id).ok_or(TokenRefusal::Unknown(id))?;
        if now >= record.expires {
            return Err(TokenRefusal::Expired { token: id, expired: record.expires, now });
        }
        let admitted = node.is_some_and(|node| record.admitted.contains(&node));
        match record.uses_left > 0 || admitted {
            true => Ok(()),
            false => Err(TokenRefusal::UsedUp(id)),
        }
    }
}

/// What the issuer keeps of one token.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct TokenRecord {
    key: SecretKey,
    #[serde(with = "time::serde::rfc3339")]
    pub expires: OffsetDateTime,
    pub uses_left: u32,
    /// The nodes that have joined with it.
    pub admitted: BTreeSet<NodeId>,
}

/// Why a token does not admit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum TokenRefusal {
    Unknown(TokenId),
    Expired { token: TokenId, expired: OffsetDateTime, now: OffsetDateTime },
    UsedUp(TokenId),
}

#[derive(Debug, thiserror::Error)]
pub enum TokenStoreError {
    #[error("the token list in {} cannot be read: move the file away and create new tokens", path.display())]
    Content {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("a token needs the address of a node that admits, and none is known")]
    NoSeed,
    #[error("a token with no use or no time to live would admit nobody")]
    Useless,
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why no use of a token could be taken.
#[derive(Debug)]
pub(crate) enum ConsumeError {
    Refused(TokenRefusal),
    File(FileError),
}

impl From<TokenRefusal> for ConsumeError {
    fn from(refusal: TokenRefusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<FileError> for ConsumeError {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

const REMEMBERED: Duration = Duration::from_secs(86_400);

pub(super) fn path_in(directory: &Path) -> PathBuf {
    directory.join("tokens.json")
}

#[cfg(test)]
mod tests {
    use time::macros::datetime;
    use weft_model::ClusterId;

    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-01-01 12:00 UTC);

    struct Issuer {
        dir: tempfile::TempDir,
        authority: Authority,
    }

    impl Issuer {
        fn new() -> Self {
            let authority = Authority::generate(ClusterId::from([1; 16]), NOW);
            Self { dir: tempfile::tempdir().unwrap(), authority }
        }

        fn open(&self) -> TokenStore {
            TokenStore::open(path_in(self.dir.path())).unwrap()
        }

        fn token(&self, store: &TokenStore, uses: u32) -> Token {
            let grant = Grant { ttl: Duration::from_secs(60), uses };
            store.create(&self.authority, &["192.0.2.1:1".parse().unwrap()], grant, NOW).unwrap()
        }
    }

    #[test]
    fn a_use_is_on_the_disk_once_it_is_taken() {
        let issuer = Issuer::new();
        let store = issuer.open();
        let token = issuer.token(&store, 2);
        store.consume(token.id, NodeId::from([1; 16]), NOW).unwrap();

        let reopened = issuer.open();
        assert_eq!(reopened.list(NOW)[&token.id].uses_left, 1);
        reopened.consume(token.id, NodeId::from([2; 16]), NOW).unwrap();
        assert!(reopened.list(NOW).is_empty());
        let third = reopened.consume(token.id, NodeId::from([3; 16]), NOW);
        assert!(matches!(third, Err(ConsumeError::Refused(TokenRefusal::UsedUp(_)))), "{third:?}");
    }

    #[test]
    fn the_same_node_may_ask_again_with_a_used_up_token_until_it_expires() {
        let issuer = Issuer::new();
        let store = issuer.open();
        let token = issuer.token(&store, 1);
        let node = NodeId::from([1; 16]);
        store.consume(token.id, node, NOW).unwrap();
        store.consume(token.id, node, NOW).unwrap();

        let late = store.consume(token.id, node, NOW + Duration::from_secs(60));
        assert!(
            matches!(late, Err(ConsumeError::Refused(TokenRefusal::Expired { .. }))),
            "{late:?}"
        );
    }

    #[test]
    fn the_secret_is_not_in_the_file() {
        let issuer = Issuer::new();
        let store = issuer.open();
        let token = issuer.token(&store, 1);
        let text = std::fs::read_to_string(path_in(issuer.dir.path())).unwrap();
        assert!(text.contains(&token.id.to_string()));

        let joiner = PublicKey::from([9; 32]);
        let proof = token.secret.key().prove(&joiner);
        assert_eq!(store.tokens().judge(token.id, &joiner, &proof, NOW), Ok(()));
        let kept: serde_json::Value = serde_json::from_str(&text).unwrap();
        let kept = kept[token.id.to_string()]["key"].as_str().unwrap();
        let stolen = Secret::from(<[u8; 32]>::try_from(hex::decode(kept).unwrap()).unwrap());
        let forged = stolen.key().prove(&joiner);
        assert_eq!(
            store.tokens().judge(token.id, &joiner, &forged, NOW),
            Err(TokenRefusal::Unknown(token.id)),
            "what is kept must not itself be a secret that joins"
        );
    }

    #[test]
    fn expired_and_removed_tokens_are_told_apart_and_forgotten_in_time() {
        let issuer = Issuer::new();
        let store = issuer.open();
        let (expired, removed) = (issuer.token(&store, 1), issuer.token(&store, 1));
        assert!(store.remove(removed.id, NOW).unwrap());
        assert!(!store.remove(removed.id, NOW).unwrap());

        let later = NOW + Duration::from_secs(61);
        let judge = |token: &Token| {
            let joiner = PublicKey::from([9; 32]);
            store.tokens().judge(token.id, &joiner, &token.secret.key().prove(&joiner), later)
        };
        assert!(matches!(judge(&expired), Err(TokenRefusal::Expired { .. })));
        assert_eq!(judge(&removed), Err(TokenRefusal::Unknown(removed.id)));

        store.remove(removed.id, later + REMEMBERED).unwrap();
        assert_eq!(judge(&expired), Err(TokenRefusal::Unknown(expired.id)));
    }
}
