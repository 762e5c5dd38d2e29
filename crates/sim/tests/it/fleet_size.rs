//! The forecast size of a fleet against the size that the simulation finds.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::sync::Arc;

use crate::BLOCK;
use foresee_core::router::RouterConfig;
use foresee_core::{LatencyLimits, LatencyModel, MeanLengths, policy, sustainable_rate};
use foresee_sim::baselines::PolicySpec;
use foresee_sim::capacity::{Target, find};
use foresee_sim::engine::EngineConfig;
use foresee_sim::hashed_workload::HashedWorkload;
use foresee_sim::replay::ReplayConfig;
use foresee_sim::slo::Slo;
use foresee_sim::step_time::{H100_70B_TP4, L40S_8B, Preset};
use foresee_sim::workload::{Shape, Spacing, Workload};

/// Number of workers of the simulated fleet.
const WORKERS: u32 = 4;

/// Returns what a router learns of an engine: prefills of at least the floor, and decode steps at the
/// floor.
fn learned(preset: &Preset) -> LatencyModel {
    let step = preset.step_time;
    LatencyModel {
        prefill_base: step.overhead,
        prefill_per_token: step.per_token,
        prefill_per_attention_pair: step.per_prefill_attention,
        decode_base: step.overhead + step.floor,
        decode_per_request: step.per_sequence,
        decode_per_context_token: step.per_context_token,
        ..LatencyModel::default()
    }
}

/// Returns the highest rate at which 95 % of the requests meet the objective, by simulation.
fn simulated(preset: &Preset, shape: &Shape, slo: Slo, near: f64) -> f64 {
    let gaps = "poisson".parse::<Spacing>().unwrap().at(near).unwrap();
    let workload = Workload::open_loop(shape, 800, &gaps, 1);
    let traffic = [Arc::new(HashedWorkload::new(workload, BLOCK))];
    let engine = EngineConfig::from_preset(preset, BLOCK);
    let config = ReplayConfig {
        slo,
        ..ReplayConfig::uniform(RouterConfig::default(), &engine, WORKERS)
    };
    let policies = [PolicySpec::from(policy::MARGINAL_DELAY)];
    let found = find(
        &config,
        &policies,
        &traffic,
        Target::Rate,
        0.95,
        1,
        &|_, _, _| (),
    );
    found.unwrap().results[0].requests_per_second.unwrap()
}

#[test]
fn the_sustainable_rate_is_near_the_simulated_one() {
    let slo = Slo::default();
    let limits = LatencyLimits {
        ttft: slo.ttft,
        itl: slo.itl,
    };
    for (preset, isl, osl) in [
        (&L40S_8B, 700, 60),
        (&L40S_8B, 2000, 200),
        (&H100_70B_TP4, 3000, 150),
    ] {
        let shape = Shape {
            isl,
            osl,
            isl_spread: 0.5,
            osl_spread: 0.5,
            prefixes: 0,
            ..Shape::default()
        };
        let lengths = MeanLengths {
            prompt_tokens: isl.into(),
            new_tokens: isl.into(),
            output_tokens: osl.into(),
        };
        let memory = f64::from(preset.kv_tokens);
        let rate = sustainable_rate(&learned(preset), memory, &lengths, &limits);
        let forecast = rate * f64::from(WORKERS);
        let simulated = simulated(preset, &shape, slo, forecast);
        let ratio = forecast / simulated;
        assert!(
            (0.7..=1.3).contains(&ratio),
            "{} {isl} {osl}: {ratio}",
            preset.name
        );
    }
}
