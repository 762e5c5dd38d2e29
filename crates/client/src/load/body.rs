//! Request bodies in OpenAI's JSON. The prompt's tokens become text that a mock engine splits into
//! exactly the same number of tokens.

use bytes::Bytes;
use foresee_sim::prompt::{Prompt, VOCABULARY};
use foresee_sim::workload::WorkloadRequest;
use serde::Serialize;

use crate::load::{LoadConfig, OutputRequest};

/// Returns the body of a request for a stream with usage at its end and the workload's number of
/// output tokens. The body depends on the arguments alone.
pub(super) fn body(request: &WorkloadRequest, config: &LoadConfig) -> Bytes {
    let text = text(&request.prompt);
    let question = if config.chat {
        Question::Messages([Message {
            role: "user",
            content: text,
        }])
    } else {
        Question::Prompt(text)
    };
    let tokens = request.output_tokens;
    let (max_tokens, min_tokens) = match config.output_request {
        OutputRequest::Exact | OutputRequest::AtMost => (tokens, None),
        OutputRequest::AtLeast { max_tokens } => (max_tokens.max(tokens), Some(tokens)),
    };
    let body = Body {
        model: &config.model,
        max_tokens,
        min_tokens,
        ignore_eos: config.output_request == OutputRequest::Exact,
        temperature: 0,
        stream: true,
        stream_options: StreamOptions {
            include_usage: true,
        },
        question,
    };
    // Serialisation fails only for maps with keys other than strings; this body has none.
    serde_json::to_vec(&body).unwrap_or_default().into()
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_tokens: Option<u32>,
    #[serde(skip_serializing_if = "is_off")]
    ignore_eos: bool,
    temperature: u8,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(flatten)]
    question: Question,
}

/// Returns whether a field is left out of the body.
#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_off(switch: &bool) -> bool {
    !switch
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Question {
    Prompt(String),
    Messages([Message; 1]),
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
}

/// Returns the prompt with four letters for each token: a mock engine reads four bytes as a token.
fn text(prompt: &Prompt) -> String {
    let mut text = String::with_capacity(prompt.len() as usize * 4);
    for token in prompt.tokens(VOCABULARY) {
        text.extend(word(token).map(char::from));
    }
    text
}

/// Returns a word of four letters, different for each token below 2^20.
fn word(token: u32) -> [u8; 4] {
    // JSON escapes none of these letters.
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    [15, 10, 5, 0].map(|shift| LETTERS[(token >> shift) as usize % 32])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use foresee_sim::workload::Arrival;

    use super::*;

    #[test]
    fn every_token_has_its_own_word_of_four_letters() {
        let words: HashSet<[u8; 4]> = (0..VOCABULARY.get()).map(word).collect();
        assert_eq!(words.len(), VOCABULARY.get() as usize);
    }

    #[test]
    fn equal_tokens_are_equal_text() {
        let [first, second] = [2, 3].map(|own| text(&Prompt::new().then(1, 50).then(own, 20)));
        assert_eq!((first.len(), second.len()), (280, 280));
        assert_eq!(first[..200], second[..200]);
        assert_ne!(first[200..], second[200..]);
    }

    #[test]
    fn a_body_asks_for_the_whole_stream() {
        let request = WorkloadRequest {
            prompt: Prompt::new().then(1, 3),
            output_stream: None,
            output_tokens: 7,
            arrival: Arrival::ClosedLoop,
        };
        let mut config = LoadConfig::new("", "a \"model\"");
        let read = |config: &LoadConfig| -> serde_json::Value {
            serde_json::from_slice(&body(&request, config)).unwrap()
        };
        let expected = serde_json::json!({
            "model": "a \"model\"",
            "max_tokens": 7,
            "ignore_eos": true,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
            "prompt": text(&request.prompt),
        });
        assert_eq!(read(&config), expected);
        config.chat = true;
        let messages = serde_json::json!([{"role": "user", "content": text(&request.prompt)}]);
        assert_eq!(read(&config)["messages"], messages);
        config.output_request = OutputRequest::AtMost;
        assert_eq!(read(&config).get("ignore_eos"), None);
        for (limit, max_tokens) in [(4096, 4096), (5, 7)] {
            config.output_request = OutputRequest::AtLeast { max_tokens: limit };
            let body = read(&config);
            assert_eq!(
                (&body["max_tokens"], &body["min_tokens"]),
                (&max_tokens.into(), &7.into())
            );
            assert_eq!(body.get("ignore_eos"), None);
        }
    }
}
