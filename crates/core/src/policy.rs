//! Policies: rules that choose a worker among candidates.
//!
//! A [`Policy`] reads one request ([`RequestProfile`]) and the candidates ([`Candidates`], whose
//! rows are [`WorkerView`]s), and gives each candidate a cost. The router chooses the least cost, or
//! draws by the costs at a temperature above 0. Every policy reads the same bookings under the same
//! lock, so each decision sees all decisions before it. Policies differ only in the numbers that
//! they compare.
//!
//! Each policy is a file of its own, whose documentation has its formula, its source and its
//! trade-off, and one line in [`ALL`]. A caller may also define a [`NamedPolicy`] outside this
//! crate:
//!
//! ```
//! use foresee_core::policy::{Candidates, NamedPolicy, Policy, RequestProfile};
//! use foresee_core::router::{Router, RouterConfig};
//!
//! /// The worker whose KV cache is least occupied.
//! #[derive(Debug)]
//! struct LeastBlocks;
//!
//! impl Policy for LeastBlocks {
//!     fn costs(&self, _: &RequestProfile<'_>, workers: &Candidates<'_>, costs: &mut Vec<f64>) {
//!         costs.extend(workers.iter().map(|worker| worker.active_blocks as f64));
//!     }
//! }
//!
//! const LEAST_BLOCKS: NamedPolicy = NamedPolicy {
//!     name: "least-blocks",
//!     description: "the worker with the fewest active blocks",
//!     default_queue: None,
//!     create: || Box::new(LeastBlocks),
//! };
//! let router = Router::new(RouterConfig::for_policy(LEAST_BLOCKS))?;
//! # Ok::<(), foresee_core::router::ConfigError>(())
//! ```

mod candidates;
mod consistent_hash;
mod decision;
mod interface;
pub mod kv_cost;
mod least_requests;
mod lmetric;
pub mod marginal_delay;
mod power_of_two;
mod random;
mod registry;
mod request_profile;
mod round_robin;
mod selector;

pub(crate) use candidates::EarlierPrompts;
pub use candidates::{Candidates, WorkerView};
pub use consistent_hash::CONSISTENT_HASH;
pub use decision::Decision;
pub use interface::{BatchRule, NamedPolicy, Policy, Scope};
pub use kv_cost::KV;
pub use least_requests::LEAST_REQUESTS;
pub use lmetric::LMETRIC;
pub use marginal_delay::MARGINAL_DELAY;
pub use power_of_two::POWER_OF_TWO;
pub use random::RANDOM;
pub use registry::{ALL, UnknownPolicy};
pub use request_profile::RequestProfile;
pub use round_robin::ROUND_ROBIN;
pub(crate) use selector::Selector;
