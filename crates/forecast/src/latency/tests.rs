//! The latency model learns the coefficients of simulated workers.

use super::*;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

const TRUTH: LatencyModel = LatencyModel {
    prefill_base: 0.05,
    prefill_per_token: 6e-5,
    prefill_per_attention_pair: 2e-9,
    decode_base: 0.015,
    decode_per_request: 5e-5,
    decode_per_context_token: 3e-8,
    prefill_accuracy: LatencyAccuracy::NONE,
    decode_accuracy: LatencyAccuracy::NONE,
};

/// Simulates a worker that is `slowdown` times as slow as [`TRUTH`] and computes prompts one at
/// a time.
fn prefills(
    estimator: &mut LatencyEstimator,
    shared: &mut SharedLatencyModel,
    slowdown: f64,
    prompts: usize,
    now: &mut f64,
    rng: &mut SmallRng,
) {
    for _ in 0..prompts {
        let prompt = rng.random_range(100..20_000);
        let work = PrefillWork::new(rng.random_range(50..=prompt), prompt);
        let booked_at = *now;
        *now += slowdown * TRUTH.prefill_seconds(1.0, work) * rng.random_range(0.9..1.1);
        estimator.observe_first_token(shared, work, at(booked_at), false, at(*now));
        *now += rng.random_range(0.0..0.5);
    }
}

fn error(model: &LatencyModel, slowdown: f64) -> f64 {
    let errors = [(100, 100), (1000, 5000), (8000, 8000), (500, 20_000)].map(
        |(new_tokens, prompt_tokens)| {
            let work = PrefillWork::new(new_tokens, prompt_tokens);
            (model.prefill_seconds(1.0, work) / (slowdown * TRUTH.prefill_seconds(1.0, work)) - 1.0)
                .abs()
        },
    );
    errors.iter().sum::<f64>() / 4.0
}

#[test]
fn prefill_speed_and_a_change_of_it_are_learned_within_a_hundred_prompts() {
    let mut rng = SmallRng::seed_from_u64(1);
    let (mut estimator, mut shared, mut now) = (
        LatencyEstimator::default(),
        SharedLatencyModel::default(),
        1.0,
    );
    prefills(&mut estimator, &mut shared, 1.0, 40, &mut now, &mut rng);
    let first = error(&estimator.latency_model(&shared, at(now)), 1.0);
    assert!(first < 0.15, "{first}");
    prefills(&mut estimator, &mut shared, 2.0, 100, &mut now, &mut rng);
    let slowed = error(&estimator.latency_model(&shared, at(now)), 2.0);
    assert!(slowed < 0.15, "{slowed}");
}

#[test]
fn workers_share_a_latency_model_and_differ_by_a_speed_factor() {
    let mut rng = SmallRng::seed_from_u64(2);
    let (mut shared, mut now) = (SharedLatencyModel::default(), 1.0);
    let mut estimators = [LatencyEstimator::default(), LatencyEstimator::default()];
    for _ in 0..100 {
        for (estimator, slowdown) in estimators.iter_mut().zip([1.0, 2.0]) {
            prefills(estimator, &mut shared, slowdown, 2, &mut now, &mut rng);
        }
    }
    for (estimator, slowdown) in estimators.iter().zip([1.0, 2.0]) {
        let error = error(&estimator.latency_model(&shared, at(now)), slowdown);
        assert!(error < 0.1, "{error} at {slowdown}");
    }
}

#[test]
fn a_worker_without_recent_samples_is_forecast_like_its_peers() {
    let mut rng = SmallRng::seed_from_u64(5);
    let (mut shared, mut now) = (SharedLatencyModel::default(), 1.0);
    let mut estimators = [
        LatencyEstimator::default(),
        LatencyEstimator::default(),
        LatencyEstimator::default(),
    ];
    // The second worker only while nothing is known yet, the third never.
    prefills(&mut estimators[1], &mut shared, 0.2, 2, &mut now, &mut rng);
    prefills(
        &mut estimators[0],
        &mut shared,
        0.2,
        500,
        &mut now,
        &mut rng,
    );
    // All workers get faster.
    prefills(
        &mut estimators[0],
        &mut shared,
        0.1,
        500,
        &mut now,
        &mut rng,
    );
    for estimator in &estimators {
        let error = error(&estimator.latency_model(&shared, at(now)), 0.1);
        assert!(error < 0.1, "{error}");
    }
}

#[test]
fn a_slow_worker_is_forecast_like_its_peers_after_a_pause() {
    let mut rng = SmallRng::seed_from_u64(6);
    let (mut shared, mut now) = (SharedLatencyModel::default(), 1.0);
    let mut estimators = [LatencyEstimator::default(), LatencyEstimator::default()];
    for _ in 0..100 {
        for (estimator, slowdown) in estimators.iter_mut().zip([1.0, 4.0]) {
            prefills(estimator, &mut shared, slowdown, 1, &mut now, &mut rng);
        }
    }
    let forecast = |estimators: &[LatencyEstimator; 2], shared: &SharedLatencyModel, now: f64| {
        let [fast, slow] = [0, 1].map(|index: usize| {
            let model = estimators[index].latency_model(shared, at(now));
            model.prefill_seconds(1.0, PrefillWork::new(1000, 1000))
        });
        slow / fast
    };
    let ratio = forecast(&estimators, &shared, now);
    assert!((2.8..4.5).contains(&ratio), "{ratio}");
    // The slow worker is not chosen for ten minutes.
    let until = now + 600.0;
    while now < until {
        prefills(&mut estimators[0], &mut shared, 1.0, 1, &mut now, &mut rng);
    }
    let ratio = forecast(&estimators, &shared, now);
    assert!((0.9..1.6).contains(&ratio), "{ratio}");
    // The worker is as slow as before, which two prompts show.
    prefills(&mut estimators[1], &mut shared, 4.0, 2, &mut now, &mut rng);
    let ratio = forecast(&estimators, &shared, now);
    assert!((2.5..4.5).contains(&ratio), "{ratio}");
}

#[test]
fn each_decode_step_is_learned_once_and_apart_from_prefill() {
    let mut rng = SmallRng::seed_from_u64(3);
    let (mut estimator, mut shared, mut now) = (
        LatencyEstimator::default(),
        SharedLatencyModel::default(),
        1.0,
    );
    for step in 0..600 {
        let requests = rng.random_range(1..60);
        let context = u64::from(requests) * rng.random_range(100..4000_u64);
        let has_prefill = step % 5 == 0;
        let mut seconds = TRUTH.decode_step_seconds(f64::from(requests), context as f64);
        if has_prefill {
            seconds += 0.2;
        }
        now += seconds;
        for _ in 0..requests {
            estimator.observe_step(
                &mut shared,
                1,
                at(seconds),
                has_prefill,
                (requests, context),
                at(now),
            );
        }
    }
    let model = estimator.latency_model(&shared, at(now));
    let accuracy = model.decode_accuracy;
    assert!(accuracy.samples <= 480, "{accuracy:?}");
    for (requests, context) in [(1.0, 1000.0), (50.0, 100_000.0)] {
        let ratio = model.decode_step_seconds(requests, context)
            / TRUTH.decode_step_seconds(requests, context);
        assert!((0.97..1.03).contains(&ratio), "{ratio}");
    }
    assert!(
        (0.2..0.3).contains(&estimator.mixed_step_seconds()),
        "{}",
        estimator.mixed_step_seconds()
    );
}

#[test]
fn prompts_of_one_step_are_one_sample() {
    let (mut estimator, mut shared) = (LatencyEstimator::default(), SharedLatencyModel::default());
    let work = PrefillWork::new(1000, 1000);
    for round in 1..=200 {
        let booked_at = at(f64::from(round));
        for _ in 0..4 {
            estimator.observe_first_token(&mut shared, work, booked_at, false, booked_at + at(0.4));
        }
    }
    assert!((estimator.mean_prefill_batch() - 4.0).abs() < 0.1);
    let mut all = PrefillWork::default();
    (0..4).for_each(|_| all += work);
    let forecast = estimator
        .latency_model(&shared, at(201.0))
        .prefill_seconds(1.0, all);
    assert!((forecast / 0.4 - 1.0).abs() < 0.02, "{forecast}");
}
