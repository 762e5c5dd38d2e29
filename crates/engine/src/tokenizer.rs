//! A model's tokenizer: text in, the ids its engine would compute out.
//!
//! Text between two special tokens is tokenised apart from everything around it, so the ids of
//! such a segment are kept and used again wherever the same segment comes back: a conversation's
//! earlier turns cost a look-up. No cut is made anywhere else, because there the merges of either
//! side could differ.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Memory for the ids of segments. A segment of more than a 64th of it is not kept.
const CACHE_BYTES: usize = 128 << 20;

/// What SentencePiece vocabularies write for a space.
const SPACE: char = '\u{2581}';

/// A loaded tokenizer. Encoding from several threads at once is fine.
pub struct Tokenizer {
    inner: fastokens::Tokenizer,
    /// Its vocabulary writes every byte as one character.
    is_byte_level: bool,
}

/// Whether the tokens that the model frames every text with are added: those that
/// `tokenizer.json` names. What `tokenizer_config.json` says of it (`add_bos_token`) counts for
/// nothing beside that file since transformers 5, which vLLM and SGLang use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// As engines tokenise the prompt of a text completion.
    Added,
    /// As engines tokenise a rendered chat: the template has put them there.
    InText,
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// There is no `tokenizer.json`.
    #[error("{} has no tokenizer.json (SentencePiece and tiktoken files are not read)", .0.display())]
    Missing(PathBuf),
    /// The file is there, and cannot be used.
    #[error("{}: {reason}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Some text could not be tokenised.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
}

impl Tokenizer {
    /// Loads from a model's folder, or from its `tokenizer.json`.
    ///
    /// # Errors
    /// If there is no such file, or it asks for something that is not implemented.
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
        let whole_words = |token: &fastokens::AddedTokenConfig| token.single_word;
        if let Some(token) = inner.added_token_configs().iter().find(|t| whole_words(t)) {
            // The library would match it inside words too, and the ids would differ in silence.
            let name = &token.content;
            return Err(unusable(format!("token {name:?} matches whole words only")));
        }
        // Engines cut or pad no prompt here, whatever the file says.
        inner.set_truncation(None);
        inner.set_padding(None);
        inner.enable_segment_cache(CACHE_BYTES);
        let mut tokenizer = Self {
            inner,
            is_byte_level: false,
        };
        tokenizer.is_byte_level = tokenizer.writes_bytes_as_characters()?;
        Ok(tokenizer)
    }

    /// The ids of a text.
    ///
    /// # Errors
    /// If the text cannot be tokenised: never for want of a cache, and never for most tokenizers.
    pub fn encode(&self, text: &str, framing: Framing) -> Result<Vec<u32>, TokenizerError> {
        let add = framing == Framing::Added;
        // The library is not ours: should it panic, one prediction is lost and no request.
        let encoded = catch_unwind(AssertUnwindSafe(|| {
            self.inner.encode_with_special_tokens(text, add)
        }));
        match encoded {
            Ok(Ok(ids)) => Ok(ids),
            Ok(Err(error)) => Err(TokenizerError::Encode(error.to_string())),
            Err(_) => Err(TokenizerError::Encode("the tokenizer panicked".to_owned())),
        }
    }

    /// How many bytes of text each id stands for, up to the first that stands for none.
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

    /// Bytes of text whose ids were used again, and bytes that were tokenised.
    #[must_use]
    pub fn reused_and_encoded_bytes(&self) -> (u64, u64) {
        self.inner
            .segment_cache_stats()
            .map_or((0, 0), |stats| (stats.hit_bytes, stats.miss_bytes))
    }

    /// Byte-level vocabularies write a line feed as `Ċ`.
    fn writes_bytes_as_characters(&self) -> Result<bool, TokenizerError> {
        let line_feed = self.encode("\n", Framing::InText)?;
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

/// A special token in `tokenizer_config.json`: its text, or an object that holds it.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum SpecialToken {
    Text(String),
    Described { content: String },
}

impl SpecialToken {
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Described { content: text } => text,
        }
    }
}
