//! Which requests the admin listener accepts: checks of host, origin, key and content type.
//!
//! A web page that an operator visits can send requests to a listener on the operator's machine.
//! The checks of `Origin` and of the content type stop requests of pages of other sites, since the
//! listener never sends a CORS header. The check of `Host` stops pages whose own host name was made
//! to resolve to the listener's address (DNS rebinding), for which the browser sees no other site.

use std::net::IpAddr;

use foresee_engine::error::ApiError;
use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, ORIGIN, TRANSFER_ENCODING,
};
use http::request::Parts;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method};

use super::dashboard::assets::is_page;
use super::settings::{AdminConfig, AdminListen};
use crate::keys::key_config::Scope;
use crate::keys::{KeyRefusal, KeyRing};

/// Maximum number of characters of a header that an error message repeats.
const MAX_QUOTED_CHARS: usize = 200;

/// Which part of the admin listener a path belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Area {
    /// Health checks.
    Health,
    /// Metrics.
    Metrics,
    /// Files of the dashboard, which have no secrets.
    Page,
    /// The admin API, and all unknown paths.
    Admin,
}

impl Area {
    /// Returns the area of a path.
    fn of(path: &str) -> Self {
        match path {
            "/metrics" => Self::Metrics,
            path if path.starts_with("/health/") => Self::Health,
            path if is_page(path) => Self::Page,
            _ => Self::Admin,
        }
    }
}

/// Access that a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// Needs no key.
    Open,
    Metrics,
    /// Reads the admin API.
    AdminRead,
    /// Changes something, or calls an unknown path.
    AdminChange,
}

/// Sender of a request: the id of a key, `admin key`, or `anonymous` if no key is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Principal(String);

impl Principal {
    fn anonymous() -> Self {
        Self("anonymous".to_owned())
    }
}

impl std::fmt::Display for Principal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl AdminConfig {
    /// Checks that a request may be handled, and returns its sender. `listen` is the listener that it
    /// arrived at; `keys` are those of clients, some of which may open it.
    ///
    /// # Errors
    /// Fails with a 403 for a foreign origin or host, or for a key of another scope, with a 401 for a
    /// missing or wrong key, and with a 415 for a body of another type than JSON.
    pub(super) fn check_request(
        &self,
        listen: &AdminListen,
        keys: &KeyRing,
        head: &Parts,
    ) -> Result<Principal, ApiError> {
        let area = Area::of(head.uri.path());
        check_origin(head)?;
        // Probes and scrapers reach the listener by names of services, and browsers cannot open a
        // Unix socket.
        let is_read = head.method == Method::GET || head.method == Method::HEAD;
        let is_probed = matches!(area, Area::Health | Area::Metrics);
        let is_exempt = is_read && is_probed || matches!(listen, AdminListen::Unix(_));
        if !is_exempt {
            self.check_host(head)?;
        }
        let access = match area {
            // An explanation changes nothing.
            Area::Admin if is_read || head.uri.path() == "/admin/explain" => Access::AdminRead,
            Area::Admin => Access::AdminChange,
            Area::Metrics => Access::Metrics,
            Area::Health => Access::Open,
            Area::Page if is_read => Access::Open,
            Area::Page => Access::AdminChange,
        };
        let principal = self.check_key(access, keys, &head.headers)?;
        check_content_type(head)?;
        Ok(principal)
    }

    /// Checks that the request was sent to an accepted host: an IP address, `localhost`, or one of
    /// [`hosts`](Self::hosts). A request without a host is accepted, because browsers always send
    /// one. Fails with a 403.
    fn check_host(&self, head: &Parts) -> Result<(), ApiError> {
        let authority = head.uri.authority().map(Authority::as_str);
        let headers = head.headers.get_all(HOST).iter();
        let headers = headers.map(|host| host.to_str().unwrap_or(""));
        match authority
            .into_iter()
            .chain(headers)
            .find(|authority| !self.is_accepted_host(authority))
        {
            None => Ok(()),
            Some(authority) => Err(refusal(
                403,
                "host_not_allowed",
                format!(
                    "The host `{}` is not accepted. Use the listener's IP address or `localhost`, \
                     or start the router with --admin-host and this name.",
                    quoted(authority)
                ),
            )),
        }
    }

    /// Returns whether an authority (`HOST` or `HOST:PORT`) names an accepted host. The port does
    /// not matter.
    fn is_accepted_host(&self, authority: &str) -> bool {
        let Ok(parsed) = authority.parse::<Authority>() else {
            return false;
        };
        if authority.contains('@') {
            return false;
        }
        let host = parsed.host();
        let address = host.trim_start_matches('[').trim_end_matches(']');
        address.parse::<IpAddr>().is_ok()
            || host.eq_ignore_ascii_case("localhost")
            || self
                .hosts
                .iter()
                .any(|name| host.eq_ignore_ascii_case(name))
    }

    /// Checks that the request has a key that opens what it calls, if there is such a key, and returns
    /// whose it is. Fails with a 401, and with a 403 for a key that opens only other things.
    fn check_key(
        &self,
        access: Access,
        keys: &KeyRing,
        headers: &HeaderMap,
    ) -> Result<Principal, ApiError> {
        let (own_keys, protecting, opening): (_, &[Scope], &[Scope]) = match access {
            Access::Open => return Ok(Principal::anonymous()),
            Access::Metrics => (
                [&self.metrics_key, &self.key],
                &[Scope::Metrics],
                &[Scope::Metrics, Scope::AdminRead, Scope::Admin],
            ),
            Access::AdminRead => (
                [&self.key, &None],
                &[Scope::AdminRead, Scope::Admin],
                &[Scope::AdminRead, Scope::Admin],
            ),
            Access::AdminChange => (
                [&self.key, &None],
                &[Scope::AdminRead, Scope::Admin],
                &[Scope::Admin],
            ),
        };
        let [required, _] = own_keys;
        if required.is_none() && !keys.has_key_for(protecting) {
            return Ok(Principal::anonymous());
        }
        let Some(given) = bearer_token(headers) else {
            let message = "This path needs the header `Authorization: Bearer KEY`.";
            return Err(ApiError::unauthorized(message));
        };
        if own_keys
            .iter()
            .any(|key| key.as_ref().is_some_and(|key| key.matches(given)))
        {
            return Ok(Principal("admin key".to_owned()));
        }
        match keys.find(headers, opening) {
            Ok(key) => Ok(Principal(key.config.id.clone())),
            Err(KeyRefusal::Scope) => Err(KeyRefusal::Scope.into_response()),
            Err(_) => {
                let message = "The key of the `Authorization` header is wrong for this path.";
                Err(ApiError::unauthorized(message))
            }
        }
    }
}

/// Returns the token of `Authorization: Bearer TOKEN`; `None` without such a header.
fn bearer_token(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked("Bearer ".len())?;
    let is_bearer = scheme.eq_ignore_ascii_case(b"Bearer ");
    is_bearer.then(|| token.trim_ascii())
}

/// Checks that a request with an `Origin` header comes from a page of the same host and port as the
/// request's `Host`. Schemes are not compared. Fails with a 403.
fn check_origin(head: &Parts) -> Result<(), ApiError> {
    let host = single(&head.headers, &HOST);
    let is_same_host = |origin: &HeaderValue| {
        let origin = origin.to_str().ok()?;
        let (_, authority) = origin.split_once("://")?;
        Some(authority.eq_ignore_ascii_case(host?))
    };
    let foreign = head
        .headers
        .get_all(ORIGIN)
        .iter()
        .find(|origin| is_same_host(origin) != Some(true));
    match foreign {
        None => Ok(()),
        Some(origin) => Err(refusal(
            403,
            "origin_not_allowed",
            format!(
                "Requests of web pages are accepted only from this listener's own origin, not from \
                 `{}`. Send the request without an `Origin` header, from a program that is not a \
                 web page.",
                quoted(&String::from_utf8_lossy(origin.as_bytes()))
            ),
        )),
    }
}

/// Checks that the body of a request that changes state is declared as JSON. A page of another site
/// cannot declare that without asking first (a CORS preflight), which is always refused. Fails with
/// a 415.
fn check_content_type(head: &Parts) -> Result<(), ApiError> {
    let headers = &head.headers;
    let is_empty = headers
        .get_all(CONTENT_LENGTH)
        .iter()
        .all(|length| length == "0");
    if is_empty && !headers.contains_key(TRANSFER_ENCODING) {
        return Ok(());
    }
    let content_type = single(headers, &CONTENT_TYPE).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(refusal(
        415,
        "unsupported_media_type",
        "A body needs the header `Content-Type: application/json`.",
    ))
}

/// Returns the value of a header that occurs once and is text.
fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Returns the first [`MAX_QUOTED_CHARS`] characters of a text that a client sent.
pub(super) fn quoted(text: &str) -> String {
    text.chars().take(MAX_QUOTED_CHARS).collect()
}

/// Returns an error response that the admin listener alone uses.
pub(super) fn refusal(status: u16, code: &'static str, message: impl Into<String>) -> ApiError {
    ApiError {
        status,
        code: Some(code),
        kind: match status {
            403 => "permission_error",
            404 => "not_found_error",
            _ => "invalid_request_error",
        },
        ..ApiError::bad_request(message, None)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::Request;

    use super::super::key::AdminKey;
    use super::*;
    use crate::clock::Clock;
    use crate::keys::key_config::{KeyConfig, KeyHash};
    use crate::metrics::Metrics;

    /// Returns the status of a request with these headers, 200 if it is accepted. Clients have no
    /// keys.
    fn status(config: &AdminConfig, request: &str, headers: &[(&str, &str)]) -> u16 {
        status_with(&ring(None), config, request, headers)
    }

    /// Returns a ring of these keys.
    fn ring(keys: Option<&[KeyConfig]>) -> KeyRing {
        KeyRing::new(keys, Clock::start(), Arc::new(Metrics::new()))
    }

    /// As [`status`], with keys of clients.
    fn status_with(
        keys: &KeyRing,
        config: &AdminConfig,
        request: &str,
        headers: &[(&str, &str)],
    ) -> u16 {
        let (method, target) = request.split_once(' ').unwrap();
        let mut builder = Request::builder().method(method).uri(target);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        let (head, ()) = builder.body(()).unwrap().into_parts();
        let listen = "127.0.0.1:8081".parse().unwrap();
        match config.check_request(&listen, keys, &head) {
            Ok(_) => 200,
            Err(error) => error.status,
        }
    }

    #[test]
    fn hosts_are_addresses_localhost_or_configured_names() {
        let config = AdminConfig {
            hosts: vec!["router.internal".to_owned()],
            ..AdminConfig::default()
        };
        let of = |host: &str| status(&config, "GET /admin/workers", &[("host", host)]);
        for host in [
            "127.0.0.1",
            "127.0.0.1:8081",
            "10.1.2.3:9",
            "[::1]:8081",
            "[::1]",
            "localhost",
            "LocalHost:8081",
            "router.internal:8081",
            "Router.Internal",
        ] {
            assert_eq!(of(host), 200, "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:8081",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "router.internal.evil",
            "user@localhost",
            "localhost@evil.example",
            "",
            "[::1",
            "a b",
        ] {
            assert_eq!(of(host), 403, "{host}");
        }
        let twice = [("host", "localhost"), ("host", "evil.example")];
        assert_eq!(status(&config, "GET /admin/workers", &twice), 403);
        // Clients of HTTP/1.0 may send no host; browsers always do.
        assert_eq!(status(&config, "GET /admin/workers", &[]), 200);
        let localhost = [("host", "localhost")];
        let absolute = "GET http://evil.example/admin/workers";
        assert_eq!(status(&config, absolute, &localhost), 403);
    }

    #[test]
    fn probes_and_scrapers_may_use_any_host_but_not_a_foreign_origin() {
        let config = AdminConfig::default();
        let foreign = [("host", "foresee.svc")];
        for request in ["GET /metrics", "GET /health/ready", "HEAD /health/live"] {
            assert_eq!(status(&config, request, &foreign), 200, "{request}");
            let page = [("host", "foresee.svc"), ("origin", "http://evil.example")];
            assert_eq!(status(&config, request, &page), 403, "{request}");
        }
        for request in [
            "POST /metrics",
            "GET /health",
            "GET /",
            "GET /admin/workers",
        ] {
            assert_eq!(status(&config, request, &foreign), 403, "{request}");
        }
    }

    #[test]
    fn an_origin_is_the_host_of_the_request() {
        let config = AdminConfig::default();
        let of = |origin: &str| {
            let headers = [("host", "localhost:8081"), ("origin", origin)];
            status(&config, "POST /admin/workers/a/drain", &headers)
        };
        assert_eq!(of("http://localhost:8081"), 200);
        assert_eq!(of("https://LOCALHOST:8081"), 200);
        for origin in [
            "null",
            "",
            "http://localhost",
            "http://localhost:8082",
            "http://evil.example",
            "localhost:8081",
            "http://evil.example/localhost:8081",
        ] {
            assert_eq!(of(origin), 403, "{origin}");
        }
        let no_host = [("origin", "http://localhost")];
        assert_eq!(
            status(&config, "POST /admin/workers/a/drain", &no_host),
            403
        );
    }

    #[test]
    fn bodies_are_declared_as_json() {
        let config = AdminConfig::default();
        let of = |headers: &[(&str, &str)]| status(&config, "POST /admin/workers", headers);
        assert_eq!(of(&[]), 200);
        assert_eq!(of(&[("content-length", "0")]), 200);
        let length = ("content-length", "7");
        assert_eq!(of(&[length, ("content-type", "application/json")]), 200);
        let with_charset = ("content-type", "Application/JSON; charset=utf-8");
        assert_eq!(of(&[length, with_charset]), 200);
        assert_eq!(of(&[length]), 415);
        assert_eq!(of(&[("transfer-encoding", "chunked")]), 415);
        for content_type in [
            "text/plain",
            "",
            "application/json2",
            "text/plain, application/json",
        ] {
            assert_eq!(
                of(&[length, ("content-type", content_type)]),
                415,
                "{content_type}"
            );
        }
        let json = ("content-type", "application/json");
        assert_eq!(of(&[length, json, ("content-type", "text/plain")]), 415);
    }

    #[test]
    fn each_area_has_its_keys() {
        let key = |text| Some(AdminKey::new(text).unwrap());
        let both = AdminConfig {
            key: key("admin"),
            metrics_key: key("scraper"),
            ..AdminConfig::default()
        };
        let admin_only = AdminConfig {
            metrics_key: None,
            ..both.clone()
        };
        let metrics_only = AdminConfig {
            key: None,
            ..both.clone()
        };
        let (none, wrong) = (&[][..], &[("authorization", "Bearer wrong")][..]);
        let admin = &[("authorization", "Bearer admin")][..];
        let scraper = &[("authorization", "bearer scraper")][..];
        let basic = &[("authorization", "Basic admin")][..];
        for (config, request, expected) in [
            (&both, "GET /health/live", [200; 5]),
            (&both, "GET /metrics", [401, 401, 200, 200, 401]),
            (&both, "GET /admin/workers", [401, 401, 200, 401, 401]),
            (&both, "GET /unknown", [401, 401, 200, 401, 401]),
            (&admin_only, "GET /metrics", [200; 5]),
            (&admin_only, "GET /admin/workers", [401, 401, 200, 401, 401]),
            (&metrics_only, "GET /metrics", [401, 401, 401, 200, 401]),
            (&metrics_only, "GET /admin/workers", [200; 5]),
        ] {
            let statuses = [none, wrong, admin, scraper, basic]
                .map(|headers| status(config, request, headers));
            assert_eq!(statuses, expected, "{request}");
        }
    }

    #[test]
    fn keys_of_clients_open_what_their_scopes_say() {
        let key = |name: &str, scope| KeyConfig {
            scopes: vec![scope],
            ..KeyConfig::new(name, KeyHash::of(name.as_bytes()))
        };
        let all = ring(Some(&[
            key("client", Scope::Api),
            key("scraper", Scope::Metrics),
            key("reader", Scope::AdminRead),
            key("admin", Scope::Admin),
        ]));
        let only_clients = ring(Some(&[key("client", Scope::Api)]));
        let config = AdminConfig::default();
        // Without a key, and with those of the client, scraper, reader and admin.
        for (request, expected) in [
            ("GET /health/live", [200, 200, 200, 200, 200]),
            ("GET /metrics", [401, 403, 200, 200, 200]),
            ("GET /admin/workers", [401, 403, 403, 200, 200]),
            ("POST /admin/explain", [401, 403, 403, 200, 200]),
            ("POST /admin/workers", [401, 403, 403, 403, 200]),
            ("DELETE /admin/workers/a", [401, 403, 403, 403, 200]),
        ] {
            let names = ["client", "scraper", "reader", "admin"];
            let mut statuses = vec![status_with(&all, &config, request, &[])];
            statuses.extend(names.map(|name| {
                let value = format!("Bearer {name}");
                status_with(&all, &config, request, &[("authorization", &value)])
            }));
            assert_eq!(statuses, expected, "{request}");
            assert_eq!(status_with(&only_clients, &config, request, &[]), 200);
        }
    }
}
