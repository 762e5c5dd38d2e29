//! Tokenises prompts as their engines do, for as long as the engines' token counts agree.
//!
//! Token ids from a wrong tokenizer or chat template match nothing that the engine has cached, and
//! the only symptom would be a low hit rate. So each prompt token count that an engine reports is
//! compared with the gateway's count. A model whose counts differ several times in a row is
//! *suspended*: its prompts are matched as text. While it is suspended, a sample of its prompts is
//! still tokenised and compared, and the model is resumed when the counts agree again.

use std::collections::HashMap;
use std::path::Path;

use foresee_engine::chat_template::{ChatTemplate, TemplateError};
use foresee_engine::conversion::Dialect;
use foresee_engine::prompt_encoder::{EncodeError, PromptEncoder};
use foresee_engine::request::{ApiRequest, Endpoint, Prompt};
use foresee_engine::tokenizer::{Tokenizer, TokenizerError};
use parking_lot::Mutex;

use crate::log_limit::warn_limited;
use crate::metrics::Metrics;

/// Maximum size of a text that is tokenised on the I/O thread, at about 10 MB/s.
pub(crate) const MAX_INLINE_TOKENIZE_BYTES: usize = 4 << 10;

/// Maximum number of models whose counts are compared. Clients can invent model names, so the number
/// is bounded.
const MAX_MODELS: usize = 256;

/// Number of successive responses with a different count that are tolerated. A few can come from
/// requests with an option that changes the prompt, such as `truncate_prompt_tokens`.
const MAX_CONSECUTIVE_DIFFERENCES: u32 = 3;

/// Of a suspended model, one in this many requests is tokenised for comparison. Few enough that a
/// wrong tokenizer costs little processor time, and enough to notice within some hundred requests
/// that the counts agree again.
const SAMPLE_INTERVAL: u32 = 16;

/// Number of successive equal counts after which a suspended model is resumed. Doubles with each
/// suspension of the model, because each change between tokens and text makes known prefixes unknown.
/// One tokenizer can be right for some of a model's requests and wrong for others, for example those
/// with tools.
const EQUAL_TO_RESUME: u32 = 8;
/// Maximum number of doublings of [`EQUAL_TO_RESUME`]: at most 128 equal counts are needed.
const MAX_DOUBLINGS: u32 = 4;

/// A tokenizer with its chat template, and how its counts compare for each model.
#[derive(Debug)]
pub(crate) struct PromptTokenizer {
    tokenizer: Tokenizer,
    /// Chat template of the model folder. Without one, only text completions are tokenised.
    template: Option<ChatTemplate>,
    /// Agreement of each model's counts.
    models: Mutex<HashMap<String, ModelAgreement>>,
}

/// The token ids of a request's prompts.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct TokenizedPrompts {
    /// Token ids of each prompt. `None` for a prompt that is matched as text instead, or that the
    /// client sent as token ids.
    pub(crate) ids: Vec<Option<Vec<u32>>>,
    /// Tokens of all prompts, to be compared with the engine's count; `None` unless all prompts were
    /// tokenised. A sampled request of a suspended model has a count, but no `ids`.
    pub(crate) token_count: Option<u32>,
}

/// How a request's token ids are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TokenUse {
    /// To match prefixes, and to compare the count.
    Match,
    /// Only to compare the count: the model is suspended, and this request is a sample.
    Compare,
    /// Not at all: the model is suspended.
    Skip,
}

/// How the counts of one model compare with the engine's.
#[derive(Clone, Copy, Debug, Default)]
struct ModelAgreement {
    state: AgreementState,
    /// Number of times that the model was suspended.
    suspensions: u32,
    /// Whether an error of the chat template was logged.
    template_error_logged: bool,
}

/// Whether a model's prompts are matched as tokens.
#[derive(Clone, Copy, Debug)]
enum AgreementState {
    /// Prompts are matched as tokens.
    Active {
        /// Number of latest responses in a row whose count differed.
        consecutive_differences: u32,
    },
    /// Prompts are matched as text.
    Suspended {
        /// Number of requests since the last sample.
        requests_since_sample: u32,
        /// Number of latest responses in a row whose count was equal.
        consecutive_equal: u32,
    },
}

impl Default for AgreementState {
    fn default() -> Self {
        Self::Active {
            consecutive_differences: 0,
        }
    }
}

/// A change of a model's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transition {
    /// From active to suspended.
    Suspended,
    /// From suspended to active, after this many equal counts in a row.
    Resumed(u32),
}

impl ModelAgreement {
    /// Returns how to use the token ids of the next request, and counts the request. For a
    /// suspended model, one in [`SAMPLE_INTERVAL`] requests is to be compared.
    fn next_use(&mut self) -> TokenUse {
        let AgreementState::Suspended {
            requests_since_sample,
            ..
        } = &mut self.state
        else {
            return TokenUse::Match;
        };
        *requests_since_sample += 1;
        if *requests_since_sample < SAMPLE_INTERVAL {
            return TokenUse::Skip;
        }
        *requests_since_sample = 0;
        TokenUse::Compare
    }

    /// Records whether one response's count was equal to the gateway's. Returns the change of state
    /// that follows from it. `None` if the state stays the same.
    fn record(&mut self, is_equal: bool) -> Option<Transition> {
        match &mut self.state {
            AgreementState::Active {
                consecutive_differences,
            } => {
                *consecutive_differences = if is_equal {
                    0
                } else {
                    *consecutive_differences + 1
                };
                if *consecutive_differences <= MAX_CONSECUTIVE_DIFFERENCES {
                    return None;
                }
                self.suspensions = self.suspensions.saturating_add(1);
                self.state = AgreementState::Suspended {
                    requests_since_sample: 0,
                    consecutive_equal: 0,
                };
                Some(Transition::Suspended)
            }
            AgreementState::Suspended {
                consecutive_equal, ..
            } => {
                *consecutive_equal = if is_equal { *consecutive_equal + 1 } else { 0 };
                let doublings = self.suspensions.saturating_sub(1).min(MAX_DOUBLINGS);
                let needed = EQUAL_TO_RESUME << doublings;
                if *consecutive_equal < needed {
                    return None;
                }
                self.state = AgreementState::default();
                Some(Transition::Resumed(needed))
            }
        }
    }

    /// Returns whether the model's prompts are matched as text.
    fn is_suspended(&self) -> bool {
        matches!(self.state, AgreementState::Suspended { .. })
    }
}

impl PromptTokenizer {
    /// Loads a tokenizer from a model folder or a `tokenizer.json`, and the chat template from the
    /// same folder. A missing or invalid template is logged and not an error. Fails if the
    /// tokenizer cannot be loaded.
    pub(crate) fn load(path: &Path) -> Result<Self, TokenizerError> {
        let tokenizer = Tokenizer::load(path)?;
        let folder = if path.is_dir() {
            path
        } else {
            path.parent().unwrap_or(Path::new(""))
        };
        let template = match ChatTemplate::load(folder) {
            Ok(template) => Some(template),
            Err(error) => {
                tracing::warn!(
                    folder = %folder.display(), %error,
                    "cannot load a chat template; matching chats as text. Put the model's template \
                     next to its tokenizer.json"
                );
                None
            }
        };
        Ok(Self {
            tokenizer,
            template,
            models: Mutex::default(),
        })
    }

    /// Tokenises the prompts of a request with this `body`, as engines of this dialect do, and counts
    /// for each text prompt whether
    /// that succeeded. Of a suspended model's requests, tokenises only samples, and returns only
    /// their count. `body` is read only for chats. Prompts that the client sent as token ids are
    /// neither tokenised nor counted.
    pub(crate) fn encode(
        &self,
        endpoint: Endpoint,
        dialect: Dialect,
        request: &ApiRequest,
        body: &[u8],
        metrics: &Metrics,
    ) -> TokenizedPrompts {
        let token_use = self.next_use(&request.model);
        let mut token_count = Some(0_u32);
        let encoded = request.all_prompts().map(|prompt| {
            let ids = match prompt {
                Prompt::Text(_) if token_use != TokenUse::Skip => {
                    Some(self.encode_prompt(endpoint, dialect, request, prompt, body))
                }
                Prompt::Text(_) => Some(Err("suspended")),
                _ => None,
            };
            token_count = match &ids {
                Some(Ok(ids)) => token_count.map(|sum| sum.saturating_add(ids.len() as u32)),
                _ => None,
            };
            let result = match &ids {
                Some(Err(reason)) => Some(*reason),
                Some(Ok(_)) if token_use == TokenUse::Match => Some("tokens"),
                Some(Ok(_)) => Some("suspended"),
                None => None,
            };
            if let Some(result) = result {
                metrics.record_tokenization(result);
            }
            ids.and_then(Result::ok)
                .filter(|_| token_use == TokenUse::Match)
        });
        let ids = encoded.collect();
        TokenizedPrompts { ids, token_count }
    }

    /// Tokenises one prompt of a request whose body is `body`, as engines of this dialect do. The
    /// error is the reason why the prompt is matched as text, a label value of
    /// `foresee_tokenized_prompts_total`. A template error is also logged, once per model.
    fn encode_prompt(
        &self,
        endpoint: Endpoint,
        dialect: Dialect,
        request: &ApiRequest,
        prompt: &Prompt,
        body: &[u8],
    ) -> Result<Vec<u32>, &'static str> {
        let encoder = PromptEncoder {
            tokenizer: &self.tokenizer,
            template: self.template.as_ref(),
            dialect,
        };
        let encoded = encoder.encode(endpoint, request, prompt, body);
        encoded.map_err(|error| match error {
            EncodeError::NoTemplate => "no_template",
            EncodeError::Template(TemplateError::Media(_)) => "media",
            EncodeError::Template(error) => {
                self.log_template_error_once(&request.model, &error);
                "not_rendered"
            }
            EncodeError::NotText => "not_text",
            EncodeError::Tokenizer(_) => "not_encoded",
        })
    }

    /// Returns the tokenizer, or `None` if `model` is suspended.
    pub(crate) fn tokenizer(&self, model: &str) -> Option<&Tokenizer> {
        let models = self.models.lock();
        let is_suspended = models.get(model).is_some_and(ModelAgreement::is_suspended);
        (!is_suspended).then_some(&self.tokenizer)
    }

    /// Compares the prompt tokens of one request: `counted` by this tokenizer, `reported` by the
    /// engine. Suspends or resumes the model if enough counts in a row differ or agree. Also counts
    /// the comparison. Changes of state are logged. A new model is not followed if there are
    /// [`MAX_MODELS`] already.
    pub(crate) fn compare(&self, model: &str, counted: u32, reported: u32, metrics: &Metrics) {
        let is_equal = counted == reported;
        metrics.record_token_parity(is_equal);
        match self.with_model(model, |agreement| agreement.record(is_equal)) {
            Some(Some(Transition::Suspended)) => {
                warn_limited!(
                    key: model, model, ours = counted, engine = reported,
                    likely_cause = likely_cause(counted, reported),
                    "token counts differ from the engine's in {} consecutive responses; falling back \
                     to text matching for this model and comparing every {SAMPLE_INTERVAL}th request",
                    MAX_CONSECUTIVE_DIFFERENCES + 1
                );
            }
            Some(Some(Transition::Resumed(responses))) => tracing::info!(
                model,
                "token counts agree with the engine's in {responses} consecutive responses; \
                 resuming token matching for this model"
            ),
            Some(None) | None => {}
        }
    }

    /// Returns how to use the token ids of the next request for `model`, and counts the request.
    fn next_use(&self, model: &str) -> TokenUse {
        let mut models = self.models.lock();
        models
            .get_mut(model)
            .map_or(TokenUse::Match, ModelAgreement::next_use)
    }

    /// Logs an error of the chat template, once per model.
    fn log_template_error_once(&self, model: &str, error: &TemplateError) {
        let is_logged = self.with_model(model, |agreement| {
            std::mem::replace(&mut agreement.template_error_logged, true)
        });
        if is_logged == Some(false) {
            tracing::warn!(
                model, %error,
                "cannot render a chat with the chat template; matching such chats as text (logged \
                 once per model)"
            );
        }
    }

    /// Calls `change` with the agreement of `model` and returns its result. Returns `None` for an
    /// unknown model if there are [`MAX_MODELS`] already. Adds the model if it is new.
    fn with_model<T>(
        &self,
        model: &str,
        change: impl FnOnce(&mut ModelAgreement) -> T,
    ) -> Option<T> {
        let mut models = self.models.lock();
        if !models.contains_key(model) {
            if models.len() >= MAX_MODELS {
                return None;
            }
            models.insert(model.to_owned(), ModelAgreement::default());
        }
        models.get_mut(model).map(change)
    }
}

/// Returns the likely reason why an engine reported `reported` tokens where the gateway `counted`
/// another number.
fn likely_cause(counted: u32, reported: u32) -> &'static str {
    match i64::from(reported) - i64::from(counted) {
        1 | 2 => "the engine adds a special token that tokenizer.json does not add",
        -2 | -1 => "the engine does not add a special token that tokenizer.json adds",
        3..=200 => "the engine's chat template adds text: another template, or a default option",
        _ => "--tokenizer is another model's, or the engine was given its own chat template",
    }
}

#[cfg(test)]
mod tests {
    use foresee_engine::tokenizer::SpecialTokens;

    use super::*;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");

    fn tokenize(tokenizer: &PromptTokenizer, endpoint: Endpoint, body: &str) -> TokenizedPrompts {
        let request = ApiRequest::parse(endpoint, body.as_bytes()).unwrap();
        tokenizer.encode(
            endpoint,
            Dialect::Vllm,
            &request,
            body.as_bytes(),
            &Metrics::new(),
        )
    }

    fn encode(tokenizer: &PromptTokenizer, endpoint: Endpoint, body: &str) -> Option<Vec<u32>> {
        tokenize(tokenizer, endpoint, body).ids.swap_remove(0)
    }

    /// Tokenises a text completion for `model`.
    fn complete(tokenizer: &PromptTokenizer, model: &str) -> TokenizedPrompts {
        let body = format!(r#"{{"model":"{model}","prompt":"Hi"}}"#);
        tokenize(tokenizer, Endpoint::Completions, &body)
    }

    fn is_matched_as_tokens(tokenizer: &PromptTokenizer, model: &str) -> bool {
        complete(tokenizer, model).ids[0].is_some()
    }

    #[test]
    fn each_endpoint_is_tokenised_as_engines_do() {
        let prompt_tokenizer = PromptTokenizer::load(Path::new(TINY)).unwrap();
        let tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
        let chat = encode(
            &prompt_tokenizer,
            Endpoint::ChatCompletions,
            r#"{"model":"m","messages":[{"role":"user","content":"Hi"}]}"#,
        );
        let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(
            chat,
            tokenizer.encode(text, SpecialTokens::AlreadyPresent).ok()
        );
        let framed = encode(
            &prompt_tokenizer,
            Endpoint::Completions,
            r#"{"prompt":"Hi"}"#,
        );
        assert_eq!(framed, tokenizer.encode("Hi", SpecialTokens::Add).ok());
        let body = r#"{"prompt":"Hi","add_special_tokens":false}"#;
        let bare = encode(&prompt_tokenizer, Endpoint::Completions, body);
        assert_eq!(
            bare,
            tokenizer.encode("Hi", SpecialTokens::AlreadyPresent).ok()
        );
        assert_ne!(framed, bare);
    }

    #[test]
    fn prompts_that_cannot_be_tokenised_are_matched_as_text() {
        let tokenizer = PromptTokenizer::load(Path::new(TINY)).unwrap();
        let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        assert_eq!(encode(&tokenizer, Endpoint::ChatCompletions, image), None);
        let own_template = r#"{"messages":[],"chat_template":"x"}"#;
        assert_eq!(
            encode(&tokenizer, Endpoint::ChatCompletions, own_template),
            None
        );
        assert_eq!(
            encode(&tokenizer, Endpoint::Completions, r#"{"prompt":[1,2]}"#),
            None
        );
    }

    #[test]
    fn the_count_covers_all_prompts_or_none() {
        let tokenizer = PromptTokenizer::load(Path::new(TINY)).unwrap();
        let both = tokenize(
            &tokenizer,
            Endpoint::Completions,
            r#"{"prompt":["Hi","Ho"]}"#,
        );
        let lengths = both.ids.iter().flatten().map(|ids| ids.len() as u32);
        assert_eq!(both.token_count, Some(lengths.sum()));
        let ids = tokenize(&tokenizer, Endpoint::Completions, r#"{"prompt":[1,2]}"#);
        assert_eq!(ids.token_count, None);
    }

    #[test]
    fn a_model_whose_counts_differ_is_suspended_and_no_other() {
        let tokenizer = PromptTokenizer::load(Path::new(TINY)).unwrap();
        let metrics = Metrics::new();
        for _ in 0..MAX_CONSECUTIVE_DIFFERENCES {
            tokenizer.compare("m", 7, 8, &metrics);
        }
        tokenizer.compare("m", 7, 7, &metrics);
        for _ in 0..MAX_CONSECUTIVE_DIFFERENCES {
            tokenizer.compare("m", 7, 8, &metrics);
        }
        assert!(is_matched_as_tokens(&tokenizer, "m"));
        tokenizer.compare("m", 7, 8, &metrics);
        assert!(!is_matched_as_tokens(&tokenizer, "m"));
        assert!(tokenizer.tokenizer("m").is_none());
        assert!(is_matched_as_tokens(&tokenizer, "n"));
        assert!(tokenizer.tokenizer("n").is_some());
    }

    #[test]
    fn a_suspended_model_is_resumed_after_equal_counts_of_sampled_requests() {
        let tokenizer = PromptTokenizer::load(Path::new(TINY)).unwrap();
        let metrics = Metrics::new();
        let count = complete(&tokenizer, "m").token_count.unwrap();
        for _ in 0..=MAX_CONSECUTIVE_DIFFERENCES {
            tokenizer.compare("m", count, count + 1, &metrics);
        }
        // Waits for the next sample, and has the engine report `reported` tokens for it.
        let compare_sample = |reported: u32| {
            for _ in 1..SAMPLE_INTERVAL {
                let skipped = complete(&tokenizer, "m");
                assert_eq!(skipped.token_count, None);
                assert_eq!(skipped.ids, [None]);
            }
            let sample = complete(&tokenizer, "m");
            assert_eq!(sample.ids, [None], "a sample is matched as text");
            assert_eq!(sample.token_count, Some(count));
            tokenizer.compare("m", count, reported, &metrics);
        };
        for _ in 1..EQUAL_TO_RESUME {
            compare_sample(count);
        }
        // A different count restarts the series.
        compare_sample(count + 1);
        for _ in 0..EQUAL_TO_RESUME {
            assert!(tokenizer.tokenizer("m").is_none());
            compare_sample(count);
        }
        assert!(is_matched_as_tokens(&tokenizer, "m"));
        assert!(tokenizer.tokenizer("m").is_some());
        // A single difference does not suspend it again.
        tokenizer.compare("m", count, count + 1, &metrics);
        assert!(is_matched_as_tokens(&tokenizer, "m"));
    }

    #[test]
    fn each_suspension_doubles_the_equal_counts_needed_to_resume() {
        let mut agreement = ModelAgreement::default();
        for suspension in 0..7 {
            for _ in 0..MAX_CONSECUTIVE_DIFFERENCES {
                assert_eq!(agreement.record(false), None);
            }
            assert_eq!(agreement.record(false), Some(Transition::Suspended));
            let expected = EQUAL_TO_RESUME << suspension.min(MAX_DOUBLINGS);
            for _ in 1..expected {
                assert_eq!(agreement.record(true), None);
            }
            assert_eq!(agreement.record(true), Some(Transition::Resumed(expected)));
            assert!(!agreement.is_suspended());
        }
    }
}
