//! The error with which a request body cannot be used.

/// Why a body cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BodyError {
    /// Description of the fault and of the valid form.
    pub message: String,
    /// The invalid field; `None` if the body as a whole is invalid.
    pub param: Option<&'static str>,
}
