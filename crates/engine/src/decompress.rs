//! A bounded copy of a compressed body, for reading only: the engine receives the original bytes.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};

use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use ruzstd::decoding::StreamingDecoder;

/// Size of the buffer for compressed brotli data, in bytes.
const BROTLI_BUFFER_BYTES: usize = 4 << 10;

/// Maximum window of a zstd frame, in bytes.
const MAX_ZSTD_WINDOW_BYTES: u64 = 8 << 20;

/// Why a compressed body cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecompressError {
    /// The content coding is not supported, or there are several.
    #[error("content coding is not supported")]
    Unsupported,
    /// The decompressed body is longer than the limit. Holds the limit, in bytes.
    #[error("decompressed body is larger than {0} bytes")]
    TooLarge(usize),
    /// The body is not valid data of its content coding.
    #[error("body is not valid {0} data")]
    Invalid(&'static str),
}

/// Returns the decompressed body, of at most `limit` bytes. `encoding` is the value of the header
/// `Content-Encoding`: `gzip`, `deflate`, `zstd`, `br` or `identity`.
///
/// # Errors
/// If the content coding is another or the data are invalid, or if the decompressed body is longer
/// than `limit`: then no more than `limit` bytes were decompressed.
pub fn decompress(encoding: &str, body: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    match encoding.trim().to_ascii_lowercase().as_str() {
        "identity" => read_bounded("identity", body, limit),
        "gzip" | "x-gzip" => read_bounded("gzip", MultiGzDecoder::new(body), limit),
        // By RFC 9110 this is zlib's format; some clients send the data without its frame.
        "deflate" => match read_bounded("deflate", ZlibDecoder::new(body), limit) {
            Err(DecompressError::Invalid(_)) => {
                read_bounded("deflate", DeflateDecoder::new(body), limit)
            }
            outcome => outcome,
        },
        "zstd" => {
            // A panic of this third-party library must not cost more than one request's match.
            catch_unwind(AssertUnwindSafe(|| read_zstd(body, limit)))
                .unwrap_or(Err(DecompressError::Invalid("zstd")))
        }
        "br" => {
            let decoder = brotli_decompressor::Decompressor::new(body, BROTLI_BUFFER_BYTES);
            read_bounded("br", decoder, limit)
        }
        _ => Err(DecompressError::Unsupported),
    }
}

/// Reads all bytes, but no more than `limit`.
fn read_bounded(
    coding: &'static str,
    mut reader: impl Read,
    limit: usize,
) -> Result<Vec<u8>, DecompressError> {
    let mut bytes = Vec::new();
    let bound = (limit as u64).saturating_add(1);
    let outcome = reader.by_ref().take(bound).read_to_end(&mut bytes);
    match outcome {
        _ if bytes.len() > limit => Err(DecompressError::TooLarge(limit)),
        Ok(_) => Ok(bytes),
        Err(_) => Err(DecompressError::Invalid(coding)),
    }
}

/// Decompresses the frames of a zstd body. A frame that requires a larger window than
/// [`MAX_ZSTD_WINDOW_BYTES`] is invalid by RFC 9659.
fn read_zstd(body: &[u8], limit: usize) -> Result<Vec<u8>, DecompressError> {
    let mut bytes = Vec::new();
    let mut rest = body;
    loop {
        if zstd_window(rest).is_none_or(|window| window > MAX_ZSTD_WINDOW_BYTES) {
            return Err(DecompressError::Invalid("zstd"));
        }
        let frame = StreamingDecoder::new(&mut rest);
        let frame = frame.map_err(|_| DecompressError::Invalid("zstd"))?;
        match read_bounded("zstd", frame, limit - bytes.len()) {
            Ok(more) => bytes.extend(more),
            Err(DecompressError::TooLarge(_)) => return Err(DecompressError::TooLarge(limit)),
            Err(error) => return Err(error),
        }
        if rest.is_empty() {
            return Ok(bytes);
        }
    }
}

/// Returns the size of the window that a zstd frame requires, in bytes; `None` if the head of the
/// frame is cut off. The window of a frame with a single segment is its content.
fn zstd_window(frame: &[u8]) -> Option<u64> {
    let descriptor = *frame.get(4)?;
    let is_single_segment = descriptor & 0x20 != 0;
    if !is_single_segment {
        let window = *frame.get(5)?;
        let base = 1_u64 << (10 + u64::from(window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    let dictionary_bytes = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let size_bytes = [1, 2, 4, 8][usize::from(descriptor >> 6)];
    let size = frame.get(5 + dictionary_bytes..)?.get(..size_bytes)?;
    Some(
        size.iter()
            .rev()
            .fold(0, |sum, byte| sum << 8 | u64::from(*byte)),
    )
}
