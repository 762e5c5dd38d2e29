//! `[[key]]` tables: keys of clients, in the configuration file or in a file of their own.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, bail, ensure};
use foresee_gateway::{KeyConfig, KeyLimits, Scope};
use serde::{Deserialize, Serialize};
use toml::value::Datetime;

/// Largest number of keys.
const MAX_KEYS: usize = 100_000;

/// A file with keys.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyFile {
    #[serde(default)]
    key: Vec<KeyTable>,
}

/// A `[[key]]` table.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct KeyTable {
    id: String,
    hash: String,
    tenant: Option<String>,
    scopes: Option<Vec<String>>,
    models: Option<Vec<String>>,
    #[serde(alias = "requests_per_minute")]
    requests_per_minute: Option<NonZeroU32>,
    #[serde(alias = "tokens_per_minute")]
    tokens_per_minute: Option<NonZeroU32>,
    #[serde(alias = "concurrent_requests")]
    concurrent_requests: Option<NonZeroU32>,
    #[serde(default, alias = "highest_priority")]
    highest_priority: i32,
    expires: Option<Datetime>,
}

/// Checks the id of a key.
///
/// # Errors
/// If it has other characters than visible ones of ASCII, or none.
pub(crate) fn check_id(id: &str) -> Result<(), &'static str> {
    let is_visible = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_graphic());
    match is_visible {
        true => Ok(()),
        false => Err("`id` of a key must be visible ASCII characters without spaces"),
    }
}

impl KeyTable {
    /// Returns the key that the table describes.
    ///
    /// # Errors
    /// If a value is invalid. The error names the key's id and the field, and contains no hash.
    fn key(self) -> anyhow::Result<KeyConfig> {
        let id = self.id;
        check_id(&id).map_err(anyhow::Error::msg)?;
        let in_key = || format!("key `{id}`");
        let hash = self.hash.parse();
        let hash = hash.map_err(|error: &str| anyhow::anyhow!("`hash` {error}"));
        let mut key = KeyConfig::new(&id, hash.with_context(in_key)?);
        if let Some(tenant) = self.tenant {
            key.tenant = tenant;
        }
        if let Some(scopes) = self.scopes {
            let scopes: Result<_, _> = scopes.iter().map(|scope| scope.parse::<Scope>()).collect();
            key.scopes = scopes.map_err(anyhow::Error::msg).with_context(in_key)?;
        }
        if let Some(models) = self.models {
            key.models = models;
        }
        key.limits = KeyLimits {
            requests_per_minute: self.requests_per_minute,
            tokens_per_minute: self.tokens_per_minute,
            concurrent_requests: self.concurrent_requests,
        };
        key.highest_priority = self.highest_priority;
        key.expires = self.expires.map(time_of).transpose().with_context(in_key)?;
        Ok(key)
    }
}

/// Returns the time that a date, or a date with a time, means in UTC.
fn time_of(datetime: Datetime) -> anyhow::Result<SystemTime> {
    let mut text = datetime.to_string();
    if datetime.time.is_none() {
        text.push_str("T00:00:00");
    }
    if !text.ends_with('Z') {
        text.push('Z');
    }
    humantime::parse_rfc3339(&text)
        .with_context(|| format!("`expires` is {datetime}: write a date, or a time in UTC"))
}

/// Returns the keys of all tables.
///
/// # Errors
/// If a table is invalid, a hash occurs twice, or keys of one id have different limits.
pub(crate) fn keys(tables: Vec<KeyTable>) -> anyhow::Result<Vec<KeyConfig>> {
    ensure!(
        tables.len() <= MAX_KEYS,
        "there are more than {MAX_KEYS} keys"
    );
    let keys = tables.into_iter().map(KeyTable::key);
    let keys: Vec<KeyConfig> = keys.collect::<Result<_, _>>()?;
    let mut ids = HashMap::new();
    let mut hashes = HashMap::new();
    for key in &keys {
        if let Some(other) = hashes.insert(key.hash, &key.id) {
            bail!("keys `{other}` and `{}` have the same hash", key.id);
        }
        let limits = ids.entry(&key.id).or_insert(key.limits);
        ensure!(
            *limits == key.limits,
            "the keys with id `{}` have different limits, although they share them",
            key.id
        );
    }
    Ok(keys)
}

/// Reads the tables of a key file.
///
/// # Errors
/// If the file cannot be read, or is not TOML of `[[key]]` tables.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<KeyTable>> {
    let in_file = || format!("in the key file {}", path.display());
    let text = std::fs::read_to_string(path).with_context(in_file)?;
    let mode = std::fs::metadata(path)
        .with_context(in_file)?
        .permissions()
        .mode();
    ensure!(
        mode & 0o022 == 0,
        "the key file {} can be written by other users: run `chmod go-w` on it",
        path.display()
    );
    let file: KeyFile = toml::from_str(&text).with_context(in_file)?;
    Ok(file.key)
}

/// Returns the table of a new key, as text.
pub(crate) fn table_text(key: &NewKey<'_>) -> String {
    let mut table = toml::Table::new();
    table.insert("id".to_owned(), key.id.into());
    table.insert("hash".to_owned(), key.hash.clone().into());
    if let Some(tenant) = key.tenant {
        table.insert("tenant".to_owned(), tenant.into());
    }
    if !key.scopes.is_empty() {
        let scopes: Vec<toml::Value> = key
            .scopes
            .iter()
            .map(|scope| scope.as_str().into())
            .collect();
        table.insert("scopes".to_owned(), scopes.into());
    }
    format!("[[key]]\n{table}")
}

/// Fields of a new key's table.
#[derive(Debug)]
pub(crate) struct NewKey<'a> {
    pub(crate) id: &'a str,
    pub(crate) hash: String,
    pub(crate) tenant: Option<&'a str>,
    pub(crate) scopes: &'a [String],
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Vec<KeyConfig>> {
        keys(toml::from_str::<KeyFile>(text)?.key)
    }

    fn table(id: &str, digit: char, rest: &str) -> String {
        let hash = digit.to_string().repeat(64);
        format!("[[key]]\nid = \"{id}\"\nhash = \"sha256:{hash}\"\n{rest}\n")
    }

    #[test]
    fn a_table_describes_a_key() {
        let rest = "tenant = \"t\"\nscopes = [\"api\", \"metrics\"]\nmodels = [\"llama-*\"]\n\
                    requests-per-minute = 60\ntokens_per_minute = 7000\nconcurrent-requests = 3\n\
                    highest-priority = -2\nexpires = 2027-01-01";
        let keys = parse(&table("a", '1', rest)).unwrap();
        let key = &keys[0];
        assert_eq!((key.id.as_str(), key.tenant.as_str()), ("a", "t"));
        assert_eq!(key.scopes, [Scope::Api, Scope::Metrics]);
        assert_eq!(key.limits.tokens_per_minute, NonZeroU32::new(7000));
        assert_eq!(key.highest_priority, -2);
        let expires = humantime::format_rfc3339(key.expires.unwrap()).to_string();
        assert_eq!(expires, "2027-01-01T00:00:00Z");
        assert!(key.allows_model("llama-70b") && !key.allows_model("qwen"));
        let plain = parse(&table("b", '2', "expires = 2027-01-01T10:00:00Z")).unwrap();
        assert_eq!(
            (plain[0].tenant.as_str(), plain[0].scopes.as_slice()),
            ("b", &[Scope::Api][..])
        );
    }

    #[test]
    fn mistakes_name_the_key_and_the_field() {
        let two = table("a", '1', "") + &table("b", '1', "");
        let limits = table("a", '1', "") + &table("a", '2', "concurrent-requests = 2");
        for (text, parts) in [
            (
                "[[key]]\nid = \"a\"\nhash = \"secret\"\n",
                &["key `a`", "`hash`", "sha256:"][..],
            ),
            ("[[key]]\nid = \"a\"\n", &["hash"]),
            (&table("a b", '1', ""), &["`id`"]),
            (&table("a", '1', "rpm = 3"), &["rpm", "line 4"]),
            (
                &table("a", '1', "scopes = [\"root\"]"),
                &["key `a`", "`root`", "admin-read"],
            ),
            (&table("a", '1', "requests-per-minute = 0"), &["line 4"]),
            (
                &table("a", '1', "expires = 10:00:00"),
                &["key `a`", "`expires`"],
            ),
            (&two, &["`a`", "`b`", "same hash"]),
            (&limits, &["`a`", "limits"]),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            for part in parts {
                assert!(error.contains(part), "{text}: {error}");
            }
            assert!(!error.contains("secret"), "{error}");
        }
    }
}
