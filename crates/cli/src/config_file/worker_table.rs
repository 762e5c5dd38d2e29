//! Conversion between a `[[worker]]` table and a value of `--worker`.

use anyhow::{Context, bail, ensure};
use toml::{Table, Value};

use crate::values::nearest;

/// Options of `--worker`; the keys of the table are the same, with `_` or `-`.
const OPTIONS: [&str; 16] = [
    "name",
    "ranks",
    "blocks",
    "prefix-caching",
    "eviction",
    "kv-events",
    "replay",
    "topic",
    "health-path",
    "api-key",
    "resolve",
    "tls-ca",
    "tls-certificate",
    "tls-key",
    "tls-server-name",
    "tls-verify",
];

/// Options that may be booleans in TOML.
const SWITCHES: [&str; 4] = ["prefix-caching", "kv-events", "resolve", "tls-verify"];
/// Options that may be integers in TOML.
const NUMBERS: [&str; 2] = ["ranks", "blocks"];

/// Key of the worker's URL.
const URL: &str = "url";

/// Returns the value of `--worker` that describes the same worker as the table.
///
/// # Errors
/// If there is no URL, or a key is unknown or has a value of the wrong type or with a comma or a
/// space. The values themselves are not checked.
pub(super) fn to_flag(table: &Table) -> anyhow::Result<String> {
    let url = table.get(URL).and_then(Value::as_str);
    let mut flag = url
        .context("key `url` is missing, such as url = \"http://gpu1:8000\"")?
        .to_owned();
    check_separators(URL, &flag)?;
    for (key, value) in table.iter().filter(|(key, _)| *key != URL) {
        let option = key.replace('_', "-");
        if !OPTIONS.contains(&option.as_str()) {
            match nearest(&option, OPTIONS.into_iter().chain([URL])) {
                Some(similar) => bail!(
                    "unknown key `{key}`; did you mean `{}`?",
                    similar.replace('-', "_")
                ),
                None => bail!(
                    "unknown key `{key}`; known: url, {}",
                    OPTIONS.join(", ").replace('-', "_")
                ),
            }
        }
        let text = match value {
            Value::String(text) => text.clone(),
            Value::Integer(number) => number.to_string(),
            Value::Boolean(true)
                if SWITCHES.contains(&option.as_str()) && option != "kv-events" =>
            {
                "on".to_owned()
            }
            Value::Boolean(false) if SWITCHES.contains(&option.as_str()) => "off".to_owned(),
            other => bail!("key `{key}` cannot be {other}"),
        };
        check_separators(key, &text)?;
        flag.push_str(&format!(",{option}={text}"));
    }
    Ok(flag)
}

/// Checks that a value contains no separator of options or of workers.
fn check_separators(key: &str, text: &str) -> anyhow::Result<()> {
    ensure!(
        !text.contains([',', ' ', '\t', '\n']),
        "key `{key}` cannot contain a comma or a space"
    );
    Ok(())
}

/// Returns the lines of a `[[worker]]` table that describes the same worker as a valid value of
/// `--worker`. `name` is the worker's name, which the value may omit.
pub(crate) fn from_flag(flag: &str, name: &str) -> String {
    let mut options = flag.split(',');
    let url = options.next().unwrap_or_default();
    let mut table = Table::new();
    table.insert(URL.to_owned(), url.to_owned().into());
    table.insert("name".to_owned(), name.to_owned().into());
    for (option, text) in options.filter_map(|option| option.split_once('=')) {
        let (option, text) = (option.trim(), text.trim());
        let value = match (text, text.parse::<i64>()) {
            ("on", _) if SWITCHES.contains(&option) => Value::Boolean(true),
            ("off", _) if SWITCHES.contains(&option) => Value::Boolean(false),
            (_, Ok(number)) if NUMBERS.contains(&option) => Value::Integer(number),
            _ => Value::String(text.to_owned()),
        };
        table.insert(option.replace('-', "_"), value);
    }
    let lines = table
        .iter()
        .map(|(key, value)| format!("{key} = {value}\n"));
    format!("[[worker]]\n{}", lines.collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_table_keeps_its_options_as_a_flag() {
        let flag = "https://a:1,name=x,tls-ca=/ca,tls-verify=off,ranks=2,blocks=7,prefix-caching=off,eviction=radix,\
                    kv-events=tcp://a:5557,replay=tcp://a:5657,topic=12,\
                    health-path=none,api-key=file:/run/key,resolve=off";
        let text = from_flag(flag, "x");
        let file: Table = text.parse().unwrap();
        let table = file["worker"][0].as_table().unwrap();
        assert_eq!(table["ranks"].as_integer(), Some(2));
        assert_eq!(table["topic"].as_str(), Some("12"));
        assert_eq!(table["resolve"].as_bool(), Some(false));
        let again = to_flag(table).unwrap();
        let sorted = |flag: &str| {
            let mut parts: Vec<_> = flag.split(',').map(str::to_owned).collect();
            parts.sort();
            parts
        };
        assert_eq!(sorted(&again), sorted(flag));
    }

    #[test]
    fn errors_in_a_worker_table_name_the_key() {
        for (text, part) in [
            ("name = \"x\"", "`url`"),
            ("url = \"a:1\"\nkv_event = \"off\"", "`kv_events`"),
            ("url = \"a:1\"\nname = \"x,y\"", "comma"),
            ("url = \"a:1\"\nname = [1]", "`name`"),
        ] {
            let error = to_flag(&text.parse().unwrap()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
