//! Property test of ejections against a slow model: which workers are ejected, and that never too
//! many of one model are.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use foresee_core::booking::Booking;
use foresee_core::outlier::{ExchangeResult, OutlierConfig};
use foresee_core::policy;
use foresee_core::router::{Request, Router, RouterConfig};
use foresee_core::sequence::Sequence;
use foresee_core::workers::{WorkerId, WorkerSpec, WorkerState};
use proptest::prelude::*;

const MODELS: [&[&str]; 4] = [&["a"], &["b"], &["a", "b"], &[]];
const TRIAL_INTERVAL: u64 = 30;

#[derive(Clone, Debug)]
enum Step {
    /// A worker succeeds or fails some times.
    Report {
        worker: usize,
        fails: bool,
        times: usize,
    },
    /// A request for a model is routed, and its worker succeeds or fails.
    Exchange {
        model: usize,
        fails: bool,
    },
    /// A request is routed and stays.
    Book {
        model: usize,
    },
    /// A booking reports a failure and is released.
    FailBooking {
        booking: usize,
    },
    SetHealthy {
        worker: usize,
        healthy: bool,
    },
    SetDraining {
        worker: usize,
        draining: bool,
    },
    Restart {
        worker: usize,
    },
    /// The worker is removed and added again.
    Replace {
        worker: usize,
    },
    Wait {
        seconds: u64,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let worker = 0..8_usize;
    prop_oneof![
        8 => (worker.clone(), prop::bool::weighted(0.8), 1..12_usize)
            .prop_map(|(worker, fails, times)| Step::Report { worker, fails, times }),
        6 => (0..3_usize, any::<bool>()).prop_map(|(model, fails)| Step::Exchange { model, fails }),
        3 => (0..3_usize).prop_map(|model| Step::Book { model }),
        3 => (0..8_usize).prop_map(|booking| Step::FailBooking { booking }),
        4 => (worker.clone(), any::<bool>())
            .prop_map(|(worker, healthy)| Step::SetHealthy { worker, healthy }),
        2 => (worker.clone(), any::<bool>())
            .prop_map(|(worker, draining)| Step::SetDraining { worker, draining }),
        1 => worker.clone().prop_map(|worker| Step::Restart { worker }),
        1 => worker.prop_map(|worker| Step::Replace { worker }),
        4 => (1..40_u64).prop_map(|seconds| Step::Wait { seconds }),
    ]
}

/// An ejection of the model, in seconds.
#[derive(Clone, Copy, Debug)]
struct Ejection {
    since: u64,
    ends_at: u64,
    next_trial_at: u64,
}

#[derive(Clone, Debug, Default)]
struct Worker {
    models: Vec<&'static str>,
    healthy: bool,
    draining: bool,
    /// Whether each of the results since the start or the latest recovery was a failure.
    results: Vec<bool>,
    ejection: Option<Ejection>,
    ejections: u64,
    /// End of the latest ejection.
    calm_since: u64,
    /// Results of requests that were sent earlier are ignored.
    ignore_before: u64,
}

impl Worker {
    fn serves(&self, model: &str) -> bool {
        model.is_empty() || self.models.is_empty() || self.models.contains(&model)
    }

    fn accepts(&self) -> bool {
        self.healthy && !self.draining
    }

    fn recent(&self) -> &[bool] {
        &self.results[self.results.len().saturating_sub(20)..]
    }

    fn failure_rate(&self) -> f64 {
        let failures = self.recent().iter().filter(|&&failed| failed).count();
        failures as f64 / self.recent().len().max(1) as f64
    }

    fn consecutive(&self) -> usize {
        let failures = self.results.iter().rev();
        failures.take_while(|&&failed| failed).count()
    }

    fn end_ejection(&mut self, now: u64) {
        self.ejection = None;
        self.calm_since = now;
    }

    fn recover(&mut self, now: u64) {
        self.end_ejection(now);
        self.results.clear();
        self.ignore_before = now;
    }

    fn eject(&mut self, now: u64) {
        if self.ejection.is_none() {
            self.ejections = self.ejections.saturating_sub((now - self.calm_since) / 300);
        }
        self.ejections += 1;
        let duration = (30 * self.ejections).min(300);
        self.ejection = Some(Ejection {
            since: now,
            ends_at: now + duration,
            next_trial_at: now + duration.min(TRIAL_INTERVAL),
        });
    }
}

/// The model: workers by their number.
#[derive(Debug)]
struct Model(Vec<Worker>);

impl Model {
    /// Returns the accepting workers that serve the model.
    fn group(&self, model: &str) -> Vec<usize> {
        let numbers = 0..self.0.len();
        numbers
            .filter(|&number| self.0[number].accepts() && self.0[number].serves(model))
            .collect()
    }

    /// Returns the models that the worker may serve: all known ones if its own are unknown.
    fn models_of(&self, number: usize) -> Vec<&'static str> {
        match self.0[number].models.is_empty() {
            true => self.known_models(),
            false => self.0[number].models.clone(),
        }
    }

    fn known_models(&self) -> Vec<&'static str> {
        let models = self.0.iter().flat_map(|worker| worker.models.clone());
        models.collect()
    }

    fn first_model(&self, number: usize) -> &'static str {
        self.0[number].models.first().copied().unwrap_or_default()
    }

    fn ejected(&self, group: &[usize]) -> usize {
        let ejected = group
            .iter()
            .filter(|&&number| self.0[number].ejection.is_some());
        ejected.count()
    }

    fn max_ejected(group: &[usize]) -> usize {
        match group.len() {
            0 | 1 => 0,
            healthy => (healthy / 2).max(1),
        }
    }

    fn report(&mut self, number: usize, fails: bool, sent_at: u64, now: u64) {
        let worker = &mut self.0[number];
        let since = worker.ejection.map_or(0, |ejection| ejection.since);
        if sent_at < worker.ignore_before.max(since) {
            return;
        }
        match (fails, worker.ejection) {
            (false, Some(_)) => worker.recover(now),
            (true, Some(ejection)) => {
                if ejection.ends_at <= sent_at {
                    worker.eject(now);
                }
            }
            (_, None) => worker.results.push(fails),
        }
        if fails && self.0[number].ejection.is_none() && self.should_eject(number) {
            self.0[number].eject(now);
        }
    }

    fn should_eject(&self, number: usize) -> bool {
        let worker = &self.0[number];
        let group = self.group(self.first_model(number));
        let mut peers: Vec<f64> = group
            .iter()
            .filter(|&&peer| peer != number && self.0[peer].ejection.is_none())
            .filter(|&&peer| self.0[peer].recent().len() >= 5)
            .map(|&peer| self.0[peer].failure_rate())
            .collect();
        peers.sort_by(f64::total_cmp);
        let peer_rate = peers.get(peers.len() / 2).copied().unwrap_or(0.0);
        let (results, rate) = (worker.recent().len(), worker.failure_rate());
        let deviation = (peer_rate * (1.0 - peer_rate) / results as f64).sqrt();
        let is_run =
            worker.consecutive() >= 5 && peer_rate.powf(worker.consecutive() as f64) <= 0.0001;
        let is_rate =
            results >= 10 && rate >= 0.5 && rate >= peer_rate + (3.0 * deviation).max(0.3);
        let is_full = |group: &Vec<usize>| self.ejected(group) >= Self::max_ejected(group);
        (is_run || is_rate) && worker.accepts() && !self.groups_of(number).iter().any(is_full)
    }

    /// Returns the accepting workers of each model that the worker may serve.
    fn groups_of(&self, number: usize) -> Vec<Vec<usize>> {
        let models = self.models_of(number).into_iter();
        let models = models.chain([self.first_model(number)]);
        models.map(|model| self.group(model)).collect()
    }

    /// Ends ejections, earliest end first, that the fleet has become too small for.
    fn enforce(&mut self, indices: &[WorkerId], now: u64) {
        let mut ejected: Vec<_> = (0..self.0.len())
            .filter_map(|number| Some((self.0[number].ejection?.ends_at, indices[number], number)))
            .collect();
        // The router breaks ties by its indices, which it assigns again after a removal.
        ejected.sort_by_key(|&(ends_at, _, number)| (ends_at, number));
        for (_, _, number) in ejected {
            if !self.0[number].accepts() {
                continue;
            }
            let exceeds = |group: &Vec<usize>| self.ejected(group) > Self::max_ejected(group);
            if self.groups_of(number).iter().any(exceeds) {
                self.0[number].end_ejection(now);
            }
        }
    }

    fn due_trial(&self, model: &str, now: u64) -> Option<usize> {
        let group = self.group(model).into_iter();
        group
            .filter_map(|number| {
                let next_trial_at = self.0[number].ejection?.next_trial_at;
                (next_trial_at <= now).then_some((next_trial_at, number))
            })
            .min()
            .map(|(_, number)| number)
    }
}

fn check(workers: &[usize], steps: Vec<Step>) {
    let config = RouterConfig {
        policy: policy::LEAST_REQUESTS,
        queue_order: None,
        outlier: OutlierConfig {
            warm_up_requests: 0,
            ..OutlierConfig::default()
        },
        ..RouterConfig::default()
    };
    let router = Router::new(config).unwrap();
    let prompt = Sequence::from_tokens(&[1; 100], RouterConfig::default().block_size, 0);
    let mut now = 1_u64;
    let time = Duration::from_secs;
    let add = |number: usize, models: &[&str]| {
        router.add_worker(WorkerSpec {
            name: number.to_string(),
            models: models.iter().map(ToString::to_string).collect(),
            ..WorkerSpec::default()
        })
    };
    let mut model = Model(Vec::new());
    let mut ids = Vec::new();
    for (number, &models) in workers.iter().enumerate() {
        let id = add(number, MODELS[models]).unwrap();
        router.set_healthy(id, true);
        ids.push(id);
        model.0.push(Worker {
            models: MODELS[models].to_vec(),
            healthy: true,
            ..Worker::default()
        });
    }
    let mut bookings: Vec<(Booking, u64)> = Vec::new();
    let request_models = ["a", "b", ""];
    for step in steps {
        let result = |fails| match fails {
            true => ExchangeResult::Failure,
            false => ExchangeResult::Success,
        };
        let number_of = |ids: &[WorkerId], id| ids.iter().position(|&known| known == id).unwrap();
        match step {
            Step::Report {
                worker,
                fails,
                times,
            } => {
                let number = worker % ids.len();
                for _ in 0..times {
                    router.report(ids[number], result(fails), time(now));
                    model.report(number, fails, now, now);
                }
            }
            Step::Exchange { .. } | Step::Book { .. } => {
                let (Step::Exchange { model: name, .. } | Step::Book { model: name }) = step else {
                    continue;
                };
                let name = request_models[name];
                let request = Request {
                    model: name,
                    ..Request::new(&prompt)
                };
                let routed = router.route(&request, time(now));
                let group = model.group(name);
                let Ok(mut booking) = routed else {
                    assert!(group.is_empty());
                    continue;
                };
                let number = number_of(&ids, booking.worker());
                match model.due_trial(name, now) {
                    Some(due) => {
                        // Of trials that are due for equally long, any may be sent.
                        let due_since = |number: usize| {
                            model.0[number]
                                .ejection
                                .map(|ejection| ejection.next_trial_at)
                        };
                        assert_eq!(due_since(number), due_since(due), "the trial that is due");
                        if let Some(ejection) = &mut model.0[number].ejection {
                            ejection.next_trial_at = now + TRIAL_INTERVAL;
                        }
                    }
                    None => assert!(
                        model.0[number].ejection.is_none() || model.ejected(&group) == group.len(),
                        "no trial is due"
                    ),
                }
                assert!(group.contains(&number));
                if let Step::Exchange { fails, .. } = step {
                    booking.report(result(fails), time(now));
                    model.report(number, fails, now, now);
                } else {
                    bookings.push((booking, now));
                }
            }
            Step::FailBooking { booking } => {
                if !bookings.is_empty() {
                    let (mut booking, sent_at) = bookings.swap_remove(booking % bookings.len());
                    booking.report(ExchangeResult::Failure, time(now));
                    let worker = booking.worker();
                    if let Some(number) = ids.iter().position(|&known| known == worker) {
                        model.report(number, true, sent_at, now);
                    }
                }
            }
            Step::SetHealthy { worker, healthy } => {
                let number = worker % ids.len();
                router.set_healthy(ids[number], healthy);
                model.0[number].healthy = healthy;
                model.enforce(&ids, now);
            }
            Step::SetDraining { worker, draining } => {
                let number = worker % ids.len();
                router.set_draining(ids[number], draining);
                model.0[number].draining = draining;
                model.enforce(&ids, now);
            }
            Step::Restart { worker } => {
                let number = worker % ids.len();
                router.reset_outlier(ids[number], time(now));
                let known = &model.0[number];
                model.0[number] = Worker {
                    models: known.models.clone(),
                    healthy: known.healthy,
                    draining: known.draining,
                    ignore_before: now,
                    ..Worker::default()
                };
            }
            Step::Replace { worker } => {
                let number = worker % ids.len();
                assert!(router.remove_worker(ids[number]));
                let models = model.0[number].models.clone();
                model.0[number] = Worker {
                    models: models.clone(),
                    ignore_before: now,
                    ..Worker::default()
                };
                model.enforce(&ids, now);
                ids[number] = add(number, &models).unwrap();
            }
            Step::Wait { seconds } => {
                now += seconds;
                // The router learns the time with each call.
                let _ = router.workers(time(now));
            }
        }
        let snapshots: BTreeMap<WorkerId, _> = router
            .workers(time(now))
            .into_iter()
            .map(|worker| (worker.id, worker))
            .collect();
        for (number, id) in ids.iter().enumerate() {
            let outlier = &snapshots[id].outlier;
            let expected = &model.0[number];
            let expected = expected.ejection.map(|ejection| time(ejection.ends_at));
            assert_eq!(
                outlier.ejected_until, expected,
                "worker {number} after {step:?}"
            );
            let is_shown = snapshots[id].state == WorkerState::Ejected;
            assert_eq!(is_shown, expected.is_some() && model.0[number].accepts());
        }
        for name in model.known_models() {
            let group = model.group(name);
            let (ejected, limit) = (model.ejected(&group), Model::max_ejected(&group));
            assert!(
                ejected <= limit,
                "{ejected} workers of {name:?} are ejected"
            );
            assert!(group.is_empty() || ejected < group.len());
        }
    }
    drop(bookings);
    for worker in router.workers(time(now)) {
        let load = (worker.requests, worker.active_blocks, worker.prefill_tokens);
        assert_eq!(load, (0, 0, 0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn ejections_equal_the_model(
        workers in prop::collection::vec(0..4_usize, 1..8),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        check(&workers, steps);
    }

    #[test]
    fn never_more_than_half_of_a_model_is_ejected(
        workers in 1..8_usize,
        steps in prop::collection::vec(step(), 1..60),
    ) {
        check(&vec![0; workers], steps);
    }
}
