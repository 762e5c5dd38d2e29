//! Requests to the public listener that the gateway answers itself: the models of all workers, and its
//! own health.

use std::sync::Arc;

use foresee_core::router::Router;
use foresee_engine::error::ApiError;
use http::{Method, Response, StatusCode, request};
use percent_encoding::percent_decode_str;

use crate::keys::Key;
use crate::reply::{self, Body};
use crate::shutdown::ShutdownSignal;
use crate::workers::model_names::ModelNames;

/// Contents of the gateway's own responses.
#[derive(Debug)]
pub(crate) struct OwnResponses {
    pub(crate) router: Router,
    pub(crate) names: Arc<ModelNames>,
    pub(crate) shutdown: Arc<ShutdownSignal>,
}

impl OwnResponses {
    /// Returns the response to a request that the gateway answers itself: the model list, one model,
    /// or the health. `None` for every other request. Fails with a 404 for an unknown model.
    ///
    /// With a `key`, only models that it opens are listed.
    pub(crate) fn respond(
        &self,
        head: &request::Parts,
        key: Option<&Key>,
    ) -> Result<Option<Response<Body>>, ApiError> {
        if head.method != Method::GET {
            return Ok(None);
        }
        Ok(Some(match head.uri.path() {
            "/v1/models" => self.models(key),
            "/health" => self.health(),
            path => match path.strip_prefix("/v1/models/") {
                Some(model) if !model.is_empty() => self.model(model, key)?,
                _ => return Ok(None),
            },
        }))
    }

    /// Lists the aliases and the models of all workers. Each entry is as the first worker that serves
    /// the model wrote it. Workers are taken in the order in which they were added, unhealthy ones
    /// included. A worker that has not listed its models yet adds none.
    fn models(&self, key: Option<&Key>) -> Response<Body> {
        let mut names = self.names.all();
        names.retain(|name| is_open(key, name));
        let entries: Vec<String> = names
            .iter()
            .filter_map(|name| self.names.entry(name))
            .collect();
        let list = format!(r#"{{"object":"list","data":[{}]}}"#, entries.join(","));
        reply::json(StatusCode::OK, list)
    }

    /// Returns the entry of one model, as the first worker that serves it wrote it. `name` may contain
    /// percent escapes. Fails with a 404 if no worker serves the model.
    fn model(&self, name: &str, key: Option<&Key>) -> Result<Response<Body>, ApiError> {
        let name = percent_decode_str(name).decode_utf8_lossy();
        let entry = self.names.entry(&name);
        let entry = entry.filter(|_| is_open(key, &name));
        let unknown = || {
            let mut served = self.names.all();
            served.retain(|model| is_open(key, model));
            ApiError::model_not_found(&name, &served)
        };
        let entry = entry.ok_or_else(unknown)?;
        Ok(reply::json(StatusCode::OK, entry))
    }

    /// Returns an empty 200 if a worker can serve a request now, and otherwise a 503, as engines do. A
    /// gateway that shuts down returns a 503.
    fn health(&self) -> Response<Body> {
        let status = if self.router.is_ready() && !self.shutdown.has_begun() {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        reply::whole(status, "text/plain", "")
    }
}

/// Returns whether a request with this key may name a model.
fn is_open(key: Option<&Key>, model: &str) -> bool {
    key.is_none_or(|key| key.config.allows_model(model))
}
