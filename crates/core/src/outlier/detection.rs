//! Which workers are ejected, and which may be chosen now.

use std::borrow::Cow;
use std::time::Duration;

use foresee_prefix::WorkerIndex;

use super::record::{FailureCharge, OutlierRecord};
use super::{OutlierConfig, Restriction};
use crate::affinity::restrict;
use crate::model_name::ModelName;
use crate::request::{PreparedRequest, SelectError};
use crate::worker_id::WorkerId;
use crate::workers::{Worker, Workers};

/// Smallest difference between the failure rate of an outlier and the median of its peers.
const MIN_EXCESS_FAILURE_RATE: f64 = 0.3;

/// Smallest such difference in standard deviations of the failure rate of a worker that is like its
/// peers.
const MIN_EXCESS_DEVIATIONS: f64 = 3.0;

/// Probability with which a worker that is no worse than its peers may fail so often in a row that
/// it is ejected.
const MAX_CHANCE_OF_FAILURE_RUN: f64 = 1e-4;

/// Number of models of one worker for which the fraction of ejected workers is limited. Of further
/// models, such as LoRA adapters, only the last worker is not ejected.
const MAX_LIMITED_MODELS: usize = 16;

/// Number of results from which the failure rate of a peer is used.
const MIN_PEER_RESULTS: usize = 5;

/// Records of all workers, and lists of the few to which the records matter at present.
#[derive(Debug, Default)]
pub(crate) struct Outliers {
    pub(crate) config: OutlierConfig,
    /// Records by worker index. Records of removed workers stay until their index is used again.
    records: Vec<OutlierRecord>,
    /// Workers that are ejected or have had backpressure recently. Usually empty.
    restricted: Vec<WorkerIndex>,
    /// Workers that are warming up. Usually empty.
    warming_up: Vec<WorkerIndex>,
    /// Workers with a failure charge. Usually empty.
    charged: Vec<WorkerIndex>,
}

impl Outliers {
    /// Returns an empty collection with these settings.
    pub(crate) fn new(config: OutlierConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }

    /// Starts the record of a worker that was added or restarted, without failures and warming up.
    pub(crate) fn start(&mut self, index: WorkerIndex, now: Duration) {
        self.forget(index);
        let position = index as usize;
        if self.records.len() <= position {
            self.records
                .resize_with(position + 1, OutlierRecord::default);
        }
        self.records[position] = OutlierRecord::new(now);
        if self.config.warm_up_requests > 0 {
            self.warming_up.push(index);
        }
    }

    /// Removes a worker from all lists.
    pub(crate) fn forget(&mut self, index: WorkerIndex) {
        for list in [
            &mut self.restricted,
            &mut self.warming_up,
            &mut self.charged,
        ] {
            list.retain(|&listed| listed != index);
        }
    }

    /// Returns the record of the worker at `index`, if any worker ever had it.
    pub(crate) fn record(&self, index: WorkerIndex) -> Option<&OutlierRecord> {
        self.records.get(index as usize)
    }

    /// Returns the record of the worker at `index` to be changed, with the settings.
    pub(crate) fn record_mut(
        &mut self,
        index: WorkerIndex,
    ) -> Option<(&mut OutlierRecord, &OutlierConfig)> {
        Some((self.records.get_mut(index as usize)?, &self.config))
    }

    /// Ends the warm-up of a worker, whose first requests are then no longer limited.
    pub(crate) fn end_warm_up(&mut self, index: WorkerIndex) {
        if let Some(record) = self.records.get_mut(index as usize)
            && record.is_warming_up
        {
            record.is_warming_up = false;
            self.warming_up.retain(|&listed| listed != index);
        }
    }

    /// Lists a worker that was ejected or has backpressure.
    pub(crate) fn restrict(&mut self, index: WorkerIndex) {
        if !self.restricted.contains(&index) {
            self.restricted.push(index);
        }
    }

    /// Adds to the failure charge of a worker.
    pub(crate) fn add_charge(&mut self, index: WorkerIndex, charge: FailureCharge, now: Duration) {
        let Some(record) = self.records.get_mut(index as usize) else {
            return;
        };
        record.add_charge(charge, &self.config, now);
        if !self.charged.contains(&index) {
            self.charged.push(index);
        }
    }

    /// Returns whether any worker has a failure charge.
    pub(crate) fn has_charges(&self) -> bool {
        !self.charged.is_empty()
    }

    /// Returns the failure charge of a worker. Zero at the cost of one comparison if no worker has
    /// one.
    #[inline]
    pub(crate) fn charge(&self, index: WorkerIndex, now: Duration) -> FailureCharge {
        if self.charged.is_empty() {
            return FailureCharge::default();
        }
        let record = self.records.get(index as usize);
        record.map_or_else(FailureCharge::default, |record| {
            record.charge(&self.config, now)
        })
    }

    /// Removes workers from the lists whose backpressure has ended or whose charge has decayed.
    fn prune(&mut self, now: Duration) {
        let Self {
            config,
            records,
            restricted,
            charged,
            ..
        } = self;
        restricted.retain(|&index| {
            let record = &records[index as usize];
            record.ejection.is_some() || record.backpressure_until(now).is_some()
        });
        charged.retain(|&index| {
            let record = &mut records[index as usize];
            let is_negligible = record.is_charge_negligible(config, now);
            if is_negligible {
                record.clear_charge();
            }
            !is_negligible
        });
    }
}

impl Workers {
    /// Returns why a worker is passed over, if it is.
    pub(crate) fn restriction(&self, index: WorkerIndex, now: Duration) -> Option<Restriction> {
        let record = self.outliers.record(index)?;
        if record.ejection.is_some() {
            return Some(Restriction::Ejected);
        }
        if let Some(until) = record.backpressure_until(now) {
            return Some(Restriction::Backpressure { until });
        }
        self.is_at_warm_up_limit(index)
            .then_some(Restriction::WarmUp)
    }

    /// Returns whether the worker gets no new bookings because it replied 429 or 503.
    pub(crate) fn has_backpressure(&self, index: WorkerIndex, now: Duration) -> bool {
        !self.outliers.restricted.is_empty()
            && self
                .outliers
                .record(index)
                .is_some_and(|record| record.backpressure_until(now).is_some())
    }

    /// Returns whether the worker is warming up and has as many requests as it may have until then.
    fn is_at_warm_up_limit(&self, index: WorkerIndex) -> bool {
        let limit = self.outliers.config.warm_up_requests;
        let is_warming_up = self
            .outliers
            .record(index)
            .is_some_and(|record| record.is_warming_up);
        limit > 0 && is_warming_up && self.loads[index as usize].requests >= limit
    }

    /// Returns whether some worker may be passed over. Costs two comparisons if none is.
    pub(crate) fn has_restrictions(&self) -> bool {
        !self.outliers.restricted.is_empty()
            || self
                .outliers
                .warming_up
                .iter()
                .any(|&index| self.is_at_warm_up_limit(index))
    }

    /// Returns the workers among which a policy chooses for this request: the eligible ones that
    /// are not passed over. Ignores the warm-up limit if more workers are at it than not: see
    /// [`on_selected`](Self::on_selected). If all are passed over, returns the ejected ones.
    /// Excluded workers are left out.
    ///
    /// # Errors
    /// [`SelectError::UnknownModel`] if the models of all workers are known and none serves this
    /// one. [`SelectError::Backpressure`] if workers could be chosen were it not for their
    /// backpressure.
    pub(crate) fn selectable(
        &self,
        request: &PreparedRequest<'_>,
        excluded: &[WorkerIndex],
        now: Duration,
    ) -> Result<Cow<'_, [WorkerIndex]>, SelectError> {
        let eligible = self
            .eligible(request.model_name())
            .ok_or(SelectError::UnknownModel)?;
        let eligible = restrict(eligible, request.only_worker.map(|id| id.index));
        if !self.has_restrictions() {
            if excluded.is_empty() {
                return Ok(Cow::Borrowed(eligible));
            }
            let remaining = eligible.iter().copied();
            let remaining = remaining.filter(|index| !excluded.contains(index));
            return Ok(Cow::Owned(remaining.collect()));
        }
        // Workers without a restriction, those and the ones at their warm-up limit, and ejected ones.
        let (mut available, mut accepting, mut ejected) = (Vec::new(), Vec::new(), Vec::new());
        // Earliest end of the backpressure of a worker that is not ejected, and of one that is.
        let (mut until, mut ejected_until) = (None::<Duration>, None::<Duration>);
        let earlier = |known: Option<Duration>, until: Duration| {
            Some(known.map_or(until, |known| known.min(until)))
        };
        for &index in eligible {
            if excluded.contains(&index) {
                continue;
            }
            match self.restriction(index, now) {
                None => {
                    available.push(index);
                    accepting.push(index);
                }
                Some(Restriction::WarmUp) => accepting.push(index),
                Some(Restriction::Backpressure { until: end }) => until = earlier(until, end),
                Some(Restriction::Ejected) => {
                    let record = self.outliers.record(index);
                    match record.and_then(|record| record.backpressure_until(now)) {
                        Some(end) => ejected_until = earlier(ejected_until, end),
                        None => ejected.push(index),
                    }
                }
            }
        }
        if !accepting.is_empty() {
            let is_fleet_new = 2 * available.len() < accepting.len();
            let chosen = if is_fleet_new { accepting } else { available };
            return Ok(Cow::Owned(chosen));
        }
        let backpressure = |until: Duration| SelectError::Backpressure {
            retry_after: until.saturating_sub(now),
        };
        match (until, ejected_until) {
            (Some(until), _) => Err(backpressure(until)),
            _ if !ejected.is_empty() => Ok(Cow::Owned(ejected)),
            (None, Some(until)) => Err(backpressure(until)),
            (None, None) => Ok(Cow::Owned(Vec::new())),
        }
    }

    /// Ends the warm-up of all workers that serve the model of a request if the worker at `index`,
    /// which was selected for it, is at its warm-up limit. Most of them are then new, and a burst
    /// has arrived. Their first outputs end their warm-ups at slightly different times, and without
    /// this rule the first half of them would get the rest of the burst. A request for which other
    /// workers are excluded shows nothing.
    pub(crate) fn on_selected(&mut self, index: WorkerIndex, request: &PreparedRequest<'_>) {
        let has_choice = request.only_worker.is_none() && request.excluded_workers.is_empty();
        if !has_choice || !self.is_at_warm_up_limit(index) {
            return;
        }
        let eligible = self.eligible(request.model_name()).unwrap_or_default();
        let is_new = |index: &WorkerIndex| eligible.contains(index);
        let all_new = self.outliers.warming_up.iter().copied().filter(is_new);
        for index in all_new.collect::<Vec<_>>() {
            self.outliers.end_warm_up(index);
        }
    }

    /// Returns an ejected worker to which this request is to be sent as a trial, and schedules its
    /// next trial. `None` if no trial is due, or if the request has excluded workers: its retry
    /// must not meet a worker that may fail.
    pub(crate) fn take_due_trial(
        &mut self,
        request: &PreparedRequest<'_>,
        now: Duration,
    ) -> Option<WorkerId> {
        if self.outliers.restricted.is_empty() && self.outliers.charged.is_empty() {
            return None;
        }
        self.outliers.prune(now);
        let worker = self.due_trial(request, now)?;
        let (record, config) = self.outliers.record_mut(worker.index)?;
        if let Some(ejection) = &mut record.ejection {
            ejection.next_trial_at = now.saturating_add(config.trial_interval);
        }
        Some(worker)
    }

    /// Returns the ejected worker whose trial has been due for longest and that can serve the
    /// request. `None` if the request has excluded workers, or one that it has to go to.
    pub(crate) fn due_trial(
        &self,
        request: &PreparedRequest<'_>,
        now: Duration,
    ) -> Option<WorkerId> {
        if !request.excluded_workers.is_empty() || request.only_worker.is_some() {
            return None;
        }
        let due = self.outliers.restricted.iter().filter_map(|&index| {
            let record = self.outliers.record(index)?;
            let next_trial_at = record.ejection?.next_trial_at;
            let worker = self.by_index(index)?;
            let is_due = next_trial_at <= now
                && record.backpressure_until(now).is_none()
                && worker.is_accepting()
                && worker.serves(request.model);
            is_due.then_some((next_trial_at, worker.id))
        });
        due.min().map(|(_, id)| id)
    }

    /// Returns the eligible workers that serve the first model of `worker`, itself included: those
    /// with which it is compared.
    fn peers(&self, index: WorkerIndex) -> &[WorkerIndex] {
        let model = self
            .by_index(index)
            .and_then(|worker| worker.models().first())
            .map_or("", String::as_str);
        self.eligible(ModelName::new(model)).unwrap_or_default()
    }

    /// Returns the median failure rate of the peers of a worker that are not ejected and have a
    /// known rate, without the worker itself. 0 if there are none.
    fn median_peer_failure_rate(&self, index: WorkerIndex, now: Duration) -> f64 {
        let mut rates: Vec<f64> = self
            .peers(index)
            .iter()
            .filter(|&&peer| peer != index)
            .filter_map(|&peer| {
                let record = self.outliers.record(peer)?;
                let (results, rate) = record.failure_rate(now);
                (results >= MIN_PEER_RESULTS && record.ejection.is_none()).then_some(rate)
            })
            .collect();
        let middle = rates.len() / 2;
        if rates.is_empty() {
            return 0.0;
        }
        *rates.select_nth_unstable_by(middle, f64::total_cmp).1
    }

    /// Ejects a worker that has failed if it is clearly worse than its peers and few enough of them
    /// are ejected. Returns whether it did.
    pub(crate) fn eject_if_outlier(&mut self, index: WorkerIndex, now: Duration) -> bool {
        if !self.is_outlier(index, now) || !self.may_eject(index) {
            return false;
        }
        let Some((record, config)) = self.outliers.record_mut(index) else {
            return false;
        };
        record.eject(config, now);
        self.outliers.restrict(index);
        self.set_ejected(index, true);
        true
    }

    /// Returns whether a worker that is not ejected fails clearly more often than its peers.
    fn is_outlier(&self, index: WorkerIndex, now: Duration) -> bool {
        let config = &self.outliers.config;
        let Some(record) = self.outliers.record(index) else {
            return false;
        };
        let consecutive = record.consecutive_failures();
        let (results, rate) = record.failure_rate(now);
        let min_consecutive = config.consecutive_failures;
        let has_failure_run = min_consecutive > 0 && consecutive >= min_consecutive;
        let has_failure_rate = config.failure_rate > 0.0
            && results >= config.min_results as usize
            && rate >= config.failure_rate;
        if record.ejection.is_some() || !(has_failure_run || has_failure_rate) {
            return false;
        }
        let peer_rate = self.median_peer_failure_rate(index, now);
        let run_chance = peer_rate.powf(f64::from(consecutive));
        let deviation = (peer_rate * (1.0 - peer_rate) / results.max(1) as f64).sqrt();
        let min_excess = MIN_EXCESS_FAILURE_RATE.max(MIN_EXCESS_DEVIATIONS * deviation);
        (has_failure_run && run_chance <= MAX_CHANCE_OF_FAILURE_RUN)
            || (has_failure_rate && rate >= peer_rate + min_excess)
    }

    /// Returns whether the worker may be ejected: of each of its models at most the allowed number
    /// of workers is ejected then, and another worker is left.
    fn may_eject(&self, index: WorkerIndex) -> bool {
        let Some(worker) = self.by_index(index).filter(|worker| worker.is_accepting()) else {
            return false;
        };
        let is_within_limit =
            |workers: &[WorkerIndex]| self.ejected_count(workers) < self.max_ejected(workers.len());
        let has_other = |workers: &[WorkerIndex]| {
            let mut others = workers.iter().filter(|&&other| other != index);
            others.any(|&other| !self.is_ejected(other))
        };
        is_within_limit(self.peers(index))
            && self
                .groups(worker)
                .take(MAX_LIMITED_MODELS)
                .all(is_within_limit)
            && self.groups(worker).all(has_other)
    }

    /// Returns whether too many workers of one of the worker's models are ejected, or all.
    fn exceeds_limit(&self, worker: &Worker) -> bool {
        let exceeds =
            |workers: &[WorkerIndex]| self.ejected_count(workers) > self.max_ejected(workers.len());
        let is_without_other =
            |workers: &[WorkerIndex]| workers.iter().all(|&other| self.is_ejected(other));
        exceeds(self.peers(worker.id.index))
            || self.groups(worker).take(MAX_LIMITED_MODELS).any(exceeds)
            || self.groups(worker).any(is_without_other)
    }

    /// Returns the eligible workers of each model that the worker may serve.
    fn groups<'a>(&'a self, worker: &'a Worker) -> impl Iterator<Item = &'a [WorkerIndex]> {
        self.models_of(worker)
            .map(|model| self.eligible(model).unwrap_or_default())
    }

    /// Returns how many of `count` healthy workers may be ejected.
    fn max_ejected(&self, count: usize) -> usize {
        if count < 2 {
            return 0;
        }
        let fraction = self.outliers.config.max_ejected_fraction;
        ((count as f64 * fraction) as usize).clamp(1, count - 1)
    }

    /// Returns how many of these workers are ejected.
    fn ejected_count(&self, indices: &[WorkerIndex]) -> usize {
        let ejected = indices.iter().filter(|&&index| self.is_ejected(index));
        ejected.count()
    }

    /// Returns whether the worker at `index` is ejected.
    fn is_ejected(&self, index: WorkerIndex) -> bool {
        self.by_index(index)
            .is_some_and(|worker| worker.is_ejected())
    }

    /// Ends ejections, in the order in which they would end, until no model has more ejected workers
    /// than allowed. Must be called after every change of eligibility. The workers keep their
    /// failures and their charge.
    pub(crate) fn enforce_ejection_limit(&mut self, now: Duration) {
        let mut ejected: Vec<(Duration, WorkerIndex)> = self
            .outliers
            .restricted
            .iter()
            .filter(|&&index| self.is_ejected(index))
            .filter_map(|&index| Some((self.outliers.record(index)?.ejection?.ends_at, index)))
            .collect();
        ejected.sort_unstable();
        for (_, index) in ejected {
            let worker = self.by_index(index).filter(|worker| worker.is_accepting());
            let Some(worker) = worker else {
                continue;
            };
            if self.exceeds_limit(worker) {
                if let Some((record, _)) = self.outliers.record_mut(index) {
                    record.end_ejection(now);
                }
                self.set_ejected(index, false);
            }
        }
    }
}
