//! Choice of a candidate by the costs that a policy gives: the least, or a random one at a
//! temperature above 0.

use foresee_prefix::WorkerIndex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::candidates::Candidates;
use super::interface::{Policy, Scope};
use super::request_profile::RequestProfile;

/// A policy, with the temperature and the random numbers of its choices.
#[derive(Debug)]
pub(crate) struct Selector {
    policy: Box<dyn Policy>,
    /// Temperature of the choice; 0 chooses the least cost.
    temperature: f64,
    rng: SmallRng,
    /// Number of choices so far.
    choices: u64,
    /// Memory for the costs of one decision.
    costs: Vec<f64>,
}

impl Selector {
    /// Returns a selector that has made no choice.
    pub(crate) fn new(policy: Box<dyn Policy>, temperature: f64, seed: u64) -> Self {
        Self {
            policy,
            temperature,
            rng: SmallRng::seed_from_u64(seed),
            choices: 0,
            costs: Vec::new(),
        }
    }

    /// Sets the temperature of later choices.
    pub(crate) fn set_temperature(&mut self, temperature: f64) {
        self.temperature = temperature;
    }

    /// Returns the policy.
    pub(crate) fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    /// Returns the number of choices so far.
    pub(crate) fn choices(&self) -> u64 {
        self.choices
    }

    /// Records that the request is placed on `worker`.
    pub(crate) fn on_placed(&mut self, request: &RequestProfile<'_>, worker: WorkerIndex) {
        self.policy.on_placed(request, worker);
    }

    /// Chooses a candidate. Returns `None`, and draws no random number, if there is none.
    pub(crate) fn select(
        &mut self,
        request: &RequestProfile<'_>,
        candidates: &Candidates<'_>,
    ) -> Option<WorkerIndex> {
        let mut costs = std::mem::take(&mut self.costs);
        costs.clear();
        if self.needs_all_costs() {
            self.policy.costs(request, candidates, &mut costs);
        } else {
            self.policy.costs_or_bounds(request, candidates, &mut costs);
        }
        let position = self.select_by(&mut costs, |policy, position| {
            policy.tie_breaker(request, &candidates.at(position))
        });
        self.costs = costs;
        position.map(|position| candidates.at(position).index)
    }

    /// Chooses a position by costs and tie breakers that were computed before. Returns `None`, and
    /// draws no random number, if there are no costs.
    pub(crate) fn select_by_costs(
        &mut self,
        costs: &mut [f64],
        tie_breakers: &[f64],
    ) -> Option<usize> {
        self.select_by(costs, |_, position| tie_breakers[position])
    }

    /// Returns whether the choice depends on more costs than the least.
    fn needs_all_costs(&self) -> bool {
        self.temperature > 0.0 || self.policy.scope() == Scope::RandomTwo
    }

    /// Chooses a position by these costs. A cost that is not a number counts as infinite.
    fn select_by(
        &mut self,
        costs: &mut [f64],
        tie_breaker: impl Fn(&dyn Policy, usize) -> f64,
    ) -> Option<usize> {
        let policy = &*self.policy;
        let position = if self.temperature > 0.0 {
            replace_nan(costs);
            sample(costs, self.temperature, &mut self.rng)
        } else if policy.scope() == Scope::RandomTwo {
            replace_nan(costs);
            less_of_two(costs, &mut self.rng)
        } else {
            least(
                costs,
                |position| tie_breaker(policy, position),
                &mut self.rng,
            )
        }?;
        self.choices += 1;
        Some(position)
    }

    /// Returns the probability with which each candidate is chosen, by costs and tie breakers. The
    /// probabilities sum to 1 unless there is no candidate. `costs` that are not a number are
    /// set to infinity.
    pub(crate) fn probabilities(&self, costs: &mut [f64], tie_breakers: &[f64]) -> Vec<f64> {
        replace_nan(costs);
        if self.temperature > 0.0 {
            return normalized(softmax_weights(costs, self.temperature).collect());
        }
        if self.policy.scope() == Scope::RandomTwo {
            return less_of_two_probabilities(costs);
        }
        let tie_breakers = tie_breakers.iter().copied();
        let ranks: Vec<(f64, f64)> = costs.iter().copied().zip(tie_breakers).collect();
        let ascending =
            |a: &(f64, f64), b: &(f64, f64)| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1));
        let minimum = ranks.iter().copied().min_by(ascending);
        let is_minimal = ranks.iter().map(|&rank| Some(rank) == minimum);
        normalized(
            is_minimal
                .map(|is_minimal| f64::from(u8::from(is_minimal)))
                .collect(),
        )
    }
}

/// Sets every cost that is not a number to infinity, so that one unusable forecast does not keep a
/// request from every worker.
fn replace_nan(costs: &mut [f64]) {
    for cost in costs {
        if cost.is_nan() {
            *cost = f64::INFINITY;
        }
    }
}

/// Returns the position of the least cost; of several, that of the least tie breaker, or a random
/// one of several with the same. Tie breakers are computed only for equal costs. A cost that is not
/// a number counts as infinite.
fn least(costs: &[f64], tie_breaker: impl Fn(usize) -> f64, rng: &mut SmallRng) -> Option<usize> {
    let minimum = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let is_least = |cost: f64| cost == minimum || (cost.is_nan() && minimum == f64::INFINITY);
    let mut ties = (0..costs.len()).filter(|&position| is_least(costs[position]));
    let mut chosen = ties.next()?;
    let mut least_tie_breaker = None;
    let mut tie_count = 1;
    for position in ties {
        let least = *least_tie_breaker.get_or_insert_with(|| tie_breaker(chosen));
        let value = tie_breaker(position);
        if value < least {
            (chosen, least_tie_breaker, tie_count) = (position, Some(value), 1);
        } else if value == least {
            // Each of `n` equal candidates ends up chosen with probability 1/n.
            tie_count += 1;
            if rng.random_range(0..tie_count) == 0 {
                chosen = position;
            }
        }
    }
    Some(chosen)
}

/// Draws two different positions at random and returns the one of less cost. Returns the first
/// drawn if both costs are equal, the only position if there is one, and `None` if there is none.
fn less_of_two(costs: &[f64], rng: &mut SmallRng) -> Option<usize> {
    let count = costs.len();
    if count <= 1 {
        return count.checked_sub(1);
    }
    let first = rng.random_range(0..count);
    let second = (first + rng.random_range(1..count)) % count;
    let keep_first = costs[first] <= costs[second];
    Some(if keep_first { first } else { second })
}

/// Returns the probability with which [`less_of_two`] chooses each position.
fn less_of_two_probabilities(costs: &[f64]) -> Vec<f64> {
    let count = costs.len();
    if count == 1 {
        return vec![1.0];
    }
    let mut sorted = costs.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let pairs = (count * count.saturating_sub(1)).max(1) as f64;
    let probability = |&cost: &f64| {
        let more = count - sorted.partition_point(|&other| other <= cost);
        // Without the candidate itself, which is no pair with itself.
        let at_least = count - sorted.partition_point(|&other| other < cost) - 1;
        // Drawn first it beats candidates of at least its cost; drawn second, those of more.
        (at_least + more) as f64 / pairs
    };
    costs.iter().map(probability).collect()
}

/// Draws a position by softmax over the costs, divided by their range. Returns `None` if there is
/// none.
fn sample(costs: &[f64], temperature: f64, rng: &mut SmallRng) -> Option<usize> {
    let mut chosen = None;
    let mut total = 0.0;
    for (position, weight) in softmax_weights(costs, temperature).enumerate() {
        total += weight;
        if rng.random::<f64>() * total < weight {
            chosen = Some(position);
        }
    }
    chosen
}

/// Returns the weight of each position in the draw, up to a common factor. An infinite cost has
/// weight 0, unless no cost is finite: then all weights are 1.
fn softmax_weights(costs: &[f64], temperature: f64) -> impl Iterator<Item = f64> + '_ {
    let minimum = costs.iter().copied().fold(f64::INFINITY, f64::min);
    let finite = costs.iter().copied().filter(|cost| cost.is_finite());
    let range = finite.fold(f64::NEG_INFINITY, f64::max) - minimum;
    costs.iter().map(move |&cost| {
        // The first case covers the minimum, and every position if no cost is finite.
        if cost == minimum {
            1.0
        } else if !cost.is_finite() {
            0.0
        } else {
            (-((cost - minimum) / range) / temperature).exp()
        }
    })
}

/// Returns the weights divided by their sum.
fn normalized(mut weights: Vec<f64>) -> Vec<f64> {
    let total: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|weight| *weight /= total);
    weights
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::policy;

    fn selector(policy: policy::NamedPolicy, temperature: f64) -> Selector {
        Selector::new((policy.create)(), temperature, 7)
    }

    /// Returns the probabilities of these costs, and how often each is chosen in 4,000 draws.
    fn outcomes(selector: &mut Selector, costs: &[f64]) -> (Vec<f64>, Vec<u32>) {
        let tie_breakers = vec![0.0; costs.len()];
        let probabilities = selector.probabilities(&mut costs.to_vec(), &tie_breakers);
        let mut counts = vec![0; costs.len()];
        for _ in 0..4000 {
            let chosen = selector.select_by_costs(&mut costs.to_vec(), &tie_breakers);
            counts[chosen.unwrap()] += 1;
        }
        (probabilities, counts)
    }

    #[test]
    fn choices_are_as_frequent_as_their_probabilities_say() {
        let costs = [3.0, 1.0, 2.0, 1.0, f64::NAN, f64::INFINITY];
        for policy in policy::ALL {
            for temperature in [0.0, 0.5] {
                let mut selector = selector(policy, temperature);
                let (probabilities, counts) = outcomes(&mut selector, &costs);
                assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-9);
                for (probability, count) in probabilities.iter().zip(counts) {
                    let difference = (probability - f64::from(count) / 4000.0).abs();
                    assert!(difference < 0.04, "{policy} {probability} {count}");
                }
            }
        }
    }

    #[test]
    fn a_cost_that_is_not_a_number_is_never_sampled_and_spoils_no_other() {
        let mut selector = selector(policy::MARGINAL_DELAY, 0.5);
        let (probabilities, counts) = outcomes(&mut selector, &[f64::NAN, 1.0, f64::INFINITY, 1.0]);
        assert_eq!(probabilities, [0.0, 0.5, 0.0, 0.5]);
        assert_eq!((counts[0], counts[2]), (0, 0));
    }

    #[test]
    fn without_any_finite_cost_every_worker_is_equally_likely() {
        for temperature in [0.0, 0.5] {
            let mut selector = selector(policy::MARGINAL_DELAY, temperature);
            let (probabilities, counts) = outcomes(&mut selector, &[f64::NAN, f64::INFINITY]);
            assert_eq!(probabilities, [0.5, 0.5]);
            assert!(counts.iter().all(|&count| count > 1800));
        }
    }
}
