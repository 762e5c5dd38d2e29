//! How a request of another API is converted to a chat.

/// The engine whose conversion of a request to a chat is followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// vLLM 0.32
    #[default]
    Vllm,
    /// SGLang 0.5.23
    Sglang,
}

/// How a request is converted to a chat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    /// The engine.
    pub dialect: Dialect,
    /// Whether the template accepts a system message only as the first one, so that engines move
    /// the texts of all system messages there.
    pub merges_system: bool,
}
