//! Requests to the API server of Kubernetes.

use std::path::Path;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use http::StatusCode;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ObjectList, Request};
use kube::{Client, Config, Error};
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::pods::Pod;

/// Number of pods in one response to a list.
const PAGE_SIZE: u32 = 500;

/// Largest number of pods in a list.
const MAX_PODS: usize = 8192;

/// Time after which the API server ends a watch, in seconds.
const WATCH_SECONDS: u32 = 290;

/// Variable that is set in every pod.
const SERVICE_HOST: &str = "KUBERNETES_SERVICE_HOST";

/// Report of a watch.
#[derive(Debug)]
pub(super) enum PodEvent {
    /// A pod is new or has changed.
    Applied(Pod),
    /// A pod is gone, or no longer has the labels of the selector.
    Deleted(Pod),
    /// Nothing has changed.
    Other,
    /// The watch cannot be continued: the pods must be listed again.
    Ended,
}

/// Connection to an API server.
pub(super) struct ApiServer {
    client: Client,
    /// Namespace of the service account, or of the kubeconfig.
    pub(super) namespace: String,
    time_limit: Duration,
}

impl ApiServer {
    /// Reads the address of the API server and the credentials: from `kubeconfig`, or else those of
    /// the pod's service account, or else those that `kubectl` would use. Each request may take
    /// `time_limit`.
    ///
    /// # Errors
    /// Fails with the cause as text if a file is missing or invalid.
    pub(super) async fn connect(
        kubeconfig: Option<&Path>,
        time_limit: Duration,
    ) -> Result<Self, String> {
        let options = KubeConfigOptions::default();
        let config = if let Some(path) = kubeconfig {
            let read = Kubeconfig::read_from(path);
            let read = read.map_err(|error| chain(&error))?;
            let config = Config::from_custom_kubeconfig(read, &options).await;
            config.map_err(|error| chain(&error))
        } else if std::env::var_os(SERVICE_HOST).is_some() {
            Config::incluster_env().map_err(|error| chain(&error))
        } else {
            let config = Config::from_kubeconfig(&options).await;
            config.map_err(|error| {
                format!(
                    "{}; outside of a cluster, --kubernetes-config names a kubeconfig",
                    chain(&error)
                )
            })
        };
        let mut config = config?;
        config.connect_timeout = Some(time_limit);
        // The caller tries again, and says so.
        config.default_retry = false;
        let namespace = config.default_namespace.clone();
        // A program that kubeconfig names for the credentials may take some time.
        let client = tokio::task::spawn_blocking(move || Client::try_from(config)).await;
        let client = client.map_err(|error| error.to_string())?;
        let client = client.map_err(|error| chain(&error))?;
        Ok(Self {
            client,
            namespace,
            time_limit,
        })
    }

    /// Returns all pods of a selector and the version of the list.
    ///
    /// # Errors
    /// Fails with the cause as text, also if there are more than [`MAX_PODS`].
    pub(super) async fn list_pods(
        &self,
        path: &str,
        selector: &str,
    ) -> Result<(Vec<Pod>, String), String> {
        let mut pods = Vec::new();
        let mut page = ListParams::default().labels(selector).limit(PAGE_SIZE);
        loop {
            let request = Request::new(path).list(&page);
            let list = self.send(request.map_err(|error| chain(&error))?).await?;
            let list: ObjectList<Pod> = list.map_err(|error| describe(&error))?;
            pods.extend(list.items);
            if pods.len() > MAX_PODS {
                return Err(format!("`{selector}` selects more than {MAX_PODS} pods"));
            }
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page.continue_token = Some(token),
                None => return Ok((pods, list.metadata.resource_version.unwrap_or_default())),
            }
        }
    }

    /// Watches the pods of a selector from a version of their list on.
    ///
    /// # Errors
    /// Fails with the cause as text if the watch does not begin in time.
    pub(super) async fn watch_pods(
        &self,
        path: &str,
        selector: &str,
        version: &str,
    ) -> Result<impl Stream<Item = PodEvent> + use<>, String> {
        let params = WatchParams::default()
            .labels(selector)
            .timeout(WATCH_SECONDS);
        let request = Request::new(path).watch(&params, version);
        let request = request.map_err(|error| chain(&error))?;
        let events = self.client.request_events::<Pod>(request);
        let events = match timeout(self.time_limit, events).await {
            Ok(Ok(events)) => events,
            // The version is too old: the pods are listed again.
            Ok(Err(Error::Api(status))) if status.code == StatusCode::GONE.as_u16() => {
                return Ok(stream::iter([PodEvent::Ended]).boxed());
            }
            Ok(Err(error)) => return Err(describe(&error)),
            Err(_) => return Err(self.no_response()),
        };
        let events = events.map(|event| match event {
            Ok(WatchEvent::Added(pod) | WatchEvent::Modified(pod)) => PodEvent::Applied(pod),
            Ok(WatchEvent::Deleted(pod)) => PodEvent::Deleted(pod),
            Ok(WatchEvent::Bookmark(_)) => PodEvent::Other,
            Ok(WatchEvent::Error(status)) => {
                tracing::debug!(code = status.code, %status.message, "a watch of pods ended");
                PodEvent::Ended
            }
            Err(error) => {
                tracing::debug!(error = chain(&error), "a watch of pods broke off");
                PodEvent::Ended
            }
        });
        Ok(events.boxed())
    }

    /// Returns the object at a path; `None` if there is none.
    ///
    /// # Errors
    /// Fails with the cause as text.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, String> {
        let request = http::Request::get(path).body(Vec::new());
        let request = request.map_err(|error| error.to_string())?;
        match self.send(request).await? {
            Ok(object) => Ok(Some(object)),
            Err(Error::Api(status)) if status.code == StatusCode::NOT_FOUND.as_u16() => Ok(None),
            Err(error) => Err(describe(&error)),
        }
    }

    /// Sends a request and returns the object of its response, or the error of the API server. Fails
    /// with a text if there is no response in time.
    async fn send<T: DeserializeOwned>(
        &self,
        request: http::Request<Vec<u8>>,
    ) -> Result<Result<T, Error>, String> {
        let sent = timeout(self.time_limit, self.client.request(request)).await;
        sent.map_err(|_| self.no_response())
    }

    fn no_response(&self) -> String {
        format!(
            "the API server did not respond within {:?}",
            self.time_limit
        )
    }
}

/// Returns what went wrong, with the remedy if credentials or rights are the cause.
fn describe(error: &Error) -> String {
    let Error::Api(status) = error else {
        return format!("the request to the API server failed: {}", chain(error));
    };
    let message = status.message.trim();
    match StatusCode::from_u16(status.code) {
        Ok(StatusCode::UNAUTHORIZED) => format!(
            "the API server does not accept the credentials (401 {message}); check the token of \
             the service account or of the kubeconfig"
        ),
        Ok(StatusCode::FORBIDDEN) => format!(
            "the API server refuses the request (403 {message}); the service account needs the \
             rights get, list and watch for pods, and get for inferencepools if pools are used"
        ),
        _ => format!("the API server responded with {} {message}", status.code),
    }
}

/// Returns an error and its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_say_what_to_do() {
        let error = |code: u16, message: &str| {
            let status =
                serde_json::json!({ "status": "Failure", "code": code, "message": message });
            describe(&Error::Api(serde_json::from_value(status).unwrap()))
        };
        let forbidden = "pods is forbidden: User \"system:serviceaccount:prod:foresee\" cannot list \
                         resource \"pods\" in API group \"\" in the namespace \"prod\"";
        let text = error(403, forbidden);
        assert!(
            text.contains(forbidden) && text.contains("get, list and watch"),
            "{text}"
        );
        let text = error(401, "Unauthorized");
        assert!(
            text.contains("401 Unauthorized") && text.contains("token"),
            "{text}"
        );
        assert!(error(500, "etcd").ends_with("500 etcd"));
    }
}
