//! Bytes per token of each model, for prompts that are hashed as text.

use std::collections::{BTreeMap, HashMap};

use foresee_prefix::sequence::BytesPerToken;
use parking_lot::Mutex;

/// Maximum number of models with a ratio. Clients can invent model names, so the number is bounded;
/// further models use the default ratio.
const MAX_MODELS: usize = 256;

/// Change of a model's ratio, in bytes per token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RatioChange {
    /// Ratio before.
    pub before: f64,
    /// Ratio from now on.
    pub now: f64,
}

/// The learned number of bytes per token of each model.
#[derive(Debug, Default)]
pub struct TextRatios {
    by_model: Mutex<HashMap<String, BytesPerToken>>,
}

impl TextRatios {
    /// Returns the ratios of all models.
    #[must_use]
    pub fn learned(&self) -> BTreeMap<String, f64> {
        let by_model = self.by_model.lock();
        let ratios = by_model.iter();
        ratios
            .map(|(model, bytes_per_token)| (model.clone(), bytes_per_token.ratio()))
            .collect()
    }

    /// Sets the ratios with which models start, of at most [`MAX_MODELS`] models.
    pub fn restore(&self, ratios: &BTreeMap<String, f64>) {
        let mut by_model = self.by_model.lock();
        for (model, ratio) in ratios.iter().take(MAX_MODELS) {
            by_model.insert(model.clone(), BytesPerToken::with_ratio(*ratio));
        }
    }

    /// Returns the number of bytes per token of `model`, or the default for an unknown model.
    #[must_use]
    pub fn get(&self, model: &str) -> f64 {
        self.by_model
            .lock()
            .get(model)
            .map_or_else(|| BytesPerToken::default().ratio(), BytesPerToken::ratio)
    }

    /// Learns from an engine that counted `prompt_tokens` tokens in a prompt of `prompt_bytes`
    /// bytes. Returns the change if that changes the ratio; text hashed before then matches no new
    /// text. Has no effect if one of the numbers is 0, or for a new model if there are
    /// [`MAX_MODELS`] already.
    pub fn observe(
        &self,
        model: &str,
        prompt_bytes: usize,
        prompt_tokens: u32,
    ) -> Option<RatioChange> {
        let mut by_model = self.by_model.lock();
        if !by_model.contains_key(model) {
            if by_model.len() >= MAX_MODELS {
                return None;
            }
            by_model.insert(model.to_owned(), BytesPerToken::default());
        }
        let bytes_per_token = by_model.get_mut(model)?;
        let before = bytes_per_token.ratio();
        let has_changed = bytes_per_token.observe(prompt_bytes, prompt_tokens);
        has_changed.then(|| RatioChange {
            before,
            now: bytes_per_token.ratio(),
        })
    }
}
