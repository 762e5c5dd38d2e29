//! Names of models that the operator adds to those that workers list.

use std::fmt;
use std::str::FromStr;

/// Maximum number of models of one alias.
const MAX_TARGETS: usize = 16;

/// Name under which clients can request one of several models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelAlias {
    /// Name that clients use.
    pub(crate) name: String,
    /// Models that requests are sent to, at least one, and the share of requests of each.
    pub(crate) targets: Vec<Target>,
}

/// Model behind an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Name under which workers serve the model.
    pub(crate) model: String,
    /// Share of the requests, relative to those of the other models. At least 1.
    pub(crate) weight: u32,
}

/// Text that is not an alias.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is not a model alias: {reason}; write NAME=MODEL or NAME=MODEL:WEIGHT,MODEL:WEIGHT"
)]
pub struct InvalidAlias {
    text: String,
    reason: &'static str,
}

impl ModelAlias {
    /// Returns the name that clients use.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for ModelAlias {
    type Err = InvalidAlias;

    /// Parses `NAME=MODEL`, where the model's name may have colons, or
    /// `NAME=MODEL:WEIGHT,MODEL:WEIGHT`.
    fn from_str(text: &str) -> Result<Self, InvalidAlias> {
        let fail = |reason| InvalidAlias {
            text: text.to_owned(),
            reason,
        };
        let (name, targets) = text.split_once('=').ok_or_else(|| fail("it has no `=`"))?;
        let parts: Vec<&str> = targets.split(',').collect();
        if parts.len() > MAX_TARGETS {
            return Err(fail("it has more than 16 models"));
        }
        let is_weighted = parts.len() > 1;
        let mut targets: Vec<Target> = Vec::new();
        for part in parts {
            let (model, weight) = match part.rsplit_once(':') {
                Some((model, weight)) if is_weighted => (model, weight.trim().parse().ok()),
                _ => (part, (!is_weighted).then_some(1)),
            };
            let weight = weight.filter(|weight| *weight > 0);
            let weight = weight.ok_or_else(|| fail("a weight is not an integer of at least 1"))?;
            let model = model.trim().to_owned();
            if model.is_empty() {
                return Err(fail("the name of a model is empty"));
            }
            if targets.iter().any(|target| target.model == model) {
                return Err(fail("it has a model twice"));
            }
            targets.push(Target { model, weight });
        }
        let name = name.trim().to_owned();
        if name.is_empty() {
            return Err(fail("its name is empty"));
        }
        Ok(Self { name, targets })
    }
}

impl fmt::Display for ModelAlias {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}=", self.name)?;
        if let [only] = &self.targets[..] {
            return formatter.write_str(&only.model);
        }
        for (index, target) in self.targets.iter().enumerate() {
            let separator = if index == 0 { "" } else { "," };
            write!(formatter, "{separator}{}:{}", target.model, target.weight)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_are_parsed_and_written_alike() {
        for text in [
            "gpt-4o=qwen3:8b",
            "fast=a:90,b:10",
            "llama=llama:1,org/x:free:3",
        ] {
            let alias: ModelAlias = text.parse().unwrap();
            assert_eq!(alias.to_string(), text);
        }
        let alias: ModelAlias = " fast = a : 90 , b:10".parse().unwrap();
        assert_eq!(alias.to_string(), "fast=a:90,b:10");
    }

    #[test]
    fn mistakes_are_explained() {
        for (text, reason) in [
            ("a", "no `=`"),
            ("=a", "its name is empty"),
            ("a=", "name of a model is empty"),
            ("a=b:1,", "not an integer"),
            ("a=b,c:1", "not an integer"),
            ("a=b:0,c:1", "not an integer"),
            ("a=b:1,b:2", "twice"),
        ] {
            let error = text.parse::<ModelAlias>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text}: {error}");
        }
        let many = format!("a={}", vec!["b:1"; 17].join(","));
        assert!(many.parse::<ModelAlias>().is_err());
    }
}
