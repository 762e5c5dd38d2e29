//! The error of a router's active blocks compared with the blocks that engines have allocated, and
//! its causes.
//!
//! A router counts the blocks of a request from the decision on. An engine allocates them after it
//! has admitted the request, chunk by chunk. The raw error is therefore split: the prediction is
//! first taken without the requests that wait in the engine, then also without blocks of running
//! prefills that are not allocated yet. The remaining error is that of the prediction itself: equal
//! blocks that an engine stores twice, and prefixes that it computed again.

use std::cmp::Ordering;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use serde::Serialize;

/// A booked request on one worker, for [`unallocated`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct BookedRequest<'a> {
    /// Hashes of the blocks that other requests can share.
    pub(crate) hashes: &'a [SequenceHash],
    /// Blocks of its prompt and the output so far, shareable or not.
    pub(crate) blocks: u32,
    /// Blocks that the engine has allocated to the request; `None` while the request waits there.
    pub(crate) engine_blocks: Option<u32>,
}

/// Blocks that the router counts as active although the engine has not allocated them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unallocated {
    /// Blocks of requests that wait in the engine.
    pub(crate) waiting_blocks: u64,
    /// Blocks that the prefills of running requests have not reached.
    pub(crate) unreached_blocks: u64,
}

/// Counts the blocks of the requests booked on one worker that its engine has not allocated. Shared
/// blocks are counted once. They are allocated as soon as one running request has reached them.
pub(crate) fn unallocated(booked: &[BookedRequest<'_>]) -> Unallocated {
    let all = blocks_of(
        booked
            .iter()
            .map(|request| (request.hashes, request.blocks)),
    );
    let running = || {
        booked
            .iter()
            .filter_map(|request| Some((request, request.engine_blocks?)))
    };
    let admitted = blocks_of(running().map(|(request, _)| (request.hashes, request.blocks)));
    let reached = blocks_of(running().map(|(request, allocated)| {
        let shareable = request.hashes.len().min(allocated as usize);
        (&request.hashes[..shareable], request.blocks.min(allocated))
    }));
    Unallocated {
        waiting_blocks: all - admitted,
        unreached_blocks: admitted - reached,
    }
}

/// Returns the number of blocks of several requests, with shared blocks counted once. Each request
/// is given by its shareable blocks and its number of all blocks, which must not be smaller.
fn blocks_of<'a>(requests: impl Iterator<Item = (&'a [SequenceHash], u32)>) -> u64 {
    let mut unshared = 0;
    let mut chains: Vec<&[SequenceHash]> = Vec::new();
    for (hashes, blocks) in requests {
        unshared += u64::from(blocks) - hashes.len() as u64;
        chains.push(hashes);
    }
    // In sorted order, the longest common prefix of a chain with any earlier chain is the one with
    // its predecessor.
    chains.sort_unstable_by(|a, b| order(a, b));
    let mut previous: &[SequenceHash] = &[];
    let mut distinct = 0;
    for chain in chains {
        distinct += (chain.len() - common_prefix(previous, chain)) as u64;
        previous = chain;
    }
    unshared + distinct
}

/// Orders chains by the first hash in which they differ, so that chains with a common prefix are
/// neighbours.
fn order(a: &[SequenceHash], b: &[SequenceHash]) -> Ordering {
    let common = common_prefix(a, b);
    a.get(common).cmp(&b.get(common))
}

/// Returns the number of leading blocks that two chains share. Bisection works because equal hashes
/// have equal prefixes.
fn common_prefix(a: &[SequenceHash], b: &[SequenceHash]) -> usize {
    let (mut equal, mut end) = (0, a.len().min(b.len()));
    while equal < end {
        let middle = equal.midpoint(end);
        if a[middle] == b[middle] {
            equal = middle + 1;
        } else {
            end = middle;
        }
    }
    equal
}

/// Mean absolute difference between a router's active blocks and the blocks that engines have
/// allocated, over workers and instants, as a fraction of `peak_blocks`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PredictionError {
    /// Error over all requests.
    pub raw: f64,
    /// Error without the blocks of requests that wait in their engine, which has allocated none to
    /// them.
    pub admitted: f64,
    /// Error without these blocks and without the blocks that running prefills have not reached.
    pub allocated: f64,
    /// Maximum number of allocated blocks of an engine at a sampled instant.
    pub peak_blocks: u32,
    /// Number of sampled instants.
    pub samples: usize,
}

/// Active blocks of each worker at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Instant {
    /// Time on the virtual clock, in seconds.
    pub seconds: f64,
    /// For each worker, the router's count and the engine's count.
    pub workers: Vec<(u64, u32)>,
}

/// Absolute differences at one instant, summed over the workers, in blocks. See
/// [`PredictionError`].
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    raw: u64,
    admitted: u64,
    allocated: u64,
}

/// Compares predictions with engines at evenly spaced instants. The interval grows with the length
/// of the run, so that the number of samples is bounded.
#[derive(Debug)]
pub(crate) struct Sampler {
    interval: Duration,
    /// The next instant to sample.
    next: Duration,
    samples: Vec<Sample>,
    /// One for each sample, if instants are kept.
    instants: Option<Vec<Instant>>,
    peak_blocks: u32,
    workers: usize,
}

impl Sampler {
    const FIRST_INTERVAL: Duration = Duration::from_millis(10);
    const MAX_SAMPLES: usize = 1024;

    /// Creates a sampler whose first instant is time zero. `workers` is the number of workers over
    /// which the error is averaged. `keep_instants` selects whether
    /// [`take_instants`](Self::take_instants) returns anything.
    pub(crate) fn new(workers: usize, keep_instants: bool) -> Self {
        Self {
            interval: Self::FIRST_INTERVAL,
            next: Duration::ZERO,
            samples: Vec::new(),
            instants: keep_instants.then(Vec::new),
            peak_blocks: 0,
            workers,
        }
    }

    /// Returns the next instant to sample if it is before `end`.
    pub(crate) fn due_before(&self, end: Duration) -> Option<Duration> {
        (self.next < end).then_some(self.next)
    }

    /// Takes a sample at the instant that is due. `workers` has for each worker the router's active
    /// blocks, the engine's allocated blocks, and the causes of their difference. Schedules the
    /// next instant. After [`MAX_SAMPLES`](Self::MAX_SAMPLES) samples, every second one is dropped.
    pub(crate) fn take(&mut self, workers: impl Iterator<Item = (u64, u32, Unallocated)>) {
        let mut sample = Sample::default();
        let mut instant = Instant {
            seconds: self.next.as_secs_f64(),
            workers: Vec::new(),
        };
        for (predicted, actual, unallocated) in workers {
            let actual_blocks = u64::from(actual);
            let admitted = predicted.saturating_sub(unallocated.waiting_blocks);
            let allocated = admitted.saturating_sub(unallocated.unreached_blocks);
            sample.raw += predicted.abs_diff(actual_blocks);
            sample.admitted += admitted.abs_diff(actual_blocks);
            sample.allocated += allocated.abs_diff(actual_blocks);
            self.peak_blocks = self.peak_blocks.max(actual);
            if self.instants.is_some() {
                instant.workers.push((predicted, actual));
            }
        }
        self.samples.push(sample);
        self.instants
            .iter_mut()
            .for_each(|instants| instants.push(instant.clone()));
        self.next += self.interval;
        if self.samples.len() == Self::MAX_SAMPLES {
            self.halve();
        }
    }

    /// Drops every second sample and doubles the interval.
    fn halve(&mut self) {
        keep_every_second(&mut self.samples);
        self.instants.iter_mut().for_each(keep_every_second);
        self.interval *= 2;
        self.next = self.interval * self.samples.len() as u32;
    }

    /// Returns the kept instants and removes them.
    pub(crate) fn take_instants(&mut self) -> Vec<Instant> {
        self.instants.take().unwrap_or_default()
    }

    /// Returns the mean errors over all samples. Zeros without samples. A worker that has not
    /// joined the fleet counts as a worker without error.
    pub(crate) fn finish(&self) -> PredictionError {
        let observations = (self.samples.len() * self.workers).max(1) as f64;
        let peak = f64::from(self.peak_blocks.max(1));
        let mean_fraction = |blocks: fn(&Sample) -> u64| {
            self.samples.iter().map(blocks).sum::<u64>() as f64 / observations / peak
        };
        PredictionError {
            raw: mean_fraction(|sample| sample.raw),
            admitted: mean_fraction(|sample| sample.admitted),
            allocated: mean_fraction(|sample| sample.allocated),
            peak_blocks: self.peak_blocks,
            samples: self.samples.len(),
        }
    }
}

/// Removes all elements with an odd index.
fn keep_every_second<T>(elements: &mut Vec<T>) {
    let mut index = 0;
    elements.retain(|_| {
        index += 1;
        index % 2 == 1
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// Returns a chain through a small tree: blocks with equal choices up to them have equal
    /// hashes.
    fn chain(choices: &[u8]) -> Vec<SequenceHash> {
        let mut hash = 1;
        choices
            .iter()
            .map(|choice| {
                hash = hash * 4 + u64::from(*choice);
                hash
            })
            .collect()
    }

    proptest! {
        #[test]
        fn shared_blocks_count_once(
            requests in prop::collection::vec(
                (prop::collection::vec(0..2_u8, 0..8), 0..3_u32), 0..20,
            ),
        ) {
            let chains: Vec<_> = requests.iter().map(|(choices, _)| chain(choices)).collect();
            let distinct: HashSet<_> = chains.iter().flatten().collect();
            let unshared: u32 = requests.iter().map(|(_, unshared)| unshared).sum();
            let blocks = chains.iter().zip(&requests);
            let blocks = blocks
                .map(|(chain, (_, unshared))| (chain.as_slice(), chain.len() as u32 + unshared));
            prop_assert_eq!(blocks_of(blocks), distinct.len() as u64 + u64::from(unshared));
        }
    }

    #[test]
    fn waiting_and_unreached_blocks_are_distinguished() {
        let (running, waiting) = (chain(&[0, 0, 0, 0]), chain(&[0, 0, 1, 1]));
        let booked = [
            // A running request whose prefill has reached two of five blocks.
            BookedRequest {
                hashes: &running,
                blocks: 5,
                engine_blocks: Some(2),
            },
            // A waiting request that shares two blocks with the first.
            BookedRequest {
                hashes: &waiting,
                blocks: 5,
                engine_blocks: None,
            },
        ];
        let expected = Unallocated {
            waiting_blocks: 3,
            unreached_blocks: 3,
        };
        assert_eq!(unallocated(&booked), expected);
    }

    #[test]
    fn any_run_has_a_bounded_number_of_evenly_spaced_samples() {
        let mut sampler = Sampler::new(1, true);
        let end = Duration::from_secs(3600);
        let mut last = Duration::ZERO;
        while let Some(instant) = sampler.due_before(end) {
            assert!(instant >= last);
            last = instant;
            sampler.take(std::iter::once((
                110,
                100,
                Unallocated {
                    waiting_blocks: 10,
                    unreached_blocks: 0,
                },
            )));
        }
        let error = sampler.finish();
        assert!((Sampler::MAX_SAMPLES / 2..Sampler::MAX_SAMPLES).contains(&error.samples));
        assert!((error.raw - 0.1).abs() < 1e-9);
        assert_eq!((error.admitted, error.peak_blocks), (0.0, 100));
        let instants = sampler.take_instants();
        assert_eq!(instants.len(), error.samples);
        assert_eq!(instants.last().unwrap().seconds, last.as_secs_f64());
        assert_eq!(instants[9].workers, [(110, 100)]);
    }
}
