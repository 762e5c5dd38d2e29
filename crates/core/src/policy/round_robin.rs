//! Round robin: each candidate in turn.
//!
//! **Cost:** the number of turns until it is the worker's turn.
//!
//! **Trade-off:** a baseline. It reacts to nothing: a slow worker receives as much as a fast one.

use super::candidates::Candidates;
use super::interface::{NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// Round robin.
pub const ROUND_ROBIN: NamedPolicy = NamedPolicy {
    name: "round-robin",
    description: "each worker in turn",
    default_queue: None,
    create: || Box::new(RoundRobin),
};

#[derive(Debug)]
struct RoundRobin;

impl Policy for RoundRobin {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        let count = candidates.len() as u64;
        let turn = request.choices.checked_rem(count).unwrap_or(0);
        costs.extend((0..count).map(|position| ((position + count - turn) % count) as f64));
    }
}
