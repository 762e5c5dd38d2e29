//! The workers there are: who may serve which model, and what each is known to carry.

use std::collections::HashMap;
use std::mem;
use std::num::NonZeroU32;
use std::time::Duration;

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::capacity::CapacitySource;
use crate::choose::Load;
use crate::delay::{Delay, Placement};
use crate::forecast::pace::{Law, Pace};
use crate::outlook::Outlook;
use crate::shadow::{Eviction, Shadow};
use crate::tree::{Depth, Slot};

/// Names one worker for as long as it is known. A worker removed and added again, even under
/// the same name, has another id. Ids are ordered by when the workers joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkerId {
    pub(crate) generation: u64,
    pub(crate) slot: Slot,
}

/// What a worker is, as far as routing cares.
#[derive(Clone, Debug, Default)]
pub struct WorkerSpec {
    /// Unique among the workers.
    pub name: String,
    /// Models it serves; empty while unknown, and then it is eligible for every model.
    pub models: Vec<String>,
    /// KV blocks it has; unknown begins as
    /// [`DEFAULT_CAPACITY_BLOCKS`](crate::DEFAULT_CAPACITY_BLOCKS) and is learned.
    pub capacity_blocks: Option<u32>,
    /// Without prefix caching no two requests share a block there.
    pub prefix_caching: bool,
    /// How it chooses what to evict.
    pub eviction: Eviction,
}

/// Whether a worker can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerState {
    /// It can.
    Healthy,
    /// Its probe fails; requests it still runs stay booked.
    Unhealthy,
    /// It finishes what it has and gets nothing new.
    Draining,
}

impl WorkerState {
    /// The name used in the admin API and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Draining => "draining",
        }
    }
}

/// One worker at one instant.
#[derive(Clone, Debug)]
pub struct WorkerSnapshot {
    /// The worker.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// Whether it can be chosen.
    pub state: WorkerState,
    /// Models it serves; empty while unknown.
    pub models: Vec<String>,
    /// Requests booked on it.
    pub requests: u32,
    /// Those of them that wait at the router.
    pub held_requests: u32,
    /// Blocks pinned by those that it has, shared ones once.
    pub active_blocks: u64,
    /// Blocks beside those that will be pinned by those that wait.
    pub held_blocks: u64,
    /// Prompt and output tokens of them, not deduplicated.
    pub context_tokens: u64,
    /// Booked prompt tokens that it has not computed yet, by forecast.
    pub prefill_tokens: u64,
    /// Blocks its prefix cache holds: by its events, or by the shadow's account, pinned or not.
    pub cached_blocks: u64,
    /// Its events tell what it caches; otherwise the shadow does.
    pub follows_events: bool,
    /// Its KV blocks.
    pub capacity_blocks: u32,
    /// Who says so.
    pub capacity_source: CapacitySource,
    /// How it chooses what to evict.
    pub eviction: Eviction,
    /// What it takes, as learned.
    pub pace: Pace,
    /// Until a prompt booked now would be turned to, by forecast.
    pub backlog: Duration,
    /// Between two tokens of one request as things stand, by forecast.
    pub inter_token_latency: Duration,
    /// Prompts forecast, and the mean error of what was forecast to be their time to first token,
    /// as a share of it.
    pub first_token_error: (u64, f64),
}

/// Why a worker cannot join.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WorkerError {
    /// Two workers of one name could not be told apart.
    #[error(
        "a worker named `{0}` exists already: give this one another name, or remove that one first"
    )]
    NameTaken(String),
    /// Every structure indexed by worker is bounded.
    #[error("there are {0} workers already, which is the limit")]
    TooMany(usize),
}

/// Most workers one router takes.
pub const MAX_WORKERS: usize = 4096;

/// Sets of models whose workers are told apart in what they take.
const MOST_LAWS: usize = 256;

#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) name: String,
    models: Vec<String>,
    healthy: bool,
    draining: bool,
    pub(crate) prefix_caching: bool,
    pub(crate) shadow: Shadow,
    /// Blocks pinned through the prefix tree: active blocks less the unshared ones.
    pub(crate) pinned: u64,
    /// Blocks cached by its events' account.
    pub(crate) told: u64,
}

/// A worker whose engine's blocks are so many of the router's, more than one. Engines share whole
/// blocks of their own size only.
#[derive(Clone, Copy, Debug)]
struct Coarse {
    slot: Slot,
    stride: NonZeroU32,
}

impl Worker {
    /// KV blocks it has, if that is more than an assumption.
    pub(crate) fn known_capacity(&self) -> Option<u32> {
        let is_assumed = self.shadow.capacity_source() == CapacitySource::Assumed;
        (!is_assumed).then(|| self.shadow.capacity())
    }

    /// KV blocks it has, if somebody said so.
    pub(crate) fn told_capacity(&self) -> Option<u32> {
        match self.shadow.capacity_source() {
            CapacitySource::Configured | CapacitySource::Reported => Some(self.shadow.capacity()),
            CapacitySource::Learned | CapacitySource::Assumed => None,
        }
    }

    pub(crate) fn state(&self) -> WorkerState {
        match (self.draining, self.healthy) {
            (true, _) => WorkerState::Draining,
            (false, true) => WorkerState::Healthy,
            (false, false) => WorkerState::Unhealthy,
        }
    }
}

/// All workers, by slot, and who is eligible for which model.
#[derive(Debug, Default)]
pub(crate) struct Fleet {
    workers: Vec<Option<Worker>>,
    /// Apart from `workers`, so that a decision over hundreds of them reads little memory.
    pub(crate) loads: Vec<Load>,
    /// Apart for the same reason.
    pub(crate) outlooks: Vec<Outlook>,
    /// What workers of the same first model have in common. Never shrinks, so bounded by the first
    /// models that workers of one fleet ever had; of more than [`MOST_LAWS`], the rest share the first.
    laws: Vec<(String, Law)>,
    eligible: Eligible,
    /// Apart too, because most fleets have none.
    coarse: Vec<Coarse>,
    generations: u64,
}

#[derive(Debug, Default)]
struct Eligible {
    for_any_model: Vec<Slot>,
    /// Models that some worker, eligible or not, is known to serve.
    by_model: HashMap<String, Vec<Slot>>,
    /// Workers whose models are not known: they might serve any.
    of_unknown_models: Vec<Slot>,
}

impl Fleet {
    pub(crate) fn add(&mut self, spec: WorkerSpec) -> Result<WorkerId, WorkerError> {
        if self.iter().any(|worker| worker.name == spec.name) {
            return Err(WorkerError::NameTaken(spec.name));
        }
        let slot = match self.workers.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.workers.len() == MAX_WORKERS => {
                return Err(WorkerError::TooMany(MAX_WORKERS));
            }
            None => {
                self.workers.push(None);
                self.loads.push(Load::default());
                self.outlooks.push(Outlook::default());
                self.workers.len() - 1
            }
        };
        self.generations += 1;
        let id = WorkerId {
            slot: slot as Slot,
            generation: self.generations,
        };
        self.loads[slot] = Load {
            identity: rapidhash_v3_seeded(spec.name.as_bytes(), &DEFAULT_RAPID_SECRETS),
            ..Load::default()
        };
        self.outlooks[slot] = Outlook::following(self.find_law(&spec.models));
        self.workers[slot] = Some(Worker {
            id,
            name: spec.name,
            models: spec.models,
            healthy: false,
            draining: false,
            prefix_caching: spec.prefix_caching,
            shadow: Shadow::new(spec.eviction, spec.capacity_blocks),
            pinned: 0,
            told: 0,
        });
        self.find_eligible();
        Ok(id)
    }

    pub(crate) fn remove(&mut self, id: WorkerId) -> bool {
        if self.get(id).is_none() {
            return false;
        }
        self.workers[id.slot as usize] = None;
        self.loads[id.slot as usize] = Load::default();
        self.outlooks[id.slot as usize] = Outlook::default();
        self.coarse.retain(|coarse| coarse.slot != id.slot);
        self.find_eligible();
        true
    }

    /// Lowers depths to what engines with larger blocks can share of a prompt, of which `reusable`
    /// blocks can be spared at most. Returns whether there are any.
    pub(crate) fn round_to_whole_blocks(&self, reusable: u32, depths: &mut [Depth]) -> bool {
        for &Coarse { slot, stride } in &self.coarse {
            let whole = |blocks: u32| {
                let blocks = blocks.min(reusable);
                blocks - blocks % stride
            };
            if let Some(depth) = depths.get_mut(slot as usize) {
                (depth.cached, depth.active) = (whole(depth.cached), whole(depth.active));
            }
        }
        !self.coarse.is_empty()
    }

    /// How many of the router's blocks one of the engine's is.
    pub(crate) fn stride(&self, slot: Slot) -> NonZeroU32 {
        let coarse = self.coarse.iter().find(|it| it.slot == slot);
        coarse.map_or(NonZeroU32::MIN, |it| it.stride)
    }

    /// Says how many of the router's blocks one of the worker's engine's is.
    pub(crate) fn set_stride(&mut self, id: WorkerId, stride: NonZeroU32) {
        let slot = id.slot;
        if self.get(id).is_none()
            || self
                .coarse
                .iter()
                .any(|it| (it.slot, it.stride) == (slot, stride))
        {
            return;
        }
        self.coarse.retain(|coarse| coarse.slot != slot);
        if stride > NonZeroU32::MIN {
            self.coarse.push(Coarse { slot, stride });
        }
    }

    /// The worker, unless it was removed since.
    pub(crate) fn get(&self, id: WorkerId) -> Option<&Worker> {
        let worker = self.workers.get(id.slot as usize)?.as_ref()?;
        (worker.id == id).then_some(worker)
    }

    /// The worker and its load, unless it was removed since.
    pub(crate) fn get_mut(&mut self, id: WorkerId) -> Option<(&mut Worker, &mut Load)> {
        let worker = self.workers.get_mut(id.slot as usize)?.as_mut()?;
        let load = self.loads.get_mut(id.slot as usize)?;
        (worker.id == id).then_some((worker, load))
    }

    /// The worker's outlook and the law it follows, unless it was removed since.
    pub(crate) fn outlook_mut(&mut self, id: WorkerId) -> Option<(&mut Outlook, &mut Law)> {
        self.get(id)?;
        let outlook = self.outlooks.get_mut(id.slot as usize)?;
        let (_, law) = self.laws.get_mut(outlook.law)?;
        Some((outlook, law))
    }

    /// The law that a worker with this outlook follows.
    pub(crate) fn law(&self, outlook: &Outlook) -> &Law {
        &self.laws[outlook.law].1
    }

    /// What placing a request at `slot`, whose prompt reaches so deep there, costs.
    pub(crate) fn delay(&self, placement: &Placement, slot: Slot, depth: Depth) -> Delay {
        let outlook = &self.outlooks[slot as usize];
        let load = self.loads[slot as usize];
        let pace = outlook.watch.pace(self.law(outlook), placement.now);
        placement.delay(&pace, outlook, load, depth)
    }

    /// The same as a number, unless that is no less than `most`: then something no less.
    pub(crate) fn delay_below(
        &self,
        most: f64,
        placement: &Placement,
        slot: Slot,
        depth: Depth,
    ) -> f64 {
        let outlook = &self.outlooks[slot as usize];
        let load = self.loads[slot as usize];
        let pace = outlook.watch.pace(self.law(outlook), placement.now);
        placement.total_below(most, &pace, outlook, load, depth)
    }

    /// Where the law is that workers of these models follow: that of the first, because engines
    /// name the model that they run before its adapters, which come and go.
    fn find_law(&mut self, models: &[String]) -> usize {
        let model = models.first().map(String::as_str).unwrap_or_default();
        let known = self.laws.iter().position(|(of, _)| of == model);
        match known {
            Some(index) => index,
            None if self.laws.len() < MOST_LAWS => {
                self.laws.push((model.to_owned(), Law::default()));
                self.laws.len() - 1
            }
            None => 0,
        }
    }

    pub(crate) fn at(&self, slot: Slot) -> Option<&Worker> {
        self.workers.get(slot as usize)?.as_ref()
    }

    pub(crate) fn slots(&self) -> usize {
        self.workers.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Worker> {
        self.workers.iter().flatten()
    }

    pub(crate) fn set_healthy(&mut self, id: WorkerId, healthy: bool) {
        self.update(id, |worker| &mut worker.healthy, healthy);
    }

    pub(crate) fn set_draining(&mut self, id: WorkerId, draining: bool) {
        self.update(id, |worker| &mut worker.draining, draining);
    }

    pub(crate) fn set_models(&mut self, id: WorkerId, models: Vec<String>) {
        let law = self.find_law(&models);
        if let Some((outlook, _)) = self.outlook_mut(id)
            && outlook.law != law
        {
            outlook.law = law;
            outlook.watch.follows_another_law();
        }
        self.update(id, |worker| &mut worker.models, models);
    }

    fn update<T: PartialEq>(&mut self, id: WorkerId, of: fn(&mut Worker) -> &mut T, new: T) {
        // Every probe says again what is known already.
        if let Some((worker, _)) = self.get_mut(id)
            && mem::replace(of(worker), new) != *of(worker)
        {
            self.find_eligible();
        }
    }

    /// Workers that may serve `model` now; an empty name stands for any model. `None` if all
    /// workers' models are known and this is none of them.
    pub(crate) fn eligible(&self, model: &str) -> Option<&[Slot]> {
        if model.is_empty() {
            return Some(&self.eligible.for_any_model);
        }
        match self.eligible.by_model.get(model) {
            Some(slots) => Some(slots),
            None => {
                let unknown = self.iter().any(|worker| worker.models.is_empty());
                (unknown || self.iter().next().is_none())
                    .then_some(self.eligible.of_unknown_models.as_slice())
            }
        }
    }

    /// Who is eligible changes a million times less often than it is asked, so it is kept.
    fn find_eligible(&mut self) {
        let mut eligible = Eligible::default();
        for worker in self.iter() {
            for model in &worker.models {
                eligible.by_model.entry(model.clone()).or_default();
            }
        }
        for worker in self.iter() {
            if worker.state() != WorkerState::Healthy {
                continue;
            }
            let slot = worker.id.slot;
            eligible.for_any_model.push(slot);
            for model in &worker.models {
                if let Some(slots) = eligible.by_model.get_mut(model)
                    && slots.last() != Some(&slot)
                {
                    slots.push(slot);
                }
            }
            if worker.models.is_empty() {
                eligible.of_unknown_models.push(slot);
                eligible
                    .by_model
                    .values_mut()
                    .for_each(|slots| slots.push(slot));
            }
        }
        self.eligible = eligible;
    }

    pub(crate) fn snapshot(&self, now: Duration) -> Vec<WorkerSnapshot> {
        self.iter()
            .map(|worker| {
                let load = self.loads[worker.id.slot as usize];
                let outlook = &self.outlooks[worker.id.slot as usize];
                let pace = outlook.watch.pace(self.law(outlook), now);
                let (requests, context) = outlook.decoding();
                let step = pace.step(f64::from(requests.max(1)), context as f64);
                WorkerSnapshot {
                    id: worker.id,
                    name: worker.name.clone(),
                    state: worker.state(),
                    models: worker.models.clone(),
                    requests: load.requests,
                    held_requests: outlook.line.all().requests,
                    active_blocks: load.active_blocks,
                    held_blocks: load.held_blocks,
                    context_tokens: load.context_tokens,
                    prefill_tokens: outlook.backlog_tokens(&pace, now),
                    cached_blocks: if worker.shadow.is_told() {
                        worker.told
                    } else {
                        worker.pinned + worker.shadow.cached_blocks()
                    },
                    follows_events: worker.shadow.is_told(),
                    capacity_blocks: worker.shadow.capacity(),
                    capacity_source: worker.shadow.capacity_source(),
                    eviction: worker.shadow.eviction(),
                    backlog: seconds(outlook.backlog(&pace, now)),
                    inter_token_latency: seconds(step),
                    first_token_error: outlook.watch.first_token_error(),
                    pace,
                }
            })
            .collect()
    }
}

/// However long a forecast is, it is a duration.
pub(crate) fn seconds(forecast: f64) -> Duration {
    Duration::try_from_secs_f64(forecast).unwrap_or(Duration::MAX)
}
