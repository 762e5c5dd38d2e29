//! Descriptions of engines: the values of `--worker`.

use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use foresee_core::EvictionRule;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use crate::kv_events::source::{KvEvents, check_endpoint};
use crate::workers::api_key::ApiKeySource;
use crate::workers::health_config::HealthPath;
use crate::workers::worker_tls::WorkerTlsConfig;

/// Port of a URL without one.
const DEFAULT_PORT: u16 = 80;

/// Port of an `https://` URL that names none.
const DEFAULT_TLS_PORT: u16 = 443;

/// Maximum number of data-parallel ranks of one engine.
const MAX_RANKS: u32 = 1024;

/// Description of one engine. It becomes one worker or, with `ranks`, one worker for each rank.
///
/// The text form is `URL[,name=NAME][,ranks=N][,blocks=N][,prefix-caching=on|off]
/// [,eviction=queue|radix][,kv-events=ENDPOINT|off[,replay=ENDPOINT][,topic=TOPIC]]
/// [,health-path=PATH|none][,api-key=env:NAME|file:PATH][,resolve=on|off]
/// [,tls-ca=PATH][,tls-certificate=PATH,tls-key=PATH][,tls-server-name=NAME][,tls-verify=on|off]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Unique name; by default the host and port of the URL.
    pub name: String,
    /// Number of data-parallel ranks at the URL, if each is to be a worker of its own.
    pub ranks: Option<NonZeroU32>,
    /// Rank of this worker, if it is one rank of an engine.
    pub rank: Option<u32>,
    /// Host and port of the engine.
    pub(crate) authority: Authority,
    /// Path of the engine's API before `/v1`; empty, or without a slash at its end.
    pub(crate) base_path: String,
    /// Number of KV blocks, of each rank; `None` to use the number that the engine reports.
    pub blocks: Option<u32>,
    /// Whether the engine shares cached blocks between requests; `None` for the gateway's default.
    pub prefix_caching: Option<bool>,
    /// Eviction rule of the engine; `None` to derive it from the engine's name.
    pub eviction: Option<EvictionRule>,
    /// Source of the KV events; for an engine with ranks, that of rank 0.
    pub kv_events: KvEvents,
    /// Path of the health check; `None` for the gateway's.
    pub health_path: Option<HealthPath>,
    /// API key of requests to the worker; `None` for the gateway's key for workers.
    pub api_key: Option<ApiKeySource>,
    /// TLS, for an `https://` URL; `None` for plain HTTP.
    pub tls: Option<WorkerTlsConfig>,
    /// Whether the gateway resolves a host name in the background, to one worker for each address.
    /// Otherwise the name is one worker and is resolved for each connection.
    pub resolve: bool,
    /// Address that tells this worker from others of the same host name; part of its name. `None`
    /// for the worker of the first address.
    pub(crate) member: Option<IpAddr>,
    /// Identity of the process behind the URL, such as the uid of a pod: another one is another
    /// worker, even at the same URL. `None` if the source of the description knows none.
    pub(crate) instance: Option<Arc<str>>,
}

/// Option of a worker that concerns the machine of the gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LocalOption {
    /// `api-key`.
    Key,
    /// `tls-ca`, `tls-certificate` or `tls-key`.
    TlsFiles,
    /// An endpoint of KV events, by the name of the option.
    Endpoint(&'static str),
}

/// Invalid description of a worker.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("worker `{given}`: {problem}")]
pub struct WorkerConfigError {
    /// The whole description.
    given: String,
    /// Problem, and the text to write instead.
    problem: String,
}

impl WorkerConfig {
    /// Returns the URL, without a slash at its end.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}{}", self.authority, self.base_path)
    }

    /// Returns the name of the engine: without the rank and the address, if this worker is one rank
    /// or one of several addresses.
    pub(crate) fn engine_name(&self) -> &str {
        let without_rank = self.rank.and_then(|rank| {
            let suffix = format!("/{rank}");
            self.name.strip_suffix(&suffix)
        });
        let name = without_rank.unwrap_or(&self.name);
        let without_address = self.member.and_then(|address| {
            let suffix = format!("@{address}");
            name.strip_suffix(&suffix)
        });
        without_address.unwrap_or(name)
    }

    /// Returns the first option that names a file or a variable of this machine, or an endpoint for KV events at which
    /// this machine would open a port or a file. A client that is not the operator may set none.
    pub(crate) fn local_option(&self) -> Option<LocalOption> {
        if self.api_key.is_some() {
            return Some(LocalOption::Key);
        }
        if self.tls.as_ref().is_some_and(WorkerTlsConfig::names_files) {
            return Some(LocalOption::TlsFiles);
        }
        let KvEvents::At(source) = &self.kv_events else {
            return None;
        };
        let is_remote = |endpoint: &str| endpoint.starts_with("tcp://");
        match &source.replay {
            _ if source.binds || !is_remote(&source.endpoint) => {
                Some(LocalOption::Endpoint("kv-events"))
            }
            Some(replay) if !is_remote(replay) => Some(LocalOption::Endpoint("replay")),
            _ => None,
        }
    }

    /// Returns the host of the URL, an IPv6 address without brackets.
    pub(crate) fn host(&self) -> &str {
        self.authority.host().trim_matches(['[', ']'])
    }

    /// Returns the port of the URL.
    pub(crate) fn port(&self) -> u16 {
        let default = match self.tls {
            Some(_) => DEFAULT_TLS_PORT,
            None => DEFAULT_PORT,
        };
        self.authority.port_u16().unwrap_or(default)
    }

    /// Returns whether the gateway resolves the host of the URL in the background: the host is a
    /// name, and the description does not forbid it.
    pub(crate) fn is_resolved_in_background(&self) -> bool {
        self.resolve && self.host().parse::<IpAddr>().is_err()
    }

    /// Returns the description of the engine at a further address of this one's host name, named
    /// `NAME@ADDRESS`.
    pub(crate) fn at_address(&self, address: IpAddr) -> Self {
        Self {
            name: format!("{}@{address}", self.name),
            member: Some(address),
            ..self.clone()
        }
    }

    /// Returns the workers that this engine becomes: itself, or one for each rank, named
    /// `NAME/RANK`. The events of rank r are expected at the configured ports + r.
    #[must_use]
    pub fn workers(&self) -> Vec<Self> {
        let Some(ranks) = self.ranks else {
            return vec![self.clone()];
        };
        let rank_worker = |rank| Self {
            name: format!("{}/{rank}", self.name),
            rank: Some(rank),
            kv_events: match &self.kv_events {
                // `complete_events` has checked that every rank has a port.
                KvEvents::At(source) => source.for_rank(rank).map_or(KvEvents::Off, KvEvents::At),
                KvEvents::Discovered | KvEvents::Off => self.kv_events.clone(),
            },
            ..self.clone()
        };
        (0..ranks.get()).map(rank_worker).collect()
    }

    /// Returns the name as a header value. Names that are not valid header values are refused when a
    /// description is parsed.
    pub(crate) fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.name).unwrap_or(HeaderValue::from_static(""))
    }

    /// Adds `replay` and `topic` to the event source, and checks that every rank has its port.
    /// Fails with the problem as text if there is no such port, or if `replay` or `topic` is given
    /// without an endpoint of events.
    fn complete_events(
        &mut self,
        replay: Option<String>,
        topic: Option<String>,
    ) -> Result<(), String> {
        let KvEvents::At(source) = &mut self.kv_events else {
            return match (replay, topic) {
                (None, None) => Ok(()),
                (Some(_), _) => Err("`replay` requires `kv-events=ENDPOINT`".to_owned()),
                (None, Some(_)) => Err("`topic` requires `kv-events=ENDPOINT`".to_owned()),
            };
        };
        source.replay = replay;
        source.topic = topic.unwrap_or_default();
        let last_rank = self.ranks.map_or(0, |ranks| ranks.get() - 1);
        if source.for_rank(last_rank).is_none() {
            return Err(format!(
                "`kv-events` and `replay`: the events of rank r are at tcp://HOST:(PORT + r), but \
                 there is no PORT + {last_rank}; use tcp:// endpoints with lower ports"
            ));
        }
        Ok(())
    }

    /// Sets an option of TLS. Fails with the problem as text if the URL is not one of `https://`, or
    /// the option or its value is unknown. A certificate without its key is left half.
    fn set_tls_option(&mut self, option: &str, value: &str) -> Result<(), String> {
        let tls = self.tls.as_mut();
        let tls = tls.ok_or_else(|| format!("`{option}` needs a URL that begins with https://"))?;
        match (option, value) {
            ("tls-verify", "on") => tls.verifies = true,
            ("tls-verify", "off") => tls.verifies = false,
            ("tls-verify", _) => return Err("`tls-verify` must be on or off".to_owned()),
            (_, "") => return Err(format!("`{option}` must not be empty")),
            ("tls-ca", path) => tls.ca = Some(path.into()),
            ("tls-certificate", path) => tls.identity.get_or_insert_default().0 = path.into(),
            ("tls-key", path) => tls.identity.get_or_insert_default().1 = path.into(),
            ("tls-server-name", name) => tls.server_name = Some(name.to_owned()),
            _ => {
                return Err(format!(
                    "unknown option `{option}`: use tls-ca, tls-certificate, tls-key, \
                     tls-server-name or tls-verify"
                ));
            }
        }
        Ok(())
    }

    /// Parses the URL of a description, without options. `http://` may be left out. The name is the
    /// host and port. Fails with the problem as text if the URL has another scheme, no host, a user
    /// name, an invalid port or a query.
    fn from_url(url: &str) -> Result<Self, String> {
        let with_scheme = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let uri: Uri = with_scheme
            .parse()
            .map_err(|error| format!("not a URL ({error}); write http://HOST:PORT"))?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => None,
            Some(scheme) if *scheme == Scheme::HTTPS => Some(WorkerTlsConfig::default()),
            _ => return Err("the URL must begin with http:// or https://".to_owned()),
        };
        let authority = uri
            .authority()
            .filter(|authority| !authority.host().is_empty())
            .ok_or("no host; write http://HOST:PORT")?;
        if authority.as_str().contains('@') {
            return Err("the URL must have no user name and no password".to_owned());
        }
        let has_port = authority.as_str() != authority.host();
        if has_port && authority.port_u16().is_none_or(|port| port == 0) {
            return Err("the port must be an integer from 1 to 65535".to_owned());
        }
        if uri.query().is_some() {
            return Err("the URL must have no query".to_owned());
        }
        Ok(Self {
            name: authority.to_string(),
            ranks: None,
            rank: None,
            authority: authority.clone(),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            blocks: None,
            prefix_caching: None,
            eviction: None,
            kv_events: KvEvents::default(),
            health_path: None,
            api_key: None,
            tls,
            resolve: true,
            member: None,
            instance: None,
        })
    }
}

impl FromStr for WorkerConfig {
    type Err = WorkerConfigError;

    fn from_str(given: &str) -> Result<Self, WorkerConfigError> {
        let fail = |problem: String| WorkerConfigError {
            given: given.to_owned(),
            problem,
        };
        let mut parts = given.split(',');
        let mut worker = Self::from_url(parts.next().unwrap_or("").trim()).map_err(fail)?;
        let (mut replay, mut topic) = (None, None);
        for option in parts {
            let (key, value) = option
                .split_once('=')
                .ok_or_else(|| fail(format!("`{option}` is not KEY=VALUE")))?;
            match (key.trim(), value.trim()) {
                ("name", name)
                    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) =>
                {
                    return Err(fail(
                        "`name` must consist of visible ASCII characters".to_owned(),
                    ));
                }
                ("name", name) => worker.name = name.to_owned(),
                ("ranks", ranks) => {
                    let ranks = ranks.parse().ok();
                    let ranks = ranks.filter(|ranks: &NonZeroU32| ranks.get() <= MAX_RANKS);
                    let problem = format!("`ranks` must be an integer from 1 to {MAX_RANKS}");
                    worker.ranks = Some(ranks.ok_or_else(|| fail(problem))?);
                }
                ("blocks", blocks) => {
                    let blocks = blocks.parse().ok().filter(|&blocks| blocks > 0);
                    let problem = "`blocks` must be an integer above 0";
                    worker.blocks = Some(blocks.ok_or_else(|| fail(problem.to_owned()))?);
                }
                ("prefix-caching", "on") => worker.prefix_caching = Some(true),
                ("prefix-caching", "off") => worker.prefix_caching = Some(false),
                ("prefix-caching", _) => {
                    return Err(fail("`prefix-caching` must be on or off".to_owned()));
                }
                ("eviction", "queue") => worker.eviction = Some(EvictionRule::VllmLru),
                ("eviction", "radix") => worker.eviction = Some(EvictionRule::SglangRadix),
                ("eviction", _) => {
                    return Err(fail("`eviction` must be queue or radix".to_owned()));
                }
                ("kv-events", "off") => worker.kv_events = KvEvents::Off,
                ("kv-events", source) => {
                    let source = source.parse();
                    let source = source.map_err(|error| fail(format!("`kv-events`: {error}")))?;
                    worker.kv_events = KvEvents::At(source);
                }
                ("replay", endpoint) => {
                    let checked = check_endpoint(endpoint);
                    checked.map_err(|error| fail(format!("`replay`: {error}")))?;
                    replay = Some(endpoint.to_owned());
                }
                ("topic", "") => return Err(fail("`topic` must not be empty".to_owned())),
                ("topic", name) => topic = Some(name.to_owned()),
                ("health-path", path) => {
                    let path = path.parse();
                    let path = path.map_err(|error| fail(format!("`health-path`: {error}")))?;
                    worker.health_path = Some(path);
                }
                ("api-key", source) => {
                    // An error does not show the source, which may be the key.
                    let error = |error| WorkerConfigError {
                        given: given.replace(&format!("api-key={source}"), "api-key=…"),
                        problem: format!("`api-key`: {error}"),
                    };
                    worker.api_key = Some(source.parse::<ApiKeySource>().map_err(error)?);
                }
                (option, value) if option.starts_with("tls-") => {
                    worker.set_tls_option(option, value).map_err(fail)?;
                }
                ("resolve", "on") => worker.resolve = true,
                ("resolve", "off") => worker.resolve = false,
                ("resolve", _) => return Err(fail("`resolve` must be on or off".to_owned())),
                (key, _) => {
                    let known = "name, ranks, blocks, prefix-caching, eviction, kv-events, replay, \
                                 topic, health-path, api-key, resolve, tls-ca, \
                                 tls-certificate, tls-key, tls-server-name or tls-verify";
                    return Err(fail(format!("unknown option `{key}`: use {known}")));
                }
            }
        }
        let identity = worker.tls.as_ref().and_then(|tls| tls.identity.as_ref());
        let is_half = |(certificate, key): &(PathBuf, PathBuf)| {
            certificate.as_os_str().is_empty() || key.as_os_str().is_empty()
        };
        if identity.is_some_and(is_half) {
            let problem = "`tls-certificate` and `tls-key` need each other";
            return Err(fail(problem.to_owned()));
        }
        worker.complete_events(replay, topic).map_err(fail)?;
        Ok(worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv_events::source::EventSource;

    #[test]
    fn a_key_in_the_place_of_its_source_is_not_shown() {
        let error = "a:1,api-key=sk-secret".parse::<WorkerConfig>().unwrap_err();
        let error = error.to_string();
        assert!(error.contains("a:1,api-key=…"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }

    #[test]
    fn a_worker_is_parsed_from_a_url_and_options() {
        let plain: WorkerConfig = "http://10.0.0.7:8000/".parse().unwrap();
        assert_eq!(plain.url(), "http://10.0.0.7:8000");
        assert_eq!(plain.name, "10.0.0.7:8000");

        let full = "gpu1:8000/engine,name=a,blocks=27312,prefix-caching=off,eviction=radix";
        let full: WorkerConfig = full.parse().unwrap();
        assert_eq!(full.url(), "http://gpu1:8000/engine");
        assert_eq!((full.name.as_str(), full.blocks), ("a", Some(27312)));
        assert_eq!(full.prefix_caching, Some(false));
        assert_eq!(full.eviction, Some(EvictionRule::SglangRadix));
        assert_eq!(full.kv_events, KvEvents::Discovered);

        let source = source_of("a:1,replay=tcp://a:5558,topic=kv,kv-events=tcp://a:5557");
        assert_eq!(
            (source.endpoint.as_str(), source.binds),
            ("tcp://a:5557", false)
        );
        assert_eq!(source.replay.as_deref(), Some("tcp://a:5558"));
        assert_eq!(source.topic, "kv");

        let source = source_of("a:1,kv-events=bind:tcp://*:5557");
        assert_eq!(
            (source.endpoint.as_str(), source.binds),
            ("tcp://0.0.0.0:5557", true)
        );

        let off: WorkerConfig = "a:1,kv-events=off".parse().unwrap();
        assert_eq!(off.kv_events, KvEvents::Off);

        let access: WorkerConfig = "a:1,health-path=/ping,api-key=file:/run/key,resolve=off"
            .parse()
            .unwrap();
        assert_eq!(access.health_path, Some("/ping".parse().unwrap()));
        assert_eq!(access.api_key, Some(ApiKeySource::File("/run/key".into())));
        assert!(!access.is_resolved_in_background());
    }

    #[test]
    fn a_port_that_cannot_be_connected_to_and_a_password_are_errors() {
        for url in ["gpu1:", "gpu1:0", "gpu1:65536", "http://[::1]:99999"] {
            let error = url.parse::<WorkerConfig>().unwrap_err().to_string();
            assert!(error.contains("from 1 to 65535"), "{error}");
        }
        let error = "http://user:key@gpu1:8000".parse::<WorkerConfig>();
        assert!(error.unwrap_err().to_string().contains("no password"));
    }

    #[test]
    fn a_host_name_is_resolved_in_the_background_and_an_address_is_not() {
        for (url, is_name, host, port) in [
            ("gpu1:8000", true, "gpu1", 8000),
            ("localhost", true, "localhost", 80),
            ("10.0.0.7:8000", false, "10.0.0.7", 8000),
            ("http://[::1]:8000", false, "::1", 8000),
        ] {
            let worker: WorkerConfig = url.parse().unwrap();
            assert_eq!(worker.is_resolved_in_background(), is_name, "{url}");
            assert_eq!((worker.host(), worker.port()), (host, port));
        }
    }

    #[test]
    fn a_worker_at_a_further_address_belongs_to_the_same_engine() {
        let engine: WorkerConfig = "gpu:1,name=a,ranks=2".parse().unwrap();
        for address in ["10.0.0.7", "2001:db8::7"] {
            let member = engine.at_address(address.parse().unwrap());
            let workers = member.workers();
            assert_eq!(workers[1].name, format!("a@{address}/1"));
            assert!(workers.iter().all(|worker| worker.engine_name() == "a"));
        }
    }

    fn source_of(worker: &str) -> EventSource {
        let config: WorkerConfig = worker.parse().unwrap();
        match config.kv_events {
            KvEvents::At(source) => source,
            unexpected => panic!("{worker}: {unexpected:?}"),
        }
    }

    #[test]
    fn an_engine_with_several_ranks_becomes_one_worker_per_rank() {
        let description =
            "a:1,blocks=7,ranks=2,kv-events=bind:tcp://*:5557,replay=tcp://a:5658,topic=t";
        let engine: WorkerConfig = description.parse().unwrap();
        let workers: Vec<_> = engine
            .workers()
            .into_iter()
            .map(|worker| {
                assert_eq!((worker.blocks, worker.engine_name()), (Some(7), "a:1"));
                let KvEvents::At(source) = worker.kv_events else {
                    panic!("no events");
                };
                assert_eq!((source.binds, source.topic.as_str()), (true, "t"));
                let replay = source.replay.unwrap();
                (worker.name, worker.rank, source.endpoint, replay)
            })
            .collect();
        let expected = [
            ("a:1/0", Some(0), "tcp://0.0.0.0:5557", "tcp://a:5658"),
            ("a:1/1", Some(1), "tcp://0.0.0.0:5558", "tcp://a:5659"),
        ];
        let owned = |(name, rank, events, replay): (&str, _, &str, &str)| {
            (name.to_owned(), rank, events.to_owned(), replay.to_owned())
        };
        assert_eq!(workers, expected.map(owned));

        let single: WorkerConfig = "a:1,name=b".parse().unwrap();
        assert_eq!(single.workers(), std::slice::from_ref(&single));
    }

    #[test]
    fn errors_name_the_invalid_part() {
        for (given, expected) in [
            ("ftp://a:1", "https://"),
            ("http://", "URL"),
            ("http://a:1,blocks=none", "`blocks`"),
            ("http://a:1,colour=red", "`colour`"),
            ("http://a:1,name", "KEY=VALUE"),
            ("http://a:1,name=", "`name`"),
            ("http://a:1,name=two words", "`name`"),
            ("http://a:1?x=1", "query"),
            ("http://a:1,replay=tcp://a:1", "`replay` requires"),
            ("http://a:1,kv-events=off,topic=t", "`topic` requires"),
            ("http://a:1,kv-events=tcp://a:1,topic=", "`topic`"),
            ("http://a:1,ranks=0", "`ranks`"),
            ("http://a:1,health-path=ping", "`health-path`"),
            ("http://a:1,api-key=", "`api-key`: write env:NAME"),
            ("http://a:1,resolve=never", "`resolve`"),
            ("http://a:1,ranks=1025", "`ranks`"),
            ("http://a:1,ranks=2,kv-events=ipc:///tmp/a", "PORT + 1"),
            ("http://a:1,kv-events=tcp://a:65535,ranks=2", "PORT + 1"),
            (
                "http://a:1,kv-events=tcp://a:1,replay=tcp://a:65534,ranks=3",
                "PORT + 2",
            ),
            ("http://a:1,kv-events=a:5557", "`kv-events`"),
            ("http://a:1,kv-events=tcp://*:5557", "`*`"),
            ("http://a:1,kv-events=udp://a:5557", "`kv-events`"),
            ("http://a:1,kv-events=tcp://a:1,replay=nowhere", "`replay`"),
        ] {
            let error = given.parse::<WorkerConfig>().unwrap_err().to_string();
            assert!(error.contains(expected), "{given}: {error}");
        }
    }
}
