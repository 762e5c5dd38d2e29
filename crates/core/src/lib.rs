//! Router core of Foresee: predicts the load and the prefix cache of every LLM worker, and chooses
//! the worker for each request.
//!
//! The caller adds workers to a [`Router`](router::Router) and routes each request with it. The
//! result is a [`Booking`](booking::Booking), which counts the request on its worker until it is
//! dropped. The caller reports what it observes of the response (first token, further tokens, cached
//! tokens, end) to the booking, and what it learns about the worker (health, KV events, capacity) to
//! the router. The crate does no I/O, reads no clock and is not async: time is an argument of every
//! call. The code that serves traffic is therefore the code that runs in the simulator and in the
//! property tests.
//!
//! # Modules
//!
//! What a caller uses:
//!
//! | module | question |
//! |---|---|
//! | [`router`] | How is a request routed, and how does the router learn about its workers? |
//! | [`booking`], [`batch`] | What does a routed request occupy, and how is its progress reported? |
//! | [`workers`] | What is a worker, and what is known about it? |
//! | [`sequence`] | What is a prompt, and how is it hashed? |
//! | [`text_ratios`] | How many bytes of text are a token? |
//! | [`event_index`] | How do KV events become knowledge about caches? |
//! | [`policy`] | By which rule, and by which cost, is a worker chosen? |
//! | [`outlier`] | Which workers get no requests because they failed or refused earlier ones? |
//! | [`retry_budget`] | May a failed request be sent again? |
//! | [`queue`] | Which requests wait at the router, and which is sent next? |
//!
//! What happens inside, in the order of reading:
//!
//! | module | question |
//! |---|---|
//! | `config`, `request`, `observed` | Which types do callers of the router pass and receive? |
//! | `critical_section`, `state`, `assessment` | How does the lock work, what is behind it, and how is a decision made? |
//! | [`foresee_prefix`] | Which worker has which blocks? A crate of its own, with the active blocks, the event index and the estimated caches. |
//! | [`foresee_forecast`] | How fast is a worker, how long are outputs, how fast do requests arrive? A crate of its own. |
//! | `pending_work` | How much prefill and decode work does a worker have? |
//! | `replication` | When should an idle worker compute a popular prefix once more? |
//! | `bookings`, `booking_record`, `ledger` | What does a booking add to its worker, and when is it subtracted? |
//! | `progress`, `progress_estimator` | How far is a request whose response is not streamed? |
//! | `removal` | How is everything that a worker held removed without a pause? |
//! | `dispatch`, `sglang_admission` | When is a queued request sent, and does it fit the worker's memory? |
//!
//! # Example
//!
//! ```
//! use std::time::Duration;
//! use foresee_core::router::{Request, Router, RouterConfig};
//! use foresee_core::sequence::{Sequence, prefix_salt};
//! use foresee_core::workers::WorkerSpec;
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
//! let tokens: Vec<u32> = (0..100).collect();
//! let prompt = Sequence::from_tokens(&tokens, block_size, prefix_salt("llama", None, None));
//! let mut booking = router.route(&Request::new(&prompt), Duration::ZERO)?;
//! booking.on_tokens(1, Duration::from_millis(80));
//!
//! let chosen = router
//!     .workers(Duration::from_millis(80))
//!     .into_iter()
//!     .find(|worker| worker.id == booking.worker());
//! assert_eq!(chosen.map(|worker| worker.active_blocks), Some(7)); // ⌈(100 + 1) / 16⌉
//!
//! drop(booking); // releases everything
//! assert!(router.workers(Duration::ZERO).iter().all(|worker| worker.active_blocks == 0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod affinity;
mod assessment;
pub mod batch;
mod batch_costs;
pub mod booking;
mod booking_id;
mod booking_record;
mod bookings;
mod config;
mod critical_section;
mod dispatch;
mod dispatcher;
mod explain;
pub mod learned;
mod ledger;
mod load;
mod model_name;
mod observed;
pub mod outlier;
mod pending_work;
pub mod policy;
mod progress;
mod progress_estimator;
pub mod queue;
mod removal;
mod replication;
mod request;
pub mod retry_budget;
pub mod router;
mod sglang_admission;
mod state;
pub mod text_ratios;
mod time;
mod worker_id;
pub mod workers;

pub use config::DEFAULT_TTFT_WEIGHT;
pub use foresee_forecast::{
    DemandForecast, LatencyAccuracy, LatencyLimits, LatencyModel, MeanLengths,
    OutputLengthAccuracy, sustainable_rate,
};
pub use foresee_prefix::{CapacitySource, DEFAULT_CAPACITY_BLOCKS, EvictionRule, PrefixMatch};

pub mod event_index {
    //! How do KV events become knowledge about caches? See [`foresee_prefix::event_index`].

    pub use foresee_prefix::event_index::{
        CacheDelta, CacheView, EventIndex, PrefixRuns, StoredBlocks,
    };
}

pub mod sequence {
    //! What is a prompt, and how is it hashed? See [`foresee_prefix::sequence`].

    pub use foresee_prefix::sequence::{
        BytesPerToken, PartialBlock, Sequence, SequenceHash, extend_hash, prefix_salt,
    };
}

/// The example of the README, which is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
