//! Keys of the admin listener.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use subtle::ConstantTimeEq;

/// Maximum length of a key, in bytes.
const MAX_KEY_LEN: usize = 1024;

/// Secret that a request sends as `Authorization: Bearer KEY`. Its debug form does not contain it.
#[derive(Clone, PartialEq, Eq)]
pub struct AdminKey(Box<str>);

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The key's file cannot be read.
    #[error("cannot read the key in {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        error: io::Error,
    },
    /// The text is empty or too long, or contains characters that a header cannot carry.
    #[error("a key must have 1 to {MAX_KEY_LEN} visible ASCII characters, without spaces")]
    Invalid,
    /// The first line of the key's file is not a valid key.
    #[error("the first line of {}: {}", .0.display(), Self::Invalid)]
    InvalidInFile(PathBuf),
}

impl AdminKey {
    /// Returns the key `text`.
    ///
    /// # Errors
    /// Fails unless the text consists of 1 to 1,024 visible ASCII characters.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        let has_valid_length = (1..=MAX_KEY_LEN).contains(&text.len());
        if has_valid_length && text.bytes().all(|byte| byte.is_ascii_graphic()) {
            Ok(Self(text.into()))
        } else {
            Err(KeyError::Invalid)
        }
    }

    /// Reads a key from the first line of a file. White space around the key is ignored. At most
    /// the first few KiB of the file are read.
    ///
    /// # Errors
    /// Fails if the file cannot be read, or its first line is not a valid key.
    pub fn from_file(path: &Path) -> Result<Self, KeyError> {
        let read_line = || {
            let mut line = Vec::new();
            // Room for the key, and for white space around it.
            let file = File::open(path)?.take(4 * MAX_KEY_LEN as u64);
            BufReader::new(file).read_until(b'\n', &mut line)?;
            Ok(line)
        };
        let line = read_line().map_err(|error| KeyError::Read {
            path: path.to_owned(),
            error,
        })?;
        let key = std::str::from_utf8(&line).unwrap_or("");
        Self::new(key.trim()).map_err(|_| KeyError::InvalidInFile(path.to_owned()))
    }

    /// Returns whether `given` is the key. The time depends on the length of `given` alone, so that
    /// it tells nothing of the characters.
    pub(crate) fn matches(&self, given: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(given).into()
    }
}

impl fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_visible_ascii() {
        let key = AdminKey::new("s3cret/+=").unwrap();
        assert!(key.matches(b"s3cret/+="));
        for other in ["", "s3cret/+", "s3cret/+==", "S3cret/+="] {
            assert!(!key.matches(other.as_bytes()), "{other}");
        }
        assert!(!format!("{key:?}").contains("s3cret"));
        let long = "k".repeat(MAX_KEY_LEN + 1);
        for invalid in ["", "two words", "käse", "tab\t", &long] {
            assert!(matches!(AdminKey::new(invalid), Err(KeyError::Invalid)));
        }
    }

    #[test]
    fn a_file_has_the_key_in_its_first_line() {
        let path = std::env::temp_dir().join(format!("foresee-key-{}", std::process::id()));
        for text in ["secret", "secret\n", " secret \r\nmore\n"] {
            std::fs::write(&path, text).unwrap();
            assert!(AdminKey::from_file(&path).unwrap().matches(b"secret"));
        }
        for text in ["", "\nsecret\n", "two words\n"] {
            std::fs::write(&path, text).unwrap();
            let error = AdminKey::from_file(&path).unwrap_err().to_string();
            assert!(error.contains("foresee-key-"), "{error}");
            assert!(error.contains("visible ASCII"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        let error = AdminKey::from_file(&path).unwrap_err().to_string();
        assert!(error.contains("cannot read the key"), "{error}");
    }
}
