//! Pods: which of them are workers, and what their annotations say.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::discovery::targets::{Trust, describe};
use crate::log_limit::warn_limited;
use crate::workers::worker_config::WorkerConfig;

/// Prefix of the annotations that describe a worker.
const PREFIX: &str = "foresee.dev/";

/// Annotations with the ports of a pod's engines, the most specific first. The last two are those of
/// llm-d and of SMG.
const PORT_ANNOTATIONS: [&str; 4] = [
    "foresee.dev/ports",
    "foresee.dev/port",
    "llm-d.ai/active-ports",
    "smg.ai/worker-ports",
];

/// Options of `--worker` that an annotation may set. Others name files of the router's machine.
const OPTIONS: [&str; 10] = [
    "ranks",
    "blocks",
    "prefix-caching",
    "eviction",
    "kv-events",
    "replay",
    "topic",
    "health-path",
    "tls-server-name",
    "tls-verify",
];

/// Annotations with a port of KV events at the pod's address, and the option that it becomes.
const EVENT_PORTS: [(&str, &str); 2] = [("kv-events-port", "kv-events"), ("replay-port", "replay")];

/// The fields of a pod that are read.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Pod {
    metadata: Metadata,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
    deletion_timestamp: Option<String>,
    annotations: Option<BTreeMap<String, String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Status {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    conditions: Option<Vec<Condition>>,
}

#[derive(Clone, Debug, Deserialize)]
struct Condition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

/// Whether a pod is a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PodState {
    /// The pod can serve.
    Ready,
    /// The pod starts, or has become unready. One that was ready stays a worker: the router's own
    /// health checks decide about it.
    Unready,
    /// The pod ends or has ended, or has no address.
    Gone,
}

impl Pod {
    /// Returns whether the pod is a worker.
    fn state(&self) -> PodState {
        let phase = self.status.phase.as_deref();
        let has_ended = matches!(phase, Some("Succeeded" | "Failed"));
        if self.metadata.deletion_timestamp.is_some() || has_ended || self.ip().is_empty() {
            return PodState::Gone;
        }
        let mut conditions = self.status.conditions.iter().flatten();
        let is_ready =
            conditions.any(|condition| condition.kind == "Ready" && condition.status == "True");
        match (phase, is_ready) {
            (Some("Running"), true) => PodState::Ready,
            _ => PodState::Unready,
        }
    }

    fn ip(&self) -> &str {
        self.status.pod_ip.as_deref().unwrap_or("")
    }

    /// Returns the namespace and the name, which no two pods have at a time.
    fn key(&self) -> String {
        format!("{}/{}", self.metadata.namespace, self.metadata.name)
    }

    fn annotation(&self, name: &str) -> Option<&str> {
        let annotations = self.metadata.annotations.as_ref()?;
        annotations.get(name).map(String::as_str)
    }

    /// Returns the engines of the pod: one for each port. They have the pod's name, with the port if
    /// there are several.
    ///
    /// # Errors
    /// Fails with the annotation that is invalid, as text.
    fn engines(&self, default_ports: &[u16]) -> Result<Vec<WorkerConfig>, String> {
        let ports = self.ports(default_ports)?;
        let ip = self.ip();
        let host = match ip.contains(':') {
            true => format!("[{ip}]"),
            false => ip.to_owned(),
        };
        let scheme = self.annotation("foresee.dev/scheme").unwrap_or("http");
        let key = self.key();
        let engine = |(index, port): (usize, &u16)| {
            let name = match ports.len() {
                1 => key.clone(),
                _ => format!("{key}:{port}"),
            };
            let mut options = vec![("name".to_owned(), name)];
            for option in OPTIONS {
                if let Some(value) = self.annotation(&format!("{PREFIX}{option}")) {
                    options.push((option.to_owned(), value.to_owned()));
                }
            }
            for (annotation, option) in EVENT_PORTS {
                if let Some(first) = self.annotation(&format!("{PREFIX}{annotation}")) {
                    // As vLLM numbers the ports of the ranks of one pod.
                    let port = first.trim().parse().ok();
                    let port: Option<u16> =
                        port.and_then(|port: u16| port.checked_add(u16::try_from(index).ok()?));
                    let port = port.filter(|&port| port > 0).ok_or_else(|| {
                        format!("annotation {PREFIX}{annotation}: `{first}` is not a port")
                    })?;
                    options.push((option.to_owned(), format!("tcp://{host}:{port}")));
                }
            }
            let url = format!("{scheme}://{host}:{port}");
            let mut engine = describe(&url, &options, Trust::Remote)?;
            engine.instance = Some(self.metadata.uid.as_str().into());
            Ok(engine)
        };
        ports.iter().enumerate().map(engine).collect()
    }

    /// Returns the ports of the pod's engines, each once.
    fn ports(&self, default_ports: &[u16]) -> Result<Vec<u16>, String> {
        let named = PORT_ANNOTATIONS.iter();
        let mut named = named.filter_map(|name| Some((*name, self.annotation(name)?)));
        let Some((name, text)) = named.next() else {
            return Ok(default_ports.to_vec());
        };
        let mut ports = Vec::new();
        for part in text.split(',').map(str::trim) {
            let port = part.parse().ok().filter(|&port: &u16| port > 0);
            let port = port.ok_or_else(|| {
                format!("annotation {name}: `{text}` is not a list of ports, such as 8000,8001")
            })?;
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        Ok(ports)
    }

    /// Logs the annotations that look like descriptions of a worker and are none.
    fn warn_of_unknown_annotations(&self) {
        let annotations = self.metadata.annotations.iter().flatten();
        for (annotation, _) in annotations {
            let Some(option) = annotation.strip_prefix(PREFIX) else {
                continue;
            };
            let is_known = OPTIONS.contains(&option)
                || EVENT_PORTS.iter().any(|(name, _)| *name == option)
                || ["port", "ports", "scheme"].contains(&option);
            if !is_known {
                warn_limited!(
                    key: annotation, pod = %self.key(), %annotation,
                    "ignoring an annotation that is unknown or not allowed for a pod; allowed are \
                     port, ports, scheme, kv-events-port, replay-port, {}",
                    OPTIONS.join(", ")
                );
            }
        }
    }
}

/// A pod that is a worker.
#[derive(Clone, Debug)]
struct KnownPod {
    uid: String,
    ip: String,
    engines: Vec<WorkerConfig>,
}

impl KnownPod {
    /// Returns whether this is the process that `pod` describes.
    fn is_instance(&self, pod: &Pod) -> bool {
        self.uid == pod.metadata.uid && self.ip == pod.ip()
    }
}

/// The pods that are workers, by namespace and name.
#[derive(Debug, Default)]
pub(super) struct KnownPods(BTreeMap<String, KnownPod>);

impl KnownPods {
    /// Returns the engines of all pods.
    pub(super) fn engines(&self) -> Vec<WorkerConfig> {
        let pods = self.0.values();
        pods.flat_map(|pod| pod.engines.iter().cloned()).collect()
    }

    /// Makes the pods those of a list. Returns the errors of their annotations.
    pub(super) fn replace(&mut self, list: &[Pod], default_ports: &[u16]) -> Vec<String> {
        let mut replaced = Self(std::mem::take(&mut self.0));
        let mut errors = Vec::new();
        for pod in list {
            errors.extend(replaced.update(pod, default_ports));
            let key = pod.key();
            if let Some(known) = replaced.0.remove(&key) {
                self.0.insert(key, known);
            }
        }
        errors
    }

    /// Takes over a pod that is new or has changed. Returns the error of its annotations: then
    /// the pod keeps the description that it had, if it was a worker already.
    pub(super) fn update(&mut self, pod: &Pod, default_ports: &[u16]) -> Option<String> {
        let key = pod.key();
        let is_known = self.0.get(&key).is_some_and(|known| known.is_instance(pod));
        if !is_known || pod.state() == PodState::Gone {
            self.0.remove(&key);
        }
        if pod.state() != PodState::Ready {
            return None;
        }
        if !is_known {
            pod.warn_of_unknown_annotations();
        }
        match pod.engines(default_ports) {
            Ok(engines) => {
                let known = KnownPod {
                    uid: pod.metadata.uid.clone(),
                    ip: pod.ip().to_owned(),
                    engines,
                };
                self.0.insert(key, known);
                None
            }
            Err(error) => Some(format!("pod {key}: {error}")),
        }
    }

    /// Removes a pod that is gone.
    pub(super) fn remove(&mut self, pod: &Pod) {
        self.0.remove(&pod.key());
    }
}
