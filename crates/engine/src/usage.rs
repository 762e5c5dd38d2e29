//! What an engine says a request cost.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::lenient::Gist;

/// The `usage` of a response, in tokens. What the engine does not report is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt, or of all prompts of a batch.
    pub prompt_tokens: Option<u32>,
    /// Tokens generated, over all choices.
    pub completion_tokens: Option<u32>,
    /// Tokens of the prompt that came from the prefix cache.
    pub cached_tokens: Option<u32>,
}

/// Reads the usage in the body of a response that is not a stream; `None` if there is none.
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
    pub(crate) fn read(raw: &RawValue) -> Option<Self> {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Fields {
            prompt_tokens: Gist,
            completion_tokens: Gist,
            prompt_tokens_details: Option<Details>,
        }
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct Details {
            cached_tokens: Gist,
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
