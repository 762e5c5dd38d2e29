//! A workload whose prompts have been cut and hashed, once for all replays of it.

use std::num::NonZeroU32;
use std::ops::Range;
use std::sync::Arc;

use foresee_core::sequence::Sequence;

use crate::prompt::VOCABULARY;
use crate::workload::{InvalidRate, Workload, WorkloadRequest};

/// A workload, and its prompts as a router sees them.
#[derive(Clone, Debug)]
pub struct Traffic {
    workload: Workload,
    block_size: NonZeroU32,
    sequences: Arc<[Sequences]>,
}

/// One request's.
#[derive(Debug)]
struct Sequences {
    prompt: Sequence,
    /// With the answer behind, where others may send it back.
    answered: Option<Sequence>,
}

impl Traffic {
    /// Cuts into blocks of the router's size.
    #[must_use]
    pub fn new(workload: Workload, block_size: NonZeroU32) -> Self {
        let sequences = workload.requests.iter().map(|request| {
            let answered = request.answer_stream.is_some();
            Sequences {
                prompt: request.prompt.sequence(block_size),
                answered: answered.then(|| request.prompt_and_answer().sequence(block_size)),
            }
        });
        Self {
            sequences: sequences.collect(),
            workload,
            block_size,
        }
    }

    /// The same requests at `rate` times the rate; see [`Workload::at_rate`].
    ///
    /// # Errors
    /// As there.
    pub fn at_rate(&self, rate: f64) -> Result<Self, InvalidRate> {
        Ok(Self {
            workload: self.workload.clone().at_rate(rate)?,
            ..self.clone()
        })
    }

    /// What is sent.
    #[must_use]
    pub fn workload(&self) -> &Workload {
        &self.workload
    }

    /// The router's tokens per block.
    #[must_use]
    pub fn block_size(&self) -> NonZeroU32 {
        self.block_size
    }

    pub(crate) fn request(&self, index: usize) -> &WorkloadRequest {
        &self.workload.requests[index]
    }

    pub(crate) fn prompt(&self, index: usize) -> &Sequence {
        &self.sequences[index].prompt
    }

    /// The prompt and the answer behind it, where others may send it back.
    pub(crate) fn answered(&self, index: usize) -> Option<&Sequence> {
        self.sequences[index].answered.as_ref()
    }

    /// As much of prompt and answer as is known.
    pub(crate) fn known(&self, index: usize) -> &Sequence {
        self.answered(index).unwrap_or_else(|| self.prompt(index))
    }

    /// The tokens at some positions of prompt and answer.
    pub(crate) fn tokens(&self, index: usize, positions: Range<u32>) -> Vec<u32> {
        let known = self.request(index).prompt_and_answer();
        known.tokens_in(positions, VOCABULARY).collect()
    }
}
