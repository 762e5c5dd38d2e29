//! Lists of workers that other programs write: Prometheus's `file_sd`, and llm-d's endpoints.

use std::collections::{BTreeMap, HashSet};

use serde::Deserialize;

use crate::workers::worker_config::WorkerConfig;

/// Largest number of workers in a list.
const MAX_TARGETS: usize = 4096;

/// Prefix of the labels that set an option of `--worker`.
const OPTION_PREFIX: &str = "foresee_";

/// Label with the scheme of the targets.
const SCHEME: &str = "__scheme__";

/// A list in one of the known forms.
#[derive(Deserialize)]
#[serde(untagged)]
enum List {
    Prometheus(Vec<TargetGroup>),
    LlmD(Endpoints),
}

/// Targets with the same labels.
#[derive(Deserialize)]
struct TargetGroup {
    targets: Vec<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Endpoints {
    endpoints: Vec<Endpoint>,
}

/// An endpoint of llm-d.
#[derive(Deserialize)]
struct Endpoint {
    name: String,
    address: String,
    port: Port,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

/// A port, as text or as a number.
#[derive(Deserialize)]
#[serde(untagged)]
enum Port {
    Number(u16),
    Text(String),
}

/// Whether a list may name files of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trust {
    /// The list is a file of the operator.
    Local,
    /// The list comes from another machine.
    Remote,
}

/// Returns the engines of a list in JSON or YAML.
///
/// # Errors
/// Fails with a text if the list has none of the known forms, a target or an option is invalid, two
/// engines have one name, or a remote list names a file or an endpoint of this machine.
pub(super) fn parse(text: &str, trust: Trust) -> Result<Vec<WorkerConfig>, String> {
    let list: List = serde_yaml_ng::from_str(text).map_err(|error| {
        format!(
            "{error}; the list must be [{{\"targets\": [\"HOST:PORT\"], \"labels\": {{}}}}] or \
             endpoints: [{{name, address, port}}]"
        )
    })?;
    let engines: Result<Vec<_>, String> = match list {
        List::Prometheus(groups) => groups
            .iter()
            .flat_map(|group| group.targets.iter().map(|target| (target, &group.labels)))
            .map(|(target, labels)| engine(target, None, labels, trust))
            .collect(),
        List::LlmD(list) => list
            .endpoints
            .iter()
            .map(|endpoint| {
                let port = match &endpoint.port {
                    Port::Number(port) => port.to_string(),
                    Port::Text(port) => port.clone(),
                };
                let host = match endpoint.address.contains(':') {
                    true => format!("[{}]", endpoint.address),
                    false => endpoint.address.clone(),
                };
                let target = format!("{host}:{port}");
                engine(&target, Some(&endpoint.name), &endpoint.labels, trust)
            })
            .collect(),
    };
    let engines = engines?;
    if engines.len() > MAX_TARGETS {
        return Err(format!("the list has more than {MAX_TARGETS} workers"));
    }
    let mut names = HashSet::new();
    for engine in &engines {
        if !names.insert(&engine.name) {
            return Err(format!("two workers are named `{}`", engine.name));
        }
    }
    Ok(engines)
}

/// Returns the engine at a target, with the options that its labels set.
fn engine(
    target: &str,
    name: Option<&str>,
    labels: &BTreeMap<String, String>,
    trust: Trust,
) -> Result<WorkerConfig, String> {
    let url = match labels.get(SCHEME) {
        Some(scheme) => format!("{scheme}://{target}"),
        None => target.to_owned(),
    };
    let mut options: Vec<(String, String)> = Vec::new();
    options.extend(name.map(|name| ("name".to_owned(), name.to_owned())));
    for (label, value) in labels {
        if let Some(option) = label.strip_prefix(OPTION_PREFIX) {
            options.push((option.replace('_', "-"), value.clone()));
        }
    }
    describe(&url, &options, trust)
}

/// Returns the engine at a URL with options of `--worker`.
///
/// # Errors
/// Fails with a text if the URL or an option is invalid, or names a file or an endpoint of this
/// machine although the source is remote.
pub(super) fn describe(
    url: &str,
    options: &[(String, String)],
    trust: Trust,
) -> Result<WorkerConfig, String> {
    let has_separator = |text: &str| text.contains([',', ' ', '\t', '\n']);
    if has_separator(url) || options.iter().any(|(_, value)| has_separator(value)) {
        return Err(format!(
            "target `{url}`: values have no commas and no spaces"
        ));
    }
    let mut description = url.to_owned();
    for (option, value) in options {
        description.push_str(&format!(",{option}={value}"));
    }
    let engine: WorkerConfig = description.parse().map_err(|error| format!("{error}"))?;
    if trust == Trust::Remote && engine.local_option().is_some() {
        return Err(format!(
            "worker `{}` names a file or an endpoint of this machine, which only the operator's \
             files may",
            engine.name
        ));
    }
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        let engines = parse(text, Trust::Local).unwrap();
        engines.into_iter().map(|engine| engine.name).collect()
    }

    #[test]
    fn lists_of_prometheus_and_of_llm_d_are_read_as_json_and_yaml() {
        let json = r#"[{"targets": ["10.0.0.1:8000", "10.0.0.2:8000"], "labels": {"model": "m"}}]"#;
        assert_eq!(names(json), ["10.0.0.1:8000", "10.0.0.2:8000"]);
        let yaml = "- targets: ['gpu1:8000']\n  labels:\n    __scheme__: https\n    foresee_name: a\n    \
                    foresee_kv_events: tcp://gpu1:5557\n";
        let engines = parse(yaml, Trust::Remote).unwrap();
        assert_eq!(engines[0].url(), "https://gpu1:8000");
        assert_eq!(engines[0].name, "a");
        let yaml = "endpoints:\n- {name: pod-1, namespace: x, address: 10.0.0.1, port: '8000'}\n\
                    - {name: pod-2, address: 'fd00::1', port: 8001, labels: {role: decode}}\n";
        let engines = parse(yaml, Trust::Local).unwrap();
        let urls: Vec<_> = engines.iter().map(WorkerConfig::url).collect();
        assert_eq!(urls, ["http://10.0.0.1:8000", "http://[fd00::1]:8001"]);
        assert_eq!(names(yaml), ["pod-1", "pod-2"]);
        assert!(names("[]").is_empty());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("{}", "targets"),
            ("nonsense", "targets"),
            ("[{\"targets\": [\"a:x\"]}]", "a:x"),
            ("[{\"targets\": [\"a:1\", \"a:1\"]}]", "a:1"),
            ("[{\"targets\": [\"a:1,name=b\"]}]", "commas"),
            (
                "[{\"targets\": [\"a:1\"], \"labels\": {\"foresee_rank\": \"2\"}}]",
                "`rank`",
            ),
        ] {
            let error = parse(text, Trust::Local).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
        let files =
            "[{\"targets\": [\"a:1\"], \"labels\": {\"foresee_api_key\": \"file:/etc/x\"}}]";
        assert!(parse(files, Trust::Local).is_ok());
        assert!(parse(files, Trust::Remote).is_err());
        let binds =
            "[{\"targets\": [\"a:1\"], \"labels\": {\"foresee_kv_events\": \"bind:tcp://*:1\"}}]";
        assert!(parse(binds, Trust::Remote).is_err());
    }
}
