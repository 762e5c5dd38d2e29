//! The sequences that an engine runs for one body: one for each output of each prompt.

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_core::sequence::Sequence;

/// The sequences to book for one body, in the order of the choices' `index` in the response.
///
/// Outputs of one prompt have equal sequences: they share the prompt's blocks, and each grows on
/// its own. If a body has more than [`MAX_BATCH_PROMPTS`] outputs, the last sequence stands for all
/// remaining ones: it is as long as the prompts without a sequence of their own, and matches
/// nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptSequences {
    /// The sequence of the first output.
    pub first: Sequence,
    /// The further sequences, fewer than [`MAX_BATCH_PROMPTS`].
    pub rest: Vec<Sequence>,
    /// Tokens of all prompts. Each prompt counts once, as engines report it.
    pub prompt_tokens: u32,
}

impl PromptSequences {
    /// Returns the sequences of a body with one prompt and `output_count` outputs, of which there
    /// must be at least one.
    #[must_use]
    pub fn repeated(prompt: Sequence, output_count: u32) -> Self {
        if output_count == 1 {
            return Self {
                prompt_tokens: prompt.tokens(),
                first: prompt,
                rest: Vec::new(),
            };
        }
        Self::from_prompts(prompt, Vec::new(), 1, output_count, 0)
    }

    /// Returns the sequences of a body with `prompt_count` prompts and `outputs_per_prompt` outputs
    /// of each; both must be at least 1. `first` and `rest` are the prompts that are hashed. If
    /// there are other prompts, they contain `unhashed_tokens` tokens in total, and the last
    /// sequence stands for all of them.
    pub(crate) fn from_prompts(
        first: Sequence,
        rest: Vec<Sequence>,
        prompt_count: u32,
        outputs_per_prompt: u32,
        unhashed_tokens: u32,
    ) -> Self {
        let hashed = || std::iter::once(&first).chain(&rest);
        let add_tokens = |total: u32, sequence: &Sequence| total.saturating_add(sequence.tokens());
        let prompt_tokens = hashed().fold(unhashed_tokens, add_tokens);
        let output_count = u64::from(prompt_count) * u64::from(outputs_per_prompt);
        let individual_count = match usize::try_from(output_count) {
            Ok(count) if count <= MAX_BATCH_PROMPTS => count,
            _ => MAX_BATCH_PROMPTS - 1,
        };
        let outputs_per_prompt = outputs_per_prompt as usize;
        let each = hashed().flat_map(|sequence| std::iter::repeat_n(sequence, outputs_per_prompt));
        let mut further: Vec<Sequence> = each.skip(1).take(individual_count - 1).cloned().collect();
        if ((further.len() + 1) as u64) < output_count {
            let covered_prompts = individual_count.div_ceil(outputs_per_prompt);
            let remaining_tokens = hashed()
                .skip(covered_prompts)
                .fold(unhashed_tokens, add_tokens);
            further.push(Sequence::unhashed(remaining_tokens, first.block_size()));
        }
        Self {
            first,
            rest: further,
            prompt_tokens,
        }
    }
}
