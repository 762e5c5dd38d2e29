//! What is asked of a router, and what it answers: requests, refusals, explanations.

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

use crate::choose::Policy;
use crate::cost::Cost;
use crate::delay::Delay;
use crate::fleet::WorkerId;
use crate::forecast::lengths::Kind;
use crate::sequence::Sequence;
use crate::tree::Depth;

/// Why no worker was chosen.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RouteError {
    /// Workers are known, and none of them serves this model.
    #[error("no worker serves the model `{0}`")]
    UnknownModel(String),
    /// Every worker that serves the model is unhealthy, draining, or was excluded.
    #[error("no worker is available for the model `{0}`")]
    NoWorker(String),
}

/// What is to be placed.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Model name; empty accepts any worker.
    pub model: &'a str,
    /// The prompt.
    pub sequence: &'a Sequence,
    /// The most output tokens it may produce.
    pub max_tokens: Option<u32>,
    /// It produces all of those (`ignore_eos`). Engines set memory aside by that. Forecasts do not
    /// look at it: benchmarks say it and nobody else, and are to measure what others get.
    pub ignores_eos: bool,
    /// How many it is said to produce. That is learned, not believed: what those produced of whom
    /// about as much was said counts for more the more of them there were.
    pub expected_tokens: Option<u32>,
    /// Whether it may call tools, which makes for answers of other lengths.
    pub has_tools: bool,
    /// Whether its output will be watched. If not, its progress is forecast.
    pub streams: bool,
    /// In line, lower comes first.
    pub priority: i32,
    /// On whose behalf, where tenants are to be treated alike.
    pub tenant: u64,
    /// Workers not to choose: those that failed it already.
    pub excluded: &'a [WorkerId],
}

impl<'a> Request<'a> {
    /// A streamed request for any model, with no other wish.
    #[must_use]
    pub fn new(sequence: &'a Sequence) -> Self {
        Self {
            model: "",
            sequence,
            max_tokens: None,
            ignores_eos: false,
            expected_tokens: None,
            has_tools: false,
            streams: true,
            priority: 0,
            tenant: 0,
            excluded: &[],
        }
    }

    /// What its answer's length may depend on: the model, about how long it may be and is said to
    /// be, and whether it may call tools.
    pub(crate) fn kind(&self) -> Kind {
        let model = rapidhash_v3_seeded(self.model.as_bytes(), &DEFAULT_RAPID_SECRETS);
        let octave =
            |tokens: Option<u32>| tokens.map_or(0, |it| u64::BITS - u64::from(it).leading_zeros());
        let lengths = octave(self.max_tokens) | octave(self.expected_tokens) << 8;
        model ^ u64::from(lengths | u32::from(self.has_tools) << 16)
    }
}

/// One worker in an [`Explanation`].
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// The worker.
    pub id: WorkerId,
    /// Its name.
    pub name: String,
    /// Requests booked on it.
    pub requests: u32,
    /// Its active blocks before this request.
    pub active_blocks: u64,
    /// How deep the prompt reaches there.
    pub depth: Depth,
    /// The parts of its cost in blocks.
    pub cost: Cost,
    /// The parts of its cost in seconds.
    pub delay: Delay,
    /// How likely it is to be preferred by the cost that the policy looks at, as things stand: in
    /// blocks for `kv`, otherwise in seconds.
    pub probability: f64,
}

/// How a request would be decided now.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The policy that decides.
    pub policy: Policy,
    /// Weight of the prefill blocks in the cost.
    pub overlap_weight: f64,
    /// What a second until the first token counts, in seconds of anybody's delay.
    pub ttft_weight: f64,
    /// Temperature of the choice.
    pub temperature: f64,
    /// The idle worker that gets it all the same, to have a copy of its prefix: others that want
    /// it have waited for as long as that takes.
    pub copies_to: Option<WorkerId>,
    /// Every eligible worker, in the order they joined.
    pub candidates: Vec<Candidate>,
}

impl Explanation {
    /// Who would get it, as things stand: the likeliest, if chance decides.
    #[must_use]
    pub fn choice(&self) -> Option<&Candidate> {
        let of = |id| self.candidates.iter().find(|it| it.id == id);
        let likeliest = self
            .candidates
            .iter()
            .max_by(|one, other| one.probability.total_cmp(&other.probability));
        self.copies_to.and_then(of).or(likeliest)
    }
}
