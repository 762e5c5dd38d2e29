//! Service-level objective: limits for the times of one request.

use serde::Serialize;

use crate::duration::{self, InvalidDuration};

/// Limits in seconds. A request meets the objective if it is within every limit that is set.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    /// Limit for the time from arrival to the first token.
    pub ttft: Option<f64>,
    /// Limit for the mean time between two output tokens of the request.
    pub itl: Option<f64>,
}

impl Default for Slo {
    /// Returns limits of 2 s to the first token and 60 ms between tokens.
    fn default() -> Self {
        Self {
            ttft: Some(2.0),
            itl: Some(0.06),
        }
    }
}

impl Slo {
    /// Returns whether a time to first token is within the limit.
    #[must_use]
    pub fn allows_first_token(&self, seconds: f64) -> bool {
        self.ttft.is_none_or(|limit| seconds <= limit)
    }

    /// Returns whether a mean time between tokens is within the limit.
    #[must_use]
    pub fn allows_mean_gap(&self, seconds: f64) -> bool {
        self.itl.is_none_or(|limit| seconds <= limit)
    }
}

/// Error for a text that does not state limits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSlo {
    /// A part is not `ttft=TIME` or `itl=TIME`, or occurs twice.
    #[error(
        "cannot read {part:?} of the SLO: write ttft=TIME, itl=TIME or both, as in ttft=2s,itl=60ms"
    )]
    Part {
        /// The part.
        part: String,
    },
    /// The time of a limit is not a duration.
    #[error("in the SLO: {0}")]
    Time(#[from] InvalidDuration),
}

impl std::str::FromStr for Slo {
    type Err = InvalidSlo;

    fn from_str(text: &str) -> Result<Self, InvalidSlo> {
        let mut slo = Self {
            ttft: None,
            itl: None,
        };
        for part in text.split(',') {
            let invalid = || InvalidSlo::Part {
                part: part.to_owned(),
            };
            let (name, time) = part.split_once('=').ok_or_else(invalid)?;
            let limit = match name.trim() {
                "ttft" => &mut slo.ttft,
                "itl" => &mut slo.itl,
                _ => return Err(invalid()),
            };
            if limit.is_some() {
                return Err(invalid());
            }
            *limit = Some(duration::parse(time.trim())?.as_secs_f64());
        }
        Ok(slo)
    }
}

impl std::fmt::Display for Slo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = |name: &str, limit: Option<f64>| {
            limit.map(|seconds| match seconds {
                1.0.. => format!("{name}={seconds}s"),
                _ => format!("{name}={}ms", seconds * 1e3),
            })
        };
        let parts = [part("ttft", self.ttft), part("itl", self.itl)];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_round_trip_through_text() {
        let slo: Slo = "ttft=2s,itl=60ms".parse().unwrap();
        assert_eq!(slo, Slo::default());
        assert_eq!(slo.to_string(), "ttft=2s,itl=60ms");
        assert_eq!(slo.to_string().parse(), Ok(slo));
        let one: Slo = "itl=0.1s".parse().unwrap();
        assert_eq!((one.ttft, one.itl), (None, Some(0.1)));
        assert!(one.allows_first_token(1e9) && !one.allows_mean_gap(0.2));
        for (text, part) in [
            ("", "\"\""),
            ("tpot=1s", "tpot"),
            ("itl=1s,itl=2s", "itl=2s"),
        ] {
            let error = text.parse::<Slo>().unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("ttft=2s"), "{error}");
        }
        assert!(
            "ttft=2"
                .parse::<Slo>()
                .unwrap_err()
                .to_string()
                .contains("write 2ms, 2s")
        );
    }
}
