//! The verdict on a goal, with the evidence for it.

use std::fmt;

use serde::Serialize;

use crate::verify::interval::{Proportion, Verdict};

/// A goal, the observation, and the verdict.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// The subject of the goal.
    pub name: String,
    /// The observation.
    pub found: String,
    /// The goal.
    pub goal: String,
    /// Whether the observation meets the goal.
    pub verdict: Verdict,
    /// The counts and the interval, of a goal for a proportion.
    pub evidence: Option<Evidence>,
    /// Advice for a goal that fails or was not measured.
    pub remedy: Option<&'static str>,
}

/// The evidence for a goal that is judged with a confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evidence {
    /// Responses predicted exactly, among all that were compared.
    #[serde(flatten)]
    pub proportion: Proportion,
    /// Bounds of the 95 % confidence interval.
    pub interval: (f64, f64),
    /// Number of responses with which the goal would be shown if no further prediction missed.
    pub responses_needed: u64,
}

impl Evidence {
    /// Returns the evidence that a proportion is for a goal.
    pub(super) fn of(proportion: Proportion, goal: f64) -> Self {
        let (lower, upper) = proportion.interval().into_inner();
        Self {
            proportion,
            interval: (lower, upper),
            responses_needed: proportion.trials_needed(goal),
        }
    }
}

impl Verdict {
    /// Returns the word that reports show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::NotShown => "not shown",
            Self::Fails => "FAILS",
            Self::NotMeasured => "not measured",
        }
    }
}

impl Check {
    /// Returns the advice for a goal that fails or was not measured, or that was not shown and is
    /// judged without an interval; `None` for others.
    #[must_use]
    pub fn advice(&self) -> Option<&'static str> {
        let calls_for_advice = match self.verdict {
            Verdict::Holds => false,
            // With an interval, the conclusion names the number of responses that are needed.
            Verdict::NotShown => self.evidence.is_none(),
            Verdict::Fails | Verdict::NotMeasured => true,
        };
        self.remedy.filter(|_| calls_for_advice)
    }

    /// Returns the conclusion about a goal that is judged with an interval; `None` for other goals
    /// and for goals that were not measured.
    #[must_use]
    pub fn conclusion(&self) -> Option<String> {
        let needed = self.evidence?.responses_needed;
        let goal = &self.goal;
        match self.verdict {
            Verdict::NotShown => Some(format!(
                "consistent with the goal of {goal}; {} responses would be needed to show it",
                grouped(needed)
            )),
            Verdict::Holds => Some(format!("shows the goal of {goal}")),
            Verdict::Fails => Some(format!("excludes the goal of {goal}")),
            Verdict::NotMeasured => None,
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.verdict.name();
        let Self { name, found, .. } = self;
        write!(f, "{verdict:<13}{name}: {found}")?;
        match self.conclusion() {
            Some(conclusion) => write!(f, ": {conclusion}")?,
            None => write!(f, " (goal: {})", self.goal)?,
        }
        if let Some(advice) = self.advice() {
            write!(f, "\n{:13}{advice}", "")?;
        }
        Ok(())
    }
}

/// Returns a number with a comma between groups of three digits.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
