//! Text without a tokenizer: every four bytes of a prompt are a token, and an answer's tokens are
//! words of four bytes. So an answer that comes back in the next turn is the same tokens again.

use std::ops::Range;

use crate::prompt::mix;

/// Cuts a prompt's bytes into tokens of at most four.
///
/// Bytes that no UTF-8 text contains separate the parts of a conversation. Each is a token of its
/// own, so that a text is cut the same way whatever comes before it.
#[must_use]
pub fn tokenize(prompt: &[u8]) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(prompt.len() / 4 + 8);
    for part in prompt.chunk_by(|&one, &next| !is_separator(one) && !is_separator(next)) {
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

/// What the model answers: a function of the prompt and the choice, whichever engine is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    seed: u64,
}

impl Answer {
    /// The mean length of answers that end by themselves, in tokens.
    pub const MEAN_LENGTH: f64 = 200.0;

    /// The answer to a prompt.
    #[must_use]
    pub fn to(prompt: &[u32]) -> Self {
        let seed = prompt
            .iter()
            .fold(0, |folded, &token| mix(folded ^ u64::from(token)));
        Self { seed }
    }

    /// Another answer to the same prompt, for each number but 0.
    #[must_use]
    pub fn choice(self, choice: u32) -> Self {
        // An odd factor keeps the choices apart without changing the first.
        let distance = u64::from(choice).wrapping_mul(0xD6E8_FEB8_6659_FD93);
        Self {
            seed: self.seed.wrapping_add(distance),
        }
    }

    /// How many tokens it has if nothing limits it: at least 1, exponentially distributed.
    #[must_use]
    pub fn length(self) -> u32 {
        let uniform = (mix(!self.seed) >> 11) as f64 / (1_u64 << 53) as f64;
        1 + (-(1.0 - uniform).ln() * Self::MEAN_LENGTH) as u32
    }

    /// Its token at an index.
    #[must_use]
    pub fn token(self, index: u32) -> u32 {
        u32::from_le_bytes(self.word(index))
    }

    /// Its text from one token to another.
    #[must_use]
    pub fn text(self, tokens: Range<u32>) -> String {
        tokens
            .flat_map(|index| self.word(index))
            .map(char::from)
            .collect()
    }

    /// A space, a consonant, a vowel, a consonant.
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
    fn what_comes_before_a_separator_does_not_change_what_comes_after() {
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
    fn an_answers_text_is_its_tokens() {
        let answer = Answer::to(&tokenize(b"a question"));
        let tokens: Vec<u32> = (0..50).map(|index| answer.token(index)).collect();
        assert_eq!(tokenize(answer.text(0..50).as_bytes()), tokens);
        assert_eq!(
            answer.text(0..20) + &answer.text(20..50),
            answer.text(0..50)
        );
    }

    #[test]
    fn answers_differ_by_prompt_and_choice_and_have_the_mean_length() {
        let answers: Vec<Answer> = (0..4000).map(|n| Answer::to(&[n]).choice(n % 2)).collect();
        assert_eq!(answers[0], Answer::to(&[0]).choice(0));
        assert_ne!(answers[0], Answer::to(&[0]).choice(1));
        let sum: f64 = answers
            .iter()
            .map(|answer| f64::from(answer.length()))
            .sum();
        let mean = sum / answers.len() as f64;
        assert!((mean / Answer::MEAN_LENGTH - 1.0).abs() < 0.1, "{mean}");
    }
}
