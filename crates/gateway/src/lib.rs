//! The server: an OpenAI-compatible proxy that asks the router where each request should go.
//!
//! One request's life: `proxy` reads and routes it, `attempts` sends it until a worker answers,
//! by `forward`; `watch` passes the answer through and tells the booking what it sees, `answered`
//! says how it ended and `stored` what it left in the worker's cache; dropping the answer frees
//! the booking. Beside that, `workers`, `health` and `introduction` keep the fleet, `subscribe`
//! follows its caches, `sampler` asks what it carries, `admin` shows it, `metrics` counts,
//! `recorder` writes down what came, and `server` starts and stops it all.

mod admin;
mod answered;
mod attempts;
mod clock;
mod config;
mod forward;
mod health;
mod introduction;
mod listen;
mod metrics;
mod proxy;
mod recorder;
mod reply;
mod sampler;
mod server;
mod shared;
mod stored;
mod subscribe;
mod text;
mod tokens;
mod watch;
mod workers;

pub use config::{GatewayConfig, WorkerConfig, WorkerConfigError, default_io_threads};
pub use http::HeaderName;
pub use listen::raise_open_file_limit;
pub use server::{Gateway, StartError};
pub use subscribe::{EventSource, KvEvents};
