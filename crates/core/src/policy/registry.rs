//! The policies that the router offers by name.

use std::str::FromStr;

use super::consistent_hash::CONSISTENT_HASH;
use super::interface::NamedPolicy;
use super::kv_cost::KV;
use super::least_requests::LEAST_REQUESTS;
use super::lmetric::LMETRIC;
use super::marginal_delay::MARGINAL_DELAY;
use super::power_of_two::POWER_OF_TWO;
use super::random::RANDOM;
use super::round_robin::ROUND_ROBIN;

/// Every policy, the default first.
pub const ALL: [NamedPolicy; 8] = [
    MARGINAL_DELAY,
    KV,
    LMETRIC,
    LEAST_REQUESTS,
    POWER_OF_TWO,
    CONSISTENT_HASH,
    ROUND_ROBIN,
    RANDOM,
];

impl Default for NamedPolicy {
    fn default() -> Self {
        ALL[0]
    }
}

/// Error for a name that is not in [`ALL`].
#[derive(Debug, thiserror::Error)]
#[error("unknown policy `{0}`: use {names}", names = ALL.map(|policy| policy.name).join(", "))]
pub struct UnknownPolicy(String);

impl FromStr for NamedPolicy {
    type Err = UnknownPolicy;

    /// Reads a name of [`ALL`]; an underscore stands for a hyphen.
    fn from_str(name: &str) -> Result<Self, UnknownPolicy> {
        let hyphenated = name.replace('_', "-");
        ALL.into_iter()
            .find(|policy| policy.name == hyphenated)
            .ok_or_else(|| UnknownPolicy(name.to_owned()))
    }
}
