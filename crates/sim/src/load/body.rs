//! Request bodies: a workload's request as OpenAI JSON, its tokens as text that an engine cuts
//! into exactly as many tokens again.

use bytes::Bytes;
use serde::Serialize;

use crate::prompt::{Prompt, VOCABULARY};
use crate::workload::WorkloadRequest;

/// The body of a request for a stream of exactly as many tokens as the workload says.
pub(super) fn body(request: &WorkloadRequest, model: &str, chat: bool) -> Bytes {
    let text = text(&request.prompt);
    let question = if chat {
        Question::Messages([Message {
            role: "user",
            content: text,
        }])
    } else {
        Question::Prompt(text)
    };
    let body = Body {
        model,
        max_tokens: request.output_tokens,
        ignore_eos: true,
        temperature: 0,
        stream: true,
        stream_options: StreamOptions {
            include_usage: true,
        },
        question,
    };
    // Only maps with keys that are not strings fail, and there are none.
    serde_json::to_vec(&body).unwrap_or_default().into()
}

#[derive(Serialize)]
struct Body<'a> {
    model: &'a str,
    max_tokens: u32,
    ignore_eos: bool,
    temperature: u8,
    stream: bool,
    stream_options: StreamOptions,
    #[serde(flatten)]
    question: Question,
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

/// The prompt with four letters for each token: the model engine takes every four bytes for one.
fn text(prompt: &Prompt) -> String {
    let mut text = String::with_capacity(prompt.len() as usize * 4);
    for token in prompt.tokens(VOCABULARY) {
        text.extend(word(token).map(char::from));
    }
    text
}

/// A word of its own for each token below 2^20.
fn word(token: u32) -> [u8; 4] {
    // None of these is escaped in JSON.
    const LETTERS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    [15, 10, 5, 0].map(|shift| LETTERS[(token >> shift) as usize % 32])
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::workload::Arrival;

    #[test]
    fn every_token_has_its_own_word_of_four_letters() {
        let words: HashSet<[u8; 4]> = (0..VOCABULARY.get()).map(word).collect();
        assert_eq!(words.len(), VOCABULARY.get() as usize);
    }

    #[test]
    fn equal_tokens_are_equal_text() {
        let [one, other] = [2, 3].map(|own| text(&Prompt::new().then(1, 50).then(own, 20)));
        assert_eq!((one.len(), other.len()), (280, 280));
        assert_eq!(one[..200], other[..200]);
        assert_ne!(one[200..], other[200..]);
    }

    #[test]
    fn a_body_asks_for_the_whole_stream() {
        let request = WorkloadRequest {
            prompt: Prompt::new().then(1, 3),
            answer_stream: None,
            output_tokens: 7,
            arrival: Arrival::WhenFree,
        };
        let read = |chat| -> serde_json::Value {
            serde_json::from_slice(&body(&request, "a \"model\"", chat)).unwrap()
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
        assert_eq!(read(false), expected);
        let messages = serde_json::json!([{"role": "user", "content": text(&request.prompt)}]);
        assert_eq!(read(true)["messages"], messages);
    }
}
