//! Headers of a client's request: the routing hints in them, and what is passed on to a worker.
//!
//! Hints can take capacity from other clients: a priority jumps the queue, and a rank pins a worker.
//! From clients that are not trusted, hints are ignored or clamped, and control headers are not
//! passed on to engines.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use foresee_api::headers::{CONTROL_PREFIX, DEADLINE, EXPECTED_TOKENS, PRIORITY};
use foresee_engine::error::ApiError;
use http::header::{ACCEPT_ENCODING, FORWARDED, HOST, HeaderName, VIA};
use http::{HeaderMap, HeaderValue};
use ipnet::IpNet;

use crate::client_deadlines::deadlines;
use crate::connection_state::Peer;
use crate::keys::Key;
use crate::placement::hints::{RequestHints, tenant_hash};
use crate::workers::registry::WorkerRegistry;
use crate::workers::worker::RANK_HEADER;

/// Request headers by which engines let a client control scheduling.
const ENGINE_CONTROL_HEADERS: [&str; 3] = [RANK_HEADER, "x-vllm-priority", "x-smg-priority"];

/// Addresses of the proxies that a request passed through, the client's first.
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// Scheme that the client used.
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// Host that the client asked for.
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// Name of the gateway in `Via`.
const VIA_ENTRY: HeaderValue = HeaderValue::from_static("1.1 foresee");

/// Trust in the headers of clients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClientTrust {
    /// Whether hints and control headers of clients are used: priority, expected tokens, rank.
    pub control_headers: bool,
    /// Networks of proxies whose `X-Forwarded-*` headers are kept. From all others, they are
    /// replaced.
    pub proxies: Vec<IpNet>,
}

/// How the headers of clients are read and passed on.
#[derive(Debug)]
pub(crate) struct ClientHeaders {
    pub(crate) trust: ClientTrust,
    /// Header whose value identifies the tenant of a request; `None` unless the queue order is
    /// `fair`.
    pub(crate) tenant_header: Option<HeaderName>,
    pub(crate) registry: Arc<WorkerRegistry>,
}

impl ClientHeaders {
    /// Returns the routing hints in `headers`. The tenant is 0 unless the queue order is `fair` and
    /// the request has the tenant header. From clients that are not trusted, the priority is at
    /// least 0 and the other hints are ignored. With a `key`, the tenant and the bound of the priority
    /// are the key's. Fails with a 400 if the priority, the deadline or the expected number of tokens
    /// is not an integer in range.
    pub(crate) fn hints(
        &self,
        headers: &HeaderMap,
        key: Option<&Key>,
    ) -> Result<RequestHints, ApiError> {
        let priority = "an integer; lower values are served first (default 0)";
        let tokens = "an integer: the expected number of output tokens";
        let tenant_header = self.tenant_header.as_ref();
        let tenant = tenant_header.and_then(|name| headers.get(name));
        let tenant = match key {
            Some(key) => tenant_hash(key.config.tenant.as_bytes()),
            None => tenant.map_or(0, |tenant| tenant_hash(tenant.as_bytes())),
        };
        let highest_priority = match key {
            Some(key) => key.config.highest_priority,
            None if self.trust.control_headers => i32::MIN,
            None => 0,
        };
        let named_priority: Option<i32> = integer_header(headers, PRIORITY, priority)?;
        let requirement = "an integer: milliseconds until the first byte of the response";
        let deadline: Option<u32> = integer_header(headers, DEADLINE, requirement)?;
        let milliseconds = |number: u32| Duration::from_millis(number.into());
        let hints = RequestHints {
            deadlines: deadlines(headers, deadline.map(milliseconds)),
            expected_output_tokens: integer_header(headers, EXPECTED_TOKENS, tokens)?,
            priority: named_priority.unwrap_or_default().max(highest_priority),
            tenant,
            excluded_workers: Vec::new(),
        };
        Ok(if self.trust.control_headers {
            RequestHints {
                excluded_workers: named_rank(headers)
                    .map_or_else(Vec::new, |rank| self.registry.workers_of_other_ranks(rank)),
                ..hints
            }
        } else {
            RequestHints {
                expected_output_tokens: None,
                ..hints
            }
        })
    }

    /// Changes the headers of a client at `peer` into the headers for a worker. Removes control
    /// headers of clients that are not trusted, and `Accept-Encoding` if the response `is_observed`:
    /// a compressed response cannot be. Adds `Via` and `X-Forwarded-*`.
    pub(crate) fn forward(&self, headers: &mut HeaderMap, peer: Option<Peer>, is_observed: bool) {
        if !self.trust.control_headers {
            let is_control = |name: &HeaderName| {
                let name = name.as_str();
                name.starts_with(CONTROL_PREFIX) || ENGINE_CONTROL_HEADERS.contains(&name)
            };
            let control: Vec<HeaderName> = headers
                .keys()
                .filter(|name| is_control(name))
                .cloned()
                .collect();
            for name in control {
                headers.remove(name);
            }
        }
        if is_observed {
            headers.remove(ACCEPT_ENCODING);
        }
        let address = peer.map(|peer| peer.address.ip().to_canonical());
        let proxies = &self.trust.proxies;
        let is_proxy = address.is_some_and(|peer| proxies.iter().any(|net| net.contains(&peer)));
        let scheme = match peer.is_some_and(|peer| peer.is_encrypted) {
            true => HeaderValue::from_static("https"),
            false => HeaderValue::from_static("http"),
        };
        add_forwarding(headers, address, scheme, is_proxy);
    }
}

/// Returns the data-parallel rank that a client's [`RANK_HEADER`] names; `None` if the header is absent
/// or is not a number.
fn named_rank(headers: &HeaderMap) -> Option<u32> {
    let named = headers.get(RANK_HEADER)?.to_str().ok()?;
    named.trim().parse().ok()
}

/// Adds `Via` and the `X-Forwarded-*` headers of this hop. The values that the request came with are
/// kept if `keeps_earlier`, and replaced otherwise. Has to be called before `Host` is removed.
fn add_forwarding(
    headers: &mut HeaderMap,
    peer: Option<IpAddr>,
    scheme: HeaderValue,
    keeps_earlier: bool,
) {
    if !keeps_earlier {
        for name in [FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST, FORWARDED] {
            headers.remove(name);
        }
    }
    if let Some(peer) = peer
        && let Ok(peer) = HeaderValue::try_from(peer.to_string())
    {
        append(headers, FORWARDED_FOR, peer);
    }
    headers.entry(FORWARDED_PROTO).or_insert(scheme);
    if let Some(host) = headers.get(HOST).cloned() {
        headers.entry(FORWARDED_HOST).or_insert(host);
    }
    append(headers, VIA, VIA_ENTRY);
}

/// Appends an entry to a header whose value is a list. Several lines of the header become one.
fn append(headers: &mut HeaderMap, name: HeaderName, entry: HeaderValue) {
    if !headers.contains_key(&name) {
        headers.insert(name, entry);
        return;
    }
    let mut list = Vec::new();
    for value in headers.get_all(&name) {
        list.extend_from_slice(value.as_bytes());
        list.extend_from_slice(b", ");
    }
    list.extend_from_slice(entry.as_bytes());
    if let Ok(value) = HeaderValue::from_bytes(&list) {
        headers.insert(name, value);
    }
}

/// Returns the number in the header `name`, or `None` without that header. Fails with a 400 if the
/// value is not a number of type `N`. `requirement` completes the error message "Header `name` must
/// be …".
fn integer_header<N: FromStr>(
    headers: &HeaderMap,
    name: &'static str,
    requirement: &str,
) -> Result<Option<N>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let number = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let invalid = || {
        let message = format!("Header `{name}` must be {requirement}.");
        ApiError::bad_request(message, Some(name))
    };
    number.map(Some).ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
        let values = headers.get_all(name).iter();
        values
            .map(|value| value.to_str().unwrap().to_owned())
            .collect()
    }

    const HTTP: HeaderValue = HeaderValue::from_static("http");

    const SENT: &[(&str, &str)] = &[
        ("host", "api.example"),
        ("via", "1.1 cdn"),
        ("via", "1.1 lb"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x-forwarded-proto", "https"),
        ("x-forwarded-host", "front.example"),
        ("forwarded", "for=203.0.113.9"),
    ];

    #[test]
    fn a_trusted_proxys_forwarding_headers_are_extended() {
        let mut sent = headers(SENT);
        add_forwarding(&mut sent, Some("10.0.0.2".parse().unwrap()), HTTP, true);
        assert_eq!(values(&sent, "x-forwarded-for"), ["203.0.113.9, 10.0.0.2"]);
        assert_eq!(values(&sent, "x-forwarded-proto"), ["https"]);
        assert_eq!(values(&sent, "x-forwarded-host"), ["front.example"]);
        assert_eq!(values(&sent, "via"), ["1.1 cdn, 1.1 lb, 1.1 foresee"]);
        assert_eq!(values(&sent, "forwarded"), ["for=203.0.113.9"]);
    }

    #[test]
    fn a_clients_own_forwarding_headers_are_replaced() {
        let mut sent = headers(SENT);
        add_forwarding(&mut sent, Some("10.0.0.2".parse().unwrap()), HTTP, false);
        assert_eq!(values(&sent, "x-forwarded-for"), ["10.0.0.2"]);
        assert_eq!(values(&sent, "x-forwarded-proto"), ["http"]);
        assert_eq!(values(&sent, "x-forwarded-host"), ["api.example"]);
        assert_eq!(values(&sent, "via"), ["1.1 cdn, 1.1 lb, 1.1 foresee"]);
        assert!(values(&sent, "forwarded").is_empty());
    }
}
