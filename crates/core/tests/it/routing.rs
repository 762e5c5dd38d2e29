//! Routing: policies, errors and explanations.

#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, HashSet};
use std::sync::Barrier;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::outlier::OutlierConfig;
use foresee_core::policy;
use foresee_core::router::{ConfigError, Request, RouteError, Router, RouterConfig, RouterTuning};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec, WorkerState};

fn fleet(count: usize, config: RouterConfig) -> Router {
    let router = Router::new(config).unwrap();
    for worker in 0..count {
        let spec = WorkerSpec {
            name: format!("w{worker}"),
            prefix_caching: true,
            ..WorkerSpec::default()
        };
        let id = router.add_worker(spec).unwrap();
        router.set_healthy(id, true);
    }
    router
}

fn prompt(tokens: impl IntoIterator<Item = u32>) -> Sequence {
    let tokens: Vec<u32> = tokens.into_iter().collect();
    Sequence::from_tokens(&tokens, RouterConfig::default().block_size, 0)
}

fn route(router: &Router, sequence: &Sequence) -> Booking {
    router
        .route(&Request::new(sequence), Duration::ZERO)
        .unwrap()
}

fn ids(router: &Router) -> Vec<WorkerId> {
    let workers = router.workers(Duration::ZERO);
    workers.into_iter().map(|worker| worker.id).collect()
}

fn config_with(change: impl FnOnce(&mut RouterConfig)) -> RouterConfig {
    let mut config = RouterConfig {
        queue_order: None,
        outlier: OutlierConfig::disabled(),
        ..RouterConfig::default()
    };
    change(&mut config);
    config
}

/// 1,000 requests of one length without a common prefix, from 16 threads at once. Each decision sees
/// all earlier ones, so the requests spread exactly.
#[test]
fn simultaneous_requests_spread_evenly() {
    for seed in 0..20 {
        let router = fleet(
            8,
            RouterConfig {
                seed,
                queue_order: None,
                ..RouterConfig::default()
            },
        );
        let start = Barrier::new(16);
        let bookings: Vec<Booking> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16u32)
                .map(|thread| {
                    let (router, start) = (&router, &start);
                    scope.spawn(move || {
                        start.wait();
                        let requests = 1000 / 16 + u32::from(thread < 1000 % 16);
                        (0..requests)
                            .map(|i| {
                                let first = thread * 1_000_000 + i * 1_000;
                                route(router, &prompt(first..first + 700))
                            })
                            .collect::<Vec<_>>()
                    })
                })
                .collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        assert_eq!(bookings.len(), 1000);
        for worker in router.workers(Duration::ZERO) {
            assert_eq!(worker.requests, 125);
            assert_eq!(worker.active_blocks, 125 * 700_u64.div_ceil(16));
        }
        drop(bookings);
        assert!(
            router
                .workers(Duration::ZERO)
                .iter()
                .all(|worker| worker.active_blocks == 0)
        );
    }
}

/// Every policy books its load, and makes the same choices with the same seed.
#[test]
fn every_policy_books_and_is_deterministic_for_a_seed() {
    let run = |policy| {
        let router = fleet(
            5,
            RouterConfig {
                policy,
                seed: 9,
                queue_order: None,
                ..RouterConfig::default()
            },
        );
        let bookings: Vec<_> = (0..200u32)
            .map(|i| route(&router, &prompt((0..100 + i).map(|t| t / 40 * (i % 7)))))
            .collect();
        let requests: Vec<_> = router
            .workers(Duration::ZERO)
            .iter()
            .map(|worker| worker.requests)
            .collect();
        assert_eq!(requests.iter().sum::<u32>(), 200, "{policy}");
        let bound = if policy == policy::RANDOM { 70 } else { 50 };
        assert!(
            requests.iter().all(|&requests| requests <= bound),
            "{policy}: {requests:?}"
        );
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    for policy in policy::ALL {
        if policy == policy::KV {
            continue; // balances blocks, not requests
        }
        assert_eq!(run(policy), run(policy), "{policy}");
    }
}

#[test]
fn an_overlap_weight_of_zero_balances_load_only() {
    let router = fleet(2, config_with(|config| config.overlap_weight = 0.0));
    let sequence = prompt(0..1600);
    // The first worker has all blocks, yet the second request is sent to the other one.
    let first = route(&router, &sequence);
    let second = route(&router, &sequence);
    assert_ne!(first.worker(), second.worker());
}

#[test]
fn overlap_attracts_requests_until_load_outweighs_it() {
    let router = fleet(
        2,
        RouterConfig {
            queue_order: None,
            ..RouterConfig::default()
        },
    );
    let sequence = prompt(0..1600);
    let mut first = route(&router, &sequence);
    let cached_on = first.worker();
    first.on_tokens(1, Duration::ZERO);
    first.complete(Duration::ZERO);
    // Cached, not active: a request with the same prompt is sent there.
    let repeated = route(&router, &sequence);
    assert_eq!(repeated.worker(), cached_on);
    assert_eq!(
        repeated.decision().cost.overlap_blocks,
        99,
        "one token must be computed"
    );
    // The blocks of that request weigh as much as computing a prompt elsewhere, and more with further
    // requests. So a request with another prompt is sent to the empty worker.
    let elsewhere = route(&router, &prompt(10_000..11_600));
    assert_ne!(elsewhere.worker(), cached_on);
}

/// A request that is booked again matches its own active blocks. They must not count as overlap,
/// because it starts from the prompt.
#[test]
fn a_rerouted_request_has_no_overlap_with_itself() {
    let router = fleet(
        1,
        RouterConfig {
            queue_order: None,
            ..RouterConfig::default()
        },
    );
    let mut booking = route(&router, &prompt(0..1600));
    booking.reroute(&[], Duration::ZERO).unwrap();
    assert_eq!(booking.decision().cost.overlap_blocks, 0);
    assert_eq!(router.workers(Duration::ZERO)[0].prefill_tokens, 1600);
    booking.move_to(booking.worker(), Duration::ZERO).unwrap();
    assert_eq!(booking.decision().cost.overlap_blocks, 0);
    assert_eq!(router.workers(Duration::ZERO)[0].prefill_tokens, 1600);
}

/// Returns a fleet under the policy `kv` of four workers, with 0 to 3 requests of 50 blocks each.
fn uneven_fleet(temperature: f64) -> (Router, Vec<Booking>) {
    let config = config_with(|config| {
        config.policy = policy::KV;
        (config.temperature, config.seed) = (temperature, 5);
    });
    let router = fleet(4, config);
    let ids = ids(&router);
    let workers = [1, 2, 2, 3, 3, 3].into_iter().zip(0_u32..);
    let bookings = workers
        .map(|(worker, i)| {
            let first = 1_000_000 * (i + 1);
            let mut booking = route(&router, &prompt(first..first + 800));
            booking.move_to(ids[worker], Duration::ZERO).unwrap();
            booking
        })
        .collect();
    (router, bookings)
}

#[test]
fn softmax_chooses_with_the_explained_probabilities() {
    let (router, _bookings) = uneven_fleet(0.5);
    let sequence = prompt(0..400);
    let explained = router
        .explain(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    // The costs lie at 0, 1/3, 2/3 and 1 of their range.
    let weights = [0.0, -1.0, -2.0, -3.0].map(|thirds: f64| (thirds / 3.0 / 0.5).exp());
    let total: f64 = weights.iter().sum();
    const DRAWS: usize = 20_000;
    let mut chosen = [0; 4];
    let ids = ids(&router);
    for _ in 0..DRAWS {
        let worker = route(&router, &sequence).worker();
        chosen[ids.iter().position(|&id| id == worker).unwrap()] += 1;
    }
    for ((candidate, weight), count) in explained.candidates.iter().zip(weights).zip(chosen) {
        assert!((candidate.probability - weight / total).abs() < 1e-9);
        let frequency = f64::from(count) / DRAWS as f64;
        assert!(
            (frequency - candidate.probability).abs() < 0.015,
            "{frequency}"
        );
    }
}

#[test]
fn tiny_temperatures_choose_the_least_cost() {
    for temperature in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-6] {
        let (router, _bookings) = uneven_fleet(temperature);
        let sequence = prompt(0..400);
        for _ in 0..100 {
            assert_eq!(route(&router, &sequence).worker(), ids(&router)[0]);
        }
    }
}

#[test]
fn a_changed_tuning_applies_to_the_next_decision() {
    let (router, _bookings) = uneven_fleet(0.5);
    let sequence = prompt(0..400);
    let workers_of_100 = || {
        let routed = (0..100).map(|_| route(&router, &sequence).worker());
        routed.collect::<HashSet<_>>().len()
    };
    assert!(workers_of_100() > 1);
    let tuning = RouterConfig::default().tuning();
    let refused = router.set_tuning(RouterTuning {
        overlap_weight: f64::NAN,
        ..tuning
    });
    assert_eq!(refused.unwrap_err().field, "overlap-weight");
    assert!(workers_of_100() > 1);
    router.set_tuning(tuning).unwrap();
    assert_eq!(workers_of_100(), 1);
    let explained = router.explain(&Request::new(&sequence), Duration::ZERO);
    assert_eq!(explained.unwrap().temperature, 0.0);
}

#[test]
fn ties_at_temperature_zero_are_broken_by_the_seed() {
    let run = |seed| {
        let router = fleet(8, config_with(|config| config.seed = seed));
        let bookings = (0..200_u32).map(|i| route(&router, &prompt(i * 100_000..i * 100_000 + 50)));
        let bookings: Vec<Booking> = bookings.collect();
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2), "ties are broken by the seed");
}

#[test]
fn power_of_two_never_chooses_the_busiest_worker() {
    let router = fleet(
        3,
        config_with(|config| config.policy = policy::POWER_OF_TWO),
    );
    let ids = ids(&router);
    let mut busy = route(&router, &prompt(0..10));
    busy.move_to(ids[1], Duration::ZERO).unwrap();
    let mut chosen = [0; 3];
    for _ in 0..300 {
        let worker = route(&router, &prompt(0..10)).worker();
        chosen[ids.iter().position(|&id| id == worker).unwrap()] += 1;
    }
    assert_eq!(chosen[1], 0);
    assert!(chosen[0] > 100 && chosen[2] > 100, "{chosen:?}");
}

#[test]
fn consistent_hash_keeps_the_worker_of_a_prefix_up_to_its_load_bound() {
    let router = fleet(
        5,
        config_with(|config| config.policy = policy::CONSISTENT_HASH),
    );
    let family = |i: u32, turn: u32| prompt((i..i + 1024).chain(turn * 7..turn * 7 + 200));
    let mut homes = Vec::new();
    for i in 0..50 {
        let home = route(&router, &family(10_000 * i, 0)).worker();
        for turn in 1..5 {
            assert_eq!(route(&router, &family(10_000 * i, turn)).worker(), home);
        }
        homes.push(home);
    }
    let spread = ids(&router)
        .into_iter()
        .all(|id| (3..20).contains(&homes.iter().filter(|&&home| home == id).count()));
    assert!(spread, "{homes:?}");

    // All requests of one family at once: no worker gets more than 1.25 times the mean.
    let same: Vec<Booking> = (0..200)
        .map(|turn| route(&router, &family(0, turn)))
        .collect();
    let max_requests = router
        .workers(Duration::ZERO)
        .iter()
        .map(|worker| worker.requests)
        .max();
    assert!(max_requests <= Some(50), "{max_requests:?}");
    drop(same);

    // Removing a worker moves only the families that were on it.
    let removed = homes[0];
    router.remove_worker(removed);
    for (i, &home) in (0..).zip(&homes) {
        let now = route(&router, &family(10_000 * i, 0)).worker();
        assert!(now == home || home == removed);
    }
}

#[test]
fn every_policy_chooses_the_only_worker_and_fails_without_one() {
    let sequence = prompt(0..100);
    for policy in policy::ALL {
        let name = policy.name;
        for temperature in [0.0, 1.0] {
            let router = fleet(
                1,
                config_with(|config| (config.policy, config.temperature) = (policy, temperature)),
            );
            let only = ids(&router);
            for _ in 0..10 {
                assert_eq!(route(&router, &sequence).worker(), only[0], "{name}");
            }
            let request = Request {
                excluded_workers: &only,
                ..Request::new(&sequence)
            };
            let none = router.route(&request, Duration::ZERO).map(drop);
            assert_eq!(none, Err(RouteError::NoWorker(String::new())), "{name}");
        }
    }
}

#[test]
fn errors_distinguish_an_unknown_model_from_an_unavailable_worker() {
    let router = Router::new(RouterConfig {
        queue_order: None,
        ..RouterConfig::default()
    })
    .unwrap();
    let sequence = prompt(0..100);
    let route = |model: &str| {
        let request = Request {
            model,
            ..Request::new(&sequence)
        };
        router
            .route(&request, Duration::ZERO)
            .map(|booking| booking.worker())
    };
    let no_worker = |model: &str| Err(RouteError::NoWorker(model.to_owned()));
    assert_eq!(
        route("a"),
        no_worker("a"),
        "without workers no model is unknown"
    );

    let add = |name: &str, models: &[&str]| {
        let models = models.iter().map(|&model| model.to_owned()).collect();
        let name = name.to_owned();
        let spec = WorkerSpec {
            name,
            models,
            ..WorkerSpec::default()
        };
        router.add_worker(spec).unwrap()
    };
    let first = add("first", &["a", "b", "a"]);
    assert_eq!(route("a"), no_worker("a"), "not yet healthy");
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));
    router.set_healthy(first, true);
    assert_eq!(route("a"), Ok(first));
    assert_eq!(route(""), Ok(first));
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));

    let second = add("second", &[]);
    assert_eq!(
        route("c"),
        no_worker("c"),
        "the second worker might serve it"
    );
    router.set_healthy(second, true);
    assert_eq!(route("c"), Ok(second));
    router.set_models(second, vec!["d".to_owned()]);
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));
    assert_eq!(route("d"), Ok(second));
    router.remove_worker(second);
    assert_eq!(route("d"), Err(RouteError::UnknownModel("d".to_owned())));
}

#[test]
fn a_draining_worker_keeps_its_requests_and_gets_no_new_ones() {
    let router = fleet(
        2,
        RouterConfig {
            queue_order: None,
            ..RouterConfig::default()
        },
    );
    let sequence = prompt(0..1600);
    let mut booking = route(&router, &sequence);
    let drained = booking.worker();
    router.set_draining(drained, true);
    for _ in 0..20 {
        assert_ne!(route(&router, &sequence).worker(), drained);
    }
    booking.on_tokens(17, Duration::ZERO);
    let snapshots = router.workers(Duration::ZERO);
    let snapshot = snapshots
        .iter()
        .find(|worker| worker.id == drained)
        .unwrap();
    assert_eq!(snapshot.state, WorkerState::Draining);
    assert_eq!((snapshot.requests, snapshot.active_blocks), (1, 102));
    router.set_draining(drained, false);
    assert_eq!(route(&router, &sequence).worker(), drained);
}

#[test]
fn explain_reports_consistent_costs_and_changes_no_choice() {
    for policy in policy::ALL {
        let name = policy.name;
        let run = |explain_calls: usize| {
            let config = config_with(|config| {
                (config.policy, config.temperature, config.overlap_weight) = (policy, 0.7, 1.5);
            });
            let router = fleet(6, config);
            let mut bookings = Vec::new();
            for i in 0..100_u32 {
                let sequence = prompt((0..40 * i).map(|token| token / 300 * (i % 5)));
                let request = Request::new(&sequence);
                for _ in 0..explain_calls {
                    let explained = router.explain(&request, Duration::ZERO).unwrap();
                    assert_eq!(explained.policy, policy);
                    let probabilities = explained
                        .candidates
                        .iter()
                        .map(|candidate| candidate.probability);
                    let total: f64 = probabilities.sum();
                    assert!((total - 1.0).abs() < 1e-9);
                    for candidate in explained.candidates {
                        let cost = candidate.cost;
                        let parts = f64::from(cost.prefill_blocks) * 1.5;
                        assert_eq!(cost.total, parts + cost.active_blocks as f64);
                        let blocks = cost.overlap_blocks + cost.prefill_blocks;
                        assert_eq!(blocks, sequence.blocks());
                    }
                }
                bookings.push(route(&router, &sequence));
            }
            assert_eq!(router.booking_count(), 100);
            bookings.iter().map(Booking::worker).collect::<Vec<_>>()
        };
        assert_eq!(run(0), run(2), "{name}");
    }
}

#[test]
fn settings_outside_their_range_are_rejected() {
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        let config = config_with(|config| config.overlap_weight = bad);
        let error = Router::new(config).err().unwrap();
        assert_eq!(error.field, "overlap-weight");
        let config = config_with(|config| config.temperature = bad);
        let ConfigError { field, value, .. } = Router::new(config).err().unwrap();
        assert_eq!((field, value.to_bits()), ("temperature", bad.to_bits()));
    }
}

/// Returns a fleet of workers with 0, 1, 1, 3 and 5 requests, without common prefixes.
fn unevenly_loaded(config: RouterConfig) -> (Router, Vec<Booking>) {
    let router = fleet(5, config);
    let ids: Vec<_> = router
        .workers(Duration::ZERO)
        .iter()
        .map(|worker| worker.id)
        .collect();
    let mut bookings = Vec::new();
    for (index, requests) in [0, 1, 1, 3, 5].into_iter().enumerate() {
        for _ in 0..requests {
            let sequence = Sequence::unhashed(500, RouterConfig::default().block_size);
            let mut booking = route(&router, &sequence);
            booking.move_to(ids[index], Duration::ZERO).unwrap();
            bookings.push(booking);
        }
    }
    (router, bookings)
}

#[test]
fn explained_probabilities_are_the_frequencies_of_choices() {
    const DRAWS: u32 = 4000;
    for policy in policy::ALL {
        let name = policy.name;
        for temperature in [0.0, 0.5] {
            let (router, _bookings) = unevenly_loaded(config_with(|config| {
                (config.policy, config.temperature) = (policy, temperature);
            }));
            let sequence = Sequence::unhashed(100, RouterConfig::default().block_size);
            let request = Request::new(&sequence);
            let mut expected = HashMap::new();
            let mut chosen = HashMap::new();
            for _ in 0..DRAWS {
                // Marginal delays change a little with every arrival, so each draw is explained.
                let explained = router.explain(&request, Duration::ZERO).unwrap();
                let worker = route(&router, &sequence).worker();
                let most_probable = explained.expected_choice().unwrap();
                let chosen_candidate = explained
                    .candidates
                    .iter()
                    .find(|candidate| candidate.id == worker)
                    .unwrap();
                assert!(
                    chosen_candidate.probability > 0.0,
                    "{name}: chose a worker of probability 0"
                );
                assert!(chosen_candidate.probability <= most_probable.probability);
                for candidate in explained.candidates {
                    *expected.entry(candidate.id).or_insert(0.0) += candidate.probability;
                }
                *chosen.entry(worker).or_insert(0_u32) += 1;
            }
            for (id, expected) in expected {
                let actual = f64::from(chosen.get(&id).copied().unwrap_or(0));
                let difference = (actual - expected).abs() / f64::from(DRAWS);
                assert!(
                    difference < 0.04,
                    "{name} at {temperature}: {actual} of {expected}"
                );
            }
        }
    }
}

#[test]
fn explain_names_the_worker_that_deterministic_policies_choose() {
    for policy in [policy::ROUND_ROBIN, policy::CONSISTENT_HASH] {
        let (router, _bookings) = unevenly_loaded(config_with(|config| config.policy = policy));
        for i in 0..50 {
            let sequence = prompt(i * 100..(i + 1) * 100);
            let request = Request::new(&sequence);
            let explained = router.explain(&request, Duration::ZERO).unwrap();
            let expected = explained.expected_choice().unwrap();
            assert_eq!(expected.probability, 1.0);
            assert_eq!(route(&router, &sequence).worker(), expected.id, "{policy}");
        }
    }
}
