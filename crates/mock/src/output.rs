//! Text without a tokenizer: four bytes of a prompt are one token, and the tokens of an output are
//! words of four bytes. An output that is part of the next turn's prompt therefore becomes the same
//! tokens again.

use std::ops::Range;

use foresee_sim::prompt::mix;

/// Splits the bytes of a prompt into tokens of at most four bytes.
///
/// Bytes that no UTF-8 text contains separate the parts of a conversation. Each of these bytes is a
/// token of its own, so the tokens of a part do not depend on the parts before it. The last token
/// of a part is padded with zero bytes.
#[must_use]
pub fn tokenize(prompt: &[u8]) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(prompt.len() / 4 + 8);
    for part in prompt.chunk_by(|&byte, &next| !is_separator(byte) && !is_separator(next)) {
        let (words, rest) = part.as_chunks::<4>();
        tokens.extend(words.iter().map(|&word| u32::from_le_bytes(word)));
        if !rest.is_empty() {
            let mut padded = [0; 4];
            padded[..rest.len()].copy_from_slice(rest);
            tokens.push(u32::from_le_bytes(padded));
        }
    }
    tokens
}

fn is_separator(byte: u8) -> bool {
    byte >= 0xF8
}

/// The output of the mock model: a function of the prompt and the choice, equal on all engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MockOutput {
    seed: u64,
}

impl MockOutput {
    /// Mean length of outputs that no limit ends, in tokens.
    pub const MEAN_LENGTH: f64 = 200.0;

    /// Returns the output for a prompt: choice 0.
    #[must_use]
    pub fn for_prompt(prompt: &[u32]) -> Self {
        let seed = prompt
            .iter()
            .fold(0, |folded, &token| mix(folded ^ u64::from(token)));
        Self { seed }
    }

    /// Returns the output of another choice for the same prompt; for 0, this output.
    #[must_use]
    pub fn choice(self, choice: u32) -> Self {
        // The product with an odd number is different for each choice, and 0 for the first.
        let distance = u64::from(choice).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        Self {
            seed: self.seed.wrapping_add(distance),
        }
    }

    /// Returns the number of tokens without a limit: at least 1, exponentially distributed.
    #[must_use]
    pub fn length(self) -> u32 {
        let uniform = (mix(!self.seed) >> 11) as f64 / (1_u64 << 53) as f64;
        1 + (-(1.0 - uniform).ln() * Self::MEAN_LENGTH) as u32
    }

    /// Returns the token at an index.
    #[must_use]
    pub fn token(self, index: u32) -> u32 {
        u32::from_le_bytes(self.word(index))
    }

    /// Returns the text of a range of tokens.
    #[must_use]
    pub fn text(self, tokens: Range<u32>) -> String {
        tokens
            .flat_map(|index| self.word(index))
            .map(char::from)
            .collect()
    }

    /// Returns the bytes of the token at an index: a space, a consonant, a vowel, a consonant.
    fn word(self, index: u32) -> [u8; 4] {
        const CONSONANTS: &[u8; 16] = b"bcdfghjklmnprstv";
        const VOWELS: &[u8; 4] = b"aeio";
        let random = mix(self.seed.wrapping_add(u64::from(index))) as usize;
        [
            b' ',
            CONSONANTS[random % 16],
            VOWELS[(random >> 4) % 4],
            CONSONANTS[(random >> 6) % 16],
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_before_a_separator_does_not_change_the_tokens_after_it() {
        let tokens = tokenize(b"\xffuser\xfeabcdef\xffx");
        let word = |bytes: [u8; 4]| u32::from_le_bytes(bytes);
        let expected = [
            word([0xFF, 0, 0, 0]),
            word(*b"user"),
            word([0xFE, 0, 0, 0]),
            word(*b"abcd"),
            word(*b"ef\0\0"),
            word([0xFF, 0, 0, 0]),
            word(*b"x\0\0\0"),
        ];
        assert_eq!(tokens, expected);
        assert!(tokenize(b"").is_empty());
    }

    #[test]
    fn the_text_of_an_output_has_the_tokens_of_the_output() {
        let output = MockOutput::for_prompt(&tokenize(b"a question"));
        let tokens: Vec<u32> = (0..50).map(|index| output.token(index)).collect();
        assert_eq!(tokenize(output.text(0..50).as_bytes()), tokens);
        assert_eq!(
            output.text(0..20) + &output.text(20..50),
            output.text(0..50)
        );
    }

    #[test]
    fn outputs_differ_by_prompt_and_choice_and_have_the_mean_length() {
        let outputs: Vec<MockOutput> = (0..4000)
            .map(|n| MockOutput::for_prompt(&[n]).choice(n % 2))
            .collect();
        assert_eq!(outputs[0], MockOutput::for_prompt(&[0]).choice(0));
        assert_ne!(outputs[0], MockOutput::for_prompt(&[0]).choice(1));
        let sum: f64 = outputs
            .iter()
            .map(|output| f64::from(output.length()))
            .sum();
        let mean = sum / outputs.len() as f64;
        assert!((mean / MockOutput::MEAN_LENGTH - 1.0).abs() < 0.1, "{mean}");
    }
}
