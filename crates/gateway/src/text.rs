//! How many bytes make a token, per model, where there is no tokenizer.

use std::collections::HashMap;

use foresee_core::sequence::BytesPerToken;
use parking_lot::Mutex;

/// Clients may invent model names, so no more than this many are learned.
const MAX_MODELS: usize = 256;

/// One learned ratio per model.
#[derive(Debug, Default)]
pub(crate) struct TextRatios {
    by_model: Mutex<HashMap<String, BytesPerToken>>,
}

impl TextRatios {
    pub(crate) fn get(&self, model: &str) -> f64 {
        self.by_model
            .lock()
            .get(model)
            .map_or_else(|| BytesPerToken::default().get(), BytesPerToken::get)
    }

    /// An engine counted `prompt_tokens` in a prompt of `prompt_bytes`.
    pub(crate) fn observe(&self, model: &str, prompt_bytes: usize, prompt_tokens: u32) {
        let mut by_model = self.by_model.lock();
        if !by_model.contains_key(model) {
            if by_model.len() >= MAX_MODELS {
                return;
            }
            by_model.insert(model.to_owned(), BytesPerToken::default());
        }
        let Some(ratio) = by_model.get_mut(model) else {
            return;
        };
        if ratio.observe(prompt_bytes, prompt_tokens) {
            let bytes_per_token = ratio.get();
            drop(by_model);
            tracing::info!(
                model,
                bytes_per_token,
                "learned how long tokens are; prompts seen before count as new"
            );
        }
    }
}
