//! Prompts as the prefix cache sees them: chains of sequence hashes, one per full block.
//!
//! A *sequence hash* identifies all tokens from the first to the end of its block. Two prompts with
//! an equal hash at position `i` therefore have equal tokens in blocks `0..=i`. The rest of this
//! crate relies on that: common prefixes are found by bisection, and the sets of workers that have
//! the blocks of a prompt are nested.
//!
//! Blocks are hashed one by one with rapidhash. Their hashes do not depend on each other, so the
//! processor computes several at a time. They are then chained with one multiplication per block.

use std::hash::Hasher;
use std::num::NonZeroU32;
use std::sync::Arc;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_inline};

/// Maximum length of a prompt in tokens. The rest of a longer prompt is ignored, because no engine
/// accepts it.
const MAX_TOKENS: usize = u32::MAX as usize;

/// Hash that identifies a prefix: the salt, and all tokens up to the end of a full block.
pub type SequenceHash = u64;

/// Returns a salt for the constructors of [`Sequence`], which combines everything that must be
/// equal for two prompts to share a prefix. Prompts match only if model, LoRA adapter and cache
/// salt are all equal. `None` differs from an empty string.
#[must_use]
pub fn prefix_salt(model: &str, lora: Option<&str>, cache_salt: Option<&str>) -> u64 {
    // The length before each part keeps ("ab", "c") apart from ("a", "bc").
    let mut folded = 0;
    for part in [Some(model), lora, cache_salt] {
        let length = part.map_or(u64::MAX, |text| text.len() as u64);
        folded = mix_hash(folded, length);
        if let Some(text) = part {
            folded = mix_hash(folded, hash_block(text.as_bytes()));
        }
    }
    folded
}

/// Prompt that was divided into blocks and hashed. Cheap to clone, because clones share the hashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Sequence hash of each full block whose content is known.
    hashes: Arc<[SequenceHash]>,
    /// Length of the prompt in tokens, blocks without a hash included.
    tokens: u32,
    /// Tokens per block.
    block_size: NonZeroU32,
    /// Whether the blocks are text blocks, so that `tokens` is an estimate.
    is_text_based: bool,
}

impl Sequence {
    /// Hashes a prompt of token ids. `block_size` is in tokens. A partial last block gets no hash.
    /// Tokens beyond [`u32::MAX`] are ignored.
    #[must_use]
    pub fn from_tokens(tokens: &[u32], block_size: NonZeroU32, salt: u64) -> Self {
        let tokens = &tokens[..tokens.len().min(MAX_TOKENS)];
        let blocks = tokens.chunks_exact(block_size.get() as usize);
        Self {
            hashes: hash_chain_of(blocks.map(bytemuck::cast_slice::<u32, u8>), salt),
            tokens: tokens.len() as u32,
            block_size,
            is_text_based: false,
        }
    }

    /// Hashes a prompt of text, where no tokenizer is available. Divides the text into text blocks
    /// of `bytes_per_token × block_size` bytes (rounded, at least one), each of which counts as one
    /// block. Equal text has equal text blocks, so prefixes are found as with tokens; only the
    /// token count is an estimate. Text beyond [`u32::MAX`] estimated tokens is ignored.
    ///
    /// Sequences with different sizes of text blocks never match each other.
    #[must_use]
    pub fn from_text(text: &[u8], bytes_per_token: f64, block_size: NonZeroU32, salt: u64) -> Self {
        let text_block = bytes_per_text_block(bytes_per_token, block_size);
        let max_bytes = text_block.saturating_mul(MAX_TOKENS / block_size.get() as usize);
        let text = &text[..text.len().min(max_bytes)];
        let salt = mix_hash(salt, text_block as u64);
        let tokens =
            (text.len() as u128 * u128::from(block_size.get())).div_ceil(text_block as u128);
        Self {
            hashes: hash_chain_of(text.chunks_exact(text_block), salt),
            tokens: tokens as u32,
            block_size,
            is_text_based: true,
        }
    }

    /// Returns the prompt with `tokens` appended. `end` must be the partial block of this prompt,
    /// which must have been hashed with [`from_tokens`](Self::from_tokens).
    #[must_use]
    pub fn extended_with_tokens(&self, end: &PartialBlock, tokens: &[u32]) -> Self {
        self.extended_with(end, bytemuck::cast_slice(tokens))
    }

    /// Returns the prompt with `text` appended. `end` must be the partial block of this prompt,
    /// which must have been hashed with [`from_text`](Self::from_text).
    #[must_use]
    pub fn extended_with_text(&self, end: &PartialBlock, text: &[u8]) -> Self {
        self.extended_with(end, text)
    }

    /// Returns the prompt with bytes of content appended after those of its partial block. `end`
    /// must be the partial block of this prompt, which is not checked. An unhashed tail of the
    /// prompt is dropped.
    fn extended_with(&self, end: &PartialBlock, added: &[u8]) -> Self {
        let content = [&end.bytes, added].concat();
        let previous = self.hashes.last().copied().unwrap_or(end.salt);
        let added_hashes = hash_chain_of(content.chunks_exact(end.bytes_per_block), previous);
        let hashes: Arc<[SequenceHash]> = [&self.hashes[..], &added_hashes[..]].concat().into();
        let partial_bytes = content.len() % end.bytes_per_block;
        let blocks = hashes.len() as u64 * u64::from(self.block_size.get());
        let partial_tokens = partial_bytes as u64 * u64::from(self.block_size.get());
        let tokens = blocks + partial_tokens.div_ceil(end.bytes_per_block as u64);
        Self {
            hashes,
            tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
            block_size: self.block_size,
            is_text_based: self.is_text_based,
        }
    }

    /// Returns a prompt of known length and unknown content. It can be booked, and matches no other
    /// prompt.
    #[must_use]
    pub fn unhashed(tokens: u32, block_size: NonZeroU32) -> Self {
        Self {
            hashes: Arc::from([]),
            tokens,
            block_size,
            is_text_based: false,
        }
    }

    /// Appends `tokens` tokens without hashes, for content after an image.
    #[must_use]
    pub fn with_unhashed_tail(mut self, tokens: u32) -> Self {
        self.tokens = self.tokens.saturating_add(tokens);
        self
    }

    /// Returns the sequence hash of each full block whose content is known, in order.
    #[inline]
    #[must_use]
    pub fn hashes(&self) -> &[SequenceHash] {
        &self.hashes
    }

    /// Returns the sequence hashes as a shared allocation.
    pub(crate) fn hash_chain(&self) -> &Arc<[SequenceHash]> {
        &self.hashes
    }

    /// Returns the sequence hashes up to the last that ends a whole block of an engine, which has
    /// `engine_block_ratio` of these blocks. The ratio must not be 0. Copies the hashes only if
    /// some are left out.
    #[must_use]
    pub fn hash_chain_aligned_to(&self, engine_block_ratio: u32) -> Arc<[SequenceHash]> {
        match self.hashes.len() % engine_block_ratio as usize {
            0 => Arc::clone(&self.hashes),
            partial => Arc::from(&self.hashes[..self.hashes.len() - partial]),
        }
    }

    /// Returns the length in tokens, the partial last block included.
    #[inline]
    #[must_use]
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Returns whether the blocks are text blocks, whose length only approximates that of an engine
    /// block.
    #[inline]
    #[must_use]
    pub fn is_text_based(&self) -> bool {
        self.is_text_based
    }

    /// Returns the number of tokens per block.
    #[inline]
    #[must_use]
    pub fn block_size(&self) -> NonZeroU32 {
        self.block_size
    }

    /// Returns the number of blocks that the prompt occupies, the partial last block included.
    #[inline]
    #[must_use]
    pub fn blocks(&self) -> u32 {
        self.tokens.div_ceil(self.block_size.get())
    }

    /// Returns the maximum number of leading blocks that an engine can take from its cache. Never
    /// the whole prompt, because the last token must be computed to get logits.
    #[inline]
    #[must_use]
    pub fn max_reusable_blocks(&self) -> u32 {
        self.tokens.saturating_sub(1) / self.block_size.get()
    }
}

/// Content of the last, partial block of a prompt. With it, [`Sequence`] can be extended once the
/// text or tokens after the prompt are known.
#[derive(Clone, Debug)]
pub struct PartialBlock {
    /// Content of the block, as token ids in memory order or as text.
    bytes: Vec<u8>,
    /// Bytes of content in a full block.
    bytes_per_block: usize,
    /// Salt with which the hash chain of the prompt starts.
    salt: u64,
}

impl PartialBlock {
    /// Returns the partial block of a prompt that [`Sequence::from_tokens`] hashes with these
    /// arguments.
    #[must_use]
    pub fn from_tokens(tokens: &[u32], block_size: NonZeroU32, salt: u64) -> Self {
        let rest = tokens.chunks_exact(block_size.get() as usize).remainder();
        Self {
            bytes: bytemuck::cast_slice(rest).to_vec(),
            bytes_per_block: size_of::<u32>() * block_size.get() as usize,
            salt,
        }
    }

    /// Returns the partial block of a prompt that [`Sequence::from_text`] hashes with these
    /// arguments.
    #[must_use]
    pub fn from_text(text: &[u8], bytes_per_token: f64, block_size: NonZeroU32, salt: u64) -> Self {
        let text_block = bytes_per_text_block(bytes_per_token, block_size);
        Self {
            bytes: text.chunks_exact(text_block).remainder().to_vec(),
            bytes_per_block: text_block,
            salt: mix_hash(salt, text_block as u64),
        }
    }

    /// Returns the number of bytes of content in a full block.
    #[must_use]
    pub fn bytes_per_block(&self) -> usize {
        self.bytes_per_block
    }
}

/// Returns the number of bytes of text that stand for one block; at least one.
fn bytes_per_text_block(bytes_per_token: f64, block_size: NonZeroU32) -> usize {
    let bytes = (bytes_per_token * f64::from(block_size.get())).round();
    (bytes as usize).max(1)
}

/// Estimate of the bytes of prompt text per token, learned from the prompt token counts in
/// responses.
///
/// The ratio in use changes only when the observed ratio has drifted away from it, because text
/// sequences hashed with another ratio can no longer be matched.
#[derive(Clone, Debug)]
pub struct BytesPerToken {
    /// Ratio in use.
    active_ratio: f64,
    /// Weighted sum of the observed prompt sizes in bytes.
    bytes: f64,
    /// Sum of the observed prompt sizes in tokens, with the same weights.
    tokens: f64,
    /// Number of observed prompts.
    samples: u32,
}

impl Default for BytesPerToken {
    fn default() -> Self {
        Self {
            active_ratio: 4.0,
            bytes: 0.0,
            tokens: 0.0,
            samples: 0,
        }
    }
}

impl BytesPerToken {
    /// Number of observed prompts before the ratio may change.
    const SAMPLES_BEFORE_CHANGE: u32 = 16;
    /// Relative difference between observed ratio and ratio in use beyond which the ratio changes.
    const DRIFT_BEFORE_CHANGE: f64 = 0.15;
    /// Factor by which the weight of a sample falls with each later one: a sample `n` prompts ago
    /// has weight `FORGETTING^n`.
    const FORGETTING: f64 = 0.99;

    /// Returns an estimate that starts with this ratio, in bytes per token. A ratio that is not a
    /// number from 0.25 to 64 is replaced by the nearest one that is, or by the default.
    #[must_use]
    pub fn with_ratio(ratio: f64) -> Self {
        let mut estimate = Self::default();
        if !ratio.is_nan() {
            estimate.active_ratio = ratio.clamp(0.25, 64.0);
        }
        estimate
    }

    /// Returns the ratio to divide text with, in bytes per token.
    #[must_use]
    pub fn ratio(&self) -> f64 {
        self.active_ratio
    }

    /// Adds the size of one prompt, in bytes as sent and in tokens as counted by the engine. A size
    /// of zero is ignored. Returns whether the ratio in use changed; text sequences hashed before
    /// then match no new ones.
    pub fn observe(&mut self, prompt_bytes: usize, prompt_tokens: u32) -> bool {
        if prompt_bytes == 0 || prompt_tokens == 0 {
            return false;
        }
        self.bytes = self.bytes * Self::FORGETTING + prompt_bytes as f64;
        self.tokens = self.tokens * Self::FORGETTING + f64::from(prompt_tokens);
        self.samples = self.samples.saturating_add(1);
        let observed = (self.bytes / self.tokens).clamp(0.25, 64.0);
        let drift = (observed / self.active_ratio - 1.0).abs();
        let has_drifted =
            self.samples >= Self::SAMPLES_BEFORE_CHANGE && drift > Self::DRIFT_BEFORE_CHANGE;
        if has_drifted {
            self.active_ratio = observed;
        }
        has_drifted
    }
}

/// Returns the sequence hash of a block of `tokens` after a prefix with hash `previous`, which is
/// the salt for the first block.
#[must_use]
pub fn extend_hash(previous: SequenceHash, tokens: &[u32]) -> SequenceHash {
    mix_hash(previous, hash_block(bytemuck::cast_slice(tokens)))
}

/// Hashes the content of consecutive blocks, starting from the salt.
fn hash_chain_of<'a>(blocks: impl ExactSizeIterator<Item = &'a [u8]>, salt: u64) -> Arc<[u64]> {
    let mut previous = salt;
    // Collecting an iterator of exact size into an Arc allocates once.
    blocks
        .map(|block| {
            previous = mix_hash(previous, hash_block(block));
            previous
        })
        .collect()
}

/// Returns the hash of the content of one block, whatever precedes it.
#[inline]
fn hash_block(bytes: &[u8]) -> u64 {
    rapidhash_v3_inline::<true, false, false>(bytes, &DEFAULT_RAPID_SECRETS)
}

/// Extends a hash chain by one link: multiplies to 128 bits and folds the halves, the mixer of
/// wyhash and rapidhash.
#[inline]
fn mix_hash(previous: u64, link: u64) -> u64 {
    const ODD: u64 = 0x9E37_79B9_7F4A_7C15;
    let product = u128::from(previous ^ ODD) * u128::from(link ^ ODD.rotate_left(32) | 1);
    ((product as u64) ^ ((product >> 64) as u64)).wrapping_add(link)
}

/// Hasher that returns its `u64` key. Sequence hashes are uniform already, and hashing them again
/// would double the cost of a look-up.
#[derive(Debug, Default)]
pub struct IdentityHasher(u64);

impl Hasher for IdentityHasher {
    #[inline]
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        debug_assert!(
            false,
            "IdentityHasher takes only u64 keys, got bytes {bytes:?}"
        );
    }

    #[inline]
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
