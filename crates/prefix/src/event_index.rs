//! Cached blocks of workers, according to their KV events.
//!
//! [`CacheView`] follows the events of one engine and converts them into deltas of sequence hashes.
//! It belongs to the subscriber of that engine's event stream, outside the router's lock.
//! [`EventIndex`] is the router's side: it records which workers cache which prefix.
//!
//! A [`CacheDelta`] carries changes from a view to the index as [`PrefixRuns`]: consecutive
//! prefixes, each run preceded by a *lead-in* from the last *anchor*. An anchor is a block hash,
//! one in eight. The index looks up anchors only, in the table of `anchors`, and walks from there.
//!
//! A view keeps its state in `blocks`, `lead_in` and `orphans`. `runs` stores how many blocks of
//! each known run every worker caches. `probe_table` is the hash table of both sides. All of these
//! are written for small size, because a fleet caches millions of blocks, and for few cache misses,
//! on which most of the time is spent: a view must look up each block by its engine hash, while the
//! index reads a few cache lines per event.
//!
//! Engine hashes are opaque here. Blocks are hashed anew from their token ids, so neither the
//! engine's hash algorithm nor the values that it mixes in need to be known. Parents are found by
//! engine hash.
//!
//! An engine may store one block several times and then remove it as many times, because vLLM does
//! not merge physical blocks with equal content. Therefore stores are counted. A view that kept a
//! set would be wrong about many prompts that end on a block boundary and are repeated.

mod anchors;
mod blocks;
mod delta;
mod index;
mod lead_in;
mod orphans;
mod probe_table;
mod runs;
mod view;

pub use delta::{PrefixRun, PrefixRuns};
pub use index::{EventIndex, RemovalCursor, RemovalStep, UnusedTables};
pub use view::CacheView;

/// Consecutive blocks of one sequence that an engine stored in its prefix cache.
#[derive(Clone, Copy, Debug)]
pub struct StoredBlocks<'a> {
    /// Engine hash of the block before the first; `None` if the first block starts its sequence.
    pub parent: Option<u64>,
    /// Engine hashes of the blocks, in order.
    pub engine_hashes: &'a [u64],
    /// Token ids of the blocks, `block_size` for each.
    pub tokens: &'a [u32],
    /// Tokens per block of the engine.
    pub block_size: u32,
    /// [`prefix_salt`](crate::sequence::prefix_salt) of the sequence. Used only if `parent` is
    /// `None`.
    pub salt: u64,
}

/// Blocks that one worker stored and removed, as sequence hashes, for the [`EventIndex`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CacheDelta {
    /// Prefixes that are now cached. A prefix never comes before the prefix that it extends.
    pub stored: PrefixRuns,
    /// Prefixes that are no longer cached.
    pub removed: PrefixRuns,
    /// Engine block size ÷ router block size. Only prefixes that end with an engine block are
    /// listed. 0 until the engine has stored a block.
    pub engine_block_ratio: u32,
}
