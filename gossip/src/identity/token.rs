use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

use aws_lc_rs::{constant_time, hmac};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use weft_model::ClusterId;
use zeroize::Zeroize;

use super::key::PublicKey;

/// Everything that a node needs in order to join, as one word that an operator can paste.
///
/// `Display` writes the word, with the secret in it; `Debug` does not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Token {
    pub cluster: ClusterId,
    /// SHA-256 over the SubjectPublicKeyInfo of the cluster's authority.
    pub authority: [u8; 32],
    pub id: TokenId,
    pub secret: Secret,
    /// Where nodes are that may admit.
    pub seeds: Vec<SocketAddr>,
}

impl Token {
    /// How many seeds a token can carry.
    pub const MAX_SEEDS: usize = 16;

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(HEAD_BYTES + 19 * self.seeds.len() + CHECKSUM_BYTES);
        body.extend(self.cluster.as_bytes());
        body.extend(self.authority);
        body.extend(self.id.0);
        body.extend(self.secret.0);
        let seeds = &self.seeds[..self.seeds.len().min(Self::MAX_SEEDS)];
        body.push(seeds.len() as u8);
        for seed in seeds {
            match seed.ip() {
                IpAddr::V4(ip) => {
                    body.push(4);
                    body.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    body.push(6);
                    body.extend(ip.octets());
                }
            }
            body.extend(seed.port().to_be_bytes());
        }
        body
    }

    fn from_body(mut body: &[u8]) -> Option<Self> {
        let body = &mut body;
        let cluster = ClusterId::from(take::<16>(body)?);
        let authority = take(body)?;
        let id = TokenId(take(body)?);
        let secret = Secret(take(body)?);
        let count = take::<1>(body)?[0];
        let seeds = (0..count).map(|_| take_seed(body)).collect::<Option<Vec<_>>>()?;
        body.is_empty().then_some(Self { cluster, authority, id, secret, seeds })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut body = self.body();
        body.extend(checksum(&body));
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(&body))?;
        body.zeroize();
        Ok(())
    }
}

impl FromStr for Token {
    type Err = InvalidToken;

    /// Reads a token; white space in it, as a wrapped line leaves it, is ignored.
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let text: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let Some(word) = text.strip_prefix(PREFIX) else {
            return Err(match text.starts_with("weft") {
                true => InvalidToken::Version(text.chars().take(8).collect()),
                false => InvalidToken::Prefix,
            });
        };
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if let Some(bad) = word.chars().find(|&c| !allowed(c)) {
            return Err(InvalidToken::Character(bad));
        }
        // A lone sixth of a group or stray trailing bits: characters are missing or wrong.
        let Ok(bytes) = URL_SAFE_NO_PAD.decode(word) else {
            return Err(InvalidToken::Truncated { length: text.len() });
        };
        let Some((body, sum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
            return Err(InvalidToken::Truncated { length: text.len() });
        };
        match checksum(body) == *sum {
            true => Self::from_body(body).ok_or(InvalidToken::Checksum),
            false if bytes.len() < expected_bytes(&bytes) => {
                Err(InvalidToken::Truncated { length: text.len() })
            }
            false => Err(InvalidToken::Checksum),
        }
    }
}

/// Text that is no join token.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum InvalidToken {
    #[error(
        "not a join token: a token begins with {PREFIX:?}; copy the whole line that `weft token create` prints"
    )]
    Prefix,
    #[error(
        "the token begins with {0:?}, which this version cannot read: a token of this version begins with {PREFIX:?}"
    )]
    Version(String),
    #[error("the token contains {0:?}, which no token does: copy it again")]
    Character(char),
    #[error("the token is cut off after {length} characters: copy the whole line")]
    Truncated { length: usize },
    #[error("the token's checksum is wrong: a character was changed; copy it again")]
    Checksum,
}

/// Names a token without giving it away.
#[derive(Clone, Copy, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct TokenId([u8; 8]);

impl From<[u8; 8]> for TokenId {
    fn from(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }
}

impl FromStr for TokenId {
    type Err = InvalidTokenId;

    fn from_str(text: &str) -> Result<Self, InvalidTokenId> {
        let mut bytes = [0; 8];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| InvalidTokenId(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for TokenId {
    type Error = InvalidTokenId;

    fn try_from(text: String) -> Result<Self, InvalidTokenId> {
        text.parse()
    }
}

impl From<TokenId> for String {
    fn from(id: TokenId) -> Self {
        id.to_string()
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenId({self})")
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a token id: give the 16 hexadecimal digits that `weft token ls` shows")]
pub struct InvalidTokenId(String);

/// The secret half of a token.
#[derive(Clone, Eq, PartialEq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// What the issuer keeps of this secret.
    pub fn key(&self) -> SecretKey {
        SecretKey(Sha256::digest(self.0).into())
    }
}

impl From<[u8; 32]> for Secret {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// SHA-256 over a token's secret: it checks a joiner's proof, and does not join.
#[derive(Clone, Copy, Deserialize, Eq, PartialEq, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct SecretKey([u8; 32]);

impl SecretKey {
    /// The proof that whoever presents `joiner` knows the secret: HMAC-SHA-256 over its
    /// SubjectPublicKeyInfo, so that it is of no use with another key.
    pub fn prove(&self, joiner: &PublicKey) -> [u8; 32] {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        let tag = hmac::sign(&key, &joiner.spki());
        tag.as_ref().try_into().expect("HMAC-SHA-256 has 32 bytes")
    }

    /// Whether `proof` is that of `joiner`, in time that does not depend on where it differs.
    pub fn accepts(&self, joiner: &PublicKey, proof: &[u8; 32]) -> bool {
        constant_time::verify_slices_are_equal(&self.prove(joiner), proof).is_ok()
    }
}

impl TryFrom<String> for SecretKey {
    type Error = hex::FromHexError;

    fn try_from(text: String) -> Result<Self, hex::FromHexError> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

impl From<SecretKey> for String {
    fn from(key: SecretKey) -> Self {
        hex::encode(key.0)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey")
    }
}

const PREFIX: &str = "weft1-";
const CHECKSUM_BYTES: usize = 4;
const HEAD_BYTES: usize = 16 + 32 + 8 + 32 + 1;

fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = Sha256::new().chain_update(PREFIX).chain_update(body).finalize();
    digest[..CHECKSUM_BYTES].try_into().expect("SHA-256 has more than 4 bytes")
}

/// How many bytes a token that begins like `bytes` has; enough of it if the seeds are cut off.
fn expected_bytes(bytes: &[u8]) -> usize {
    let Some(&count) = bytes.get(HEAD_BYTES - 1) else { return HEAD_BYTES + CHECKSUM_BYTES };
    let mut end = HEAD_BYTES;
    for _ in 0..count {
        end += match bytes.get(end) {
            Some(6) => 19,
            Some(_) | None => 7,
        };
    }
    end + CHECKSUM_BYTES
}

fn take<const N: usize>(body: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = body.split_first_chunk::<N>()?;
    *body = rest;
    Some(*head)
}

fn take_seed(body: &mut &[u8]) -> Option<SocketAddr> {
    let ip: IpAddr = match take::<1>(body)? {
        [4] => take::<4>(body)?.into(),
        [6] => take::<16>(body)?.into(),
        [_] => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes(take(body)?)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token() -> Token {
        Token {
            cluster: ClusterId::from([1; 16]),
            authority: [2; 32],
            id: TokenId([3; 8]),
            secret: Secret([4; 32]),
            seeds: vec!["192.0.2.1:6790".parse().unwrap(), "[2001:db8::1]:6790".parse().unwrap()],
        }
    }

    #[test]
    fn a_token_reads_what_it_prints_even_if_a_terminal_has_wrapped_it() {
        let text = token().to_string();
        assert_eq!(text.parse::<Token>().unwrap(), token());
        let wrapped = format!("  {}\n{}\n", &text[..70], &text[70..]);
        assert_eq!(wrapped.parse::<Token>().unwrap(), token());
    }

    #[test]
    fn every_cut_off_token_is_called_cut_off() {
        let text = token().to_string();
        for end in 6..text.len() {
            let error = text[..end].parse::<Token>().unwrap_err();
            assert_eq!(error, InvalidToken::Truncated { length: end }, "{end}");
        }
    }

    #[test]
    fn a_foreign_word_is_told_from_a_token_of_another_version() {
        assert_eq!("SWMTKN-1-abc".parse::<Token>(), Err(InvalidToken::Prefix));
        assert_eq!("weft2-abc".parse::<Token>(), Err(InvalidToken::Version("weft2-ab".into())));
        assert_eq!("weft1-ab$c".parse::<Token>(), Err(InvalidToken::Character('$')));
    }

    #[test]
    fn neither_a_token_nor_its_secret_shows_the_secret_when_debugged() {
        let shown = format!("{:?}", token());
        assert!(!shown.contains("4, 4") && !shown.contains("0404"), "{shown}");
    }

    #[test]
    fn a_proof_is_of_no_use_with_another_key() {
        let key = Secret([4; 32]).key();
        let proof = key.prove(&PublicKey::from([7; 32]));
        assert!(key.accepts(&PublicKey::from([7; 32]), &proof));
        assert!(!key.accepts(&PublicKey::from([8; 32]), &proof));
    }

    proptest! {
        #[test]
        fn a_changed_character_is_always_noticed(at in 6usize..160, with in "[A-Za-z0-9_-]") {
            let text = token().to_string();
            let at = at.min(text.len() - 1);
            let mut changed = text.clone();
            changed.replace_range(at..=at, &with);
            prop_assume!(changed != text);
            prop_assert!(changed.parse::<Token>().is_err());
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "(weft1-)?[ -~]{0,200}") {
            let _ = text.parse::<Token>();
        }
    }
}
