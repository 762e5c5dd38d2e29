//! Configuration of a gateway and descriptions of workers.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use foresee_core::EvictionRule;
use foresee_core::router::RouterConfig;
use foresee_engine::tokenizer::TokenizerError;
use http::header::{AUTHORIZATION, HeaderName};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use crate::subscribe::{KvEvents, check_endpoint};
use crate::tokenization::PromptTokenizer;

/// Settings of a gateway: where it listens, how it routes, and its timeouts. The defaults are those
/// of the command line.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// Address of the OpenAI-compatible API.
    pub listen: SocketAddr,
    /// Address of metrics, health checks and the admin API.
    pub admin_listen: SocketAddr,
    /// Workers that the gateway starts with.
    pub workers: Vec<WorkerConfig>,
    /// How requests are routed and queued.
    pub router: RouterConfig,
    /// Maximum number of requests queued in the router; further requests are refused. `None` for no
    /// limit. Has no effect without a queue.
    pub queue_limit: Option<usize>,
    /// Header whose value identifies the tenant of a request, for the queue order `fair`.
    pub tenant_header: HeaderName,
    /// Whether workers share cached blocks between requests, unless a worker's description says
    /// otherwise.
    pub prefix_caching: bool,
    /// Model folder or `tokenizer.json`. Without it, prompts are matched as text.
    pub tokenizer: Option<PathBuf>,
    /// Maximum size of a request body, in bytes.
    pub max_body_bytes: usize,
    /// Time between two health checks of a worker.
    pub probe_interval: Duration,
    /// Time for which a worker's KV events may be unusable before its cache is estimated instead.
    pub events_grace: Duration,
    /// Time between two reads of each engine's own metrics, whose active blocks are exported next to
    /// the predicted ones. Not used for routing. `None` for never.
    pub engine_metrics_interval: Option<Duration>,
    /// File to which one line is appended for each completed request, so that the traffic can be
    /// replayed. It contains hashes of the prompts' blocks, and no text.
    pub record: Option<PathBuf>,
    /// Maximum time in which a worker accepts a connection, or responds to a health check.
    pub connect_timeout: Duration,
    /// Maximum time from sending a request to a worker until the first byte of its response; also the
    /// maximum time in the router's queue.
    pub first_byte_timeout: Duration,
    /// Maximum time for running responses to end at shutdown.
    pub shutdown_timeout: Duration,
    /// Number of threads that serve the API.
    pub io_threads: NonZeroUsize,
}

impl GatewayConfig {
    /// Checks that the tokenizer can be loaded, if one is configured. A missing or invalid chat
    /// template is logged as a warning and is not an error.
    ///
    /// # Errors
    /// Fails if the tokenizer cannot be used; then a gateway would not start either.
    pub fn check_tokenizer(&self) -> Result<(), TokenizerError> {
        if let Some(path) = &self.tokenizer {
            PromptTokenizer::load(path)?;
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
            queue_limit: None,
            tenant_header: AUTHORIZATION,
            prefix_caching: true,
            tokenizer: None,
            max_body_bytes: 32 << 20,
            probe_interval: Duration::from_secs(1),
            events_grace: Duration::from_secs(5),
            engine_metrics_interval: None,
            record: None,
            connect_timeout: Duration::from_secs(2),
            first_byte_timeout: Duration::from_secs(600),
            shutdown_timeout: Duration::from_secs(30),
            io_threads: default_io_threads(),
        }
    }
}

/// Returns half of the number of processors, and at least 1.
///
/// One I/O thread carries about ten thousand streams, and events of streams that share a thread also
/// share its wake-ups. The other processors parse and tokenise long prompts.
#[must_use]
pub fn default_io_threads() -> NonZeroUsize {
    let processors = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    NonZeroUsize::new(processors / 2).unwrap_or(NonZeroUsize::MIN)
}

/// Maximum number of data-parallel ranks of one engine.
const MAX_RANKS: u32 = 1024;

/// Description of one engine. It becomes one worker or, with `ranks`, one worker for each rank.
///
/// The text form is `URL[,name=NAME][,ranks=N][,blocks=N][,prefix-caching=on|off]
/// [,eviction=queue|radix][,kv-events=ENDPOINT|off[,replay=ENDPOINT][,topic=TOPIC]]`.
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
        format!("http://{}{}", self.authority, self.base_path)
    }

    /// Returns the name of the engine: without the rank, if this worker is one rank.
    pub(crate) fn engine_name(&self) -> &str {
        let without_rank = self.rank.and_then(|rank| {
            let suffix = format!("/{rank}");
            self.name.strip_suffix(&suffix)
        });
        without_rank.unwrap_or(&self.name)
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

    /// Parses the URL of a description, without options. `http://` may be left out. The name is the
    /// host and port. Fails with the problem as text if the URL has another scheme, a query or no
    /// host.
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
                (key, _) => {
                    let known =
                        "name, ranks, blocks, prefix-caching, eviction, kv-events, replay or topic";
                    return Err(fail(format!("unknown option `{key}`: use {known}")));
                }
            }
        }
        worker.complete_events(replay, topic).map_err(fail)?;
        Ok(worker)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subscribe::EventSource;

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
            ("https://a:1", "only http://"),
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
