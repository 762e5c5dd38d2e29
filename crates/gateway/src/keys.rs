//! Keys of clients: who may send requests, to which models, and how many.
//!
//! A request is [authenticated](KeyRing::authenticate) by a key in one of the headers in which clients
//! send it. The resulting [`KeyGuard`] counts in the key's limits until the response has ended.

pub(crate) mod key_config;
mod limits;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use foresee_engine::error::ApiError;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::clock::Clock;
use crate::log_limit::warn_limited;
use crate::metrics::Metrics;
use key_config::{KeyConfig, KeyHash, Scope};
use limits::{Exceeded, LimitState, RequestRefusal, Usage};

/// Header of Anthropic's clients.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// Header of Azure's clients.
const API_KEY: HeaderName = HeaderName::from_static("api-key");

/// Longest key that is looked up, in bytes.
const MAX_KEY_LEN: usize = 1024;

/// Longest time to retry after that a refusal names.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// A key, and what its requests have taken.
#[derive(Debug)]
pub(crate) struct Key {
    pub(crate) config: KeyConfig,
    /// Shared by all keys of one id.
    usage: Arc<Usage>,
}

/// All keys of a gateway.
#[derive(Debug)]
struct Keys {
    by_hash: HashMap<KeyHash, Arc<Key>>,
    /// Every scope that a key has.
    scopes: Vec<Scope>,
}

/// The keys in force. Without any, every client may send requests.
#[derive(Debug)]
pub(crate) struct KeyRing {
    keys: ArcSwapOption<Keys>,
    clock: Clock,
    metrics: Arc<Metrics>,
}

impl KeyRing {
    /// Creates the ring of a gateway with these keys; `None` to need no keys.
    pub(crate) fn new(keys: Option<&[KeyConfig]>, clock: Clock, metrics: Arc<Metrics>) -> Self {
        let ring = Self {
            keys: ArcSwapOption::empty(),
            clock,
            metrics,
        };
        ring.replace(keys);
        ring
    }

    /// Replaces all keys. A key whose id is in force already keeps what it has taken.
    pub(crate) fn replace(&self, keys: Option<&[KeyConfig]>) {
        let before = self.keys.load_full();
        let mut usage: HashMap<&str, Arc<Usage>> = HashMap::new();
        for key in before.iter().flat_map(|keys| keys.by_hash.values()) {
            usage.insert(&key.config.id, Arc::clone(&key.usage));
        }
        let keys = keys.map(|keys| {
            let mut by_hash = HashMap::new();
            let mut scopes = Vec::new();
            for config in keys {
                for scope in &config.scopes {
                    if !scopes.contains(scope) {
                        scopes.push(*scope);
                    }
                }
                let usage = usage.entry(&config.id).or_default();
                let key = Key {
                    config: config.clone(),
                    usage: Arc::clone(usage),
                };
                by_hash.insert(config.hash, Arc::new(key));
            }
            Arc::new(Keys { by_hash, scopes })
        });
        self.keys.store(keys);
    }

    /// Returns whether clients need a key.
    pub(crate) fn is_required(&self) -> bool {
        self.keys.load().is_some()
    }

    /// Returns whether there is a key with one of these scopes.
    pub(crate) fn has_key_for(&self, scopes: &[Scope]) -> bool {
        let keys = self.keys.load();
        let has_scope = |keys: &Arc<Keys>| keys.scopes.iter().any(|scope| scopes.contains(scope));
        keys.as_ref().is_some_and(has_scope)
    }

    /// Returns the key of a request with these headers, if it has one of the scopes and has not
    /// expired.
    pub(crate) fn find(
        &self,
        headers: &HeaderMap,
        scopes: &[Scope],
    ) -> Result<Arc<Key>, KeyRefusal> {
        let key = key_of(headers).ok_or(KeyRefusal::Missing)?;
        if key.len() > MAX_KEY_LEN {
            return Err(KeyRefusal::Unknown);
        }
        let keys = self.keys.load();
        let keys = keys.as_ref().ok_or(KeyRefusal::Unknown)?;
        // A look-up by hash takes equally long whichever characters are right.
        let found = keys.by_hash.get(&KeyHash::of(key));
        let found = found.ok_or(KeyRefusal::Unknown)?;
        let expires = found.config.expires;
        if expires.is_some_and(|expires| SystemTime::now() >= expires) {
            return Err(KeyRefusal::Expired);
        }
        if !found
            .config
            .scopes
            .iter()
            .any(|scope| scopes.contains(scope))
        {
            return Err(KeyRefusal::Scope);
        }
        Ok(Arc::clone(found))
    }

    /// Returns the key of a client's request; `None` if no key is needed. Counts and logs a refusal.
    ///
    /// # Errors
    /// Fails with a 401 if the key is missing, unknown or expired, and with a 403 if it does not open
    /// the inference APIs.
    pub(crate) fn authenticate(&self, headers: &HeaderMap) -> Result<Option<Arc<Key>>, ApiError> {
        if !self.is_required() {
            return Ok(None);
        }
        self.find(headers, &[Scope::Api])
            .map(Some)
            .map_err(|refusal| {
                self.metrics.record_key_refusal(refusal.as_str());
                warn_limited!(
                    key: refusal.as_str(), reason = refusal.as_str(),
                    "refused a request for its key"
                );
                refusal.into_response()
            })
    }

    /// Starts a request with this key, which counts in its limits until the guard is dropped.
    ///
    /// # Errors
    /// Fails with a 429 if the key has as many requests as it may.
    pub(crate) fn start(&self, key: Arc<Key>) -> Result<KeyGuard, ApiError> {
        let limits = &key.config.limits;
        if let Err(refusal) = key.usage.start(limits, self.clock.now()) {
            let (reason, error) = match refusal {
                RequestRefusal::Concurrency => (
                    "concurrency",
                    rate_limited(
                        "as many requests with this key run as may at the same time",
                        None,
                    ),
                ),
                RequestRefusal::Requests(exceeded) => (
                    "requests",
                    rate_limited(
                        "the requests per minute of this key are used up",
                        Some(exceeded),
                    ),
                ),
            };
            self.metrics.record_key_refusal(reason);
            return Err(error);
        }
        Ok(KeyGuard {
            key,
            reserved_tokens: 0.0,
        })
    }

    /// Reserves the tokens of a request: its prompt and its expected output.
    ///
    /// # Errors
    /// Fails with a 429 if the key has no room for them now.
    pub(crate) fn reserve_tokens(&self, guard: &mut KeyGuard, tokens: f64) -> Result<(), ApiError> {
        let Key { config, usage } = &*guard.key;
        let taken = usage.take_tokens(tokens, &config.limits, self.clock.now());
        if let Err(exceeded) = taken {
            self.metrics.record_key_refusal("tokens");
            let message = "the tokens per minute of this key are used up";
            return Err(rate_limited(message, Some(exceeded)));
        }
        guard.reserved_tokens = tokens;
        Ok(())
    }

    /// Checks that the requests of a key may name a model.
    ///
    /// # Errors
    /// Fails with a 403 if they may not.
    pub(crate) fn check_model(&self, key: &Key, model: &str) -> Result<(), ApiError> {
        if key.config.allows_model(model) {
            return Ok(());
        }
        self.metrics.record_key_refusal("model");
        Err(ApiError::model_not_allowed(model))
    }

    /// Adds the state of a key's limits to the headers of a response, as OpenAI writes them.
    pub(crate) fn add_limit_headers(&self, key: &Key, headers: &mut HeaderMap) {
        let states = key.usage.states(&key.config.limits, self.clock.now());
        for (state, names) in states.into_iter().zip(LIMIT_HEADERS) {
            let Some(LimitState {
                limit,
                remaining,
                reset,
            }) = state
            else {
                continue;
            };
            let [limit_name, remaining_name, reset_name] = names.map(HeaderName::from_static);
            headers.insert(limit_name, limit.into());
            headers.insert(remaining_name, remaining.into());
            if let Ok(reset) = HeaderValue::try_from(duration_text(reset)) {
                headers.insert(reset_name, reset);
            }
        }
    }
}

/// Headers with the states of the limits of requests and of tokens: limit, remaining, reset.
const LIMIT_HEADERS: [[&str; 3]; 2] = [
    [
        "x-ratelimit-limit-requests",
        "x-ratelimit-remaining-requests",
        "x-ratelimit-reset-requests",
    ],
    [
        "x-ratelimit-limit-tokens",
        "x-ratelimit-remaining-tokens",
        "x-ratelimit-reset-tokens",
    ],
];

/// Returns a duration as OpenAI writes it in headers: `20ms`, `1.5s`, `6m0s`.
fn duration_text(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    let (minutes, rest) = (milliseconds / 60_000, milliseconds % 60_000);
    match (minutes, rest) {
        (0, rest) if rest < 1000 => format!("{rest}ms"),
        (0, rest) => format!("{}s", rest as f64 / 1000.0),
        (minutes, rest) => format!("{minutes}m{}s", rest / 1000),
    }
}

/// Returns the 429 of a limit of a key.
fn rate_limited(what: &str, exceeded: Option<Exceeded>) -> ApiError {
    match exceeded {
        Some(Exceeded::TooLarge) => ApiError {
            should_retry: Some(false),
            ..ApiError::rate_limited(
                "The request is larger than the tokens per minute of this key. Send a shorter \
                 prompt, or a smaller `max_tokens`.",
                None,
            )
        },
        Some(Exceeded::For(wait)) => ApiError::rate_limited(
            format!("The request was refused, because {what}. Try again later."),
            Some(wait.min(MAX_RETRY_AFTER)),
        ),
        None => ApiError::rate_limited(
            format!("The request was refused, because {what}. Try again when one has ended."),
            None,
        ),
    }
}

/// A request that counts in the limits of its key. Dropping it ends the request, and returns tokens
/// that were reserved and not [settled](Self::settle).
#[derive(Debug)]
pub(crate) struct KeyGuard {
    pub(crate) key: Arc<Key>,
    reserved_tokens: f64,
}

impl KeyGuard {
    /// Replaces the reserved tokens by those of the response, which has ended.
    pub(crate) fn settle(&mut self, tokens: f64) {
        let reserved = std::mem::take(&mut self.reserved_tokens);
        if self.key.config.limits.tokens_per_minute.is_some() {
            self.key.usage.settle_tokens(tokens - reserved);
        }
    }
}

impl Drop for KeyGuard {
    fn drop(&mut self) {
        if self.reserved_tokens > 0.0 {
            self.settle(0.0);
        }
        self.key.usage.end();
    }
}

/// Why a key was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyRefusal {
    Missing,
    Unknown,
    Expired,
    /// The key does not open what the request calls.
    Scope,
}

impl KeyRefusal {
    /// Returns the value of the label `reason`.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Unknown => "unknown",
            Self::Expired => "expired",
            Self::Scope => "scope",
        }
    }

    /// Returns the response to the request.
    pub(crate) fn into_response(self) -> ApiError {
        match self {
            Self::Missing => ApiError::unauthorized(
                "The request needs a key: send the header `Authorization: Bearer KEY`.",
            ),
            Self::Unknown => ApiError::unauthorized("The key of the request is not known."),
            Self::Expired => ApiError::unauthorized("The key of the request has expired."),
            Self::Scope => ApiError::forbidden("The key of the request does not open this path."),
        }
    }
}

/// Returns the key that a request has sent, in the header of OpenAI's, of Anthropic's or of Azure's
/// clients.
fn key_of(headers: &HeaderMap) -> Option<&[u8]> {
    // A proxy in front may use another scheme, such as `Basic`, for a check of its own.
    let bearer = headers.get(AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
        let is_bearer = scheme.eq_ignore_ascii_case(b"Bearer ");
        is_bearer.then(|| key.trim_ascii())
    });
    if bearer.is_some() {
        return bearer;
    }
    let value = headers.get(X_API_KEY).or_else(|| headers.get(API_KEY))?;
    Some(value.as_bytes().trim_ascii())
}

/// Removes the headers in which clients send keys, so that a worker never sees a key of the gateway.
pub(crate) fn remove_keys(headers: &mut HeaderMap) {
    for name in [AUTHORIZATION, X_API_KEY, API_KEY] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU32;

    use super::key_config::KeyLimits;
    use super::*;

    fn config(id: &str, key: &str) -> KeyConfig {
        KeyConfig::new(id, KeyHash::of(key.as_bytes()))
    }

    fn ring(keys: &[KeyConfig]) -> KeyRing {
        KeyRing::new(Some(keys), Clock::start(), Arc::new(Metrics::new()))
    }

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::try_from(value).unwrap());
        headers
    }

    #[test]
    fn a_key_is_found_in_the_headers_of_all_clients() {
        let ring = ring(&[config("a", "secret")]);
        for (name, value) in [
            ("authorization", "Bearer secret"),
            ("authorization", "bearer  secret "),
            ("x-api-key", "secret"),
            ("api-key", "secret"),
        ] {
            let found = ring.authenticate(&headers(name, value)).unwrap();
            assert_eq!(found.unwrap().config.id, "a", "{name}: {value}");
        }
        // The scheme of a proxy in front does not hide the key.
        let mut both = headers("x-api-key", "secret");
        both.insert(AUTHORIZATION, HeaderValue::from_static("Basic cHJveHk="));
        assert_eq!(ring.authenticate(&both).unwrap().unwrap().config.id, "a");
        for (name, value) in [
            ("authorization", "Basic secret"),
            ("authorization", "secret"),
            ("x-api-key", "Secret"),
            ("api-key", ""),
        ] {
            let error = ring.authenticate(&headers(name, value)).unwrap_err();
            assert_eq!(error.status, 401, "{name}: {value}");
            assert!(value.is_empty() || !error.message.contains(value));
        }
    }

    #[test]
    fn expired_keys_and_keys_of_other_scopes_are_refused() {
        let expired = KeyConfig {
            expires: Some(SystemTime::UNIX_EPOCH),
            ..config("expired", "old")
        };
        let admin = KeyConfig {
            scopes: vec![Scope::Admin],
            ..config("admin", "root")
        };
        let ring = ring(&[expired, admin]);
        let find = |key: &str| {
            let headers = headers("x-api-key", key);
            ring.find(&headers, &[Scope::Api])
                .map(|key| key.config.id.clone())
        };
        assert_eq!(find("old"), Err(KeyRefusal::Expired));
        assert_eq!(find("root"), Err(KeyRefusal::Scope));
        assert!(ring.has_key_for(&[Scope::Admin]) && !ring.has_key_for(&[Scope::Metrics]));
    }

    #[test]
    fn a_replaced_key_keeps_what_it_has_taken() {
        let limited = |key: &str| KeyConfig {
            limits: KeyLimits {
                concurrent_requests: NonZeroU32::new(1),
                ..KeyLimits::default()
            },
            ..config("a", key)
        };
        let ring = ring(&[limited("old")]);
        let find = |key: &str| {
            let headers = headers("x-api-key", key);
            ring.find(&headers, &[Scope::Api])
        };
        let running = ring.start(find("old").unwrap()).unwrap();
        ring.replace(Some(&[limited("old"), limited("new")]));
        let error = ring.start(find("new").unwrap()).unwrap_err();
        assert_eq!(
            (error.status, error.code),
            (429, Some("rate_limit_exceeded"))
        );
        drop(running);
        assert!(ring.start(find("new").unwrap()).is_ok());
        ring.replace(Some(&[limited("new")]));
        assert_eq!(find("old").unwrap_err(), KeyRefusal::Unknown);
        ring.replace(None);
        assert_eq!(
            ring.authenticate(&HeaderMap::new()).unwrap().map(|_| ()),
            None
        );
    }

    #[test]
    fn reserved_tokens_are_returned_or_settled() {
        let limited = KeyConfig {
            limits: KeyLimits {
                tokens_per_minute: NonZeroU32::new(1000),
                ..KeyLimits::default()
            },
            ..config("a", "key")
        };
        let ring = ring(&[limited]);
        let key = ring
            .find(&headers("api-key", "key"), &[Scope::Api])
            .unwrap();
        let mut guard = ring.start(Arc::clone(&key)).unwrap();
        ring.reserve_tokens(&mut guard, 900.0).unwrap();
        let mut other = ring.start(Arc::clone(&key)).unwrap();
        let error = ring.reserve_tokens(&mut other, 900.0).unwrap_err();
        assert!(error.retry_after.unwrap() > Duration::from_secs(40));
        drop(guard);
        ring.reserve_tokens(&mut other, 900.0).unwrap();
        other.settle(100.0);
        drop(other);
        let mut headers = HeaderMap::new();
        ring.add_limit_headers(&key, &mut headers);
        assert_eq!(headers["x-ratelimit-limit-tokens"], "1000");
        let remaining = headers["x-ratelimit-remaining-tokens"].to_str().unwrap();
        assert!(
            (890..=910).contains(&remaining.parse::<u32>().unwrap()),
            "{remaining}"
        );
    }

    #[test]
    fn durations_are_written_as_openai_writes_them() {
        for (milliseconds, text) in [(0, "0ms"), (20, "20ms"), (1500, "1.5s"), (360_000, "6m0s")] {
            assert_eq!(duration_text(Duration::from_millis(milliseconds)), text);
        }
    }
}
