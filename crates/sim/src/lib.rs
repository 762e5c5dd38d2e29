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
//! | [`slo`], [`report`], [`significance`] | measures of a replay, and whether differences are significant |
//! | [`compare`], [`suite`], [`grid`] | several policies with several seeds, on several workloads, side by side |
//! | [`capacity`] | how much traffic a policy can carry within an SLO |
//! | [`load`] | client that sends the same workloads to a live address |
//! | [`verify`] | comparison of a router's predictions with running engines |
//!
//! [`engine::Engine`] is a state machine without a clock. Its driver decides whether the duration
//! of a step passes on a virtual clock ([`replay`]) or in real time (the
//! mock engine, in the crate `mock`).

pub mod arrivals;
pub mod baselines;
pub mod block_pool;
mod box_plot;
pub mod cache_signal;
pub mod capacity;
mod chart;
pub mod compare;
pub mod duration;
pub mod engine;
pub mod faults;
pub mod fleet_changes;
pub mod forecast_error;
pub mod grid;
pub mod hashed_workload;
mod http;
pub mod load;
mod page;
pub mod prediction;
pub mod prompt;
mod ready_wakers;
pub mod replay;
pub mod report;
pub mod significance;
pub mod slo;
pub mod step_time;
pub mod suite;
mod table;
pub mod trace;
pub mod verify;
pub mod workload;
