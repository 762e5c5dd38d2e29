//! Prompts as recipes: what their tokens are made from, so that a workload fits in memory and
//! equal parts of different prompts are equal tokens.

use std::num::NonZeroU32;
use std::ops::Range;

use foresee_core::sequence::Sequence;

/// How many different tokens prompts are made of, as many as a large model has.
pub(crate) const VOCABULARY: NonZeroU32 = NonZeroU32::new(1 << 17).expect("not zero");

/// A run of tokens from the beginning of a stream. Equal streams have equal tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Names an endless sequence of random tokens.
    pub stream: u64,
    /// How many of them.
    pub tokens: u32,
}

/// A prompt, or a prompt and its answer: pieces one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    pieces: Vec<Piece>,
}

impl Prompt {
    /// An empty prompt.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same prompt with a piece added to its end.
    #[must_use]
    pub fn then(mut self, stream: u64, tokens: u32) -> Self {
        self.pieces.push(Piece { stream, tokens });
        self
    }

    /// Its pieces, in order.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Length in tokens.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.pieces.iter().map(|piece| piece.tokens).sum()
    }

    /// Whether it has no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Its token ids, uniform in `0..vocabulary`.
    pub fn tokens(&self, vocabulary: NonZeroU32) -> impl Iterator<Item = u32> {
        self.tokens_in(0..u32::MAX, vocabulary)
    }

    /// Those of its token ids that are at some positions.
    pub(crate) fn tokens_in(
        &self,
        positions: Range<u32>,
        vocabulary: NonZeroU32,
    ) -> impl Iterator<Item = u32> {
        let mut behind = 0_u32;
        self.pieces.iter().flat_map(move |piece| {
            let start = behind;
            behind += piece.tokens;
            let within = |position: u32| u64::from(position.clamp(start, behind) - start);
            let stream = mix(piece.stream);
            (within(positions.start)..within(positions.end)).map(move |position| {
                let random = mix(stream.wrapping_add(position)) >> 32;
                // Scales 32 random bits to the vocabulary without a division.
                ((random * u64::from(vocabulary.get())) >> 32) as u32
            })
        })
    }

    /// Its tokens, cut and hashed as a router and an engine see them.
    #[must_use]
    pub fn sequence(&self, block_size: NonZeroU32) -> Sequence {
        let tokens: Vec<u32> = self.tokens(VOCABULARY).collect();
        Sequence::from_tokens(&tokens, block_size, 0)
    }
}

/// The finaliser of splitmix64: neighbouring numbers become unrelated ones.
pub(crate) fn mix(number: u64) -> u64 {
    let number = number.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: NonZeroU32 = NonZeroU32::new(16).unwrap();

    #[test]
    fn equal_pieces_share_exactly_their_blocks() {
        let one = Prompt::new().then(1, 512).then(2, 512);
        let other = Prompt::new().then(1, 512).then(3, 512);
        let (one, other) = (one.sequence(BLOCK), other.sequence(BLOCK));
        let equal = one.hashes().iter().zip(other.hashes());
        assert_eq!(equal.filter(|(a, b)| a == b).count(), 512 / 16);
        assert_eq!(one.tokens(), 1024);
    }

    #[test]
    fn a_shorter_piece_is_the_beginning_of_a_longer_one() {
        let vocabulary = NonZeroU32::new(4096).unwrap();
        let long: Vec<u32> = Prompt::new().then(9, 100).tokens(vocabulary).collect();
        let short: Vec<u32> = Prompt::new().then(9, 40).tokens(vocabulary).collect();
        assert_eq!(short, long[..40]);
        assert!(long.iter().all(|token| *token < 4096));
    }

    #[test]
    fn tokens_at_some_positions_are_those_of_the_whole() {
        let vocabulary = NonZeroU32::new(4096).unwrap();
        let prompt = Prompt::new().then(1, 10).then(2, 0).then(3, 20).then(1, 5);
        let all: Vec<u32> = prompt.tokens(vocabulary).collect();
        for (start, end) in [(0, 35), (0, 0), (3, 8), (5, 31), (10, 30), (29, 90)] {
            let some: Vec<u32> = prompt.tokens_in(start..end, vocabulary).collect();
            assert_eq!(some, all[start as usize..all.len().min(end as usize)]);
        }
    }
}
