//! A model's tokenizer: turns text into the token ids that the engine computes.
//!
//! Text between two special tokens is tokenised independently of its surroundings. The ids of such
//! a segment are therefore cached and reused when the segment occurs again: the earlier turns of a
//! conversation cost a look-up. Text is cut at no other position, because the merges on both sides
//! of such a cut could differ.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Memory for the cached ids of segments, in bytes. A segment that needs more than 1/64 of it is
/// not cached.
const CACHE_BYTES: usize = 128 << 20;

/// The character that stands for a space in SentencePiece vocabularies.
const SPACE: char = '\u{2581}';

/// A loaded tokenizer. Several threads may encode concurrently.
pub struct Tokenizer {
    inner: fastokens::Tokenizer,
    /// Whether the vocabulary represents every byte by one character.
    is_byte_level: bool,
}

/// Whether the special tokens that `tokenizer.json` puts around every text are added.
///
/// The settings of `tokenizer_config.json` (`add_bos_token`) are ignored: `tokenizer.json` takes
/// precedence since transformers 5, which vLLM and SGLang use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// Adds them, as engines do for the prompt of a text completion.
    Add,
    /// Adds none, as engines do for a rendered chat, where the template has written them.
    AlreadyPresent,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The path contains no `tokenizer.json`.
    #[error("no tokenizer.json in {} (SentencePiece and tiktoken files are not supported)", .0.display())]
    Missing(PathBuf),
    /// The file exists but cannot be used.
    #[error("cannot use {}: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why the file cannot be used.
        reason: String,
    },
    /// A text could not be tokenised. Contains the reason.
    #[error("cannot tokenise the text: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Loads a tokenizer from a model's folder, or from its `tokenizer.json`. The settings for
    /// truncation and padding in that file are ignored, as engines do.
    ///
    /// # Errors
    /// If there is no such file, or the file is invalid or requires a feature that is not
    /// implemented, such as tokens that match whole words only.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let file = if path.is_dir() {
            path.join("tokenizer.json")
        } else {
            path.to_owned()
        };
        if !file.is_file() {
            return Err(TokenizerError::Missing(path.to_owned()));
        }
        let unusable = |reason: String| TokenizerError::Unusable {
            path: file.clone(),
            reason,
        };
        let mut inner =
            fastokens::Tokenizer::from_file(&file).map_err(|error| unusable(error.to_string()))?;
        let mut added_tokens = inner.added_token_configs().iter();
        if let Some(token) = added_tokens.find(|token| token.single_word) {
            // The library would match this token inside words too, and the ids would silently
            // differ.
            let name = &token.content;
            return Err(unusable(format!(
                "token {name:?} matches whole words only, which is not supported"
            )));
        }
        // Engines neither truncate nor pad prompts with these settings of the file.
        inner.set_truncation(None);
        inner.set_padding(None);
        inner.enable_segment_cache(CACHE_BYTES);
        let mut tokenizer = Self {
            inner,
            is_byte_level: false,
        };
        tokenizer.is_byte_level = tokenizer.detect_byte_level()?;
        Ok(tokenizer)
    }

    /// Returns the token ids of a text.
    ///
    /// # Errors
    /// If the text cannot be tokenised, including a panic of the tokenizer library. With most
    /// tokenizers that never happens, and it never depends on the state of the cache.
    pub fn encode(
        &self,
        text: &str,
        special_tokens: SpecialTokens,
    ) -> Result<Vec<u32>, TokenizerError> {
        let add = special_tokens == SpecialTokens::Add;
        // A panic of this third-party library must cost one prediction and not the request.
        let encoded = catch_unwind(AssertUnwindSafe(|| {
            self.inner.encode_with_special_tokens(text, add)
        }));
        match encoded {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) => Err(TokenizerError::Encode(error.to_string())),
            Err(_) => Err(TokenizerError::Encode("tokenizer panicked".to_owned())),
        }
    }

    /// Returns the bytes of text that each id stands for, up to the first special or unknown token.
    /// From that token on, the list has no entries.
    #[must_use]
    pub fn text_lengths(&self, ids: &[u32]) -> Vec<usize> {
        let lengths = ids.iter().map_while(|&id| {
            let token = self.inner.id_to_token(id)?;
            let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
            if self.inner.is_special_token(id) {
                None
            } else if self.is_byte_level {
                Some(token.chars().count())
            } else if is_byte {
                Some(1)
            } else {
                Some(token.replace(SPACE, " ").len())
            }
        });
        lengths.collect()
    }

    /// Returns the bytes of text whose ids were found in the cache, and the bytes that were
    /// tokenised.
    #[must_use]
    pub fn reused_and_encoded_bytes(&self) -> (u64, u64) {
        self.inner
            .segment_cache_stats()
            .map_or((0, 0), |stats| (stats.hit_bytes, stats.miss_bytes))
    }

    /// Returns whether the vocabulary is byte-level: such vocabularies represent a line feed by
    /// `Ċ`.
    fn detect_byte_level(&self) -> Result<bool, TokenizerError> {
        let line_feed = self.encode("\n", SpecialTokens::AlreadyPresent)?;
        let tokens = line_feed.iter().map(|&id| self.inner.id_to_token(id));
        Ok(tokens.eq([Some("Ċ")]))
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocabulary", &self.inner.vocab_size())
            .finish_non_exhaustive()
    }
}

/// A special token in `tokenizer_config.json`: its text, or an object with that text.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl SpecialToken {
    /// Returns the token's text.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}
