//! Bounded copies of compressed bodies.
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write;

use flate2::Compression;
use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
use foresee_engine::decompress::{DecompressError, decompress};
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

const MIB: usize = 1 << 20;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zlib(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

/// `{"model":"m"}` in one block that is not compressed.
const BROTLI: &[u8] = &[
    0x0f, 0x06, 0x80, 0x7b, 0x22, 0x6d, 0x6f, 0x64, 0x65, 0x6c, 0x22, 0x3a, 0x22, 0x6d, 0x22, 0x7d,
    0x03,
];

#[test]
fn each_content_coding_is_read() {
    let body = br#"{"model":"m"}"#;
    for (encoding, bytes) in [
        ("gzip", gzip(body)),
        ("X-Gzip", gzip(body)),
        (" deflate ", zlib(body)),
        ("deflate", deflate(body)),
        ("zstd", zstd(body)),
        ("br", BROTLI.to_vec()),
        ("identity", body.to_vec()),
    ] {
        let read = decompress(encoding, &bytes, MIB);
        assert_eq!(read.as_deref(), Ok(body.as_slice()), "{encoding}");
    }
    let parts = [gzip(b"a"), gzip(b"b")].concat();
    assert_eq!(
        decompress("gzip", &parts, MIB).as_deref(),
        Ok(b"ab".as_slice())
    );
}

#[test]
fn a_zstd_body_can_have_several_frames_but_no_large_window() {
    let frames = [zstd(b"a"), zstd(b"b")].concat();
    assert_eq!(
        decompress("zstd", &frames, MIB).as_deref(),
        Ok(b"ab".as_slice())
    );
    assert_eq!(
        decompress("zstd", &frames, 1),
        Err(DecompressError::TooLarge(1))
    );
    let trailing = [zstd(b"a"), b"x".to_vec()].concat();
    assert_eq!(
        decompress("zstd", &trailing, MIB),
        Err(DecompressError::Invalid("zstd"))
    );
    // A window of 64 MiB, then an empty last block.
    let large = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x80, 0x01, 0x00, 0x00];
    assert_eq!(
        decompress("zstd", &large, MIB),
        Err(DecompressError::Invalid("zstd"))
    );
    let small = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x00, 0x01, 0x00, 0x00];
    assert_eq!(
        decompress("zstd", &small, MIB).as_deref(),
        Ok(b"".as_slice())
    );
}

#[test]
fn other_codings_and_invalid_data_are_errors() {
    for encoding in ["gzip, gzip", "compress", "", "aws-chunked"] {
        assert_eq!(
            decompress(encoding, b"", MIB),
            Err(DecompressError::Unsupported)
        );
    }
    for encoding in ["gzip", "deflate", "zstd", "br"] {
        let outcome = decompress(encoding, b"no data of this coding", MIB);
        assert!(
            matches!(outcome, Err(DecompressError::Invalid(_))),
            "{encoding}: {outcome:?}"
        );
    }
    let cut = &gzip(&[7; 500])[..20];
    assert_eq!(
        decompress("gzip", cut, MIB),
        Err(DecompressError::Invalid("gzip"))
    );
}

#[test]
fn a_body_that_grows_beyond_the_limit_is_an_error() {
    let zeros = vec![0; 20 * MIB];
    for (encoding, bytes) in [
        ("gzip", gzip(&zeros)),
        ("deflate", zlib(&zeros)),
        ("zstd", zstd(&zeros)),
    ] {
        assert!(bytes.len() < MIB / 4);
        let outcome = decompress(encoding, &bytes, MIB);
        assert_eq!(outcome, Err(DecompressError::TooLarge(MIB)), "{encoding}");
        assert_eq!(
            decompress(encoding, &bytes, zeros.len()).unwrap().len(),
            zeros.len()
        );
    }
}

proptest! {
    #[test]
    fn compressed_bytes_are_read_back(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for (encoding, compressed) in [("gzip", gzip(&bytes)), ("deflate", zlib(&bytes)), ("zstd", zstd(&bytes))] {
            let read = decompress(encoding, &compressed, MIB);
            prop_assert_eq!(read.as_ref(), Ok(&bytes));
        }
    }

    #[test]
    fn no_bytes_cause_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        cut in any::<usize>(),
        flip in any::<u8>(),
    ) {
        for (encoding, mut valid) in [("gzip", gzip(&bytes)), ("deflate", deflate(&bytes)), ("zstd", zstd(&bytes)), ("br", BROTLI.to_vec())] {
            let _ = decompress(encoding, &bytes, 1_000);
            let position = cut % valid.len();
            valid[position] ^= flip;
            let _ = decompress(encoding, &valid, 1_000);
            let _ = decompress(encoding, &valid[..position], 1_000);
        }
    }
}
