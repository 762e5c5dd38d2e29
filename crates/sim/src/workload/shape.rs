//! Requests of one shape: their lengths and shared prefixes.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::prompt::Prompt;
use crate::workload::gaps::Gaps;
use crate::workload::{Arrival, Workload, WorkloadRequest, spread};

/// Lengths of prompts and outputs, and the prefixes that prompts share.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// Mean prompt length, in tokens.
    pub isl: u32,
    /// Prompt lengths are uniform in `isl × (1 ± isl_spread)`.
    pub isl_spread: f64,
    /// Mean output length, in tokens.
    pub osl: u32,
    /// Output lengths are uniform in `osl × (1 ± osl_spread)`.
    pub osl_spread: f64,
    /// Fraction of requests, 0 to 1, whose prompts are `heavy_factor` times as long.
    pub heavy_fraction: f64,
    /// Factor on the prompt length of the requests of `heavy_fraction`.
    pub heavy_factor: f64,
    /// Number of prefixes. Each prompt starts with one of them, chosen at random. 0 for prompts
    /// without shared prefixes.
    pub prefixes: u32,
    /// Fraction of each prompt, 0 to 1, that is its prefix. A longer prompt has a longer part of
    /// the same prefix.
    pub prefix_fraction: f64,
}

impl Default for Shape {
    /// Returns ISL 7000, OSL 100, and ten prefixes of half the ISL.
    fn default() -> Self {
        Self {
            isl: 7000,
            isl_spread: 0.0,
            osl: 100,
            osl_spread: 0.0,
            heavy_fraction: 0.0,
            heavy_factor: 1.0,
            prefixes: 10,
            prefix_fraction: 0.5,
        }
    }
}

impl Shape {
    /// Returns this shape with another variation of prompt lengths.
    pub(super) fn with_isl_spread(self, isl_spread: f64) -> Self {
        Self { isl_spread, ..self }
    }

    /// Draws a request. `own_stream` must be different for each request; the part after the prefix
    /// consists of its tokens.
    fn request(&self, own_stream: u64, arrival: Arrival, rng: &mut SmallRng) -> WorkloadRequest {
        let mut isl = spread(self.isl, self.isl_spread, rng);
        if rng.random::<f64>() < self.heavy_fraction {
            isl = (f64::from(isl) * self.heavy_factor) as u32;
        }
        let osl = spread(self.osl, self.osl_spread, rng);
        let mut prompt = Prompt::new();
        let mut prefix_tokens = 0;
        if self.prefixes > 0 {
            let prefix = rng.random_range(0..self.prefixes);
            prefix_tokens = (f64::from(isl) * self.prefix_fraction.clamp(0.0, 1.0)) as u32;
            prompt = prompt.then(u64::from(prefix), prefix_tokens);
        }
        if isl > prefix_tokens {
            let own = u64::from(self.prefixes) + own_stream;
            prompt = prompt.then(own, isl - prefix_tokens);
        }
        WorkloadRequest {
            prompt,
            output_stream: None,
            output_tokens: osl,
            arrival,
        }
    }
}

impl Workload {
    /// Returns requests of one shape, with `concurrency` of them in flight at a time.
    #[must_use]
    pub fn closed_loop(shape: &Shape, requests: u32, concurrency: usize, seed: u64) -> Self {
        Self {
            name: "closed-loop".to_owned(),
            requests: shaped(shape, requests, seed, |_| Arrival::ClosedLoop),
            concurrency,
        }
    }

    /// Returns requests of one shape that all arrive at one instant.
    #[must_use]
    pub fn burst(shape: &Shape, requests: u32, seed: u64) -> Self {
        Self {
            name: "burst".to_owned(),
            requests: shaped(shape, requests, seed, |_| Arrival::At(Duration::ZERO)),
            concurrency: 0,
        }
    }

    /// Returns requests of one shape that arrive with `gaps` between them, whether or not others
    /// have ended. The first arrives after a gap, too.
    #[must_use]
    pub fn open_loop(shape: &Shape, requests: u32, gaps: &Gaps, seed: u64) -> Self {
        let mut time = Duration::ZERO;
        Self {
            name: "open-loop".to_owned(),
            requests: shaped(shape, requests, seed, |rng| {
                time += gaps.sample(rng);
                Arrival::At(time)
            }),
            concurrency: 0,
        }
    }
}

/// Draws requests of one shape; `arrival` returns the arrival of each in order.
fn shaped(
    shape: &Shape,
    requests: u32,
    seed: u64,
    mut arrival: impl FnMut(&mut SmallRng) -> Arrival,
) -> Vec<WorkloadRequest> {
    let mut rng = SmallRng::seed_from_u64(seed);
    (0..requests)
        .map(|index| {
            let arrival = arrival(&mut rng);
            shape.request(u64::from(index), arrival, &mut rng)
        })
        .collect()
}
