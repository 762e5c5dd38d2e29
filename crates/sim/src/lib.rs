//! Simulator of LLM engines, without a GPU: an iteration-level engine model on a virtual clock,
//! workloads that drive it, and replay with the router in the loop.
//!
//! Modules, in reading order:
//!
//! | modules | content |
//! |---|---|
//! | [`step_time`] | duration of an engine step |
//! | [`block_pool`] | KV cache of an engine |
//! | [`engine`] | scheduling of an engine |
//! | [`prompt`], [`trace`], [`workload`] | the requests that clients send |
//! | [`arrivals`] | the times at which the requests are sent |
//! | [`hashed_workload`], [`cache_signal`], [`fleet_changes`], [`faults`] | what the router sees of requests, of caches, and of a changing or failing fleet |
//! | [`replay`] | a workload, the engines and the router on one virtual clock |
//! | [`baselines`] | policies of other routers, in place of the router's own |
//! | [`prediction`], [`forecast_error`] | how accurate the router's predictions were |
//! | [`slo`], [`outcome`], [`measures`], [`significance`] | measures of a replay, and whether differences are significant |
//! | [`compare`], [`suite`] | several policies with several seeds, on several workloads |
//! | [`capacity`] | how much traffic a policy can carry within an SLO |
//!
//! [`engine::Engine`] is a state machine without a clock. Its driver decides whether the duration
//! of a step passes on a virtual clock ([`replay`]) or in real time (the mock engine, in the crate
//! `mock`).
//!
//! The crate does no I/O: readers take what the caller opened. It reads a clock only for
//! [`Comparison::real_seconds`](compare::Comparison::real_seconds).

pub mod arrivals;
pub mod baselines;
pub mod block_pool;
pub mod cache_signal;
pub mod capacity;
pub mod compare;
pub mod duration;
pub mod engine;
pub mod faults;
pub mod fleet_changes;
pub mod forecast_error;
pub mod hashed_workload;
pub mod measures;
pub mod outcome;
pub mod prediction;
pub mod prompt;
mod ready_wakers;
pub mod replay;
pub mod significance;
pub mod slo;
pub mod step_time;
pub mod suite;
pub mod trace;
pub mod workload;
