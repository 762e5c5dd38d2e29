//! Description of one key: who has it, what it opens, and its limits.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

/// Prefix of the text form of a hash.
const HASH_PREFIX: &str = "sha256:";

/// Prefix of new keys, by which scanners for secrets recognise them.
const KEY_PREFIX: &str = "fsk-";

/// SHA-256 of a key. Keys are random and long, so a slow hash would add nothing.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Returns the hash of a key.
    #[must_use]
    pub fn of(key: &[u8]) -> Self {
        Self(Sha256::digest(key).into())
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(HASH_PREFIX)?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(…)")
    }
}

impl FromStr for KeyHash {
    type Err = &'static str;

    /// Parses `sha256:` and 64 hexadecimal digits. The error says what to write instead, and does
    /// not contain the text, which could be a key.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = "must be `sha256:` and 64 hexadecimal digits, as `foresee key new` prints them";
        let digits = text.strip_prefix(HASH_PREFIX).ok_or(error)?;
        if digits.len() != 64 || !digits.is_ascii() {
            return Err(error);
        }
        let mut hash = [0; 32];
        for (index, byte) in hash.iter_mut().enumerate() {
            let pair = &digits[2 * index..2 * index + 2];
            *byte = u8::from_str_radix(pair, 16).map_err(|_| error)?;
        }
        Ok(Self(hash))
    }
}

/// Returns a new key of 256 random bits.
///
/// # Errors
/// Fails if the operating system provides no random numbers.
pub fn new_key() -> std::io::Result<String> {
    let mut bytes = [0_u8; 32];
    getrandom::fill(&mut bytes).map_err(|error| std::io::Error::other(error.to_string()))?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{KEY_PREFIX}{digits}"))
}

/// Part of the gateway that a key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The inference APIs of the public listener.
    Api,
    /// `GET /metrics` of the admin listener.
    Metrics,
    /// Reading the admin API.
    AdminRead,
    /// The whole admin listener.
    Admin,
}

impl Scope {
    /// All scopes, with their names.
    const ALL: [(Self, &'static str); 4] = [
        (Self::Api, "api"),
        (Self::Metrics, "metrics"),
        (Self::AdminRead, "admin-read"),
        (Self::Admin, "admin"),
    ];
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(_, name)| *name == text);
        found.map(|(scope, _)| *scope).ok_or_else(|| {
            format!("scope `{text}` is unknown; known: api, metrics, admin-read, admin")
        })
    }
}

/// Limits of the requests with one key. `None` sets no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests in a minute. As many may come at once.
    pub requests_per_minute: Option<NonZeroU32>,
    /// Prompt and output tokens in a minute. As many may come at once.
    pub tokens_per_minute: Option<NonZeroU32>,
    /// Requests that run at the same time, from their arrival to the end of their response.
    pub concurrent_requests: Option<NonZeroU32>,
}

/// Description of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyConfig {
    /// Name of the key in logs and metrics. Several keys may have one id, so that a new key can
    /// replace an old one; they share the limits.
    pub id: String,
    /// Hash of the key.
    pub hash: KeyHash,
    /// Tenant of the requests, for the queue order `fair`.
    pub tenant: String,
    /// Parts of the gateway that the key opens.
    pub scopes: Vec<Scope>,
    /// Models that requests may name: exact names, or the beginning of names with `*` at its end.
    pub models: Vec<String>,
    /// Limits of the requests.
    pub limits: KeyLimits,
    /// Most urgent priority that requests may have. Lower values are more urgent.
    pub highest_priority: i32,
    /// Time from which the key is refused.
    pub expires: Option<SystemTime>,
}

impl KeyConfig {
    /// Returns a key of the public API for all models, without limits and without an expiry. Its tenant
    /// has the name of the key.
    #[must_use]
    pub fn new(id: &str, hash: KeyHash) -> Self {
        Self {
            id: id.to_owned(),
            hash,
            tenant: id.to_owned(),
            scopes: vec![Scope::Api],
            models: vec!["*".to_owned()],
            limits: KeyLimits::default(),
            highest_priority: 0,
            expires: None,
        }
    }

    /// Returns whether requests with the key may name a model.
    #[must_use]
    pub fn allows_model(&self, model: &str) -> bool {
        let matches = |pattern: &String| match pattern.strip_suffix('*') {
            Some(beginning) => model.starts_with(beginning),
            None => model == pattern,
        };
        self.models.iter().any(matches)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_has_a_text_form_and_hides_itself() {
        let hash = KeyHash::of(b"secret");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        assert!(!format!("{hash:?}").contains(&hash.to_string()[10..20]));
        let digits = "0".repeat(64);
        for text in [
            "",
            "secret",
            "sha256:",
            &digits,
            &format!("sha256:{}é", &digits[2..]),
        ] {
            assert!(text.parse::<KeyHash>().is_err(), "{text}");
        }
    }

    #[test]
    fn new_keys_are_long_and_different() {
        let [a, b] = [new_key().unwrap(), new_key().unwrap()];
        assert_ne!(a, b);
        assert!(
            a.starts_with("fsk-") && a.len() == 68 && a.is_ascii(),
            "{a}"
        );
    }
}
