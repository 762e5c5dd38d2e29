//! What workers cache, as their own events tell it.
//!
//! [`CacheView`] follows one engine's events and turns them into changes in terms of sequence
//! hashes; it belongs to whoever listens to that engine, outside the router's lock. [`CacheIndex`]
//! is the router's side: which workers hold which prefix.
//!
//! `blocks` is what the former keeps, `sparse` the table below both, `runs` how far each worker
//! holds the prompts that the latter knows. They are written for their size: a fleet caches millions
//! of blocks.
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
mod parked;
mod runs;
mod sparse;
mod view;

pub use index::CacheIndex;
pub use view::CacheView;

use crate::sequence::SequenceHash;

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

/// A prefix, and the one that it continues by a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Up to the end of the block.
    pub hash: SequenceHash,
    /// Up to its beginning; `None` if it begins its sequence.
    pub previous: Option<SequenceHash>,
}

impl Link {
    /// All prefixes of a sequence, of the engine's blocks.
    pub fn chain(hashes: &[SequenceHash]) -> impl Iterator<Item = Self> {
        let previous = std::iter::once(None).chain(hashes.iter().copied().map(Some));
        let links = hashes.iter().zip(previous);
        links.map(|(&hash, previous)| Self { hash, previous })
    }
}

/// What an event changes in the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Prefixes that are cached and were not, none before what it continues.
    pub added: Vec<Link>,
    /// Prefixes that are no longer cached.
    pub removed: Vec<SequenceHash>,
    /// The engine's blocks are so many times the router's: only the prefixes that end with one of
    /// its blocks are told of. 0 while nothing was stored.
    pub stride: u32,
}
