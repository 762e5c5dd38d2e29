//! How far a router's active blocks are from what engines hold, and why.
//!
//! A router counts a request's blocks from the instant it is chosen; an engine takes them when
//! it admits the request, chunk by chunk. So the raw error is split: first requests that wait in
//! the engine are left out of the prediction, then blocks of running prefills that are not
//! allocated yet. What remains is what prediction gets wrong: equal blocks that an engine holds
//! twice, and prefixes it had to compute again.

use std::cmp::Ordering;
use std::time::Duration;

use foresee_core::sequence::SequenceHash;
use serde::Serialize;

/// A booked request on one worker, for [`unallocated`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Booked<'a> {
    /// Those of its blocks that others can share.
    pub(crate) hashes: &'a [SequenceHash],
    /// Blocks of its prompt and the output so far, shareable or not.
    pub(crate) blocks: u32,
    /// Blocks it holds in the engine; `None` while it waits there.
    pub(crate) held: Option<u32>,
}

/// Blocks that a router counts and an engine has not allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unallocated {
    /// Because the request waits.
    pub(crate) waiting: u64,
    /// Because its prefill has not come that far.
    pub(crate) unreached: u64,
}

/// Splits what is booked on one worker by what its engine has reached.
pub(crate) fn unallocated(booked: &[Booked<'_>]) -> Unallocated {
    let everyone = blocks_of(booked.iter().map(|it| (it.hashes, it.blocks)));
    let running = || booked.iter().filter_map(|it| Some((it, it.held?)));
    let admitted = blocks_of(running().map(|(it, _)| (it.hashes, it.blocks)));
    let reached = blocks_of(running().map(|(it, held)| {
        let shareable = it.hashes.len().min(held as usize);
        (&it.hashes[..shareable], it.blocks.min(held))
    }));
    Unallocated {
        waiting: everyone - admitted,
        unreached: admitted - reached,
    }
}

/// Blocks of several requests, each given by its shareable blocks and its number of blocks, with
/// shared ones counted once.
fn blocks_of<'a>(requests: impl Iterator<Item = (&'a [SequenceHash], u32)>) -> u64 {
    let mut unshared = 0;
    let mut chains: Vec<&[SequenceHash]> = Vec::new();
    for (hashes, blocks) in requests {
        unshared += u64::from(blocks) - hashes.len() as u64;
        chains.push(hashes);
    }
    // In sorted order, what a chain shares with any before it, it shares with the one before it.
    chains.sort_unstable_by(|one, other| order(one, other));
    let mut previous: &[SequenceHash] = &[];
    let mut distinct = 0;
    for chain in chains {
        distinct += (chain.len() - common_prefix(previous, chain)) as u64;
        previous = chain;
    }
    unshared + distinct
}

fn order(one: &[SequenceHash], other: &[SequenceHash]) -> Ordering {
    let common = common_prefix(one, other);
    one.get(common).cmp(&other.get(common))
}

/// Leading blocks that two chains share, by bisection: equal hashes have equal prefixes.
fn common_prefix(one: &[SequenceHash], other: &[SequenceHash]) -> usize {
    let (mut equal, mut end) = (0, one.len().min(other.len()));
    while equal < end {
        let middle = equal.midpoint(end);
        if one[middle] == other[middle] {
            equal = middle + 1;
        } else {
            end = middle;
        }
    }
    equal
}

/// Mean absolute difference between a router's active blocks and the blocks engines hold, over
/// workers and instants, as a share of the most any engine held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct PredictionError {
    /// As it is.
    pub raw: f64,
    /// Without the blocks of requests that wait in their engine, where they hold none.
    pub admitted: f64,
    /// Also without the blocks that running prefills have not reached.
    pub allocated: f64,
    /// The most blocks any engine held at a sampled instant.
    pub peak_blocks: u32,
    /// Instants sampled.
    pub samples: usize,
}

/// Active blocks of each worker at one instant.
#[derive(Clone, Debug, PartialEq)]
pub struct Instant {
    /// On the virtual clock, in seconds.
    pub seconds: f64,
    /// As the router has them, and as the engine does.
    pub workers: Vec<(u64, u32)>,
}

/// Sums over the workers at one instant, in blocks.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    raw: u64,
    admitted: u64,
    allocated: u64,
}

/// Instants at which to compare: evenly spaced, and so far apart that a run of any length has a
/// bounded number of them.
#[derive(Debug)]
pub(crate) struct Sampler {
    interval: Duration,
    next: Duration,
    samples: Vec<Sample>,
    /// Goes along with the samples, if instants are kept.
    instants: Option<Vec<Instant>>,
    peak_blocks: u32,
    workers: usize,
}

impl Sampler {
    const FIRST_INTERVAL: Duration = Duration::from_millis(10);
    const MOST_SAMPLES: usize = 1024;

    pub(crate) fn new(workers: usize, keeps_instants: bool) -> Self {
        Self {
            interval: Self::FIRST_INTERVAL,
            next: Duration::ZERO,
            samples: Vec::new(),
            instants: keeps_instants.then(Vec::new),
            peak_blocks: 0,
            workers,
        }
    }

    /// The next instant to sample, if it is before `end`.
    pub(crate) fn due_before(&self, end: Duration) -> Option<Duration> {
        (self.next < end).then_some(self.next)
    }

    /// Takes a sample at the instant that is due: for each worker the router's active blocks,
    /// the engine's, and what explains their difference.
    pub(crate) fn take(&mut self, workers: impl Iterator<Item = (u64, u32, Unallocated)>) {
        let mut sample = Sample::default();
        let mut instant = Instant {
            seconds: self.next.as_secs_f64(),
            workers: Vec::new(),
        };
        for (predicted, held, missing) in workers {
            let truth = u64::from(held);
            let admitted = predicted.saturating_sub(missing.waiting);
            let allocated = admitted.saturating_sub(missing.unreached);
            sample.raw += predicted.abs_diff(truth);
            sample.admitted += admitted.abs_diff(truth);
            sample.allocated += allocated.abs_diff(truth);
            self.peak_blocks = self.peak_blocks.max(held);
            if self.instants.is_some() {
                instant.workers.push((predicted, held));
            }
        }
        self.samples.push(sample);
        self.instants
            .iter_mut()
            .for_each(|it| it.push(instant.clone()));
        self.next += self.interval;
        if self.samples.len() == Self::MOST_SAMPLES {
            self.halve();
        }
    }

    /// Keeps every second sample and takes them at twice the distance from here on.
    fn halve(&mut self) {
        keep_every_second(&mut self.samples);
        self.instants.iter_mut().for_each(keep_every_second);
        self.interval *= 2;
        self.next = self.interval * self.samples.len() as u32;
    }

    /// The instants that were kept.
    pub(crate) fn take_instants(&mut self) -> Vec<Instant> {
        self.instants.take().unwrap_or_default()
    }

    pub(crate) fn finish(&self) -> PredictionError {
        let observations = (self.samples.len() * self.workers).max(1) as f64;
        let peak = f64::from(self.peak_blocks.max(1));
        let share = |blocks: fn(&Sample) -> u64| {
            self.samples.iter().map(blocks).sum::<u64>() as f64 / observations / peak
        };
        PredictionError {
            raw: share(|sample| sample.raw),
            admitted: share(|sample| sample.admitted),
            allocated: share(|sample| sample.allocated),
            peak_blocks: self.peak_blocks,
            samples: self.samples.len(),
        }
    }
}

fn keep_every_second<T>(all: &mut Vec<T>) {
    let mut index = 0;
    all.retain(|_| {
        index += 1;
        index % 2 == 1
    });
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    /// A chain through a small tree: equal choices so far, equal hash.
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
    fn waiting_and_unreached_blocks_are_told_apart() {
        let (one, other) = (chain(&[0, 0, 0, 0]), chain(&[0, 0, 1, 1]));
        let booked = [
            // Runs, prefilled up to two of its five blocks.
            Booked {
                hashes: &one,
                blocks: 5,
                held: Some(2),
            },
            // Waits; shares two blocks with the first.
            Booked {
                hashes: &other,
                blocks: 5,
                held: None,
            },
        ];
        let expected = Unallocated {
            waiting: 3,
            unreached: 3,
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
                    waiting: 10,
                    unreached: 0,
                },
            )));
        }
        let error = sampler.finish();
        assert!((Sampler::MOST_SAMPLES / 2..Sampler::MOST_SAMPLES).contains(&error.samples));
        assert!((error.raw - 0.1).abs() < 1e-9);
        assert_eq!((error.admitted, error.peak_blocks), (0.0, 100));
        let instants = sampler.take_instants();
        assert_eq!(instants.len(), error.samples);
        assert_eq!(instants.last().unwrap().seconds, last.as_secs_f64());
        assert_eq!(instants[9].workers, [(110, 100)]);
    }
}
