//! KV events: messages of vLLM and SGLang about the blocks that they cache.
//!
//! [`decode_batch`] reads all layouts that these engines have sent: events as arrays (vLLM up to
//! 0.23, older SGLang) and as maps, with fields added release by release. It finds a field by its
//! name or by its fixed position, uses a default for a missing field, and ignores an unknown one.
//! An event that cannot be decoded is counted and left out; the other events of its batch are kept.
//!
//! Decoded events contain what the engine sent, without interpretation. An index must interpret
//! them: count stores and removals, handle unknown parents, and handle groups with a window.

mod decode;
mod extra_keys;
pub mod follower;
mod framing;
mod repeated_stores;

pub use decode::{DecodeError, decode_batch};
pub use framing::{
    FrameError, Message, Replay, parse_message, parse_replay, parse_replay_request, replay_end,
    replay_request,
};

/// The events of one engine step, in order. Order matters: a block may be stored again in the batch
/// that clears the cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EventBatch {
    /// Time at which the engine sent the batch, by the engine's clock, in seconds since 1970.
    pub timestamp: Option<f64>,
    /// The events that could be decoded.
    pub events: Vec<Event>,
    /// The data-parallel rank that sent the batch. Engines without ranks send 0 or no value.
    pub data_parallel_rank: Option<u32>,
    /// Number of events left out because they could not be decoded. Their contents are lost: what
    /// is known of this worker's cache is no longer exact.
    pub malformed: u32,
    /// Number of events left out because their type is unknown.
    pub unknown: u32,
    /// Whether the payload ended early or became undecodable, so that an unknown number of events
    /// is missing.
    pub truncated: bool,
}

/// A change of an engine's cache.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks were added to the cache.
    Stored(BlockStored),
    /// Blocks were removed from the cache.
    Removed(BlockRemoved),
    /// All blocks were removed.
    Cleared {
        /// The medium that was cleared; `None`, which vLLM and SGLang send, means all media.
        medium: Option<Medium>,
    },
}

/// A run of consecutive blocks of one sequence that were added to the cache.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockStored {
    /// Engine hashes of the blocks, in order. There may be fewer hashes than blocks in `tokens`, or
    /// none: groups with a window list no blocks before the window.
    pub hashes: Vec<BlockKey>,
    /// The block before the first one; `None` if the run starts its sequence.
    pub parent: Option<BlockKey>,
    /// Token ids of all blocks, concatenated. Empty if the engine does not know them, as in events
    /// of an offloading tier.
    ///
    /// SGLang with a draft model (EAGLE) sends each token paired with the one after it. This field
    /// contains the first token of each pair, which is the token of the block; the second token of
    /// the last pair is `next_token`. Larger ids are cut to 32 bits: they are placeholders, which
    /// no vocabulary contains.
    pub tokens: Vec<u32>,
    /// The token after the last one, if the engine sent pairs of tokens. Such an engine takes a
    /// block from its cache only for a prompt that continues with this token.
    pub next_token: Option<u32>,
    /// Tokens per block; 0 if the event does not contain it.
    pub block_size: u32,
    /// The weights the blocks were computed with.
    pub adapter: Adapter,
    /// The request's `cache_salt`. vLLM sends it only with the first block of a sequence; later
    /// blocks inherit it through their parent.
    pub cache_salt: Option<Box<str>>,
    /// The medium that stores the blocks.
    pub medium: Medium,
    /// The KV-cache group of the model that the blocks belong to. Equal hashes in different groups
    /// are different blocks.
    pub group: Option<u32>,
    /// The kind of attention of that group.
    pub attention: Attention,
    /// The group's attention window in tokens, if it has one.
    pub sliding_window: Option<u32>,
    /// Further inputs of the blocks' content besides tokens, adapter and salt, in the order of the
    /// blocks. Most blocks have none.
    pub extras: Vec<BlockExtra>,
}

impl BlockStored {
    /// Returns each block with its tokens; `None` if the numbers of hashes and tokens and the block
    /// size do not match, so that the tokens cannot be assigned to blocks. A block size of 0 never
    /// matches.
    #[must_use]
    pub fn blocks(&self) -> Option<impl ExactSizeIterator<Item = (BlockKey, &[u32])>> {
        let size = usize::try_from(self.block_size).ok()?;
        let matches = size > 0 && self.hashes.len().checked_mul(size)? == self.tokens.len();
        matches.then(|| self.hashes.iter().copied().zip(self.tokens.chunks(size)))
    }
}

/// Blocks that were removed from a cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockRemoved {
    /// Engine hashes of the blocks.
    pub hashes: Vec<BlockKey>,
    /// The medium from which the blocks were removed. Another medium may still store them.
    pub medium: Medium,
    /// The KV-cache group that the blocks belonged to.
    pub group: Option<u32>,
}

/// The engine hash of a block: opaque to the router, which compares such hashes and never computes
/// them.
///
/// Engines use numbers of 64 bits, signed or unsigned, or digests of 16 or 32 bytes. All become 64
/// bits: numbers are kept, digests are cut to their last eight bytes. vLLM makes its own numbers in
/// that way, so a block has one key for any configuration of its engine. Complete digests would
/// have five times the size, in an index where the bytes per block matter.
///
/// The probability that two of *n* blocks share a key is about *n*²/2⁶⁵: 3 in 100 million for a
/// worker with a million blocks. The worst consequence is one wrong prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u64);

impl BlockKey {
    /// Returns the key of a digest: its last eight bytes, big-endian, or all of a shorter digest.
    #[must_use]
    pub fn from_digest(digest: &[u8]) -> Self {
        match digest.last_chunk() {
            Some(&last) => Self(u64::from_be_bytes(last)),
            None => Self(
                digest
                    .iter()
                    .fold(0, |key, &byte| key << 8 | u64::from(byte)),
            ),
        }
    }
}

/// A storage tier of an engine's cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Medium {
    /// The device's memory. The default of engines that send no medium.
    #[default]
    Gpu,
    /// The host's memory.
    Host,
    /// The host's disk.
    Disk,
    /// A store shared with other engines.
    External,
    /// A medium that is not known here.
    Other,
}

impl Medium {
    /// Parses the name that an engine uses; case does not matter. An unknown name is
    /// [`Other`](Self::Other).
    fn from_name(name: &str) -> Self {
        const NAMES: [(&str, Medium); 7] = [
            ("GPU", Medium::Gpu),
            ("CPU", Medium::Host),
            ("CPU_PINNED", Medium::Host),
            ("CPU_TIER1", Medium::Host),
            ("CPU_TIER2", Medium::Host),
            ("DISK", Medium::Disk),
            ("EXTERNAL", Medium::External),
        ];
        NAMES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map_or(Self::Other, |&(_, medium)| medium)
    }
}

/// The weights a block was computed with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub enum Adapter {
    /// The weights of the model.
    #[default]
    Base,
    /// The weights of the LoRA adapter that requests select by this name.
    Named(Box<str>),
    /// The weights of an adapter for which the engine sends only a number (vLLM before 0.16), so
    /// that no request can be matched with it.
    Unnamed,
}

/// The kind of attention in the layers of a KV-cache group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Attention {
    /// Not contained in the event: engines without groups, and vLLM before 0.22.
    #[default]
    Unspecified,
    /// Attention to all earlier tokens: a block can be reused only if all blocks before it can be.
    Full,
    /// A window, a recurrent state, or an unknown kind: other rules apply to the removal and reuse
    /// of blocks.
    Other,
}

impl Attention {
    /// Parses vLLM's `kv_cache_spec_kind`.
    fn from_kind(kind: &[u8]) -> Self {
        match kind {
            b"full_attention" | b"mla_attention" | b"sink_full_attention" => Self::Full,
            _ => Self::Other,
        }
    }
}

/// An input of one block's content besides tokens, adapter and salt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockExtra {
    /// The block, as an index into the event's hashes.
    pub block: u32,
    /// The input. A block with several inputs has one entry for each.
    pub key: ExtraKey,
}

/// The kind of an additional input of a block.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExtraKey {
    /// Part of an image or a sound.
    Media {
        /// The engine's hash of the medium, or the `uuid` that the request gave it.
        id: Box<str>,
        /// Start of the medium, in tokens from the start of the block; negative if the medium
        /// starts before the block.
        offset: i64,
    },
    /// A text of unspecified meaning. Older releases send the identifiers of media in this form.
    Text(Box<str>),
    /// Any other input, such as a digest of prompt embeddings, in its original encoding.
    Encoded(Box<[u8]>),
}
