//! KV-cache events: what vLLM and SGLang say about the blocks they cache.
//!
//! [`decode_batch`] reads every layout these engines have sent: events as arrays (vLLM up to
//! 0.23, older SGLang) and as maps, with fields added release by release. It looks fields up by
//! name or by the place they have kept, takes defaults for what is missing, and ignores what it
//! does not know. An event it cannot read is counted and left out; the others of its batch stay.
//!
//! What is decoded is what was said. What it means for an index (stores and removes to be
//! counted, unknown parents, groups that are windows) is for the index to know.
mod decode;
mod extra_keys;
mod framing;

pub use decode::{DecodeError, decode_batch};
pub use framing::{FrameError, Message, Replay, parse_message, parse_replay, replay_request};

/// The events of one engine step, in order. Order matters: what is cleared may be stored again
/// in the same batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EventBatch {
    /// When the engine sent it, by its clock: seconds since 1970.
    pub timestamp: Option<f64>,
    /// What could be read.
    pub events: Vec<Event>,
    /// Which data-parallel rank speaks. Engines without ranks say 0 or nothing.
    pub data_parallel_rank: Option<u32>,
    /// Events left out because they could not be read. What they said is lost: knowledge of this
    /// worker is no longer exact.
    pub malformed: u32,
    /// Events left out because they are of a type not known here.
    pub unknown: u32,
    /// Whether the payload broke off or could not be followed to its end, so that an unknown
    /// number of events is missing.
    pub truncated: bool,
}

/// Something that happened to an engine's cache.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks came to be cached.
    Stored(BlockStored),
    /// Blocks are no longer cached.
    Removed(BlockRemoved),
    /// Nothing is cached any more.
    Cleared {
        /// Where; `None`, as vLLM and SGLang say it, means everywhere.
        medium: Option<Medium>,
    },
}

/// A run of blocks of one sequence that came to be cached.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockStored {
    /// The engine's names of the blocks, in order. There may be fewer than `tokens` has blocks,
    /// or none: groups that are windows do not name what lies before the window.
    pub hashes: Vec<BlockKey>,
    /// The block before the first one; `None` if the first is the first of its sequence.
    pub parent: Option<BlockKey>,
    /// The token ids, all blocks one after the other. Empty where the engine does not know them,
    /// as in news from an offloading tier.
    ///
    /// SGLang with a draft model (EAGLE) sends each token paired with the one after it. Here are
    /// the first of each pair, which are the tokens of the blocks, and the last pair's second is
    /// `next_token`. Ids that do not fit are cut to 32 bits: they are placeholders, which no
    /// vocabulary has.
    pub tokens: Vec<u32>,
    /// The token after the last one, if tokens came as pairs. The engine then takes a block from
    /// its cache only for a prompt that goes on with the same token.
    pub next_token: Option<u32>,
    /// Tokens per block; 0 if not said.
    pub block_size: u32,
    /// The weights the blocks were computed with.
    pub adapter: Adapter,
    /// The request's `cache_salt`. vLLM tells it only with the first block of a sequence; later
    /// blocks inherit it through their parent.
    pub cache_salt: Option<Box<str>>,
    /// Where they are.
    pub medium: Medium,
    /// Which of the model's KV-cache groups they belong to. Equal hashes in different groups are
    /// different blocks.
    pub group: Option<u32>,
    /// What that group attends to.
    pub attention: Attention,
    /// The group's window in tokens, if it has one.
    pub sliding_window: Option<u32>,
    /// What, besides tokens, adapter and salt, the content of blocks depends on. Most have
    /// nothing; those that have are listed in order.
    pub extras: Vec<BlockExtra>,
}

impl BlockStored {
    /// Each block with its tokens; `None` if it cannot be told which tokens are whose, because
    /// hashes, tokens and block size do not fit together.
    #[must_use]
    pub fn blocks(&self) -> Option<impl ExactSizeIterator<Item = (BlockKey, &[u32])>> {
        let size = usize::try_from(self.block_size).ok()?;
        let fits = size > 0 && self.hashes.len().checked_mul(size)? == self.tokens.len();
        fits.then(|| self.hashes.iter().copied().zip(self.tokens.chunks(size)))
    }
}

/// Blocks that are no longer cached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockRemoved {
    /// The engine's names of the blocks.
    pub hashes: Vec<BlockKey>,
    /// Where they were. They may still be in another place.
    pub medium: Medium,
    /// Which KV-cache group they belonged to.
    pub group: Option<u32>,
}

/// An engine's name for a block: to be compared, never computed.
///
/// Engines use numbers of 64 bits, signed or not, or digests of 16 or 32 bytes. All become 64
/// bits: numbers as they are, digests cut to their last eight bytes, which is how vLLM itself
/// makes its numbers, so a block has one key however its engine is configured. Whole digests
/// would be five times the size, in an index that counts its bytes per block.
///
/// Two of *n* blocks share a key with a probability of about *n*²/2⁶⁵: for a worker with a
/// million blocks, 3 in 100 million. The worst that happens then is one wrong prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockKey(pub u64);

impl BlockKey {
    /// The key of a digest: its last eight bytes, big-endian; all of it if it is shorter.
    #[must_use]
    pub fn from_digest(digest: &[u8]) -> Self {
        match digest.last_chunk() {
            Some(&last) => Self(u64::from_be_bytes(last)),
            None => Self(digest.iter().fold(0, |key, &b| key << 8 | u64::from(b))),
        }
    }
}

/// A place where blocks are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Medium {
    /// The device's memory. Also what is meant where an engine does not say.
    #[default]
    Gpu,
    /// The host's memory.
    Host,
    /// The host's disk.
    Disk,
    /// A store shared with other engines.
    External,
    /// A place not known here.
    Other,
}

impl Medium {
    /// Understands the names engines use, in any case.
    fn named(name: &str) -> Self {
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
    /// The model's own.
    #[default]
    Base,
    /// Those of the LoRA adapter that requests ask for by this name.
    Named(Box<str>),
    /// Those of an adapter the engine only numbers (vLLM before 0.16): no request can be matched
    /// with it.
    Unnamed,
}

/// What the layers of a KV-cache group attend to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Attention {
    /// Not said: engines without groups, and vLLM before 0.22.
    #[default]
    Unsaid,
    /// Everything before: a block is of use only after all blocks before it.
    Full,
    /// A window, a state, or what is not known here: blocks leave and are of use by other rules.
    Other,
}

impl Attention {
    /// Understands vLLM's `kv_cache_spec_kind`.
    fn of_kind(kind: &[u8]) -> Self {
        match kind {
            b"full_attention" | b"mla_attention" | b"sink_full_attention" => Self::Full,
            _ => Self::Other,
        }
    }
}

/// What the content of one block depends on besides tokens, adapter and salt.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlockExtra {
    /// Which block: an index into the event's hashes.
    pub block: u32,
    /// One of the things it depends on. A block that has several is listed as often.
    pub key: ExtraKey,
}

/// Something a block depends on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ExtraKey {
    /// Part of a picture or sound that has this identifier.
    Media {
        /// The engine's hash of it, or the `uuid` the request gave it.
        id: Box<str>,
        /// Where it begins, in tokens from the start of the block; negative if before.
        offset: i64,
    },
    /// A text whose meaning is not said. In older releases the identifiers of media look so.
    Text(Box<str>),
    /// Anything else, such as a digest of prompt embeddings, as it was encoded.
    Encoded(Box<[u8]>),
}
