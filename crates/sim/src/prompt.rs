//! Prompts as descriptions from which tokens can be generated. A workload fits into memory, and
//! equal parts of different prompts become equal tokens.

use std::num::NonZeroU32;
use std::ops::Range;

use foresee_core::sequence::{Sequence, SequenceHash};

/// Number of different tokens in prompts: the vocabulary of a large model.
pub const VOCABULARY: NonZeroU32 = NonZeroU32::new(1 << 17).expect("not zero");

/// The first tokens of a stream. Equal streams have equal tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRun {
    /// Number of an endless sequence of random tokens.
    pub stream: u64,
    /// Length of the run.
    pub tokens: u32,
}

/// A prompt, or a prompt followed by its output: a list of token runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    runs: Vec<TokenRun>,
}

impl Prompt {
    /// Returns an empty prompt.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the first `tokens` tokens of a stream.
    #[must_use]
    pub fn then(mut self, stream: u64, tokens: u32) -> Self {
        self.runs.push(TokenRun { stream, tokens });
        self
    }

    /// Returns the token runs in order.
    #[must_use]
    pub fn runs(&self) -> &[TokenRun] {
        &self.runs
    }

    /// Returns the length in tokens.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.runs.iter().map(|run| run.tokens).sum()
    }

    /// Returns whether the prompt has no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the token ids, uniform in `0..vocabulary`.
    pub fn tokens(&self, vocabulary: NonZeroU32) -> impl Iterator<Item = u32> {
        self.tokens_in(0..u32::MAX, vocabulary)
    }

    /// Returns the token ids at a range of positions, as far as the prompt has tokens there.
    pub(crate) fn tokens_in(
        &self,
        positions: Range<u32>,
        vocabulary: NonZeroU32,
    ) -> impl Iterator<Item = u32> {
        let mut end = 0_u32;
        self.runs.iter().flat_map(move |run| {
            let start = end;
            end += run.tokens;
            let within = |position: u32| u64::from(position.clamp(start, end) - start);
            let stream = mix(run.stream);
            (within(positions.start)..within(positions.end)).map(move |position| {
                let random = mix(stream.wrapping_add(position)) >> 32;
                // Scales 32 random bits to the vocabulary without a division.
                ((random * u64::from(vocabulary.get())) >> 32) as u32
            })
        })
    }

    /// Returns the blocks of the prompt with their hashes, as a router and an engine compute them.
    #[must_use]
    pub fn sequence(&self, block_size: NonZeroU32) -> Sequence {
        let tokens: Vec<u32> = self.tokens(VOCABULARY).collect();
        Sequence::from_tokens(&tokens, block_size, 0)
    }
}

/// Mixes the bits of a number, so that neighbouring numbers become unrelated: the finaliser of
/// splitmix64 (Steele et al., 2014).
#[must_use]
pub fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

/// Returns the hashes of engine blocks of `ratio` router blocks each. The hash of an engine block
/// is that of its last router block, because a sequence hash covers the whole prefix. Router blocks
/// at the end that do not fill an engine block are left out.
pub(crate) fn coarser_hashes(
    hashes: &[SequenceHash],
    ratio: u32,
) -> impl Iterator<Item = SequenceHash> + '_ {
    let ratio = ratio.max(1) as usize;
    hashes.iter().skip(ratio - 1).step_by(ratio).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();

    #[test]
    fn equal_runs_share_exactly_their_blocks() {
        let a = Prompt::new().then(1, 512).then(2, 512);
        let b = Prompt::new().then(1, 512).then(3, 512);
        let (a, b) = (a.sequence(BLOCK), b.sequence(BLOCK));
        let equal = a.hashes().iter().zip(b.hashes());
        assert_eq!(
            equal.filter(|(hash, other)| hash == other).count(),
            512 / 16
        );
        assert_eq!(a.tokens(), 1024);
    }

    #[test]
    fn a_shorter_run_is_the_beginning_of_a_longer_one() {
        let vocabulary = NonZeroU32::new(4096).unwrap();
        let long: Vec<u32> = Prompt::new().then(9, 100).tokens(vocabulary).collect();
        let short: Vec<u32> = Prompt::new().then(9, 40).tokens(vocabulary).collect();
        assert_eq!(short, long[..40]);
        assert!(long.iter().all(|token| *token < 4096));
    }

    #[test]
    fn tokens_at_some_positions_are_a_part_of_all_tokens() {
        let vocabulary = NonZeroU32::new(4096).unwrap();
        let prompt = Prompt::new().then(1, 10).then(2, 0).then(3, 20).then(1, 5);
        let all: Vec<u32> = prompt.tokens(vocabulary).collect();
        for (start, end) in [(0, 35), (0, 0), (3, 8), (5, 31), (10, 30), (29, 90)] {
            let some: Vec<u32> = prompt.tokens_in(start..end, vocabulary).collect();
            assert_eq!(some, all[start as usize..all.len().min(end as usize)]);
        }
    }
}
