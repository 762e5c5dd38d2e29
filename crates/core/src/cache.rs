//! What workers cache, as their own events tell it.
//!
//! [`CacheView`] follows one engine's events and turns them into changes in terms of sequence
//! hashes; it belongs to whoever listens to that engine, outside the router's lock. [`CacheIndex`]
//! is the router's side: which workers hold which prefix.
//!
//! What one tells the other are `paths`: prefixes that continue each other, and the way to the
//! first of them from the last *mark*, one prefix in eight, by which alone the index finds it
//! (`marks`). `blocks` and `way` are what the view keeps, `runs` how far each worker holds the
//! prompts that the index knows, `sparse` the table below both. They are written for their size: a
//! fleet caches millions of blocks. And for memory that is not at hand, which is what most of the
//! time is spent on: a view must look for each block by its name, but the index reads a few lines
//! an event.
//!
//! Engines' own hashes are opaque names here. Blocks are hashed anew from their token ids, so
//! that neither the engine's algorithm nor what it mixes in needs to be known, and parents are
//! found by the engine's name for them.
//!
//! Engines may store one block several times and then remove it as often (vLLM does not merge
//! physical blocks with equal content), so stores are counted: a view that kept a set was wrong
//! about half of all block-aligned repeats.

mod blocks;
mod index;
mod marks;
mod parked;
mod paths;
mod runs;
mod sparse;
mod view;
mod way;

pub use index::CacheIndex;
pub(crate) use paths::Path;
pub use paths::Paths;
pub use view::CacheView;

/// A run of blocks of one sequence that came to be cached.
#[derive(Clone, Copy, Debug)]
pub struct StoredBlocks<'a> {
    /// The engine's name of the block before the first; `None` if the first begins its sequence.
    pub parent: Option<u64>,
    /// The engine's names of the blocks, in order.
    pub hashes: &'a [u64],
    /// Their token ids, `block_size` for each.
    pub tokens: &'a [u32],
    /// The engine's tokens per block.
    pub block_size: u32,
    /// The [`salt`](crate::sequence::salt) of the sequence; looked at if there is no parent.
    pub salt: u64,
}

/// What an event changes in the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Prefixes that are cached and were not, none before what it continues.
    pub added: Paths,
    /// Prefixes that are no longer cached.
    pub removed: Paths,
    /// The engine's blocks are so many times the router's: only the prefixes that end with one of
    /// its blocks are told of. 0 while nothing was stored.
    pub stride: u32,
}
