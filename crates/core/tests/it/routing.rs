//! How requests are spread: each policy, each error, each part of a decision.

#![allow(clippy::unwrap_used)]

use std::sync::Barrier;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::choose::Policy;
use foresee_core::fleet::{WorkerId, WorkerSpec, WorkerState};
use foresee_core::router::{ConfigError, Request, RouteError, Router, RouterConfig};
use foresee_core::sequence::Sequence;

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

fn with(change: impl FnOnce(&mut RouterConfig)) -> RouterConfig {
    let mut config = RouterConfig::default();
    change(&mut config);
    config
}

/// 1,000 requests at once, from 16 threads, of one length and nothing in common: each decision
/// sees all others, so they spread exactly.
#[test]
fn simultaneous_requests_spread_evenly() {
    for seed in 0..20 {
        let router = fleet(
            8,
            RouterConfig {
                seed,
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
                        let share = 1000 / 16 + u32::from(thread < 1000 % 16);
                        (0..share)
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
                .flat_map(|t| t.join().unwrap())
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

/// Whatever the policy, load is booked, and the same seed makes the same choices.
#[test]
fn every_policy_books_and_repeats_itself() {
    let run = |policy| {
        let router = fleet(
            5,
            RouterConfig {
                policy,
                seed: 9,
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
        let bound = if policy == Policy::Random { 70 } else { 50 };
        assert!(
            requests.iter().all(|&requests| requests <= bound),
            "{policy}: {requests:?}"
        );
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    for (policy, _) in Policy::ALL {
        if policy == Policy::Kv {
            continue; // balances blocks, not requests
        }
        assert_eq!(run(policy), run(policy), "{policy}");
    }
}

#[test]
fn weight_zero_looks_at_load_alone() {
    let router = fleet(2, with(|config| config.overlap_weight = 0.0));
    let sequence = prompt(0..1600);
    // A shared block costs nothing where it is, yet the second copy goes elsewhere.
    let first = route(&router, &sequence);
    let second = route(&router, &sequence);
    assert_ne!(first.worker(), second.worker());
}

#[test]
fn overlap_draws_until_load_outweighs_it() {
    let router = fleet(2, RouterConfig::default());
    let sequence = prompt(0..1600);
    let mut warm = route(&router, &sequence);
    let holder = warm.worker();
    warm.tokens(1, Duration::ZERO);
    warm.finish(Duration::ZERO);
    // Cached, not active: a sibling goes there.
    let sibling = route(&router, &sequence);
    assert_eq!(sibling.worker(), holder);
    assert_eq!(
        sibling.decision().cost.overlap_blocks,
        99,
        "one token must be computed"
    );
    // Its blocks there now weigh as much as computing the prompt elsewhere, and more once others
    // join: strangers go to the empty worker.
    let elsewhere = route(&router, &prompt(10_000..11_600));
    assert_ne!(elsewhere.worker(), holder);
}

/// A request sees its own blocks while it chooses, but must not take them for a cache that
/// spares it work where it starts anew.
#[test]
fn a_request_that_starts_anew_has_its_prompt_to_compute() {
    let router = fleet(1, RouterConfig::default());
    let mut booking = route(&router, &prompt(0..1600));
    booking.reroute(&[], Duration::ZERO).unwrap();
    assert_eq!(booking.decision().cost.overlap_blocks, 0);
    assert_eq!(router.workers(Duration::ZERO)[0].prefill_tokens, 1600);
    booking.move_to(booking.worker(), Duration::ZERO).unwrap();
    assert_eq!(booking.decision().cost.overlap_blocks, 0);
    assert_eq!(router.workers(Duration::ZERO)[0].prefill_tokens, 1600);
}

/// Four workers with 0 to 3 strangers of 50 blocks each, and what `kv` makes of them.
fn uneven_fleet(temperature: f64) -> (Router, Vec<Booking>) {
    let config = with(|config| {
        config.policy = Policy::Kv;
        (config.temperature, config.seed) = (temperature, 5);
    });
    let router = fleet(4, config);
    let ids = ids(&router);
    let strangers = [1, 2, 2, 3, 3, 3].into_iter().zip(0_u32..);
    let bookings = strangers
        .map(|(place, i)| {
            let first = 1_000_000 * (i + 1);
            let mut booking = route(&router, &prompt(first..first + 800));
            booking.move_to(ids[place], Duration::ZERO).unwrap();
            booking
        })
        .collect();
    (router, bookings)
}

#[test]
fn softmax_chooses_as_often_as_it_says() {
    let (router, _strangers) = uneven_fleet(0.5);
    let sequence = prompt(0..400);
    let explained = router
        .explain(&Request::new(&sequence), Duration::ZERO)
        .unwrap();
    // Costs above the least are 0, 1/3, 2/3 and 1 of their range.
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
        let share = f64::from(count) / DRAWS as f64;
        assert!((share - candidate.probability).abs() < 0.015, "{share}");
    }
}

#[test]
fn tiny_temperatures_take_the_least_cost() {
    for temperature in [0.0, f64::MIN_POSITIVE, 1e-300, 1e-6] {
        let (router, _strangers) = uneven_fleet(temperature);
        let sequence = prompt(0..400);
        for _ in 0..100 {
            assert_eq!(route(&router, &sequence).worker(), ids(&router)[0]);
        }
    }
}

#[test]
fn temperature_zero_repeats_itself_given_the_seed() {
    let run = |seed| {
        let router = fleet(8, with(|config| config.seed = seed));
        let bookings = (0..200_u32).map(|i| route(&router, &prompt(i * 100_000..i * 100_000 + 50)));
        let bookings: Vec<Booking> = bookings.collect();
        bookings.iter().map(Booking::worker).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2), "ties are broken by the seed");
}

#[test]
fn power_of_two_never_picks_the_busiest() {
    let router = fleet(3, with(|config| config.policy = Policy::PowerOfTwo));
    let ids = ids(&router);
    let mut busy = route(&router, &prompt(0..10));
    busy.move_to(ids[1], Duration::ZERO).unwrap();
    let mut picked = [0; 3];
    for _ in 0..300 {
        let worker = route(&router, &prompt(0..10)).worker();
        picked[ids.iter().position(|&id| id == worker).unwrap()] += 1;
    }
    assert_eq!(picked[1], 0);
    assert!(picked[0] > 100 && picked[2] > 100, "{picked:?}");
}

#[test]
fn consistent_hash_sticks_until_its_bound() {
    let router = fleet(5, with(|config| config.policy = Policy::ConsistentHash));
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

    // All of one family at once: no worker gets more than a quarter above the mean.
    let same: Vec<Booking> = (0..200)
        .map(|turn| route(&router, &family(0, turn)))
        .collect();
    let most = router
        .workers(Duration::ZERO)
        .iter()
        .map(|it| it.requests)
        .max();
    assert!(most <= Some(50), "{most:?}");
    drop(same);

    // A worker that leaves moves only those that were at home there.
    let gone = homes[0];
    router.remove_worker(gone);
    for (i, &home) in (0..).zip(&homes) {
        let now = route(&router, &family(10_000 * i, 0)).worker();
        assert!(now == home || home == gone);
    }
}

#[test]
fn one_worker_is_enough_for_every_policy_and_none_is_too_few() {
    let sequence = prompt(0..100);
    for (policy, name) in Policy::ALL {
        for temperature in [0.0, 1.0] {
            let router = fleet(
                1,
                with(|config| (config.policy, config.temperature) = (policy, temperature)),
            );
            let only = ids(&router);
            for _ in 0..10 {
                assert_eq!(route(&router, &sequence).worker(), only[0], "{name}");
            }
            let request = Request {
                excluded: &only,
                ..Request::new(&sequence)
            };
            let none = router.route(&request, Duration::ZERO).map(drop);
            assert_eq!(none, Err(RouteError::NoWorker(String::new())), "{name}");
        }
    }
}

#[test]
fn errors_tell_a_missing_model_from_a_missing_worker() {
    let router = Router::new(RouterConfig::default()).unwrap();
    let sequence = prompt(0..100);
    let route = |model: &str| {
        let request = Request {
            model,
            ..Request::new(&sequence)
        };
        router.route(&request, Duration::ZERO).map(|it| it.worker())
    };
    let no_worker = |model: &str| Err(RouteError::NoWorker(model.to_owned()));
    assert_eq!(route("a"), no_worker("a"), "nothing is known of any model");

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
    let one = add("one", &["a", "b", "a"]);
    assert_eq!(route("a"), no_worker("a"), "not yet healthy");
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));
    router.set_healthy(one, true);
    assert_eq!(route("a"), Ok(one));
    assert_eq!(route(""), Ok(one));
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));

    let other = add("other", &[]);
    assert_eq!(route("c"), no_worker("c"), "the other might serve it");
    router.set_healthy(other, true);
    assert_eq!(route("c"), Ok(other));
    router.set_models(other, vec!["d".to_owned()]);
    assert_eq!(route("c"), Err(RouteError::UnknownModel("c".to_owned())));
    assert_eq!(route("d"), Ok(other));
    router.remove_worker(other);
    assert_eq!(route("d"), Err(RouteError::UnknownModel("d".to_owned())));
}

#[test]
fn a_draining_worker_keeps_what_it_has_and_gets_nothing_new() {
    let router = fleet(2, RouterConfig::default());
    let sequence = prompt(0..1600);
    let mut booking = route(&router, &sequence);
    let drained = booking.worker();
    router.set_draining(drained, true);
    for _ in 0..20 {
        assert_ne!(route(&router, &sequence).worker(), drained);
    }
    booking.tokens(17, Duration::ZERO);
    let seen = router.workers(Duration::ZERO);
    let seen = seen.iter().find(|worker| worker.id == drained).unwrap();
    assert_eq!(seen.state, WorkerState::Draining);
    assert_eq!((seen.requests, seen.active_blocks), (1, 102));
    router.set_draining(drained, false);
    assert_eq!(route(&router, &sequence).worker(), drained);
}

#[test]
fn explaining_tells_what_routing_does_and_changes_nothing() {
    for (policy, name) in Policy::ALL {
        let run = |explains: usize| {
            let config = with(|config| {
                (config.policy, config.temperature, config.overlap_weight) = (policy, 0.7, 1.5);
            });
            let router = fleet(6, config);
            let mut bookings = Vec::new();
            for i in 0..100_u32 {
                let sequence = prompt((0..40 * i).map(|token| token / 300 * (i % 5)));
                let request = Request::new(&sequence);
                for _ in 0..explains {
                    let explained = router.explain(&request, Duration::ZERO).unwrap();
                    assert_eq!(explained.policy, policy);
                    let total: f64 = explained.candidates.iter().map(|it| it.probability).sum();
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
            assert_eq!(router.bookings(), 100);
            bookings.iter().map(Booking::worker).collect::<Vec<_>>()
        };
        assert_eq!(run(0), run(2), "{name}");
    }
}

#[test]
fn absurd_settings_are_refused() {
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
        let config = with(|config| config.overlap_weight = bad);
        let refused = Router::new(config).err().unwrap();
        assert_eq!(refused.field, "overlap-weight");
        let config = with(|config| config.temperature = bad);
        let ConfigError { field, value } = Router::new(config).err().unwrap();
        assert_eq!((field, value.to_bits()), ("temperature", bad.to_bits()));
    }
}
