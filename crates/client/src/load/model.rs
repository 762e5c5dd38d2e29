//! Discovery of the model that a server serves.

use std::time::Duration;

use serde::Deserialize;

use crate::http::{ApiKey, Failure, FailureKind, client, get, read_whole, send};
use crate::load::{LoadError, uri};

/// Limit for the response to `GET /v1/models`.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Connects to the server and returns the model to ask for: `asked`, or the model that
/// `/v1/models` lists if the list has exactly one. A model that is asked for need not be in the
/// list, and an error response is then ignored.
///
/// Must be called within a Tokio runtime with I/O and time enabled.
///
/// # Errors
/// If the address is invalid or cannot be reached, if the server does not respond within ten
/// seconds, or if no model is asked for and the list does not have exactly one.
pub async fn find_model(
    address: &str,
    api_key: Option<&ApiKey>,
    asked: Option<&str>,
) -> Result<String, LoadError> {
    let uri = uri(address, "/v1/models")?;
    let client = client();
    let body = async {
        let opened = send(&client, get(&uri, api_key)).await?;
        read_whole(opened.body).await
    };
    let timeout = || {
        let message = format!("no response within {TIMEOUT:?}");
        Err(Failure::new(FailureKind::Timeout, message))
    };
    let listed = tokio::time::timeout(TIMEOUT, body).await;
    let listed = match (listed.unwrap_or_else(|_| timeout()), asked) {
        (Err(failure), _)
            if matches!(failure.kind, FailureKind::Connect | FailureKind::Timeout) =>
        {
            return Err(LoadError::Unreachable {
                address: address.to_owned(),
                reason: failure.message,
            });
        }
        (_, Some(model)) => return Ok(model.to_owned()),
        (listed, None) => listed.map_err(|failure| failure.to_string()),
    };
    let only = listed.and_then(|body| only_model(&body));
    only.map_err(|reason| LoadError::UnknownModel {
        address: address
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .to_owned(),
        reason,
    })
}

/// Returns the only model of a list in OpenAI's format.
///
/// # Errors
/// A description of the problem if `body` is not such a list, or if the list is empty or has
/// several models.
fn only_model(body: &[u8]) -> Result<String, String> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Model>,
    }
    #[derive(Deserialize)]
    struct Model {
        id: String,
    }
    let list: List = serde_json::from_slice(body)
        .map_err(|error| format!("the response is not a list of models: {error}"))?;
    match list.data.as_slice() {
        [Model { id }] => Ok(id.clone()),
        [] => Err("the list is empty".to_owned()),
        models => {
            let names: Vec<&str> = models.iter().map(|model| model.id.as_str()).collect();
            Err(format!("the list has several: {}", names.join(", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_with_one_model_determines_the_model() {
        let list = r#"{"object": "list", "data": [{"id": "m", "object": "model"}]}"#;
        assert_eq!(only_model(list.as_bytes()), Ok("m".to_owned()));
    }

    #[test]
    fn other_lists_say_what_they_contain() {
        let problem = |list: &str| only_model(list.as_bytes()).unwrap_err();
        assert_eq!(problem(r#"{"data": []}"#), "the list is empty");
        let several = problem(r#"{"data": [{"id": "a"}, {"id": "b"}]}"#);
        assert_eq!(several, "the list has several: a, b");
        assert!(problem("[]").contains("not a list of models"));
    }
}
