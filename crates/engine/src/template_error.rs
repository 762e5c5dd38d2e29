//! The error with which a chat cannot be rendered.

use minijinja::Error;

/// Why a chat cannot be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's folder contains no template.
    #[error("model has no chat template")]
    Missing,
    /// A file of the model cannot be parsed.
    #[error("cannot parse {file}: {reason}")]
    File {
        /// The file, in the model's folder.
        file: &'static str,
        /// The error of the JSON parser.
        reason: String,
    },
    /// The template cannot be compiled, or it rejects the chat.
    #[error("chat template failed: {0}")]
    Template(#[from] Error),
    /// The chat contains a part that only an engine can turn into tokens. Holds the part's type.
    #[error("chat contains a part of type `{0}`, which has no text")]
    Media(String),
    /// The request cannot be rendered, possibly because it is invalid. Holds the reason.
    #[error("cannot render the chat: {0}")]
    Chat(String),
}
