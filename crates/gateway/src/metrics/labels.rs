//! Labels of the metrics, and the values of those that are known.

use crate::metrics::{LabelInfo, Outcome};

pub(super) const NO_LABEL: &[LabelInfo] = &[];
pub(super) const WORKER: &[LabelInfo] = &[LabelInfo {
    name: "worker",
    values: &[],
}];
pub(super) const SOURCE: &[LabelInfo] = &[LabelInfo {
    name: "source",
    values: &[],
}];
pub(super) const OUTCOME: &[LabelInfo] = &[LabelInfo {
    name: "outcome",
    values: &[
        Outcome::Ok.as_str(),
        Outcome::Refused.as_str(),
        Outcome::WorkerError.as_str(),
        Outcome::WorkerFailed.as_str(),
        Outcome::Unavailable.as_str(),
        Outcome::ClientLeft.as_str(),
        Outcome::ShutDown.as_str(),
    ],
}];
pub(super) const OVERLAP_KIND: &[LabelInfo] = &[LabelInfo {
    name: "kind",
    values: &["predicted", "best", "actual"],
}];
pub(super) const PREDICTION_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["exact", "over", "under"],
}];
pub(super) const TOKENIZATION_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &[
        "tokens",
        "suspended",
        "no_template",
        "media",
        "not_rendered",
        "not_text",
        "not_encoded",
    ],
}];
pub(super) const PARITY_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["equal", "different"],
}];
pub(super) const ALIAS_AND_MODEL: &[LabelInfo] = &[
    LabelInfo {
        name: "alias",
        values: &[],
    },
    LabelInfo {
        name: "model",
        values: &[],
    },
];
pub(super) const DRY_RUN_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["same", "different"],
}];
pub(super) const DRY_RUN_KIND: &[LabelInfo] = &[LabelInfo {
    name: "kind",
    values: &["chosen", "least_delay"],
}];
pub(super) const KEY_REFUSAL: &[LabelInfo] = &[LabelInfo {
    name: "reason",
    values: &[
        "missing",
        "unknown",
        "expired",
        "scope",
        "model",
        "requests",
        "tokens",
        "concurrency",
    ],
}];
pub(super) const SPAN_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["sent", "queue_full", "failed"],
}];
pub(super) const RECORDING_RESULT: &[LabelInfo] = &[LabelInfo {
    name: "result",
    values: &["written", "dropped"],
}];
/// Label with the version of the gateway, and the processor and the system that it was built for.
pub(super) const BUILD: &[LabelInfo] = &[
    LabelInfo {
        name: "version",
        values: &[],
    },
    LabelInfo {
        name: "arch",
        values: &[],
    },
    LabelInfo {
        name: "os",
        values: &[],
    },
];
