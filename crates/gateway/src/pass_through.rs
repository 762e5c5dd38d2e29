//! Paths that the operator adds to the inference paths.

use std::fmt;
use std::str::FromStr;

/// Path of an engine that the public listener passes on, although it is not an inference path: an exact
/// path or, with a `*` at its end, all paths with a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassThroughPath {
    path: String,
    is_prefix: bool,
}

/// Text that is not a path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a path: write /PATH, or /PREFIX/* for all paths with a prefix")]
pub struct InvalidPath(String);

impl PassThroughPath {
    /// Returns whether this setting adds `path`, which has no query. A path with a dot segment (`..`) is
    /// not added by a prefix: a proxy in front of the engine could resolve it to another path.
    pub(crate) fn matches(&self, path: &str) -> bool {
        if self.is_prefix {
            path.starts_with(&self.path) && !path.split('/').any(is_dot_segment)
        } else {
            path == self.path
        }
    }
}

/// Returns whether a segment of a path is `.` or `..`, as it is or percent-encoded.
fn is_dot_segment(segment: &str) -> bool {
    let segment = segment.to_ascii_lowercase().replace("%2e", ".");
    segment == "." || segment == ".."
}

impl FromStr for PassThroughPath {
    type Err = InvalidPath;

    fn from_str(text: &str) -> Result<Self, InvalidPath> {
        let path = text.strip_suffix('*').unwrap_or(text);
        let is_path = path.starts_with('/')
            && path
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !b"?#*".contains(&byte));
        if !is_path {
            return Err(InvalidPath(text.to_owned()));
        }
        Ok(Self {
            is_prefix: path.len() < text.len(),
            path: path.to_owned(),
        })
    }
}

impl fmt::Display for PassThroughPath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.path)?;
        formatter.write_str(if self.is_prefix { "*" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_exact_and_a_star_makes_it_a_prefix() {
        let exact: PassThroughPath = "/v1/files".parse().unwrap();
        assert!(exact.matches("/v1/files"));
        assert!(!exact.matches("/v1/files/7"));
        let prefix: PassThroughPath = "/v1/files/*".parse().unwrap();
        assert!(prefix.matches("/v1/files/7"));
        assert!(!prefix.matches("/v1/files"));
        assert!(prefix.matches("/v1/files/..7/a.b"));
        for path in [
            "/v1/files/../x",
            "/v1/files/%2e%2E/x",
            "/v1/files/.%2e",
            "/v1/files/./x",
        ] {
            assert!(!prefix.matches(path), "{path}");
        }
        assert_eq!(prefix.to_string(), "/v1/files/*");
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "*", "v1/files", "/a?b", "/a*b", "/a b", "http://a/b"] {
            let error = text.parse::<PassThroughPath>().unwrap_err();
            assert!(error.to_string().contains(text), "{text}");
        }
    }
}
