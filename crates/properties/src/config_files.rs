//! Configuration files, as `--config` reads them.

use std::ffi::OsString;

use foresee_cli::{command, config_file_flags};

/// Keys that would read another file or end the program.
const NOT_SETTINGS: [&str; 3] = ["config", "help", "version"];

/// Maximum number of characters of a number that the file gives in one character or more: the largest
/// float without an exponent.
const MAX_NUMBER_CHARS: usize = 400;

/// Checks a file. Panics if it becomes a flag that is no setting, more flags than it has bytes or a
/// flag longer than its bytes, if a comment or white space changes the flags, if the command line
/// cannot be parsed with them without a panic, or if there is no text for an error.
pub fn check(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let flags = match config_file_flags(text) {
        Ok(flags) => flags,
        Err(error) => {
            assert!(!format!("{error:#}").is_empty());
            return;
        }
    };
    assert!(flags.len() <= text.len());
    for flag in &flags {
        let flag = flag.to_string_lossy();
        let Some((key, value)) = flag
            .strip_prefix("--")
            .and_then(|flag| flag.split_once('='))
        else {
            panic!("`{flag}` is no flag with a value");
        };
        assert!(!NOT_SETTINGS.contains(&key), "{flag}");
        assert!(value.len() <= text.len() + MAX_NUMBER_CHARS, "{flag}");
    }
    let commented = format!("{text}\n\n# a comment\n");
    assert_eq!(config_file_flags(&commented).ok().as_ref(), Some(&flags));
    let line = ["foresee", "serve"].map(OsString::from);
    // The values may be invalid.
    let _ = command().try_get_matches_from(line.into_iter().chain(flags));
}
