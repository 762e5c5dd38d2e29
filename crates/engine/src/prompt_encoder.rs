//! Turns the prompt of any API into the token ids that the engine computes.

use crate::chat::Chat;
use crate::chat_template::ChatTemplate;
use crate::conversion::{Conversion, Dialect};
use crate::request::{ApiRequest, Endpoint, Prompt};
use crate::template_error::TemplateError;
use crate::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};
use crate::{messages_request, responses_request};

/// Why a prompt has no token ids.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The prompt is a chat, and the model has no chat template.
    #[error("model has no chat template")]
    NoTemplate,
    /// The chat cannot be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The prompt is not a text that the router knows: it is in a field that only the engine reads,
    /// or not UTF-8.
    #[error("prompt is not a text")]
    NotText,
    /// The text cannot be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A model's tokenizer and chat template, as an engine of this dialect uses them.
#[derive(Clone, Copy, Debug)]
pub struct PromptEncoder<'m> {
    /// The tokenizer.
    pub tokenizer: &'m Tokenizer,
    /// The chat template, without which only prompts without a template have token ids.
    pub template: Option<&'m ChatTemplate>,
    /// The engine that serves the request.
    pub dialect: Dialect,
}

impl PromptEncoder<'_> {
    /// Returns the token ids of `prompt`, one of the prompts of `request`, whose body is `body`. Of
    /// an API with a chat template, the prompt is rendered from the body.
    ///
    /// # Errors
    /// If the prompt cannot be rendered or tokenised.
    pub fn encode(
        &self,
        endpoint: Endpoint,
        request: &ApiRequest,
        prompt: &Prompt,
        body: &[u8],
    ) -> Result<Vec<u32>, EncodeError> {
        match (prompt, endpoint) {
            (Prompt::Tokens(ids), _) => Ok(ids.clone()),
            // The engine puts a conversation before the prompt that only it knows.
            _ if request.previous_response_id.is_some() => Err(EncodeError::NotText),
            (Prompt::Text(_), _) if endpoint.has_chat_template() => {
                self.encode_chat(endpoint, body)
            }
            // How an engine joins a query and a document depends on the model.
            (
                Prompt::Text(_),
                Endpoint::Rerank
                | Endpoint::Score
                | Endpoint::Tokenize
                | Endpoint::Detokenize
                | Endpoint::VllmGenerate
                | Endpoint::Other,
            ) => Err(EncodeError::NotText),
            (Prompt::Text(text), _) => {
                let text = std::str::from_utf8(text).map_err(|_| EncodeError::NotText)?;
                self.encode_text(text, request.add_special_tokens.unwrap_or(true))
            }
        }
    }

    /// Renders the chat in `body` with the chat template and tokenises the result.
    fn encode_chat(&self, endpoint: Endpoint, body: &[u8]) -> Result<Vec<u32>, EncodeError> {
        let template = self.template.ok_or(EncodeError::NoTemplate)?;
        let conversion = Conversion {
            dialect: self.dialect,
            merges_system: template.needs_leading_system(self.dialect),
        };
        let chat = parse_chat(endpoint, conversion, body)?;
        let text = template.render(&chat)?;
        self.encode_text(&text, chat.adds_special_tokens())
    }

    /// Tokenises `text`. `adds_special_tokens`: adds the special tokens that the tokenizer puts
    /// around a prompt.
    fn encode_text(&self, text: &str, adds_special_tokens: bool) -> Result<Vec<u32>, EncodeError> {
        let special_tokens = match adds_special_tokens {
            true => SpecialTokens::Add,
            false => SpecialTokens::AlreadyPresent,
        };
        Ok(self.tokenizer.encode(text, special_tokens)?)
    }
}

/// Parses the body of a request whose prompt is rendered with the chat template, and converts it to
/// a chat as the engine does. A body of another API is parsed as that of a chat completion.
///
/// # Errors
/// If the body has another form, contains its own template, or has an item that the conversion does
/// not support.
pub fn parse_chat(
    endpoint: Endpoint,
    conversion: Conversion,
    body: &[u8],
) -> Result<Chat, TemplateError> {
    match endpoint {
        Endpoint::Responses => responses_request::to_chat(conversion, body),
        Endpoint::Messages | Endpoint::MessagesCountTokens => {
            messages_request::to_chat(conversion, body)
        }
        _ => Chat::parse(body).map(|chat| chat.rendered_by(conversion.dialect)),
    }
}
