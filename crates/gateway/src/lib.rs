//! HTTP server of Foresee: an OpenAI-compatible proxy that sends each request to the worker that the
//! router chooses.
//!
//! A request passes these modules in order:
//!
//! 1. `accept` admits its connection, `connection` and `client_socket` carry it and its response,
//!    and `request_body` reads its body.
//! 2. `proxy` finds the inference path that it calls; `client_headers` takes the hints from its
//!    headers.
//! 3. `placement` parses, tokenises and hashes its body, a long one on a thread of `parse_pool`, and
//!    books it on a worker.
//! 4. `failover` waits in the router's queue and sends it, to another worker if one fails; `refusals`
//!    are the responses to a request that cannot be placed.
//! 5. `upstream` writes it to the worker over a pooled connection.
//! 6. `tracked_body` passes the response on, and `placement` reports its tokens to the booking.
//! 7. `completion_log` records how the response ended, and `cache_feedback` what it left in the
//!    worker's cache. Dropping the response's body releases the booking.
//!
//! Tasks that run independently of requests, started by `workers::tasks`: `workers::health` checks
//! workers, `workers::resolve` looks up their host names, `worker_info` asks them for models and
//! capacity, `subscribe` follows their KV events, and `engine_metrics` reads their own metrics.
//! `workers` has the list of workers, `admin` and `metrics` report the state, `recorder` writes a
//! trace of the requests, `server` starts and stops everything, and `shutdown` has the phases in
//! which it stops.

mod accept;
mod admin;
mod bytes_per_token;
mod cache_feedback;
mod client_headers;
mod client_socket;
mod clock;
mod completion;
mod completion_log;
mod config;
mod connection;
mod connection_state;
mod drain_rate;
mod engine_metrics;
mod failover;
mod gateway_state;
mod kv_events;
mod listen;
mod log_limit;
mod metrics;
mod parse_pool;
mod pass_through;
mod placement;
mod proxy;
mod recorder;
mod refusals;
mod reply;
mod request_body;
mod request_ids;
mod server;
mod shutdown;
mod subscribe;
mod tcp_timeouts;
mod tokenization;
mod tracked_body;
mod upstream;
mod worker_info;
mod workers;

pub use admin::{AdminConfig, AdminKey, AdminListen, KeyError, UnprotectedAdmin, parse_new_worker};
pub use client_headers::ClientTrust;
pub use config::{GatewayConfig, default_io_threads};
pub use connection_state::ConnectionConfig;
pub use http::HeaderName;
pub use ipnet::IpNet;
pub use kv_events::source::{EventSource, KvEvents};
pub use listen::{InheritedListeners, raise_open_file_limit};
pub use metrics::{LabelInfo, MetricInfo, metric_reference, metrics_page};
pub use pass_through::{InvalidPath, PassThroughPath};
pub use request_body::RequestBodyConfig;
pub use server::{Gateway, StartError};
pub use shutdown::ShutdownConfig;

pub use workers::api_key::{ApiKeyError, ApiKeySource, WorkerKeyConfig};
pub use workers::health_config::{HealthConfig, HealthMethod, HealthPath};
pub use workers::resolve::{DnsConfig, Resolver};
pub use workers::worker_config::{WorkerConfig, WorkerConfigError};
