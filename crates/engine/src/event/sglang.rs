//! Events and bodies of SGLang's `/generate`.
//!
//! An event has the whole text so far, or with `--incremental-streaming-output` only the new text.
//! The event does not say which, so the text counts as unknown. The token counts in `meta_info`
//! are those of the whole output so far.

use serde::Deserialize;
use serde_json::value::RawValue;

use super::{ChoiceDelta, Event, UsageScope, is_present, plain_text};
use crate::loose_value::LooseValue;
use crate::usage::Usage;

/// The fields of an event that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields<'d> {
    index: LooseValue,
    error: LooseValue,
    #[serde(borrow)]
    meta_info: Option<MetaInfo<'d>>,
}

/// The fields of `meta_info` that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct MetaInfo<'d> {
    #[serde(borrow)]
    finish_reason: Option<FinishReason<'d>>,
}

/// Why the output ended.
#[derive(Default, Deserialize)]
#[serde(default)]
struct FinishReason<'d> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'d RawValue>,
}

/// The `meta_info` of an event or a body.
#[derive(Deserialize)]
struct WithMetaInfo<'d> {
    #[serde(borrow)]
    meta_info: &'d RawValue,
}

/// Parses an event, or the body of a response with one output that is not streamed.
pub(super) fn parse(data: &[u8]) -> Option<Event<'_>> {
    let fields: Fields<'_> = serde_json::from_slice(data).ok()?;
    let usage = read_usage(data);
    let finish_reason = fields.meta_info.unwrap_or_default().finish_reason;
    let finish_kind = finish_reason.and_then(|reason| reason.kind);
    let is_counted = usage.is_some_and(|usage| usage.completion_tokens.is_some());
    let is_error = fields.error.is_present() || plain_text(finish_kind) == "abort";
    let delta = ChoiceDelta {
        index: fields.index.count().unwrap_or(0),
        tokens: u32::from(!is_counted && !is_error),
        finished: finish_kind.is_some_and(is_present),
        finished_by_stop: plain_text(finish_kind) == "stop",
        // Text after reasoning counts as unknown, and so does this text.
        has_reasoning: true,
        ..ChoiceDelta::default()
    };
    Some(Event {
        usage: usage.map(|usage| match fields.index {
            LooseValue::Null => usage,
            // An event of a batch reports the tokens of one prompt only.
            _ => Usage {
                prompt_tokens: None,
                cached_tokens: None,
                ..usage
            },
        }),
        usage_scope: UsageScope::Choice,
        is_error,
        ..Event::of_delta(delta)
    })
}

/// Returns the token counts in `meta_info`, if there are any.
fn read_usage(data: &[u8]) -> Option<Usage> {
    let body: WithMetaInfo<'_> = serde_json::from_slice(data).ok()?;
    Usage::read_meta_info(body.meta_info)
}
