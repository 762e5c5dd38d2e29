//! Bytes per token of each model, for prompts that are matched as text.

use std::collections::{BTreeMap, HashMap};

use foresee_core::sequence::BytesPerToken;
use parking_lot::Mutex;

/// Maximum number of models with a ratio. Clients can invent model names, so the number is bounded;
/// further models use the default ratio.
const MAX_MODELS: usize = 256;

/// The learned number of bytes per token of each model.
#[derive(Debug, Default)]
pub(crate) struct TextRatios {
    by_model: Mutex<HashMap<String, BytesPerToken>>,
}

impl TextRatios {
    /// Returns the ratios of all models.
    pub(crate) fn learned(&self) -> BTreeMap<String, f64> {
        let by_model = self.by_model.lock();
        let ratios = by_model.iter();
        ratios
            .map(|(model, bytes_per_token)| (model.clone(), bytes_per_token.ratio()))
            .collect()
    }

    /// Sets the ratios with which models start, of at most [`MAX_MODELS`] models.
    pub(crate) fn restore(&self, ratios: &BTreeMap<String, f64>) {
        let mut by_model = self.by_model.lock();
        for (model, ratio) in ratios.iter().take(MAX_MODELS) {
            by_model.insert(model.clone(), BytesPerToken::with_ratio(*ratio));
        }
    }

    /// Returns the number of bytes per token of `model`, or the default for an unknown model.
    pub(crate) fn get(&self, model: &str) -> f64 {
        self.by_model
            .lock()
            .get(model)
            .map_or_else(|| BytesPerToken::default().ratio(), BytesPerToken::ratio)
    }

    /// Learns from an engine that counted `prompt_tokens` tokens in a prompt of `prompt_bytes`
    /// bytes. Has no effect if one of the numbers is 0, or for a new model if there are
    /// [`MAX_MODELS`] already.
    pub(crate) fn observe(&self, model: &str, prompt_bytes: usize, prompt_tokens: u32) {
        let mut by_model = self.by_model.lock();
        if !by_model.contains_key(model) {
            if by_model.len() >= MAX_MODELS {
                return;
            }
            by_model.insert(model.to_owned(), BytesPerToken::default());
        }
        let Some(bytes_per_token) = by_model.get_mut(model) else {
            return;
        };
        let before = bytes_per_token.ratio();
        if bytes_per_token.observe(prompt_bytes, prompt_tokens) {
            let now = bytes_per_token.ratio();
            drop(by_model);
            tracing::info!(
                model,
                before,
                now,
                "bytes-per-token estimate changed; text-based prefix hashes were reset for this \
                 model"
            );
        }
    }
}
