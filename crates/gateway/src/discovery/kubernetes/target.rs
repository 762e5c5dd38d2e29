//! Which pods are followed: those of a selector, or of an InferencePool.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::api::ApiServer;
use crate::discovery::config::{KubernetesConfig, PoolName};

/// Namespace that stands for all of them.
const ALL_NAMESPACES: &str = "*";

/// Versions of the API of InferencePools, the newest first.
const POOL_APIS: [&str; 2] = [
    "inference.networking.k8s.io/v1",
    "inference.networking.x-k8s.io/v1alpha2",
];

/// Pods to follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Target {
    /// Path of the list of pods.
    pub(super) path: String,
    /// Selector of labels.
    pub(super) selector: String,
    /// Ports at which each pod has an engine, unless its annotations say otherwise.
    pub(super) ports: Vec<u16>,
}

/// An InferencePool.
#[derive(Deserialize)]
struct Pool {
    spec: PoolSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PoolSpec {
    selector: PoolSelector,
    #[serde(default)]
    target_ports: Vec<TargetPort>,
    /// The only port, in the older version.
    target_port_number: Option<u16>,
}

/// Labels of the pods of a pool: a field of its own in the newer version.
#[derive(Deserialize)]
#[serde(untagged)]
enum PoolSelector {
    #[serde(rename_all = "camelCase")]
    Nested {
        match_labels: BTreeMap<String, String>,
    },
    Plain(BTreeMap<String, String>),
}

#[derive(Deserialize)]
struct TargetPort {
    number: u16,
}

impl Target {
    /// Returns the pods of a pool, or those of the configuration's selector without one.
    ///
    /// # Errors
    /// Fails with the cause as text if the pool cannot be read, or has no selector or no port.
    pub(super) async fn read(
        server: &ApiServer,
        config: &KubernetesConfig,
        pool: Option<&PoolName>,
    ) -> Result<Self, String> {
        let Some(pool) = pool else {
            let path = match config.namespace.as_deref() {
                Some(ALL_NAMESPACES) => "/api/v1/pods".to_owned(),
                namespace => pods_path(namespace.unwrap_or(&server.namespace)),
            };
            return Ok(Self {
                path,
                selector: config.selector.clone().unwrap_or_default(),
                ports: config.ports.clone(),
            });
        };
        let namespace = pool.namespace.as_deref().or(config.namespace.as_deref());
        let namespace = match namespace {
            Some(ALL_NAMESPACES) | None => &server.namespace,
            Some(namespace) => namespace,
        };
        for api in POOL_APIS {
            let name = &pool.name;
            let path = format!("/apis/{api}/namespaces/{namespace}/inferencepools/{name}");
            if let Some(found) = server.get::<Pool>(&path).await? {
                return Self::of_pool(&found, namespace)
                    .map_err(|problem| format!("InferencePool {namespace}/{name} {problem}"));
            }
        }
        Err(format!(
            "there is no InferencePool {} in the namespace {namespace}",
            pool.name
        ))
    }

    /// Returns the pods of a pool. Fails with what it lacks.
    fn of_pool(pool: &Pool, namespace: &str) -> Result<Self, &'static str> {
        let (PoolSelector::Nested { match_labels } | PoolSelector::Plain(match_labels)) =
            &pool.spec.selector;
        if match_labels.is_empty() {
            // It would select all pods.
            return Err("has no labels in its selector");
        }
        let ports = pool.spec.target_ports.iter().map(|port| port.number);
        let ports: Vec<u16> = ports.chain(pool.spec.target_port_number).collect();
        if ports.is_empty() {
            return Err("has no target port");
        }
        let labels = match_labels.iter();
        let labels: Vec<_> = labels
            .map(|(key, value)| format!("{key}={value}"))
            .collect();
        Ok(Self {
            path: pods_path(namespace),
            selector: labels.join(","),
            ports,
        })
    }
}

/// Returns the path of the pods of a namespace.
fn pods_path(namespace: &str) -> String {
    format!("/api/v1/namespaces/{namespace}/pods")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_of_both_versions_are_read() {
        let new = r#"{"spec": {"selector": {"matchLabels": {"app": "x", "b": "c"}},
            "targetPorts": [{"number": 8000}, {"number": 8001}],
            "endpointPickerRef": {"name": "epp"}}}"#;
        let old = r#"{"spec": {"selector": {"app": "x"}, "targetPortNumber": 8000}}"#;
        let target = |text| Target::of_pool(&serde_json::from_str(text).unwrap(), "ns");
        let read = target(new).unwrap();
        assert_eq!(read.path, "/api/v1/namespaces/ns/pods");
        assert_eq!(read.selector, "app=x,b=c");
        assert_eq!(read.ports, [8000, 8001]);
        let read = target(old).unwrap();
        assert_eq!(
            (read.selector.as_str(), &read.ports[..]),
            ("app=x", &[8000][..])
        );
        let empty = r#"{"spec": {"selector": {"matchLabels": {}}, "targetPorts": []}}"#;
        assert!(target(empty).unwrap_err().contains("selector"));
        let portless = r#"{"spec": {"selector": {"matchLabels": {"a": "b"}}}}"#;
        assert!(target(portless).unwrap_err().contains("port"));
    }
}
