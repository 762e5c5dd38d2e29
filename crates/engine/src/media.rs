//! Hashes of images and other media, by which requests with the same media are recognised.
//!
//! A worker that has processed an image can use its result again, so that it is worth while to send
//! the same image to the same worker. The hash covers the length and both ends of an image, which
//! costs the same for images of any size. Two images with the same hash only share a preference.

use std::hash::{DefaultHasher, Hasher};

use serde::Deserialize;
use serde_json::value::RawValue;

/// Bytes at each end of an image that are hashed.
const HASHED_BYTES: usize = 4 << 10;

/// Returns the hash of the raw JSON in the value of an image: its `uuid`, its URL or its data. A
/// URL has the same hash as a string, in an object with `url`, or as the `source` of an image in
/// the form of Anthropic's API.
pub(crate) fn hash_media(value: &RawValue) -> u64 {
    /// The fields of an image object that are read.
    #[derive(Deserialize)]
    struct Image<'i> {
        #[serde(borrow, default)]
        url: Option<&'i RawValue>,
        #[serde(borrow, default)]
        data: Option<&'i RawValue>,
    }
    let image: Option<Image<'_>> = match value.get().starts_with('{') {
        true => serde_json::from_str(value.get()).ok(),
        false => None,
    };
    let content = image.and_then(|image| image.url.or(image.data));
    let text = content.unwrap_or(value).get().trim_matches('"');
    // The data in a `data:` URL is the same as in an object with `data`.
    let text = match text.strip_prefix("data:") {
        Some(rest) => rest.split_once(',').map_or(rest, |(_, data)| data),
        None => text,
    };
    let bytes = text.as_bytes();
    let mut hasher = DefaultHasher::new();
    hasher.write_usize(bytes.len());
    let end = bytes.len().saturating_sub(HASHED_BYTES);
    for part in [bytes.get(..HASHED_BYTES).unwrap_or(bytes), &bytes[end..]] {
        hasher.write(part);
    }
    hasher.finish()
}
