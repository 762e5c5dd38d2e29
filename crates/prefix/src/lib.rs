//! Which worker has which blocks of this prompt?
//!
//! An LLM engine keeps the attention keys and values of a prompt in *blocks* of, say, 16 tokens. A
//! block that a running request uses is *active*: it takes memory until the request ends. A block
//! that nothing uses stays *cached* until the engine evicts it, and a new prompt with the same
//! prefix is computed from there on. A router that knows both for every worker can tell how much of
//! a prompt each worker would have to compute, and how full its memory is.
//!
//! The active blocks of a worker are a map from each block to the requests that use it:
//!
//! ```text
//! HashMap<SequenceHash, HashSet<RequestId>>
//! ```
//!
//! The length of the map is the number of active blocks, and a prompt's blocks in it are its overlap
//! with the worker. [`active_tree`] starts from that map, and says what this crate stores instead,
//! and why. The map itself stays as the model of the property tests (`active_tree/naive.rs`), and in
//! the [example](#example).
//!
//! # Order of reading
//!
//! | module | question |
//! |---|---|
//! | [`sequence`] | What is a prompt, and how is it hashed? A sequence hash identifies all tokens up to the end of its block. |
//! | [`active_tree`] | Which blocks do the requests of each worker pin, and which has it computed? |
//! | `estimated_cache`, `estimated_cache/sglang` | Which blocks does a worker without KV events still cache? The engine's own eviction rule, run on the requests that were sent to it. |
//! | [`event_index`] | Which blocks does a worker with KV events cache, according to them? |
//! | `pending_evictions` | Events lag: which blocks that they list will be evicted before a new request runs? |
//! | `capacity`, `hit_audit` | What do the cache hits that responses report say about the size of the cache, and whether it is still there? |
//! | `prefix_state` | [`PrefixState`], the façade: it combines these stores, derives active blocks, and evicts what does not fit. |
//!
//! The caller of [`PrefixState`] names workers by index and bookings by a serial number. For each
//! request it [matches](PrefixState::match_prefix) the prompt on all workers, chooses one,
//! [pins](PrefixState::pin) the prompt there, [grows](PrefixState::grow) it with its output, and
//! [unpins](PrefixState::unpin) it at the end.
//!
//! The crate does no I/O, reads no clock and has no lock. No operation of [`PrefixState`] takes time
//! proportional to all blocks of a worker: what may take long is done in parts, which the caller
//! requests one by one.
//!
//! # Example
//!
//! ```
//! use std::collections::{HashMap, HashSet};
//! use std::num::NonZeroU32;
//! use foresee_prefix::sequence::{Sequence, SequenceHash, prefix_salt};
//! use foresee_prefix::{EvictionRule, Occupancy, PinRequest, PrefixState};
//!
//! let block_size = NonZeroU32::new(16).ok_or("no tokens")?;
//! let salt = prefix_salt("llama", None, None);
//! let tokens: Vec<u32> = (0..64).collect();
//! let prompts = [
//!     Sequence::from_tokens(&tokens, block_size, salt),
//!     Sequence::from_tokens(&tokens[..48], block_size, salt), // a prefix of the first
//! ];
//!
//! // Active blocks of one worker, as a plain map.
//! let mut map: HashMap<SequenceHash, HashSet<u64>> = HashMap::new();
//! for (request, prompt) in (1..).zip(&prompts) {
//!     for &hash in prompt.hashes() {
//!         map.entry(hash).or_default().insert(request);
//!     }
//! }
//! assert_eq!(map.len(), 4); // shared blocks count once
//!
//! // The same as a `PrefixState`, for two workers. Both requests go to worker 0.
//! let mut state = PrefixState::default();
//! for worker in 0..2 {
//!     state.add_worker(worker, true, EvictionRule::VllmLru, Some(1000));
//! }
//! for (serial, prompt) in (1..).zip(&prompts) {
//!     let (matches, position) = state.match_prefix(prompt, false);
//!     state.pin(0, &PinRequest {
//!         prompt,
//!         position,
//!         prefix_match: matches[0],
//!         serial,
//!         occupancy: Occupancy { blocks: prompt.blocks(), headroom: 0 },
//!     });
//! }
//! assert_eq!(state.active_blocks(0), map.len() as u64);
//!
//! let (matches, _) = state.match_prefix(&prompts[0], false);
//! let in_map = prompts[0].hashes().iter().take_while(|hash| map.contains_key(hash));
//! assert_eq!(matches[0].overlap() as usize, in_map.count());
//! assert_eq!(matches[1].overlap(), 0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod active_tree;
mod cache_source;
mod capacity;
#[doc(hidden)]
pub mod counter;
mod estimated_cache;
pub mod event_index;
mod hit_audit;
#[doc(hidden)]
pub mod paged_slab;
mod pending_evictions;
mod prefix_matches;
mod prefix_state;
pub mod sequence;
mod shared_prefix;

pub use active_tree::{HashChain, NO_NODE, NodeId, PrefixMatch, TreePosition, WorkerIndex};
pub use cache_source::CacheSource;
pub use capacity::{CapacitySource, DEFAULT_CAPACITY_BLOCKS};
pub use estimated_cache::EvictionRule;
pub use hit_audit::ExpectedHit;
pub use prefix_matches::PrefixMatches;
pub use prefix_state::{
    CacheStatus, Occupancy, PinRequest, Pinned, PrefixState, RetiredWorker, SourceChange,
    UnpinRequest, UnusedChains,
};
pub use shared_prefix::blocks_shared_with_earlier;

/// The example of the README, which is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
