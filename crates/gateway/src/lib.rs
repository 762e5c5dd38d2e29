//! HTTP server of Foresee: an OpenAI-compatible proxy that sends each request to the worker that the
//! router chooses, and front ends for operators and for other proxies.
//!
//! Two parts have a façade each. `placement` reads a request's body, tokenises it, chooses a worker,
//! books the request there, observes the response and releases the booking; it knows neither sockets
//! nor HTTP. `workers` has the list of workers and the tasks that follow each of them: `workers::tasks`
//! starts `workers::health`, look-ups of host names (`workers::resolve`), `worker_info`, `subscribe`
//! for KV events (`kv_events`) and `engine_metrics`. Front ends are built on both, and know each
//! other as little as the parts know them: `proxy`, `admin`, and `admin::selection`.
//!
//! A request to the proxy passes these modules in order:
//!
//! 1. `accept` admits its connection; `connection` and `client_socket` carry it and its response, or
//!    `http2_connection` does; and `request_body` reads its body.
//! 2. `proxy` finds the inference path that it calls; `client_headers` takes the hints from its
//!    headers; `own_responses` answers what is not sent to a worker.
//! 3. `placement` parses, tokenises and hashes its body, under the model's name if it has an alias
//!    (`workers::model_names`), a long one on a thread of `parse_pool`, and
//!    books it on a worker, or refuses it (`placement::refusals`).
//! 4. `failover` waits in the router's queue and sends it, to another worker if one fails.
//! 5. `upstream` writes it to the worker over a pooled connection.
//! 6. `tracked_body` passes the response on, and `model_renaming` writes the alias of its model into
//!    it. `placement::response_observer` reports its tokens to the booking.
//! 7. `placement::completion_log` records how the response ended, and `placement::cache_feedback` what
//!    it left in the worker's cache. Dropping the response's body releases the booking.
//!
//! `assembly` builds the parts and gives each front end the parts that it uses, `server` starts and
//! stops everything, and `shutdown` has the phases in which it stops.
//! `reload` applies another configuration, and `state_file` keeps what was learned over a restart.
//! `metrics` reports the state, `recorder` writes a trace of the requests, `access_log` a line for
//! each, and `traces` sends spans of the sampled ones to a collector. `fleet_demand` forecasts how
//! many workers the load needs.

mod accept;
mod access_log;
mod admin;
mod assembly;
mod client_deadlines;
mod client_headers;
mod client_socket;
mod clock;
mod completion;
mod config;
mod connection;
mod connection_limit;
mod connection_state;
mod content_watch;
mod discovery;
mod engine_metrics;
mod failover;
mod fleet_demand;
mod http2_connection;
mod https_client;
mod keys;
mod kv_events;
mod listen;
mod log_limit;
mod metrics;
mod model_alias;
mod model_renaming;
mod own_responses;
mod parse_pool;
mod pass_through;
mod placement;
mod program;
mod proxy;
mod recorder;
mod reload;
mod reply;
mod request_body;
mod request_ids;
mod server;
mod shutdown;
mod state_file;
mod subscribe;
mod tcp_timeouts;
mod tls;
mod traces;
mod tracked_body;
mod upstream;
mod worker_info;
mod workers;

pub use admin::{AdminConfig, AdminKey, AdminListen, KeyError, UnprotectedAdmin, parse_new_worker};
pub use client_headers::ClientTrust;
pub use config::{GatewayConfig, default_io_threads};
pub use connection_state::ConnectionConfig;
pub use content_watch::ContentWatch;
pub use discovery::UnsupportedSource;
pub use discovery::config::{
    DiscoveryConfig, DnsName, KubernetesConfig, PoolName, is_kubernetes_name,
};
pub use fleet_demand::AutoscalingConfig;
pub use foresee_api::admin::Reload;
pub use http::{HeaderName, Uri};
pub use ipnet::IpNet;
pub use keys::key_config::{KeyConfig, KeyHash, KeyLimits, Scope, new_key};
pub use kv_events::source::{EventSource, KvEvents};
pub use listen::{InheritedListeners, raise_open_file_limit};
pub use metrics::{
    CompatName, LabelInfo, MetricInfo, MetricsCompat, compat_reference, metric_reference,
    metrics_page,
};
pub use model_alias::{InvalidAlias, ModelAlias};
pub use pass_through::{InvalidPath, PassThroughPath};
pub use program::{LogFilter, ProgramParts};
pub use reload::{ConfigSource, ReloadError};
pub use request_body::RequestBodyConfig;
pub use server::{Gateway, StartError, WorkerCheck};
pub use shutdown::ShutdownConfig;
pub use tls::{ClientAuth, TlsConfig, TlsError};
pub use traces::config::{CollectorUrl, InvalidCollector, TraceConfig, TraceError};

pub use workers::api_key::{ApiKeyError, ApiKeySource, WorkerKeyConfig};
pub use workers::health_config::{HealthConfig, HealthMethod, HealthPath};
pub use workers::reconcile::AddError;
pub use workers::resolve::{DnsConfig, Resolver};
pub use workers::worker_config::{WorkerConfig, WorkerConfigError};
pub use workers::worker_tls::WorkerTlsConfig;
