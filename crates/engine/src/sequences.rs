//! The sequences an engine runs for one body: each answer to each prompt is one of its own.

use foresee_core::batch::MOST_IN_BATCH;
use foresee_core::sequence::Sequence;

/// What is booked for one body, in the order of the answers' `index`.
///
/// Answers to one prompt have equal sequences: they share its blocks, and each grows by itself. Of
/// more than [`MOST_IN_BATCH`] answers, the last sequence stands for all that are left: it is as
/// long as the prompts that have no other sequence, and matches nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequences {
    /// The first.
    pub first: Sequence,
    /// The others, less than [`MOST_IN_BATCH`] of them.
    pub further: Vec<Sequence>,
    /// Tokens of all prompts, each counted once, as engines report them.
    pub prompt_tokens: u32,
}

impl Sequences {
    /// A body with one prompt.
    #[must_use]
    pub fn of_one(prompt: Sequence, answers: u32) -> Self {
        if answers == 1 {
            return Self {
                prompt_tokens: prompt.tokens(),
                first: prompt,
                further: Vec::new(),
            };
        }
        Self::of_batch(prompt, Vec::new(), 1, answers, 0)
    }

    /// A body with so many `prompts`, of which those after the `further` ones hold `uncut` tokens
    /// together.
    pub(crate) fn of_batch(
        first: Sequence,
        further: Vec<Sequence>,
        prompts: u32,
        answers_each: u32,
        uncut: u32,
    ) -> Self {
        let cut = || std::iter::once(&first).chain(&further);
        let tokens = |total: u32, sequence: &Sequence| total.saturating_add(sequence.tokens());
        let prompt_tokens = cut().fold(uncut, tokens);
        let answers = u64::from(prompts) * u64::from(answers_each);
        let apart = match usize::try_from(answers) {
            Ok(answers) if answers <= MOST_IN_BATCH => answers,
            _ => MOST_IN_BATCH - 1,
        };
        let answers_each = answers_each as usize;
        let each = cut().flat_map(|sequence| std::iter::repeat_n(sequence, answers_each));
        let mut booked: Vec<Sequence> = each.skip(1).take(apart - 1).cloned().collect();
        if ((booked.len() + 1) as u64) < answers {
            let begun = apart.div_ceil(answers_each);
            let rest = cut().skip(begun).fold(uncut, tokens);
            booked.push(Sequence::opaque(rest, first.block_size()));
        }
        Self {
            first,
            further: booked,
            prompt_tokens,
        }
    }
}
