//! Random: any candidate, all with equal probability.
//!
//! **Cost:** 0, so chance decides.
//!
//! **Trade-off:** a baseline, and useful in tests of failover. As round robin, and less even.

use super::candidates::Candidates;
use super::interface::{NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// Random.
pub const RANDOM: NamedPolicy = NamedPolicy {
    name: "random",
    description: "a random worker",
    default_queue: None,
    create: || Box::new(Random),
};

#[derive(Debug)]
struct Random;

impl Policy for Random {
    fn costs(&self, _: &RequestProfile<'_>, candidates: &Candidates<'_>, costs: &mut Vec<f64>) {
        costs.resize(costs.len() + candidates.len(), 0.0);
    }
}
