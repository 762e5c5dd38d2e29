//! The mock engine: the simulated engine behind HTTP, in real time. It stands in for vLLM and needs
//! no GPU.
//!
//! It serves the endpoints that a router uses, in vLLM's formats: completions, chat completions and
//! embeddings, streamed or not, `/v1/models`, `/tokenize`, `/health`, `/metrics`, errors, and KV
//! events over ZMQ. A request is aborted as soon as its client disconnects. `POST /fault` makes a running engine
//! slower, or makes it fail its requests.
//!
//! Modules, in reading order:
//!
//! | modules | content |
//! |---|---|
//! | `config` | settings of a mock engine |
//! | [`output`] | text without a tokenizer, and the output for a prompt |
//! | `request` | bodies of requests: tokens of the prompts, lengths of the outputs |
//! | `engine_loop` | the task that owns the simulated engine and runs its steps in real time |
//! | `fault` | faults of a running engine |
//! | `response`, `wire`, `reply` | event streams and whole bodies |
//! | `metrics` | the text of `/metrics` |
//! | `kv_publisher`, `event_encoding` | KV events over ZMQ, and faults of their publication |
//! | `server` | connections, and what each path does |

mod config;
mod engine_loop;
mod event_encoding;
mod fault;
mod kv_publisher;
mod metrics;
pub mod output;
mod reply;
mod request;
mod response;
mod server;
mod wire;

pub use config::MockEngineConfig;
pub use event_encoding::{Layout, encode_batch};
pub use kv_publisher::KvEventsConfig;
pub use server::{bind, serve};
