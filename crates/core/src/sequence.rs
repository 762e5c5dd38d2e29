//! A prompt as the prefix cache sees it: a chain of sequence hashes, one per full block.
//!
//! A *sequence hash* stands for all tokens from the first to the end of its block, so two
//! prompts with an equal hash at position `i` have equal tokens in blocks `0..=i`. Everything
//! else in this crate rests on that fact: common prefixes are found by bisection, and sets of
//! workers along a prompt are nested.
//!
//! Blocks are hashed one by one with rapidhash (their hashes do not depend on each other, so
//! the processor overlaps them), then chained with one multiplication a block.

use std::hash::Hasher;
use std::num::NonZeroU32;
use std::sync::Arc;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_inline};

/// What is beyond this length of a prompt does not count: no engine takes it.
const MOST_TOKENS: usize = u32::MAX as usize;

/// Identifies a prefix: all tokens up to and including one full block, and the salt.
pub type SequenceHash = u64;

/// What must never share a prefix, folded into one number: pass it to the constructors of
/// [`Sequence`]. Requests match only when model, LoRA adapter and cache salt are all equal.
#[must_use]
pub fn salt(model: &str, lora: Option<&str>, cache_salt: Option<&str>) -> u64 {
    // A length before each part keeps ("ab", "c") apart from ("a", "bc").
    let mut folded = 0;
    for part in [Some(model), lora, cache_salt] {
        let length = part.map_or(u64::MAX, |text| text.len() as u64);
        folded = chain(folded, length);
        if let Some(text) = part {
            folded = chain(folded, hash_bytes(text.as_bytes()));
        }
    }
    folded
}

/// A prompt cut into blocks and hashed. Cheap to clone: the hashes are shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    hashes: Arc<[SequenceHash]>,
    tokens: u32,
    block_size: NonZeroU32,
    is_estimate: bool,
}

impl Sequence {
    /// Hashes token ids. `block_size` is in tokens; the partial last block has no hash.
    #[must_use]
    pub fn from_tokens(tokens: &[u32], block_size: NonZeroU32, salt: u64) -> Self {
        let tokens = &tokens[..tokens.len().min(MOST_TOKENS)];
        let blocks = tokens.chunks_exact(block_size.get() as usize);
        Self {
            hashes: chain_hashes(blocks.map(bytemuck::cast_slice::<u32, u8>), salt),
            tokens: tokens.len() as u32,
            block_size,
            is_estimate: false,
        }
    }

    /// Stands in for [`Sequence::from_tokens`] where there is no tokenizer: cuts the prompt's
    /// bytes into pieces of `bytes_per_token × block_size` bytes, each of which counts as one
    /// block. Equal text has equal pieces, so prefixes are found as well as with tokens; only
    /// the token count is an estimate.
    ///
    /// Sequences cut at different `bytes_per_token` never match each other.
    #[must_use]
    pub fn from_text(text: &[u8], bytes_per_token: f64, block_size: NonZeroU32, salt: u64) -> Self {
        let piece = bytes_per_piece(bytes_per_token, block_size);
        let most_bytes = piece.saturating_mul(MOST_TOKENS / block_size.get() as usize);
        let text = &text[..text.len().min(most_bytes)];
        let salt = chain(salt, piece as u64);
        let tokens = (text.len() as u128 * u128::from(block_size.get())).div_ceil(piece as u128);
        Self {
            hashes: chain_hashes(text.chunks_exact(piece), salt),
            tokens: tokens as u32,
            block_size,
            is_estimate: true,
        }
    }

    /// The prompt followed by `ids`, where it is of tokens; `end` is its own.
    #[must_use]
    pub fn followed_by_tokens(&self, end: &OpenEnd, ids: &[u32]) -> Self {
        self.followed_by(end, bytemuck::cast_slice(ids))
    }

    /// The prompt followed by `text`, where it is of text; `end` is its own.
    #[must_use]
    pub fn followed_by_text(&self, end: &OpenEnd, text: &[u8]) -> Self {
        self.followed_by(end, text)
    }

    fn followed_by(&self, end: &OpenEnd, more: &[u8]) -> Self {
        let content = [&end.rest, more].concat();
        let last = self.hashes.last().copied().unwrap_or(end.salt);
        let further = chain_hashes(content.chunks_exact(end.bytes_per_block), last);
        let hashes: Arc<[SequenceHash]> = [&self.hashes[..], &further[..]].concat().into();
        let rest = content.len() % end.bytes_per_block;
        let blocks = hashes.len() as u64 * u64::from(self.block_size.get());
        let partial = rest as u64 * u64::from(self.block_size.get());
        let tokens = blocks + partial.div_ceil(end.bytes_per_block as u64);
        Self {
            hashes,
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            block_size: self.block_size,
            is_estimate: self.is_estimate,
        }
    }

    /// A prompt of known length and unknown content: it is booked, and matches nothing.
    #[must_use]
    pub fn opaque(tokens: u32, block_size: NonZeroU32) -> Self {
        Self {
            hashes: Arc::from([]),
            tokens,
            block_size,
            is_estimate: false,
        }
    }

    /// Adds `tokens` whose content is not hashed, after the hashed ones: what follows an image.
    #[must_use]
    pub fn with_opaque_tail(mut self, tokens: u32) -> Self {
        self.tokens = self.tokens.saturating_add(tokens);
        self
    }

    /// The sequence hash of each full block whose content is known, in order.
    #[must_use]
    pub fn hashes(&self) -> &[SequenceHash] {
        &self.hashes
    }

    pub(crate) fn shared_hashes(&self) -> &Arc<[SequenceHash]> {
        &self.hashes
    }

    /// The hashes that fill whole blocks of an engine whose blocks are `stride` of these.
    pub(crate) fn whole_hashes(&self, stride: u32) -> Arc<[SequenceHash]> {
        match self.hashes.len() % stride as usize {
            0 => Arc::clone(&self.hashes),
            partial => Arc::from(&self.hashes[..self.hashes.len() - partial]),
        }
    }

    /// Length in tokens, the partial last block included.
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Whether its blocks are pieces of text, of which an engine's are only about as long.
    #[must_use]
    pub fn is_estimate(&self) -> bool {
        self.is_estimate
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_size(&self) -> NonZeroU32 {
        self.block_size
    }

    /// Blocks the prompt occupies, the partial last one included.
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.tokens.div_ceil(self.block_size.get())
    }

    /// The most leading blocks an engine can take from its cache: never the whole prompt,
    /// because the last token must be computed to get logits.
    #[must_use]
    pub fn reusable_blocks(&self) -> u32 {
        self.tokens.saturating_sub(1) / self.block_size.get()
    }
}

/// How a prompt's last, partial block begins, so that its [`Sequence`] can go on once it is known
/// what follows the prompt.
#[derive(Clone, Debug)]
pub struct OpenEnd {
    rest: Vec<u8>,
    bytes_per_block: usize,
    /// What the first block is chained to.
    salt: u64,
}

impl OpenEnd {
    /// The end of a prompt that [`Sequence::from_tokens`] hashes.
    #[must_use]
    pub fn of_tokens(tokens: &[u32], block_size: NonZeroU32, salt: u64) -> Self {
        let rest = tokens.chunks_exact(block_size.get() as usize).remainder();
        Self {
            rest: bytemuck::cast_slice(rest).to_vec(),
            bytes_per_block: size_of::<u32>() * block_size.get() as usize,
            salt,
        }
    }

    /// The end of a prompt that [`Sequence::from_text`] hashes.
    #[must_use]
    pub fn of_text(text: &[u8], bytes_per_token: f64, block_size: NonZeroU32, salt: u64) -> Self {
        let piece = bytes_per_piece(bytes_per_token, block_size);
        Self {
            rest: text.chunks_exact(piece).remainder().to_vec(),
            bytes_per_block: piece,
            salt: chain(salt, piece as u64),
        }
    }

    /// Bytes of content that make a block.
    #[must_use]
    pub fn bytes_per_block(&self) -> usize {
        self.bytes_per_block
    }
}

/// How many bytes of text stand for one block.
fn bytes_per_piece(bytes_per_token: f64, block_size: NonZeroU32) -> usize {
    let bytes = (bytes_per_token * f64::from(block_size.get())).round();
    (bytes as usize).max(1)
}

/// Learns how many bytes of prompt text stand for one token, from the prompt-token counts that
/// responses report.
///
/// The ratio in use changes only when the observed one has drifted away from it, because every
/// change makes earlier text sequences unrecognisable.
#[derive(Clone, Debug)]
pub struct BytesPerToken {
    in_use: f64,
    bytes: f64,
    tokens: f64,
    samples: u32,
}

impl Default for BytesPerToken {
    fn default() -> Self {
        Self {
            in_use: 4.0,
            bytes: 0.0,
            tokens: 0.0,
            samples: 0,
        }
    }
}

impl BytesPerToken {
    const SAMPLES_BEFORE_CHANGE: u32 = 16;
    const DRIFT_BEFORE_CHANGE: f64 = 0.15;
    /// Old samples count for less: the weight of one `n` samples ago is `FORGETTING^n`.
    const FORGETTING: f64 = 0.99;

    /// The ratio to cut text with.
    #[must_use]
    pub fn get(&self) -> f64 {
        self.in_use
    }

    /// Takes one prompt's size as sent, in bytes, and as the engine counted it. Returns whether
    /// the ratio in use changed.
    pub fn observe(&mut self, prompt_bytes: usize, prompt_tokens: u32) -> bool {
        if prompt_bytes == 0 || prompt_tokens == 0 {
            return false;
        }
        self.bytes = self.bytes * Self::FORGETTING + prompt_bytes as f64;
        self.tokens = self.tokens * Self::FORGETTING + f64::from(prompt_tokens);
        self.samples = self.samples.saturating_add(1);
        let observed = (self.bytes / self.tokens).clamp(0.25, 64.0);
        let drift = (observed / self.in_use - 1.0).abs();
        let change =
            self.samples >= Self::SAMPLES_BEFORE_CHANGE && drift > Self::DRIFT_BEFORE_CHANGE;
        if change {
            self.in_use = observed;
        }
        change
    }
}

/// The sequence hash of a block of `tokens` that follows a prefix with hash `previous`; the salt,
/// if it is the first.
#[must_use]
pub fn extend(previous: SequenceHash, tokens: &[u32]) -> SequenceHash {
    chain(previous, hash_bytes(bytemuck::cast_slice(tokens)))
}

fn chain_hashes<'a>(blocks: impl ExactSizeIterator<Item = &'a [u8]>, salt: u64) -> Arc<[u64]> {
    let mut previous = salt;
    // Collecting an exact-size iterator into an Arc allocates once.
    blocks
        .map(|block| {
            previous = chain(previous, hash_bytes(block));
            previous
        })
        .collect()
}

#[inline]
fn hash_bytes(bytes: &[u8]) -> u64 {
    rapidhash_v3_inline::<true, false, false>(bytes, &DEFAULT_RAPID_SECRETS)
}

/// Extends a chain by one link: multiply to 128 bits and fold, the mixer of wyhash and rapidhash.
#[inline]
fn chain(previous: u64, link: u64) -> u64 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let product = u128::from(previous ^ ODD) * u128::from(link ^ ODD.rotate_left(32) | 1);
    ((product as u64) ^ ((product >> 64) as u64)).wrapping_add(link)
}

/// Sequence hashes are uniform already; hashing them again would double the cost of a look-up.
#[derive(Debug, Default)]
pub(crate) struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        debug_assert!(false, "only u64 keys are used, not {bytes:?}");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
