//! What a gateway is told at its start.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use foresee_core::Eviction;
use foresee_core::router::RouterConfig;
use foresee_engine::tokenizer::TokenizerError;
use http::header::{AUTHORIZATION, HeaderName};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Uri};

use crate::subscribe::{KvEvents, check_endpoint};
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
    /// Most requests that wait at the router, if the router lets any wait and there is a limit.
    /// Others are refused.
    pub queue_limit: Option<usize>,
    /// The header by whose value the queue tells tenants apart, where it treats them alike.
    pub tenant_header: HeaderName,
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
    /// A file to which a line is added for each answered request, to be replayed; its prompt as
    /// hashes only.
    pub record: Option<PathBuf>,
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
            queue_limit: None,
            tenant_header: AUTHORIZATION,
            prefix_caching: true,
            tokenizer: None,
            max_body_bytes: 32 << 20,
            probe_interval: Duration::from_secs(1),
            events_grace: Duration::from_secs(5),
            sample_engines: None,
            record: None,
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

/// Most data-parallel ranks of one engine.
const MAX_RANKS: u32 = 1024;

/// One engine, written `URL[,name=…][,ranks=N][,blocks=N][,prefix-caching=on|off]
/// [,eviction=queue|radix][,kv-events=ENDPOINT[,replay=ENDPOINT][,topic=…]]`, which is one worker or, with ranks, one
/// for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerConfig {
    /// Unique name; host and port of the URL by default.
    pub name: String,
    /// Data-parallel ranks behind the URL, if each is to be a worker of its own.
    pub ranks: Option<NonZeroU32>,
    /// Which of them this is, if it is one.
    pub rank: Option<u32>,
    /// Where it listens.
    pub(crate) authority: Authority,
    /// What comes before `/v1` in its paths; empty or without a slash at its end.
    pub(crate) base_path: String,
    /// Its KV blocks (each rank's), if they are not to be read from its metrics.
    pub blocks: Option<u32>,
    /// Whether it shares blocks between requests, if not as the gateway's default.
    pub prefix_caching: Option<bool>,
    /// How it chooses what to evict, if it does not say which engine it is.
    pub eviction: Option<Eviction>,
    /// How the router learns what it caches; of several ranks, rank 0.
    pub kv_events: KvEvents,
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

    /// The name of all ranks together.
    pub(crate) fn engine_name(&self) -> &str {
        let of_ranks = self.rank.and_then(|rank| {
            let suffix = format!("/{rank}");
            self.name.strip_suffix(&suffix)
        });
        of_ranks.unwrap_or(&self.name)
    }

    /// The workers this comes to: itself, or one for each rank.
    #[must_use]
    pub fn workers(&self) -> Vec<Self> {
        let Some(ranks) = self.ranks else {
            return vec![self.clone()];
        };
        let of_rank = |rank| Self {
            name: format!("{}/{rank}", self.name),
            rank: Some(rank),
            kv_events: match &self.kv_events {
                // Whether there are so many ports was looked at when it was read.
                KvEvents::At(source) => source.of_rank(rank).map_or(KvEvents::Off, KvEvents::At),
                other => other.clone(),
            },
            ..self.clone()
        };
        (0..ranks.get()).map(of_rank).collect()
    }

    /// The name as a header's value. Only names that can be one are accepted.
    pub(crate) fn header(&self) -> HeaderValue {
        HeaderValue::from_str(&self.name).unwrap_or(HeaderValue::from_static(""))
    }

    /// Puts what goes with `kv-events` to it, and sees that every rank has its port.
    fn complete_events(
        &mut self,
        replay: Option<String>,
        topic: Option<String>,
    ) -> Result<(), String> {
        let KvEvents::At(source) = &mut self.kv_events else {
            return match (replay, topic) {
                (None, None) => Ok(()),
                (Some(_), _) => Err("`replay` goes with `kv-events=ENDPOINT`".to_owned()),
                (None, Some(_)) => Err("`topic` goes with `kv-events=ENDPOINT`".to_owned()),
            };
        };
        source.replay = replay;
        source.topic = topic.unwrap_or_default();
        let last_rank = self.ranks.map_or(0, |ranks| ranks.get() - 1);
        if source.of_rank(last_rank).is_none() {
            return Err(format!(
                "`kv-events` and `replay`: rank r of an engine is at tcp://HOST:(PORT + r), and \
                 these have no PORT + {last_rank}"
            ));
        }
        Ok(())
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
                    if name.is_empty() || !name.bytes().all(|it| it.is_ascii_graphic()) =>
                {
                    return Err(fail(
                        "`name` is not made of visible ASCII characters".to_owned(),
                    ));
                }
                ("name", name) => worker.name = name.to_owned(),
                ("ranks", ranks) => {
                    let ranks = ranks.parse().ok();
                    let ranks = ranks.filter(|ranks: &NonZeroU32| ranks.get() <= MAX_RANKS);
                    let problem = format!("`ranks` is not a whole number from 1 to {MAX_RANKS}");
                    worker.ranks = Some(ranks.ok_or_else(|| fail(problem))?);
                }
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
                ("eviction", "queue") => worker.eviction = Some(Eviction::Queue),
                ("eviction", "radix") => worker.eviction = Some(Eviction::Radix),
                ("eviction", _) => {
                    return Err(fail("`eviction` is neither queue nor radix".to_owned()));
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
                ("topic", "") => return Err(fail("`topic` is empty".to_owned())),
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
    fn a_worker_is_a_url_and_options() {
        let plain: WorkerConfig = "http://10.0.0.7:8000/".parse().unwrap();
        assert_eq!(plain.url(), "http://10.0.0.7:8000");
        assert_eq!(plain.name, "10.0.0.7:8000");

        let full = "gpu1:8000/engine,name=a,blocks=27312,prefix-caching=off,eviction=radix";
        let full: WorkerConfig = full.parse().unwrap();
        assert_eq!(full.url(), "http://gpu1:8000/engine");
        assert_eq!((full.name.as_str(), full.blocks), ("a", Some(27312)));
        assert_eq!(full.prefix_caching, Some(false));
        assert_eq!(full.eviction, Some(Eviction::Radix));
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
            other => panic!("{worker}: {other:?}"),
        }
    }

    #[test]
    fn an_engine_of_several_ranks_is_as_many_workers() {
        let written =
            "a:1,blocks=7,ranks=2,kv-events=bind:tcp://*:5557,replay=tcp://a:5658,topic=t";
        let engine: WorkerConfig = written.parse().unwrap();
        let shown: Vec<_> = engine
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
        assert_eq!(shown, expected.map(owned));

        let one: WorkerConfig = "a:1,name=b".parse().unwrap();
        assert_eq!(one.workers(), std::slice::from_ref(&one));
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
            ("http://a:1,replay=tcp://a:1", "`replay` goes with"),
            ("http://a:1,kv-events=off,topic=t", "`topic` goes with"),
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
            assert!(error.contains(says), "{given}: {error}");
        }
    }
}
