//! The part of a request's body that routing needs: the model, the prompt, the expected output.
//!
//! The body is parsed once, in place, and never rewritten: the engine receives the client's bytes.
//! Fields that routing does not need are skipped without a check, because their validation is the
//! engine's task. Of a repeated key the last value counts, as in Python.

use std::num::NonZeroU32;

use foresee_core::sequence::{self, PartialBlock, Sequence};

pub use crate::body_error::BodyError;
pub use crate::conversation::ASSISTANT_HEADING;
pub use crate::endpoint::Endpoint;
use crate::output_text::Continuation;
pub use crate::prompt::{Prompt, UnhashedInput};
pub use crate::prompt_sequences::PromptSequences;
use crate::request_body::RequestBody;

/// The fields of a body that routing needs.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiRequest {
    /// The requested model, which may be the name of a LoRA adapter; empty if the body names none.
    pub model: String,
    /// Whether the client requests a streamed response.
    pub stream: bool,
    /// Maximum output tokens per choice, if the body limits them.
    pub max_tokens: Option<u32>,
    /// Whether each output has exactly `max_tokens` tokens (`ignore_eos`).
    pub ignore_eos: bool,
    /// Whether the body offers tools, which the output may call.
    pub has_tools: bool,
    /// Outputs generated for each prompt (`n`), at least 1.
    pub choices: u32,
    /// The `cache_salt`: only requests with an equal salt share cached blocks.
    pub cache_salt: Option<String>,
    /// Whether the engine adds special tokens to the prompt, if the body specifies it.
    pub add_special_tokens: Option<bool>,
    /// Whether the engine's KV events shall also list the blocks of this prompt that it found in
    /// its cache (`vllm_xargs: {"kv_cache_report_mode": "full"}`).
    pub full_report_mode: bool,
    /// Number of prompts in the body, at least 1. The engine generates `choices` outputs for each.
    pub prompts: u32,
    /// The prompt, or the first of a batch.
    pub prompt: Prompt,
    /// The further prompts of a batch, fewer than
    /// [`MAX_BATCH_PROMPTS`](foresee_core::batch::MAX_BATCH_PROMPTS).
    pub rest: Vec<Prompt>,
    /// Input that is only counted: the rest of a single prompt, or further prompts of a batch.
    pub unhashed: UnhashedInput,
    /// Position at which the output starts.
    pub completion_follows: CompletionFollows,
    /// Id of the stored response that the request continues (`previous_response_id`). Only the
    /// worker that generated this response has it.
    pub previous_response_id: Option<String>,
    /// Key of the client's session (`prompt_cache_key`, or `session_id`): its requests are likely to
    /// have a prefix in common.
    pub session_key: Option<String>,
    /// Hash of the first image or other media part: of its `uuid`, its URL or its data. Requests
    /// with an equal hash have the same media, which the worker of the first has processed.
    pub media_hash: Option<u64>,
}

/// The position at which an output starts in the sequence of its prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CompletionFollows {
    /// Directly after the prompt.
    #[default]
    Prompt,
    /// After the heading of an assistant message.
    AssistantHeader,
    /// At a position that the chat template determines, by options that are not parsed here.
    Template,
    /// At the text of the prompt, which the output repeats (`echo`).
    EchoedPrompt,
}

impl ApiRequest {
    /// Parses a body.
    ///
    /// # Errors
    /// If the body is not a JSON object, or a field that routing needs has a form that no engine
    /// accepts.
    pub fn parse(endpoint: Endpoint, body: &[u8]) -> Result<Self, BodyError> {
        let mut body = RequestBody::parse(endpoint, body)?;
        let input = body.take_input()?;
        let completion_follows = match endpoint {
            _ if endpoint.has_chat_template() => {
                match input.continues || body.sets_continuation() {
                    true => CompletionFollows::Template,
                    false => CompletionFollows::AssistantHeader,
                }
            }
            _ if body.echoes() => CompletionFollows::EchoedPrompt,
            _ => CompletionFollows::Prompt,
        };
        Ok(Self {
            completion_follows,
            stream: body.streams(),
            max_tokens: body.max_tokens(),
            ignore_eos: body.ignores_eos(),
            has_tools: body.has_tools(),
            choices: match endpoint.generates() {
                true => body.choices(),
                false => 1,
            },
            cache_salt: body.cache_salt(),
            add_special_tokens: body.add_special_tokens(),
            full_report_mode: body.requests_full_report_mode(),
            previous_response_id: body.previous_response_id(),
            session_key: body.session_key(),
            media_hash: input.media_hash,
            model: body.model.take().unwrap_or_default(),
            prompts: input.prompts.count.max(1),
            prompt: match input.prompts.first {
                Some(prompt) => prompt,
                // The prompt may be in a field that only the engine reads, such as `prompt_embeds`.
                None => Prompt::Text(Vec::new()),
            },
            rest: input.prompts.rest,
            unhashed: input.prompts.unhashed,
        })
    }

    /// Returns the prompt, or the prompts of a batch that are not only counted.
    pub fn all_prompts(&self) -> impl Iterator<Item = &Prompt> {
        std::iter::once(&self.prompt).chain(&self.rest)
    }

    /// Returns the sequences that the engine runs for this body.
    ///
    /// `ids` are the token ids of the prompts, in the order of [`all_prompts`](Self::all_prompts).
    /// A prompt without ids, or after the end of `ids`, is hashed from its own content.
    /// `bytes_per_token` is the measured length of the engine's tokens in this text; it divides
    /// text into blocks and converts the unhashed bytes into tokens, which match nothing.
    #[must_use]
    pub fn sequences(
        &self,
        ids: &[Option<Vec<u32>>],
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> PromptSequences {
        let salt = self.salt();
        let hash_prompt = |prompt: &Prompt, ids: Option<&Option<Vec<u32>>>| match (ids, prompt) {
            (Some(Some(ids)), _) | (_, Prompt::Tokens(ids)) => {
                Sequence::from_tokens(ids, block_size, salt)
            }
            (_, Prompt::Text(text)) => Sequence::from_text(text, bytes_per_token, block_size, salt),
        };
        let unhashed_tokens = self.unhashed.bytes as f64 / bytes_per_token.max(f64::MIN_POSITIVE)
            + self.unhashed.tokens as f64;
        let unhashed_tokens = unhashed_tokens.ceil() as u32;
        let first = hash_prompt(&self.prompt, ids.first());
        if self.prompts == 1 {
            return PromptSequences::repeated(
                first.with_unhashed_tail(unhashed_tokens),
                self.choices,
            );
        }
        let rest = self.rest.iter().zip(1..);
        let rest = rest.map(|(prompt, index)| hash_prompt(prompt, ids.get(index)));
        PromptSequences::from_prompts(
            first,
            rest.collect(),
            self.prompts,
            self.choices,
            unhashed_tokens,
        )
    }

    /// Returns how the output continues the sequence of the prompt. `ids` are the token ids of the
    /// prompt, if it is hashed as tokens. The arguments must agree with those of
    /// [`sequences`](Self::sequences).
    ///
    /// Returns `None` if the body has several prompts or outputs, if the prompt is not fully
    /// hashed, or if the position of the output is unknown.
    #[must_use]
    pub fn continuation(
        &self,
        ids: Option<&[u32]>,
        block_size: NonZeroU32,
        bytes_per_token: f64,
    ) -> Option<Continuation> {
        let is_single = self.prompts == 1 && self.choices == 1 && self.is_fully_hashed();
        if !is_single || self.completion_follows == CompletionFollows::EchoedPrompt {
            return None;
        }
        let salt = self.salt();
        let from_tokens = |ids| {
            Some(Continuation::from_tokens(PartialBlock::from_tokens(
                ids, block_size, salt,
            )))
        };
        match (&self.prompt, ids, self.completion_follows) {
            (_, Some(ids), _) => from_tokens(ids),
            (Prompt::Tokens(ids), None, _) => from_tokens(ids),
            (
                Prompt::Text(text),
                None,
                CompletionFollows::Prompt | CompletionFollows::AssistantHeader,
            ) => {
                let heading = match self.completion_follows {
                    CompletionFollows::AssistantHeader => ASSISTANT_HEADING,
                    _ => &[],
                };
                let end = PartialBlock::from_text(text, bytes_per_token, block_size, salt);
                Some(Continuation::from_text(end, heading, block_size))
            }
            _ => None,
        }
    }

    /// Returns the salt that all hashes of this body start from.
    fn salt(&self) -> u64 {
        sequence::prefix_salt(&self.model, None, self.cache_salt.as_deref())
    }

    /// Returns whether the hashed prompts contain all input that the engine counts.
    #[must_use]
    pub fn is_fully_hashed(&self) -> bool {
        self.unhashed == UnhashedInput::default()
    }

    /// Returns the bytes of text that the engine's count of prompt tokens stands for, from which
    /// the bytes per token are learned; 0 if part of the input is not text.
    #[must_use]
    pub fn prompt_bytes(&self) -> usize {
        let bytes = self.all_prompts().map(|prompt| match prompt {
            Prompt::Text(text) => Some(text.len()),
            Prompt::Tokens(_) => None,
        });
        match bytes.sum::<Option<usize>>() {
            Some(bytes) if self.unhashed.tokens == 0 => bytes + self.unhashed.bytes,
            _ => 0,
        }
    }
}
