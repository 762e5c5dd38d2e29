//! The decision: which worker gets the next request, by predicted load and cache.
//!
//! This crate does no I/O, reads no clock and is not async: time comes in as an argument, so the
//! code that serves traffic is the code that runs in the simulator and in the property tests.
//!
//! Read in this order: [`sequence`] (what a prompt is), `tree` (what a worker holds), `shadow` and
//! [`cache`] (what it still caches, by its own rule or by its events), `foreseen` (what it will not
//! for long, whatever its events say), `capacity` and `reports` (what its responses say of that),
//! `forecast` (how fast it is, and how long answers are), `outlook` (what it has ahead of it),
//! [`cost`], [`delay`] and [`choose`] (numbers, then a choice among numbers),
//! [`fleet`] (the workers), `state` (what a decision reads), `copies` (when a prefix is worth
//! computing once more), `ledger` (what bookings change),
//! `unwatched` (how far those are that nobody watches), [`queue`], `dispatch` (who waits here, and
//! when who is sent) and `admission` (what an SGLang begins with at once), and those that are used
//! from outside: [`router`], [`booking`] and [`batch`].
//!
//! ```
//! use std::time::Duration;
//! use foresee_core::fleet::WorkerSpec;
//! use foresee_core::router::{Request, Router, RouterConfig};
//! use foresee_core::sequence::{Sequence, salt};
//!
//! let config = RouterConfig::default();
//! let block_size = config.block_size;
//! let router = Router::new(config)?;
//! for name in ["a", "b"] {
//!     let worker = router.add_worker(WorkerSpec {
//!         name: name.to_owned(),
//!         prefix_caching: true,
//!         ..WorkerSpec::default()
//!     })?;
//!     router.set_healthy(worker, true);
//! }
//!
//! let prompt: Vec<u32> = (0..100).collect();
//! let sequence = Sequence::from_tokens(&prompt, block_size, salt("llama", None, None));
//! let mut booking = router.route(&Request::new(&sequence), Duration::ZERO)?;
//! booking.tokens(1, Duration::from_millis(80));
//!
//! let chosen = router
//!     .workers(Duration::from_millis(80))
//!     .into_iter()
//!     .find(|worker| worker.id == booking.worker());
//! assert_eq!(chosen.map(|worker| worker.active_blocks), Some(7)); // ⌈(100 + 1) / 16⌉
//!
//! drop(booking); // frees everything
//! assert!(router.workers(Duration::ZERO).iter().all(|worker| worker.active_blocks == 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod admission;
pub mod batch;
pub mod booking;
pub mod cache;
mod capacity;
pub mod choose;
mod config;
mod copies;
pub mod cost;
pub mod delay;
mod depths;
mod dispatch;
pub mod fleet;
mod forecast;
mod foreseen;
mod ledger;
mod outlook;
pub mod queue;
mod record;
mod reports;
mod request;
pub mod router;
pub mod sequence;
mod shadow;
mod state;
mod tree;
mod unwatched;

pub use capacity::{CapacitySource, DEFAULT_CAPACITY_BLOCKS};
pub use config::DEFAULT_TTFT_WEIGHT;
pub use forecast::lengths::LengthForecast;
pub use forecast::pace::Pace;
pub use shadow::Eviction;
pub use tree::Depth;
