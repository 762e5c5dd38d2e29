//! HTTP server of Foresee: an OpenAI-compatible proxy that sends each request to the worker that the
//! router chooses.
//!
//! A request passes these modules in order:
//!
//! 1. `proxy` reads and parses it and books it on a worker.
//! 2. `failover` waits in the router's queue and sends it, to another worker if one fails.
//! 3. `upstream` writes it to the worker over a pooled connection.
//! 4. `tracked_body` passes the response on and reports its tokens to the booking.
//! 5. `completion_log` records how the response ended, and `cache_feedback` what it left in the
//!    worker's cache. Dropping the response's body releases the booking.
//!
//! Tasks that run independently of requests: `health` checks workers, `worker_info` asks them for
//! models and capacity, `subscribe` follows their KV events, and `engine_metrics` reads their
//! own metrics. `workers` has the list of workers, `admin` and `metrics` report the state,
//! `recorder` writes a trace of the requests, and `server` starts and stops everything.

mod admin;
mod bytes_per_token;
mod cache_feedback;
mod clock;
mod completion_log;
mod config;
mod engine_metrics;
mod failover;
mod gateway_state;
mod health;
mod listen;
mod log_limit;
mod metrics;
mod proxy;
mod recorder;
mod reply;
mod server;
mod subscribe;
mod tokenization;
mod tracked_body;
mod upstream;
mod worker_info;
mod workers;

pub use config::{GatewayConfig, WorkerConfig, WorkerConfigError, default_io_threads};
pub use http::HeaderName;
pub use listen::raise_open_file_limit;
pub use metrics::{LabelInfo, MetricInfo, metric_reference, metrics_page};
pub use server::{Gateway, StartError};
pub use subscribe::{EventSource, KvEvents};
