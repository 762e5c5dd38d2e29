//! API keys of workers: where a key comes from, and the header that carries it.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use http::HeaderValue;
use parking_lot::RwLock;

use crate::log_limit::warn_limited;

/// Maximum size of a file with a key, in bytes.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// API key of the gateway's requests to workers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerKeyConfig {
    /// Source of the key for workers whose description names no file.
    pub source: Option<ApiKeySource>,
    /// Whether a client's request without `authorization` is sent with the worker's key. This gives
    /// every client access to the engines.
    pub for_clients: bool,
}

/// Where an API key comes from.
#[derive(Clone, PartialEq, Eq)]
pub enum ApiKeySource {
    /// The first line of a file, which is read again while the gateway runs.
    File(PathBuf),
    /// A variable of the gateway's environment.
    Variable(String),
    /// The key itself.
    Value(String),
}

impl fmt::Debug for ApiKeySource {
    /// Writes the source without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Variable(name) => f.debug_tuple("Variable").field(name).finish(),
            Self::Value(_) => f.write_str("Value(redacted)"),
        }
    }
}

/// Text that does not say where an API key comes from. It may be a key, so it is not shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write env:NAME or file:PATH; a key itself would be visible to other users of the machine")]
pub struct UnknownKeySource;

impl FromStr for ApiKeySource {
    type Err = UnknownKeySource;

    /// Parses `file:PATH` or `env:NAME`.
    fn from_str(text: &str) -> Result<Self, UnknownKeySource> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("env", name)) if !name.is_empty() && !name.contains(['=', '\0']) => {
                Ok(Self::Variable(name.to_owned()))
            }
            _ => Err(UnknownKeySource),
        }
    }
}

/// Why an API key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiKeyError {
    /// The file cannot be read, or is too large or not text.
    #[error("cannot read the worker API key file {}: {error}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        error: io::Error,
    },
    /// The variable of the environment is not set, or is not text.
    #[error("the variable {0} with a worker's API key is not set")]
    Unset(String),
    /// The key is empty or has a character that a header cannot contain. Does not contain the key.
    #[error("the worker API key is empty or has characters other than visible ASCII")]
    Invalid,
}

impl ApiKeySource {
    /// Reads the key and returns the value of the `authorization` header, marked as sensitive.
    ///
    /// # Errors
    /// If the file cannot be read, the variable is not set, or the key is empty or has a character other than visible ASCII.
    pub fn load(&self) -> Result<HeaderValue, ApiKeyError> {
        let text = match self {
            Self::File(path) => {
                let text = read_limited(path);
                text.map_err(|error| ApiKeyError::Unreadable {
                    path: path.clone(),
                    error,
                })?
            }
            Self::Variable(name) => {
                std::env::var(name).map_err(|_| ApiKeyError::Unset(name.clone()))?
            }
            Self::Value(key) => key.clone(),
        };
        let key = text.lines().next().unwrap_or_default().trim();
        if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ApiKeyError::Invalid);
        }
        let header = HeaderValue::try_from(format!("Bearer {key}"));
        let mut header = header.map_err(|_| ApiKeyError::Invalid)?;
        header.set_sensitive(true);
        Ok(header)
    }
}

/// Returns the text of a file of at most [`MAX_FILE_BYTES`]. Fails if it is larger or not UTF-8.
fn read_limited(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path)?;
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other("the file is too large"));
    }
    Ok(text)
}

/// API key of one worker, as read last.
#[derive(Debug)]
pub(crate) struct WorkerKey {
    source: Option<ApiKeySource>,
    /// Value of the `authorization` header; its `Debug` does not show the key.
    authorization: RwLock<Option<HeaderValue>>,
    /// Whether clients' requests without a key are sent with this one.
    for_clients: bool,
}

impl WorkerKey {
    /// Reads the key of a worker whose description names `own`, or else the key of `config`. A key
    /// that cannot be read is logged and read again later.
    pub(crate) fn load(own: Option<ApiKeySource>, config: &WorkerKeyConfig, worker: &str) -> Self {
        let key = Self {
            source: own.or_else(|| config.source.clone()),
            authorization: RwLock::default(),
            for_clients: config.for_clients,
        };
        key.reload(worker);
        key
    }

    /// Reads the key again, because the file may have changed. Keeps the last key if that fails, and
    /// logs the error. Blocks on the file system.
    pub(crate) fn reload(&self, worker: &str) {
        let Some(source) = &self.source else {
            return;
        };
        match source.load() {
            Ok(header) => *self.authorization.write() = Some(header),
            Err(error) => warn_limited!(
                key: worker, %worker, %error,
                "cannot load a worker's API key; keeping the last one, if any"
            ),
        }
    }

    /// Returns whether the key can change while the gateway runs.
    pub(crate) fn is_from_file(&self) -> bool {
        matches!(self.source, Some(ApiKeySource::File(_)))
    }

    /// Returns the `authorization` of the gateway's own requests; `None` without a key.
    pub(crate) fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.read().clone()
    }

    /// Returns the `authorization` of clients' requests that have none; `None` without a key, or if
    /// clients do not share it. A client whose own key the gateway has checked does: `is_shared`.
    pub(crate) fn authorization_for_clients(&self, is_shared: bool) -> Option<HeaderValue> {
        let is_shared = is_shared || self.for_clients;
        is_shared.then(|| self.authorization()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_the_first_line_and_is_never_shown() {
        let source = ApiKeySource::Value("sk-secret \nsecond line".to_owned());
        let header = source.load().unwrap();
        assert_eq!(header, "Bearer sk-secret");
        assert!(header.is_sensitive());
        let config = WorkerKeyConfig {
            source: Some(source),
            for_clients: true,
        };
        let key = WorkerKey::load(None, &config, "a");
        assert_eq!(key.authorization_for_clients(false), key.authorization());
        for shown in [format!("{config:?}"), format!("{key:?}")] {
            assert!(!shown.contains("secret"), "{shown}");
        }
    }

    #[test]
    fn a_source_is_a_variable_or_a_file_and_never_a_key() {
        let parse = |text: &str| text.parse::<ApiKeySource>();
        assert_eq!(parse("file:/a:b"), Ok(ApiKeySource::File("/a:b".into())));
        let variable = parse("env:FORESEE_TEST_UNSET").unwrap();
        let error = variable.load().unwrap_err().to_string();
        assert!(error.contains("FORESEE_TEST_UNSET"), "{error}");
        for text in ["", "sk-secret", "file:", "env:", "env:A=B", "key:sk-secret"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn an_empty_or_unprintable_key_is_refused_without_showing_it() {
        for text in ["", " \nkey", "two words", "naïve"] {
            let error = ApiKeySource::Value(text.to_owned()).load().unwrap_err();
            assert!(matches!(error, ApiKeyError::Invalid), "{text}");
            assert!(text.is_empty() || !error.to_string().contains(text));
        }
        let missing = ApiKeySource::File("/nonexistent/key".into()).load();
        assert!(matches!(missing, Err(ApiKeyError::Unreadable { .. })));
    }
}
