//! Workload whose prompts are divided into blocks and hashed, once for all replays.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use foresee_core::sequence::Sequence;

use crate::prompt::VOCABULARY;
use crate::workload::{InvalidRate, Workload, WorkloadRequest};

/// A workload, and its prompts as sequences of a router's blocks.
#[derive(Clone, Debug)]
pub struct HashedWorkload {
    workload: Workload,
    /// Tokens per block of the router.
    block_size: NonZeroU32,
    /// By request. Shared, because a clone at another rate has the same sequences.
    sequences: Arc<[RequestHashes]>,
}

/// Sequences of one request.
#[derive(Debug)]
struct RequestHashes {
    prompt: Sequence,
    /// Prompt followed by the output; `None` if no later prompt can contain the output.
    prompt_and_output: Option<Sequence>,
}

impl HashedWorkload {
    /// Hashes all prompts of `workload`, and the outputs that later prompts can contain, in blocks
    /// of `block_size` tokens.
    #[must_use]
    pub fn new(workload: Workload, block_size: NonZeroU32) -> Self {
        let sequences = workload.requests.iter().map(|request| {
            let has_output = request.output_stream.is_some();
            RequestHashes {
                prompt: request.prompt.sequence(block_size),
                prompt_and_output: has_output
                    .then(|| request.prompt_and_output().sequence(block_size)),
            }
        });
        Self {
            sequences: sequences.collect(),
            workload,
            block_size,
        }
    }

    /// Returns the workload at `rate` times its arrival rate. See [`Workload::at_rate`].
    ///
    /// # Errors
    /// If `rate` is not a positive number, or so small that the workload never ends.
    pub fn at_rate(&self, rate: f64) -> Result<Self, InvalidRate> {
        Ok(Self {
            workload: self.workload.clone().at_rate(rate)?,
            ..self.clone()
        })
    }

    /// Returns the workload without hashes.
    #[must_use]
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// Returns the number of tokens per block.
    #[must_use]
    pub fn block_size(&self) -> NonZeroU32 {
        self.block_size
    }

    /// Returns the request at `index`.
    pub(crate) fn request(&self, index: usize) -> &WorkloadRequest {
        &self.workload.requests[index]
    }

    /// Returns the prompt of the request at `index`.
    pub(crate) fn prompt(&self, index: usize) -> &Sequence {
        &self.sequences[index].prompt
    }

    /// Returns the prompt followed by the output of the request at `index`. `None` if no later
    /// prompt can contain the output.
    pub(crate) fn prompt_and_output(&self, index: usize) -> Option<&Sequence> {
        self.sequences[index].prompt_and_output.as_ref()
    }

    /// Returns the prompt followed by the output if that is known, and otherwise the prompt alone.
    pub(crate) fn longest_known(&self, index: usize) -> &Sequence {
        self.prompt_and_output(index)
            .unwrap_or_else(|| self.prompt(index))
    }

    /// Returns the tokens at `positions` of the prompt followed by the output. Positions after the
    /// known tokens are skipped.
    pub(crate) fn tokens(&self, index: usize, positions: Range<u32>) -> Vec<u32> {
        let known = self.request(index).prompt_and_output();
        known.tokens_in(positions, VOCABULARY).collect()
    }
}
