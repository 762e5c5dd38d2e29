//! Consistent hashing with bounded loads: one worker for all prompts with the same beginning.
//!
//! **Cost:** the negated rank of the worker for the hash of the prompt's first 1,024 tokens (whole
//! blocks), by rendezvous hashing. It is infinite for a worker that has
//! `⌈1.25 × (requests + 1) / workers⌉` requests or more. A prompt shorter than one block, or of
//! unknown content, has no beginning that another one could share: its cost is the number of
//! requests.
//!
//! **Source:** Thaler and Ravishankar, 1998 (rendezvous hashing); Mirrokni, Thorup and
//! Zadimoghaddam, 2018 (bounded loads).
//!
//! **Trade-off:** right where several routers must send a prefix to the same worker without shared
//! state. Prompts that begin alike, with a common system prompt for example, all prefer one worker;
//! only the bound moves them elsewhere, whatever is cached there.

use foresee_prefix::sequence::SequenceHash;

use super::candidates::Candidates;
use super::interface::{NamedPolicy, Policy};
use super::request_profile::RequestProfile;

/// Consistent hashing with bounded loads.
pub const CONSISTENT_HASH: NamedPolicy = NamedPolicy {
    name: "consistent-hash",
    description: "by the first 1,024 prompt tokens, with bounded load",
    default_queue: None,
    create: || Box::new(ConsistentHash),
};

/// Number of prompt tokens that are hashed.
const PREFIX_TOKENS: usize = 1024;
/// Largest load that is permitted, relative to the mean number of requests.
const LOAD_FACTOR: f64 = 1.25;

#[derive(Debug)]
struct ConsistentHash;

impl Policy for ConsistentHash {
    fn costs(
        &self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
        costs: &mut Vec<f64>,
    ) {
        let requests = candidates.iter().map(|worker| worker.charged_requests());
        let Some(key) = key(request) else {
            costs.extend(requests);
            return;
        };
        let total: f64 = requests.sum();
        let bound = (LOAD_FACTOR * (total + 1.0) / candidates.len() as f64).ceil();
        costs.extend(candidates.iter().map(|worker| {
            if worker.charged_requests() < bound {
                -(rank(key, worker.name_hash) as f64)
            } else {
                f64::INFINITY
            }
        }));
    }
}

/// Returns the hash of the prompt's first [`PREFIX_TOKENS`] tokens, or of all its whole blocks if it
/// is shorter. `None` if it has no hashed block.
fn key(request: &RequestProfile<'_>) -> Option<SequenceHash> {
    let blocks = PREFIX_TOKENS / request.block_size as usize;
    let blocks = blocks.clamp(1, request.hashes.len().max(1));
    request.hashes.get(blocks - 1).copied()
}

/// Returns the rank of a worker for a key; the highest wins.
fn rank(key: SequenceHash, name_hash: u64) -> u64 {
    let product = u128::from(key ^ name_hash) * 0x9E37_79B9_7F4A_7C15;
    (product as u64) ^ ((product >> 64) as u64)
}
