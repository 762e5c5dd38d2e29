//! Compressed bodies.

use foresee_engine::decompress::{DecompressError, decompress};

/// The content codings.
const CODINGS: [&str; 5] = ["identity", "gzip", "deflate", "zstd", "br"];

/// Maximum length of a decompressed body, in bytes.
const LIMIT: usize = 64 << 10;

/// Checks the decompression of a body by all content codings. Panics if the result is longer than
/// the limit, if a lower limit that is not exceeded changes it, or if one that is exceeded does not
/// cause an error.
pub fn check(body: &[u8]) {
    for coding in CODINGS {
        let result = decompress(coding, body, LIMIT);
        assert_eq!(result, decompress(coding, body, LIMIT));
        match result {
            Ok(bytes) => check_limits(coding, body, &bytes),
            Err(DecompressError::TooLarge(limit)) => assert_eq!(limit, LIMIT),
            Err(error) => assert_eq!(error, DecompressError::Invalid(coding)),
        }
    }
    if let Ok(bytes) = decompress("identity", body, LIMIT) {
        assert_eq!(bytes, body);
    }
}

/// Checks the limits at the length of the decompressed `bytes`.
fn check_limits(coding: &str, body: &[u8], bytes: &[u8]) {
    assert!(bytes.len() <= LIMIT);
    let exact = decompress(coding, body, bytes.len());
    // A body without zlib's frame can begin like one with it. If the limit is reached before the
    // difference shows, it is an error.
    if coding != "deflate" || exact.is_ok() {
        assert_eq!(exact.as_deref(), Ok(bytes), "{coding}");
    }
    if let Some(less) = bytes.len().checked_sub(1) {
        let exceeded = decompress(coding, body, less);
        assert_eq!(exceeded, Err(DecompressError::TooLarge(less)), "{coding}");
    }
}
