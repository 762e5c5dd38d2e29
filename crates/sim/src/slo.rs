//! What counts as served well: limits for one request's times.

use serde::Serialize;

use crate::span::{self, InvalidSpan};

/// Limits, in seconds; a request that keeps within all there are was served well.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Slo {
    /// From arrival to first token.
    pub ttft: Option<f64>,
    /// From one token to the next, in the mean over the request.
    pub itl: Option<f64>,
}

impl Default for Slo {
    /// 2 s and 60 ms.
    fn default() -> Self {
        Self {
            ttft: Some(2.0),
            itl: Some(0.06),
        }
    }
}

impl Slo {
    pub(crate) fn allows_first_token(&self, seconds: f64) -> bool {
        self.ttft.is_none_or(|most| seconds <= most)
    }

    pub(crate) fn allows_mean_gap(&self, seconds: f64) -> bool {
        self.itl.is_none_or(|most| seconds <= most)
    }
}

/// Why limits cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSlo {
    /// A part is not `ttft=TIME` or `itl=TIME`, or is there twice.
    #[error(
        "cannot read {part:?} of the SLO: write ttft=TIME, itl=TIME or both, as in ttft=2s,itl=60ms"
    )]
    Part {
        /// The part.
        part: String,
    },
    /// The time.
    #[error("in the SLO: {0}")]
    Time(#[from] InvalidSpan),
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
            *limit = Some(span::parse(time.trim())?.as_secs_f64());
        }
        Ok(slo)
    }
}

impl std::fmt::Display for Slo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let part = |name: &str, limit: Option<f64>| Some(format!("{name}={}ms", limit? * 1e3));
        let parts = [part("ttft", self.ttft), part("itl", self.itl)];
        f.write_str(&parts.into_iter().flatten().collect::<Vec<_>>().join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_and_written_alike() {
        let slo: Slo = "ttft=2s,itl=60ms".parse().unwrap();
        assert_eq!(slo, Slo::default());
        assert_eq!(slo.to_string(), "ttft=2000ms,itl=60ms");
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
                .contains("as in 60ms")
        );
    }
}
