//! An LLM engine without a GPU: an iteration-level model on a virtual clock, the workloads to
//! drive it with, and replay with the router in the loop.
//!
//! Read in this order: [`law`] (how long a step takes), [`blocks`] (the KV cache), [`engine`]
//! (what a step does), [`prompt`], [`trace`] and [`workload`] (what clients send), [`arrivals`]
//! (when), [`traffic`], [`knowledge`] and [`schedule`] (what the router sees of them, of caches,
//! and of a changing fleet), [`replay`] (all of it with the router), [`lab`] (other policies in
//! its place), [`prediction`], [`slo`] and [`report`] (what came out), [`compare`] (several
//! policies, several times), [`suite`] (on what), [`grid`] (side by side), [`capacity`] (how much
//! they carry).
//! [`load`] sends the same workloads to a live address, and [`verify`] holds a router's predictions
//! against engines that run.
//!
//! [`engine::Engine`] is a state machine without a clock: its driver decides whether the time a
//! step takes passes on a virtual clock or on the wall. [`server`] lets it pass on the wall, and
//! puts vLLM's HTTP API in front.

pub mod arrivals;
pub mod blocks;
mod boxes;
pub mod capacity;
mod chart;
pub mod compare;
pub mod engine;
pub mod grid;
mod http;
pub mod knowledge;
pub mod lab;
pub mod law;
pub mod learning;
pub mod load;
mod page;
pub mod prediction;
pub mod prompt;
pub mod replay;
pub mod report;
pub mod schedule;
pub mod server;
pub mod slo;
pub mod span;
pub mod spread;
pub mod suite;
mod table;
pub mod text;
pub mod trace;
pub mod traffic;
pub mod verify;
mod woken;
pub mod workload;
