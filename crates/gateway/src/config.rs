//! What a gateway is told at its start.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use foresee_core::router::RouterConfig;
use foresee_engine::tokenizer::TokenizerError;
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use crate::subscribe::{EventSource, check_endpoint};
use crate::tokens::Tokens;

/// How a gateway listens, routes and fails. The defaults are those of the command line.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Where the OpenAI-compatible API listens.
    pub listen: SocketAddr,
    /// Where metrics, health and admin listen.
    pub admin_listen: SocketAddr,
    /// Workers known from the start.
    pub workers: Vec<WorkerConfig>,
    /// How requests are placed.
    pub router: RouterConfig,
    /// Whether workers share blocks between requests, unless one says otherwise.
    pub prefix_caching: bool,
    /// A model folder or `tokenizer.json`. Without it, prompts are matched as text.
    pub tokenizer: Option<PathBuf>,
    /// Longest request body accepted, in bytes.
    pub max_body_bytes: usize,
    /// Time between two health probes of a worker.
    pub probe_interval: Duration,
    /// How long a worker's KV events may be unusable until its cache is guessed instead.
    pub events_grace: Duration,
    /// How often each worker is asked what it carries, to be shown beside what is predicted;
    /// `None` for never. Nothing is routed by it.
    pub sample_engines: Option<Duration>,
    /// How long a worker may take to accept a connection, or to answer a probe.
    pub connect_timeout: Duration,
    /// How long a worker may take until the first byte of its answer.
    pub first_byte_timeout: Duration,
    /// How long running streams may take to end at shutdown.
    pub shutdown_timeout: Duration,
    /// Threads that serve the API.
    pub io_threads: NonZeroUsize,
}

impl GatewayConfig {
    /// Reads the tokenizer and the template beside it, if one is given, and lets go of them.
    ///
    /// # Errors
    /// If the tokenizer cannot be used, so that a gateway would not start.
    pub fn check_tokenizer(&self) -> Result<(), TokenizerError> {
        if let Some(path) = &self.tokenizer {
            Tokens::load(path)?;
        }
        Ok(())
    }
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            admin_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8081)),
            workers: Vec::new(),
            router: RouterConfig::default(),
            prefix_caching: true,
            tokenizer: None,
            max_body_bytes: 32 << 20,
            probe_interval: Duration::from_secs(1),
            events_grace: Duration::from_secs(5),
            sample_engines: None,
            connect_timeout: Duration::from_secs(2),
            first_byte_timeout: Duration::from_secs(600),
            shutdown_timeout: Duration::from_secs(30),
            io_threads: default_io_threads(),
        }
    }
}

/// Half of the processors: one carries some ten thousand streams, and events that share a thread
/// share its wake-ups. The others are for reading long prompts.
#[must_use]
pub fn default_io_threads() -> NonZeroUsize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new(processors / 2).unwrap_or(NonZeroUsize::MIN)
}

/// One worker, written
/// `URL[,name=…][,blocks=N][,prefix-caching=on|off][,kv-events=ENDPOINT[,replay=ENDPOINT]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Unique name; host and port of the URL by default.
    pub name: String,
    /// Where it listens.
    pub(crate) authority: Authority,
    /// What comes before `/v1` in its paths; empty or without a slash at its end.
    pub(crate) base_path: String,
    /// Its KV blocks, if they are not to be read from its metrics.
    pub blocks: Option<u32>,
    /// Whether it shares blocks between requests, if not as the gateway's default.
    pub prefix_caching: Option<bool>,
    /// Where it says what it caches, if it does.
    pub kv_events: Option<EventSource>,
}

/// What is wrong with a worker's description.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("worker `{given}`: {problem}")]
pub struct WorkerConfigError {
    given: String,
    problem: String,
}

impl WorkerConfig {
    /// The URL, as it was given but for a slash at its end.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}{}", self.authority, self.base_path)
    }

    /// The name as a header's value. Only names that can be one are accepted.
    pub(crate) fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.name).unwrap_or(HeaderValue::from_static(""))
    }

    fn from_url(url: &str) -> Result<Self, String> {
        let with_scheme = if url.contains("://") {
            url.to_owned()
        } else {
            format!("http://{url}")
        };
        let uri: Uri = with_scheme
            .parse()
            .map_err(|error| format!("not a URL ({error}); write http://HOST:PORT"))?;
        if uri.scheme() != Some(&Scheme::HTTP) {
            return Err("only http:// URLs are supported".to_owned());
        }
        let authority = uri
            .authority()
            .filter(|authority| !authority.host().is_empty())
            .ok_or("no host; write http://HOST:PORT")?;
        if uri.query().is_some() {
            return Err("a worker's URL has no query".to_owned());
        }
        Ok(Self {
            name: authority.to_string(),
            authority: authority.clone(),
            base_path: uri.path().trim_end_matches('/').to_owned(),
            blocks: None,
            prefix_caching: None,
            kv_events: None,
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
        let mut replay = None;
        for option in parts {
            let (key, value) = option
                .split_once('=')
                .ok_or_else(|| fail(format!("`{option}` is not KEY=VALUE")))?;
            match (key.trim(), value.trim()) {
                ("name", name)
                    if name.is_empty() || !name.bytes().all(|it| it.is_ascii_graphic()) =>
                {
                    return Err(fail(
                        "`name` is not made of visible ASCII characters".to_owned(),
                    ));
                }
                ("name", name) => worker.name = name.to_owned(),
                ("blocks", blocks) => {
                    let blocks = blocks.parse().ok().filter(|&blocks| blocks > 0);
                    let problem = "`blocks` is not a whole number above 0";
                    worker.blocks = Some(blocks.ok_or_else(|| fail(problem.to_owned()))?);
                }
                ("prefix-caching", "on") => worker.prefix_caching = Some(true),
                ("prefix-caching", "off") => worker.prefix_caching = Some(false),
                ("prefix-caching", _) => {
                    return Err(fail("`prefix-caching` is neither on nor off".to_owned()));
                }
                ("kv-events", source) => {
                    let source = source.parse();
                    worker.kv_events =
                        Some(source.map_err(|error| fail(format!("`kv-events`: {error}")))?);
                }
                ("replay", endpoint) => {
                    let checked = check_endpoint(endpoint);
                    checked.map_err(|error| fail(format!("`replay`: {error}")))?;
                    replay = Some(endpoint.to_owned());
                }
                (key, _) => {
                    let known = "name, blocks, prefix-caching, kv-events or replay";
                    return Err(fail(format!("unknown option `{key}`: use {known}")));
                }
            }
        }
        match (&mut worker.kv_events, replay) {
            (Some(source), replay) => source.replay = replay,
            (None, None) => {}
            (None, Some(_)) => {
                return Err(fail("`replay` goes with `kv-events`".to_owned()));
            }
        }
        Ok(worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_a_url_and_options() {
        let plain: WorkerConfig = "http://10.0.0.7:8000/".parse().unwrap();
        assert_eq!(plain.url(), "http://10.0.0.7:8000");
        assert_eq!(plain.name, "10.0.0.7:8000");

        let full: WorkerConfig = "gpu1:8000/engine,name=a,blocks=27312,prefix-caching=off"
            .parse()
            .unwrap();
        assert_eq!(full.url(), "http://gpu1:8000/engine");
        assert_eq!((full.name.as_str(), full.blocks), ("a", Some(27312)));
        assert_eq!(full.prefix_caching, Some(false));
        assert_eq!(full.kv_events, None);

        let events: WorkerConfig = "a:1,replay=tcp://a:5558,kv-events=tcp://a:5557"
            .parse()
            .unwrap();
        let source = events.kv_events.unwrap();
        assert_eq!(
            (source.endpoint.as_str(), source.binds),
            ("tcp://a:5557", false)
        );
        assert_eq!(source.replay.as_deref(), Some("tcp://a:5558"));

        let dialled: WorkerConfig = "a:1,kv-events=bind:tcp://*:5557".parse().unwrap();
        let source = dialled.kv_events.unwrap();
        assert_eq!(
            (source.endpoint.as_str(), source.binds),
            ("tcp://0.0.0.0:5557", true)
        );
    }

    #[test]
    fn errors_name_the_part_at_fault() {
        for (given, says) in [
            ("https://a:1", "only http://"),
            ("http://", "URL"),
            ("http://a:1,blocks=none", "`blocks`"),
            ("http://a:1,colour=red", "`colour`"),
            ("http://a:1,name", "KEY=VALUE"),
            ("http://a:1,name=", "`name`"),
            ("http://a:1,name=two words", "`name`"),
            ("http://a:1?x=1", "query"),
            ("http://a:1,replay=tcp://a:1", "goes with"),
            ("http://a:1,kv-events=a:5557", "`kv-events`"),
            ("http://a:1,kv-events=tcp://*:5557", "`*`"),
            ("http://a:1,kv-events=udp://a:5557", "`kv-events`"),
            ("http://a:1,kv-events=tcp://a:1,replay=nowhere", "`replay`"),
        ] {
            let error = given.parse::<WorkerConfig>().unwrap_err().to_string();
            assert!(error.contains(says), "{given}: {error}");
        }
    }
}
