//! Power of two choices: of two workers that are drawn at random, the one with fewer requests.
//!
//! **Cost:** the number of booked requests, as in [`least_requests`](super::least_requests), but
//! only two candidates are compared.
//!
//! **Source:** Mitzenmacher, 2001.
//!
//! **Trade-off:** right where several routers that do not see each other's load share the workers:
//! chance keeps them from choosing the same worker at the same moment. Slightly less even than least
//! requests, and as blind to caches.

use super::candidates::Candidates;
use super::interface::{NamedPolicy, Policy, Scope};
use super::request_profile::RequestProfile;

/// Power of two choices.
pub const POWER_OF_TWO: NamedPolicy = NamedPolicy {
    name: "power-of-two",
    description: "of two random workers, the one with fewer requests",
    default_queue: None,
    create: || Box::new(PowerOfTwo),
};

#[derive(Debug)]
struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn costs(&self, _: &RequestProfile<'_>, candidates: &Candidates<'_>, costs: &mut Vec<f64>) {
        costs.extend(candidates.iter().map(|worker| worker.charged_requests()));
    }

    fn scope(&self) -> Scope {
        Scope::RandomTwo
    }
}
