//! The token counts that an engine reports for a request.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::loose_value::LooseValue;

/// The `usage` of a response, in tokens. A count that the engine does not report is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, or of all prompts of a batch.
    pub prompt_tokens: Option<u32>,
    /// Output tokens, over all choices.
    pub completion_tokens: Option<u32>,
    /// Prompt tokens that were found in the engine's prefix cache.
    pub cached_tokens: Option<u32>,
}

/// Reads the usage in the body of a response that is not streamed; `None` if there is none, or the
/// body is not a JSON object.
#[must_use]
pub fn parse_usage(body: &[u8]) -> Option<Usage> {
    #[derive(Deserialize)]
    struct Body<'b> {
        #[serde(borrow)]
        usage: &'b RawValue,
    }
    let body: Body<'_> = serde_json::from_slice(body).ok()?;
    Usage::read(body.usage)
}

impl Usage {
    /// Parses a `usage` value; `None` if it is not an object, or if its `prompt_tokens_details` is
    /// neither an object nor `null`. A count that is not a nonnegative number is `None`.
    pub(crate) fn read(raw: &RawValue) -> Option<Self> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Fields {
            prompt_tokens: LooseValue,
            completion_tokens: LooseValue,
            prompt_tokens_details: Option<Details>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Details {
            cached_tokens: LooseValue,
        }
        let fields: Option<Fields> = serde_json::from_str(raw.get()).ok()?;
        fields.map(|fields| Self {
            prompt_tokens: fields.prompt_tokens.count(),
            completion_tokens: fields.completion_tokens.count(),
            cached_tokens: fields
                .prompt_tokens_details
                .and_then(|details| details.cached_tokens.count()),
        })
    }
}
