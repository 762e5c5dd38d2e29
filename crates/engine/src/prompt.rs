//! A prompt as it is hashed, and the input that is only counted.

/// The part of a prompt that can be compared with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, or the canonical bytes of a conversation. The canonical bytes of an earlier turn are a
    /// prefix of those of a later turn, whatever the formatting of the JSON. Not always UTF-8.
    Text(Vec<u8>),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// The part of a request that counts as load but is not hashed: input from the first image, sound
/// or similar part on, and the prompts of a batch after the first
/// [`MAX_BATCH_PROMPTS`](foresee_core::batch::MAX_BATCH_PROMPTS).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnhashedInput {
    /// Bytes of text.
    pub bytes: usize,
    /// Tokens, including those assumed for images and other media.
    pub tokens: usize,
}

impl UnhashedInput {
    /// Tokens assumed for one image, sound or similar part. Such parts have from a hundred to a few
    /// thousand tokens, and their length in bytes does not indicate how many.
    const TOKENS_PER_MEDIUM: usize = 1024;

    /// Counts further input.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.tokens += other.tokens;
    }

    /// Counts one image, sound or similar part.
    pub(crate) fn add_media(&mut self) {
        self.tokens += Self::TOKENS_PER_MEDIUM;
    }
}
