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

/// Reads the usage in the body of a response that is not streamed, of any API; `None` if there is
/// none, or the body is not a JSON object. For a body of SGLang's `/generate` with several outputs,
/// which is a list, only the sum of their output tokens is known, at most `u32::MAX`.
#[must_use]
pub fn parse_usage(body: &[u8]) -> Option<Usage> {
    #[derive(Deserialize)]
    struct Body<'b> {
        #[serde(borrow, default)]
        usage: Option<&'b RawValue>,
        #[serde(borrow, default)]
        meta_info: Option<&'b RawValue>,
    }
    let read = |body: &Body<'_>| match (body.usage, body.meta_info) {
        (Some(usage), _) => Usage::read(usage),
        (None, Some(meta_info)) => Usage::read_meta_info(meta_info),
        (None, None) => None,
    };
    if body.trim_ascii_start().first() == Some(&b'[') {
        let outputs: Vec<Body<'_>> = serde_json::from_slice(body).ok()?;
        let mut counts = outputs
            .iter()
            .map(|output| read(output).and_then(|usage| usage.completion_tokens));
        let add = |sum: u32, count: Option<u32>| Some(sum.saturating_add(count?));
        let sum = counts.try_fold(0, add);
        return sum.filter(|_| !outputs.is_empty()).map(|tokens| Usage {
            completion_tokens: Some(tokens),
            ..Usage::default()
        });
    }
    read(&serde_json::from_slice(body).ok()?)
}

/// The fields of a `usage` value that are read, of all APIs.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Fields {
    prompt_tokens: LooseValue,
    completion_tokens: LooseValue,
    prompt_tokens_details: Option<Details>,
    input_tokens: LooseValue,
    output_tokens: LooseValue,
    input_tokens_details: Option<Details>,
    cache_read_input_tokens: LooseValue,
    cache_creation_input_tokens: LooseValue,
    /// In SGLang's `meta_info`.
    cached_tokens: LooseValue,
}

/// The details of a count that are read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: LooseValue,
}

impl Details {
    fn cached_tokens(details: Option<Self>) -> Option<u32> {
        details.and_then(|details| details.cached_tokens.count())
    }
}

impl Usage {
    /// Parses a `usage` value; `None` if it is not an object, or if its details are neither an
    /// object nor `null`. A count that is not a nonnegative number is `None`.
    ///
    /// The form of Anthropic's API counts cached tokens apart from `input_tokens`; here they are
    /// part of the prompt's tokens. vLLM and SGLang follow that form.
    pub(crate) fn read(raw: &RawValue) -> Option<Self> {
        let fields: Option<Fields> = serde_json::from_str(raw.get()).ok()?;
        let fields = fields?;
        let is_openai = fields.prompt_tokens.is_present() || fields.completion_tokens.is_present();
        if is_openai || !(fields.input_tokens.is_present() || fields.output_tokens.is_present()) {
            return Some(Self {
                prompt_tokens: fields.prompt_tokens.count(),
                completion_tokens: fields.completion_tokens.count(),
                cached_tokens: Details::cached_tokens(fields.prompt_tokens_details),
            });
        }
        let input = fields.input_tokens.count();
        let completion_tokens = fields.output_tokens.count();
        if fields.input_tokens_details.is_some() {
            return Some(Self {
                prompt_tokens: input,
                completion_tokens,
                cached_tokens: Details::cached_tokens(fields.input_tokens_details),
            });
        }
        let read = fields.cache_read_input_tokens.count();
        let created = fields.cache_creation_input_tokens.count();
        let cached_or_created = read.unwrap_or(0).saturating_add(created.unwrap_or(0));
        Some(Self {
            prompt_tokens: input.map(|input| input.saturating_add(cached_or_created)),
            completion_tokens,
            cached_tokens: read,
        })
    }

    /// Parses the `meta_info` of SGLang's `/generate`; `None` if it is not an object.
    pub(crate) fn read_meta_info(raw: &RawValue) -> Option<Self> {
        let fields: Option<Fields> = serde_json::from_str(raw.get()).ok()?;
        fields.map(|fields| Self {
            prompt_tokens: fields.prompt_tokens.count(),
            completion_tokens: fields.completion_tokens.count(),
            cached_tokens: fields.cached_tokens.count(),
        })
    }

    /// Returns this report, with the counts of an `earlier` one where this one has none.
    pub(crate) fn or(self, earlier: Option<Self>) -> Self {
        let earlier = earlier.unwrap_or_default();
        Self {
            prompt_tokens: self.prompt_tokens.or(earlier.prompt_tokens),
            completion_tokens: self.completion_tokens.or(earlier.completion_tokens),
            cached_tokens: self.cached_tokens.or(earlier.cached_tokens),
        }
    }
}
