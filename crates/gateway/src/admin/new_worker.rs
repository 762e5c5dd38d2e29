//! Workers that are added over HTTP: the body of `POST /admin/workers`.

use foresee_engine::error::ApiError;
use serde::Deserialize;

use super::access::refusal;
use crate::workers::worker_config::{LocalOption, WorkerConfig};

/// Parses the body `{"url": "URL[,name=NAME][,ranks=N][,blocks=N]…"}`, whose `url` is a description
/// as for `--worker`.
///
/// # Errors
/// Fails with a 400 if the body or the description is invalid or names a file with a key, and with a
/// 403 if only the operator of the router's host may configure such a worker.
pub fn parse_new_worker(body: &[u8]) -> Result<WorkerConfig, ApiError> {
    #[derive(Deserialize)]
    struct NewWorker {
        url: String,
    }
    let new: NewWorker = serde_json::from_slice(body).map_err(|error| {
        let message = format!(
            "The body must be {{\"url\": \"http://HOST:PORT[,name=NAME][,blocks=N]\"}}: {error}."
        );
        ApiError::bad_request(message, Some("url"))
    })?;
    let config: WorkerConfig = new.url.parse().map_err(|error| {
        let message = format!("The description in `url` is invalid: {error}.");
        ApiError::bad_request(message, Some("url"))
    })?;
    match config.local_option() {
        None => Ok(config),
        Some(LocalOption::Key) => {
            // Such a request could send any file or variable of this machine to a server of its choice.
            let message = "`api-key` is not accepted here: name the file with --worker or \
                           --worker-api-key-file, which apply when the router starts.";
            Err(ApiError::bad_request(message, Some("url")))
        }
        Some(LocalOption::TlsFiles) => {
            // The certificate could be shown to a server of the client's choice.
            let message = "`tls-ca`, `tls-certificate` and `tls-key` are not accepted here: name the \
                           files with --worker, or with --worker-tls-ca and \
                           --worker-tls-certificate, which apply to all workers.";
            Err(ApiError::bad_request(message, Some("url")))
        }
        Some(LocalOption::Endpoint(field)) => {
            let message = format!(
                "`{field}` must be `tcp://HOST:PORT` for a worker that is added over HTTP. Configure \
                 an endpoint with `bind:` or `ipc:` by --worker at the start of the router."
            );
            Err(ApiError {
                param: Some("url"),
                ..refusal(403, "endpoint_not_allowed", message)
            })
        }
    }
}
