//! Active blocks as a plain map: the data structure that the router began with.
//!
//! It is that of NVIDIA Dynamo's pull request 1731: for each worker, the blocks that running
//! requests pin, each with the requests that pin it. A block is active as long as its set is not
//! empty, so shared prefixes count once. The property tests compare [`PrefixTree`] with it.
//!
//! [`PrefixTree`]: crate::active_tree::PrefixTree

use std::collections::{HashMap, HashSet};

use crate::active_tree::WorkerIndex;
use crate::sequence::SequenceHash;

/// Id of a running request.
pub(super) type RequestId = u64;

/// Active blocks of all workers.
#[derive(Debug, Default)]
pub(super) struct ActiveBlocks {
    requests_by_block: HashMap<WorkerIndex, HashMap<SequenceHash, HashSet<RequestId>>>,
}

impl ActiveBlocks {
    /// Pins the blocks of a request. Returns how many of them were not active before.
    pub(super) fn pin(
        &mut self,
        worker: WorkerIndex,
        request: RequestId,
        blocks: &[SequenceHash],
    ) -> usize {
        let requests_by_block = self.requests_by_block.entry(worker).or_default();
        let before = requests_by_block.len();
        for &block in blocks {
            requests_by_block.entry(block).or_default().insert(request);
        }
        requests_by_block.len() - before
    }

    /// Unpins the blocks of a request. Returns how many of them are no longer active.
    pub(super) fn unpin(
        &mut self,
        worker: WorkerIndex,
        request: RequestId,
        blocks: &[SequenceHash],
    ) -> usize {
        let requests_by_block = self.requests_by_block.entry(worker).or_default();
        let before = requests_by_block.len();
        for block in blocks {
            if let Some(requests) = requests_by_block.get_mut(block) {
                requests.remove(&request);
            }
        }
        requests_by_block.retain(|_, requests| !requests.is_empty());
        before - requests_by_block.len()
    }

    /// Returns the number of active blocks of a worker.
    pub(super) fn active_blocks(&self, worker: WorkerIndex) -> usize {
        self.requests_by_block.get(&worker).map_or(0, HashMap::len)
    }

    /// Returns how many leading blocks of a prompt are active on a worker.
    pub(super) fn matching_blocks(&self, worker: WorkerIndex, blocks: &[SequenceHash]) -> usize {
        let active = self.requests_by_block.get(&worker);
        let is_active = |block: &&SequenceHash| active.is_some_and(|map| map.contains_key(*block));
        blocks.iter().take_while(is_active).count()
    }
}
