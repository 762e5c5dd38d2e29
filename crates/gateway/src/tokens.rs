//! Prompts as the engines' own token ids, for as long as the engines' counts agree with ours.
//!
//! A tokenizer or a template that is not the engine's gives ids that match nothing the engine has
//! cached, and nothing would show it but cold caches. So every prompt count that an engine reports
//! is held against ours, and a model whose counts differ is routed by text again.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use foresee_engine::chat::Chat;
use foresee_engine::chat_template::{ChatTemplate, TemplateError};
use foresee_engine::request::{ApiRequest, Endpoint, Prompt};
use foresee_engine::tokenizer::{Framing, Tokenizer, TokenizerError};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::Metrics;

/// Clients may invent model names, so no more than this many are watched.
const MAX_MODELS: usize = 256;

/// Counts that differ in a row before a model's ids are given up: a single one may be a request
/// with an option that changes its prompt, such as `truncate_prompt_tokens`.
const DIFFERENCES_TOLERATED: u32 = 3;

/// A tokenizer, the template beside it, and how they have done.
#[derive(Debug)]
pub(crate) struct Tokens {
    tokenizer: Tokenizer,
    /// Without one, only text completions are tokenised.
    template: Option<ChatTemplate>,
    models: Mutex<HashMap<String, Agreement>>,
    /// One for each processor: more tokenising at once would only delay the I/O threads.
    permits: Arc<Semaphore>,
}

/// How a model's counts compared.
#[derive(Clone, Copy, Debug, Default)]
struct Agreement {
    different_in_a_row: u32,
    given_up: bool,
    /// The log has been told that some chat could not be rendered.
    told: bool,
}

impl Tokens {
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
                tracing::warn!(%error, "chats are routed by their text, not by tokens");
                None
            }
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            tokenizer,
            template,
            models: Mutex::default(),
            permits: Arc::new(Semaphore::new(processors)),
        })
    }

    /// Waits until tokenising a long prompt takes no processor from another.
    pub(crate) async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.permits).acquire_owned().await.ok()
    }

    /// The ids of each of the request's prompts; `None` for one that is to be matched as text
    /// instead, or has brought its ids.
    pub(crate) fn encode(
        &self,
        endpoint: Endpoint,
        request: &ApiRequest,
        body: &[u8],
        metrics: &Metrics,
    ) -> Vec<Option<Vec<u32>>> {
        let encoded = request.all_prompts().map(|prompt| {
            let Prompt::Text(text) = prompt else {
                return None;
            };
            let ids = self.encode_one(endpoint, request, text, body);
            metrics.tokenized(ids.as_ref().err().copied().unwrap_or("tokens"));
            ids.ok()
        });
        encoded.collect()
    }

    fn encode_one(
        &self,
        endpoint: Endpoint,
        request: &ApiRequest,
        text: &[u8],
        body: &[u8],
    ) -> Result<Vec<u32>, &'static str> {
        if self.has_given_up(&request.model) {
            Err("given_up")
        } else if endpoint == Endpoint::ChatCompletions {
            self.encode_chat(&request.model, body)
        } else {
            self.encode_text(text, request.add_special_tokens.unwrap_or(true))
        }
    }

    fn encode_chat(&self, model: &str, body: &[u8]) -> Result<Vec<u32>, &'static str> {
        let template = self.template.as_ref().ok_or("no_template")?;
        let rendered = Chat::parse(body).and_then(|chat| {
            let text = template.render(&chat)?;
            Ok((text, chat.adds_special_tokens()))
        });
        match rendered {
            Ok((text, framed)) => self.encode_text(text.as_bytes(), framed),
            Err(TemplateError::Media(_)) => Err("media"),
            Err(error) => {
                self.tell_once(model, &error);
                Err("not_rendered")
            }
        }
    }

    fn encode_text(&self, text: &[u8], framed: bool) -> Result<Vec<u32>, &'static str> {
        let text = std::str::from_utf8(text).map_err(|_| "not_text")?;
        let framing = if framed {
            Framing::Added
        } else {
            Framing::InText
        };
        let encoded = self.tokenizer.encode(text, framing);
        encoded.map_err(|_| "not_encoded")
    }

    /// The tokenizer, unless the model's engine was seen to use another.
    pub(crate) fn tokenizer(&self, model: &str) -> Option<&Tokenizer> {
        (!self.has_given_up(model)).then_some(&self.tokenizer)
    }

    /// An engine counted `reported` tokens in a prompt in which we had counted `counted`.
    pub(crate) fn compare(&self, model: &str, counted: u32, reported: u32, metrics: &Metrics) {
        let equal = counted == reported;
        metrics.token_parity(equal);
        let gave_up = self.with_model(model, |agreement| {
            if equal {
                agreement.different_in_a_row = 0;
                return false;
            }
            agreement.different_in_a_row += 1;
            let enough = agreement.different_in_a_row > DIFFERENCES_TOLERATED;
            enough && !std::mem::replace(&mut agreement.given_up, true)
        });
        if gave_up {
            let likely_cause = likely_cause(counted, reported);
            tracing::warn!(
                model,
                counted,
                reported,
                likely_cause,
                "the engine counts prompt tokens otherwise; its prompts are matched as text from now on"
            );
        }
    }

    fn has_given_up(&self, model: &str) -> bool {
        let models = self.models.lock();
        models.get(model).is_some_and(|known| known.given_up)
    }

    fn tell_once(&self, model: &str, error: &TemplateError) {
        if self.with_model(model, |known| !std::mem::replace(&mut known.told, true)) {
            tracing::warn!(model, %error, "a chat is matched as text; told once per model");
        }
    }

    /// Changes what is known of a model; `false` for one model too many.
    fn with_model(&self, model: &str, change: impl FnOnce(&mut Agreement) -> bool) -> bool {
        let mut models = self.models.lock();
        if !models.contains_key(model) {
            if models.len() >= MAX_MODELS {
                return false;
            }
            models.insert(model.to_owned(), Agreement::default());
        }
        models.get_mut(model).is_some_and(change)
    }
}

fn likely_cause(counted: u32, reported: u32) -> &'static str {
    match i64::from(reported) - i64::from(counted) {
        1 | 2 => "the engine frames prompts with a token that tokenizer.json does not add",
        -2 | -1 => "the engine does not add the token that tokenizer.json frames prompts with",
        3..=200 => "the engine's chat template adds text: another template, or a default option",
        _ => "--tokenizer is another model's, or the engine was given its own chat template",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../engine/tests/tiny_model");

    fn encode(tokens: &Tokens, endpoint: Endpoint, body: &str) -> Option<Vec<u32>> {
        let request = ApiRequest::parse(endpoint, body.as_bytes()).unwrap();
        let mut ids = tokens.encode(endpoint, &request, body.as_bytes(), &Metrics::new());
        ids.swap_remove(0)
    }

    #[test]
    fn each_endpoint_is_tokenised_as_engines_do() {
        let tokens = Tokens::load(Path::new(TINY)).unwrap();
        let tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
        let chat = encode(
            &tokens,
            Endpoint::ChatCompletions,
            r#"{"model":"m","messages":[{"role":"user","content":"Hi"}]}"#,
        );
        let text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(chat, tokenizer.encode(text, Framing::InText).ok());
        let framed = encode(&tokens, Endpoint::Completions, r#"{"prompt":"Hi"}"#);
        assert_eq!(framed, tokenizer.encode("Hi", Framing::Added).ok());
        let body = r#"{"prompt":"Hi","add_special_tokens":false}"#;
        let bare = encode(&tokens, Endpoint::Completions, body);
        assert_eq!(bare, tokenizer.encode("Hi", Framing::InText).ok());
        assert_ne!(framed, bare);
    }

    #[test]
    fn what_cannot_be_tokenised_is_left_to_text() {
        let tokens = Tokens::load(Path::new(TINY)).unwrap();
        let image = r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#;
        assert_eq!(encode(&tokens, Endpoint::ChatCompletions, image), None);
        let own = r#"{"messages":[],"chat_template":"x"}"#;
        assert_eq!(encode(&tokens, Endpoint::ChatCompletions, own), None);
        assert_eq!(
            encode(&tokens, Endpoint::Completions, r#"{"prompt":[1,2]}"#),
            None
        );
    }

    #[test]
    fn a_model_whose_counts_differ_is_given_up_and_no_other() {
        let tokens = Tokens::load(Path::new(TINY)).unwrap();
        let metrics = Metrics::new();
        let body = |model: &str| format!(r#"{{"model":"{model}","prompt":"Hi"}}"#);
        let is_tokenised =
            |model: &str| encode(&tokens, Endpoint::Completions, &body(model)).is_some();
        for _ in 0..DIFFERENCES_TOLERATED {
            tokens.compare("m", 7, 8, &metrics);
        }
        tokens.compare("m", 7, 7, &metrics);
        for _ in 0..DIFFERENCES_TOLERATED {
            tokens.compare("m", 7, 8, &metrics);
        }
        assert!(is_tokenised("m"));
        tokens.compare("m", 7, 8, &metrics);
        assert!(!is_tokenised("m"));
        assert!(is_tokenised("n"));
    }
}
