//! Invite tokens: `cxi_<id>_<secret>`.
//!
//! The id is public: it finds the invite and may stand in a log. The secret is 256 random bits; the
//! hub keeps only its SHA-256, which needs no slow hash because there is nothing to guess.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRng as _;
use sha2::Digest as _;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroize as _;

const PREFIX: &str = "cxi_";
const ID_BYTES: usize = 8;
const SECRET_BYTES: usize = 32;

/// The public part of a token: 8 characters of lower-case base 32 (Crockford's alphabet).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InviteId(String);

impl InviteId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InviteId {
    type Err = InvalidToken;
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        if text.len() == ID_BYTES && text.bytes().all(|b| ALPHABET.contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidToken)
        }
    }
}

impl fmt::Display for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for InviteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// Text that is not a token. Says nothing of the text, which may be a mistyped secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not an invite token: expected cxi_<8 characters>_<43 characters>")]
pub struct InvalidToken;

/// A complete token. Printing it for debugging shows the id only; the secret is wiped on drop.
pub struct InviteToken {
    id: InviteId,
    secret: [u8; SECRET_BYTES],
}

impl InviteToken {
    /// A new token from the operating system's randomness.
    ///
    /// # Panics
    /// If the operating system has no randomness to give, without which nothing here is safe.
    #[must_use]
    pub fn generate() -> Self {
        let mut id = [0; ID_BYTES];
        let mut secret = [0; SECRET_BYTES];
        rand::rngs::SysRng
            .try_fill_bytes(&mut id)
            .and_then(|()| rand::rngs::SysRng.try_fill_bytes(&mut secret))
            .expect("the operating system gives random bytes");
        let id = id.iter().map(|b| char::from(ALPHABET[usize::from(b % 32)])).collect();
        Self { id: InviteId(id), secret }
    }

    /// The public part.
    #[must_use]
    pub fn id(&self) -> &InviteId {
        &self.id
    }

    /// What the hub keeps of the secret.
    #[must_use]
    pub fn secret_hash(&self) -> SecretHash {
        SecretHash(sha2::Sha256::digest(self.secret).into())
    }

    /// The whole token, secret included: for the one who is to receive it, and nobody else.
    #[must_use]
    pub fn expose(&self) -> String {
        format!("{PREFIX}{}_{}", self.id, URL_SAFE_NO_PAD.encode(self.secret))
    }
}

impl FromStr for InviteToken {
    type Err = InvalidToken;
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let rest = text.trim().strip_prefix(PREFIX).ok_or(InvalidToken)?;
        let (id, secret) = rest.split_once('_').ok_or(InvalidToken)?;
        let id = id.parse()?;
        let mut secret = URL_SAFE_NO_PAD.decode(secret).map_err(|_| InvalidToken)?;
        let taken = secret.as_slice().try_into().map_err(|_| InvalidToken);
        secret.zeroize();
        Ok(Self { id, secret: taken? })
    }
}

impl fmt::Debug for InviteToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}_…", self.id)
    }
}

impl Drop for InviteToken {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

/// SHA-256 of a secret. Comparison takes the same time wherever the difference is.
#[derive(Clone)]
pub struct SecretHash([u8; 32]);

impl SecretHash {
    /// Reads a stored hash; `None` unless there are 32 bytes.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes to store.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for SecretHash {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for SecretHash {}

impl fmt::Debug for SecretHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretHash(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_survives_text_and_hides_in_debug() {
        let token = InviteToken::generate();
        let text = token.expose();
        let read: InviteToken = format!("  {text}\n").parse().unwrap();
        assert_eq!(read.id(), token.id());
        assert_eq!(read.secret_hash(), token.secret_hash());
        let secret = text.splitn(3, '_').nth(2).unwrap();
        assert!(!format!("{token:?}").contains(&secret[..8]));
    }

    #[test]
    fn different_secret_has_different_hash() {
        assert_ne!(InviteToken::generate().secret_hash(), InviteToken::generate().secret_hash());
    }

    #[test]
    fn mistyped_tokens_are_refused() {
        let good = InviteToken::generate().expose();
        for bad in
            ["", "cxi_", "cxi_abc_def", &good[1..], &good[..good.len() - 1], &format!("{good}x")]
        {
            assert!(bad.parse::<InviteToken>().is_err(), "{}", bad.len());
        }
    }
}
