//! Model names with their hashes.

use rapidhash::v3::{DEFAULT_RAPID_SECRETS, rapidhash_v3_seeded};

/// Model name of a request, with its hash.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelName<'a> {
    /// At most [`MAX_MODEL_NAME_BYTES`]; empty for any model.
    pub(crate) name: &'a str,
    /// [`hash_model_name`] of the name.
    pub(crate) hash: u64,
}

impl<'a> ModelName<'a> {
    /// Returns a name with its hash, which takes time proportional to the name.
    pub(crate) fn new(name: &'a str) -> Self {
        Self {
            name,
            hash: hash_model_name(name),
        }
    }
}

impl ModelName<'static> {
    /// Name that stands for any model.
    pub(crate) const ANY: Self = Self { name: "", hash: 0 };
}

/// Returns the hash of a model name.
pub(crate) fn hash_model_name(name: &str) -> u64 {
    rapidhash_v3_seeded(name.as_bytes(), &DEFAULT_RAPID_SECRETS)
}
