//! Lines of the settings in a configuration file, for errors.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// Lines of all keys of a file, from 1.
#[derive(Debug, Default)]
pub(super) struct Lines(Vec<KeyLines>);

/// Lines of one key.
#[derive(Debug)]
struct KeyLines {
    key: String,
    /// Line of the key.
    line: usize,
    /// Lines of the values, if the key has a list or several tables.
    values: Vec<usize>,
}

impl Lines {
    /// Returns the lines of the keys in the text of a file.
    pub(super) fn of(text: &str) -> Self {
        let (table, _) = DeTable::parse_recoverable(text);
        let line_at = |offset: usize| {
            let before = text.as_bytes().iter().take(offset);
            1 + before.filter(|byte| **byte == b'\n').count()
        };
        let lines = table.get_ref().iter().map(|(key, value)| {
            let values = match value.get_ref() {
                DeValue::Array(values) => values.iter().map(Spanned::span).collect(),
                _ => Vec::new(),
            };
            KeyLines {
                key: key.get_ref().to_string(),
                line: line_at(key.span().start),
                values: values.iter().map(|span| line_at(span.start)).collect(),
            }
        });
        Self(lines.collect())
    }

    /// Returns the line of a key, or of its value with an index, if it has several.
    pub(super) fn line(&self, key: &str, index: usize) -> Option<usize> {
        let found = self.0.iter().find(|lines| lines.key == key)?;
        Some(found.values.get(index).copied().unwrap_or(found.line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_keys_and_of_their_values() {
        let text = "policy = \"kv\"\n\n# text\nqueue = \"off\"\nadmin-host = [\n  \"a\",\n  \"b\"\n]\n\
                    [[worker]]\nurl = \"a:1\"\n\n[[worker]]\nurl = \"b:1\"\n";
        let lines = Lines::of(text);
        assert_eq!(lines.line("policy", 0), Some(1));
        assert_eq!(lines.line("queue", 0), Some(4));
        assert_eq!(lines.line("admin-host", 0), Some(6));
        assert_eq!(lines.line("admin-host", 1), Some(7));
        assert_eq!(lines.line("worker", 0), Some(9));
        assert_eq!(lines.line("worker", 1), Some(12));
        assert_eq!(lines.line("seed", 0), None);
    }
}
