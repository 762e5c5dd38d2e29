//! Least requests: the worker with the fewest requests.
//!
//! **Cost:** the number of booked requests, dispatched and queued.
//!
//! **Trade-off:** ignores caches and the lengths of prompts and outputs. Requests with a common
//! prefix are spread over all workers, and each worker computes the prefix.

use super::candidates::Candidates;
use super::interface::{NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// Least requests.
pub const LEAST_REQUESTS: NamedPolicy = NamedPolicy {
    name: "least-requests",
    description: "the worker with the fewest requests",
    default_queue: None,
    create: || Box::new(LeastRequests),
};

#[derive(Debug)]
struct LeastRequests;

impl Policy for LeastRequests {
    fn costs(&self, _: &RequestProfile<'_>, candidates: &Candidates<'_>, costs: &mut Vec<f64>) {
        costs.extend(candidates.iter().map(|worker| worker.charged_requests()));
    }
}
