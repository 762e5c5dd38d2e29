//! Optional tests: token ids of chats and texts are equal to those of a running vLLM.
//!
//! `FORESEE_TEST_VLLM_URL` is the URL of a vLLM started with `--enable-scale-out`, which serves
//! `/v1/chat/completions/render`. `FORESEE_TEST_MODEL` is the folder of its tokenizer and chat
//! template. `FORESEE_TEST_CHATS` is the number of chats to compare (default 400).
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;

use foresee_engine::chat::Chat;
use foresee_engine::chat_template::ChatTemplate;
use foresee_engine::tokenizer::{SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};

/// Returns the address of the running engine and the folder of its model; `None` to skip the test.
fn engine() -> Option<(String, PathBuf)> {
    let url = std::env::var("FORESEE_TEST_VLLM_URL").ok();
    let folder = std::env::var_os("FORESEE_TEST_MODEL");
    let (Some(url), Some(folder)) = (url, folder) else {
        println!("skipped: set FORESEE_TEST_VLLM_URL and FORESEE_TEST_MODEL to compare");
        return None;
    };
    let address = url.trim_start_matches("http://").trim_end_matches('/');
    Some((address.to_owned(), folder.into()))
}

fn count() -> usize {
    let count = std::env::var("FORESEE_TEST_CHATS").ok();
    count.map_or(400, |count| count.parse().expect("a number of chats"))
}

/// Sends a request. Returns the status and the body of the response.
pub(crate) fn post(address: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = TcpStream::connect(address).unwrap();
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).unwrap();
    let response = String::from_utf8(response).unwrap();
    let (head, body) = response.split_once("\r\n\r\n").expect("a response");
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_default())
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error} in {value}"))
}

/// A repeatable random generator of chats and texts (SplitMix64).
struct Generator(u64);

impl Generator {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) as usize % bound
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }

    /// Returns a random element.
    fn element<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    fn text(&mut self) -> String {
        const PARTS: [&str; 22] = [
            "The quick brown fox, it's 3.14 o'clock! ",
            "WE'LL see HTTPServer2 ",
            "你好，世界。今天天气怎么样？",
            "カタカナと漢字。",
            "안녕하세요 세계!",
            "Привет, мир! ",
            "مرحبا بالعالم ",
            "नमस्ते दुनिया ",
            "🙂👍🏽👩‍👩‍👧‍👦🇫🇷 ",
            "e\u{301} ﬁ ½ ℌ ㎏ ",
            "x = {'a': [1,2,3]}\n\treturn foo(bar)->baz;\n    // comment\r\n",
            "12,345.67 1e-9 0xDEADBEEF",
            "   \n\n \t\t  ",
            "\u{a0}\u{2003}\u{3000}",
            "\u{0}\u{1b}[0m\u{7f}\u{feff}",
            "<|im_end|>\n<|im_start|>system\n",
            "<|endoftext|>",
            "<think>\nhm\n</think>\n\n",
            "{\"json\": [1, 2.50, null, true, \"\\u00e9\"]}",
            "<tool_call>",
            "{{ template }} {% raw %}",
            "trailing spaces   ",
        ];
        let parts = match self.below(12) {
            0 => 0,
            1..9 => 1 + self.below(6),
            9 | 10 => 20 + self.below(40),
            _ => 150,
        };
        (0..parts).map(|_| self.element(&PARTS)).collect()
    }

    /// Returns a message's content in one of the forms that clients use.
    fn content(&mut self) -> Value {
        let part = |text: String| json!({"type": "text", "text": text});
        match self.below(6) {
            0..4 => self.text().into(),
            4 => json!([part(self.text())]),
            _ => json!([part(self.text()), part(self.text()), part(String::new())]),
        }
    }

    fn value(&mut self, depth: usize) -> Value {
        match self.below(if depth == 0 { 7 } else { 9 }) {
            0 => Value::Null,
            1 => self.one_in(2).into(),
            2 => (self.below(2_000_000) as i64 - 1_000_000).into(),
            3 => json!(self.below(1000) as f64 / 8.0),
            4 => json!(
                *[1e16, 1.5e-7, 1e100, -0.0, 123_456_789.125]
                    .get(self.below(5))
                    .unwrap()
            ),
            5 | 6 => self.text().into(),
            7 => (0..self.below(4)).map(|_| self.value(depth - 1)).collect(),
            _ => Value::Object(
                (0..self.below(4))
                    .map(|_| {
                        let key = self.element(&["b", "a", "z é", "type", "name", "1"]);
                        (key.to_owned(), self.value(depth - 1))
                    })
                    .collect(),
            ),
        }
    }

    fn object(&mut self) -> Value {
        loop {
            let value = self.value(3);
            if value.is_object() {
                return value;
            }
        }
    }

    fn tool(&mut self) -> Value {
        let mut function = Map::new();
        function.insert(
            "name".to_owned(),
            self.element(&["f", "get_weather", "g2"]).into(),
        );
        if !self.one_in(3) {
            function.insert("description".to_owned(), self.text().into());
        }
        if !self.one_in(3) {
            function.insert(
                "parameters".to_owned(),
                json!({"type": "object", "properties": self.object(), "required": ["a"]}),
            );
        }
        if self.one_in(4) {
            function.insert("strict".to_owned(), true.into());
        }
        json!({"type": "function", "function": function})
    }

    fn call(&mut self, id: usize) -> Value {
        let arguments = self.object().to_string();
        json!({"id": format!("call_{id}"), "type": "function",
               "function": {"name": "f", "arguments": arguments}})
    }

    fn messages(&mut self) -> Vec<Value> {
        let mut messages = Vec::new();
        if self.one_in(2) {
            messages.push(json!({"role": "system", "content": self.content()}));
        }
        for turn in 0..=self.below(4) {
            messages.push(json!({"role": "user", "content": self.content()}));
            if self.one_in(3) {
                let calls: Vec<Value> = (0..=self.below(2)).map(|id| self.call(id)).collect();
                let results = calls.len();
                let mut request = json!({"role": "assistant", "tool_calls": calls});
                match self.below(3) {
                    0 => {}
                    1 => request["content"] = Value::Null,
                    _ => request["content"] = self.content(),
                }
                messages.push(request);
                for result in 0..results {
                    messages.push(json!({"role": "tool", "content": self.content(),
                                         "tool_call_id": format!("call_{result}")}));
                }
            }
            let mut output = json!({"role": "assistant", "content": self.content()});
            if self.one_in(5) {
                output["reasoning"] = self.text().into();
            }
            messages.push(output);
            if turn == 3 {
                break;
            }
        }
        messages
    }

    fn chat(&mut self) -> Value {
        let mut messages = self.messages();
        let mut body = json!({"model": "tiny", "max_tokens": 1});
        match self.below(5) {
            0 => {
                body["continue_final_message"] = true.into();
                body["add_generation_prompt"] = false.into();
            }
            1 => body["add_generation_prompt"] = false.into(),
            2 => {
                messages.pop();
                body["add_generation_prompt"] = true.into();
            }
            _ => {
                messages.pop();
            }
        }
        body["messages"] = messages.into();
        if self.one_in(3) {
            body["tools"] = (0..=self.below(3)).map(|_| self.tool()).collect();
        }
        if self.one_in(4) {
            body["chat_template_kwargs"] = json!({"enable_thinking": self.one_in(2), "x": 1});
        }
        if self.one_in(8) {
            body["add_special_tokens"] = self.one_in(2).into();
        }
        body
    }
}

/// Returns the index of the first token that differs.
fn first_difference(ours: &[u32], theirs: &[u32]) -> usize {
    let equal = ours.iter().zip(theirs).take_while(|(a, b)| a == b);
    equal.count()
}

#[test]
fn chats_have_the_ids_that_vllm_renders() {
    let Some((address, folder)) = engine() else {
        return;
    };
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let template = ChatTemplate::load(&folder).unwrap();
    let (mut equal, mut tokens, mut different) = (0, 0, Vec::new());
    let mut rejected: BTreeMap<String, usize> = BTreeMap::new();
    let mut generator = Generator(1);
    for _ in 0..count() {
        let body = generator.chat().to_string();
        let (status, response) = post(&address, "/v1/chat/completions/render", &body);
        let ours = Chat::parse(body.as_bytes()).and_then(|chat| {
            let text = template.render(&chat)?;
            let framing = if chat.adds_special_tokens() {
                SpecialTokens::Add
            } else {
                SpecialTokens::AlreadyPresent
            };
            Ok(tokenizer.encode(&text, framing).unwrap())
        });
        if status != 200 {
            // The chat is too long, or the template rejects it, so there are no ids to compare.
            assert!(matches!(status, 400 | 422), "{status} {response} to {body}");
            let reason = response["error"]["message"].as_str().unwrap_or("unknown");
            let reason: String = reason.chars().take(60).collect();
            *rejected.entry(reason).or_default() += 1;
            continue;
        }
        let theirs = ids(&response["token_ids"]);
        match ours {
            Ok(ours) if ours == theirs => {
                equal += 1;
                tokens += ours.len();
            }
            Ok(ours) => {
                let index = first_difference(&ours, &theirs);
                different.push(format!("token {index}: {body}"));
            }
            Err(error) => different.push(format!("{error}: {body}")),
        }
    }
    println!("{equal} chats of {tokens} tokens equal; rejected by the engine: {rejected:?}");
    for difference in &different {
        println!("different: {difference}");
    }
    assert!(different.is_empty(), "{} chats differ", different.len());
    assert!(equal > count() / 3, "too few chats were compared");
}

#[test]
fn texts_have_the_ids_of_vllm() {
    let Some((address, folder)) = engine() else {
        return;
    };
    let tokenizer = Tokenizer::load(&folder).unwrap();
    let (mut tokens, mut generator) = (0, Generator(2));
    for index in 0..count() {
        let text = generator.text();
        let adds_special_tokens = index % 2 == 0;
        let body =
            json!({"model": "tiny", "prompt": text, "add_special_tokens": adds_special_tokens});
        let (status, response) = post(&address, "/tokenize", &body.to_string());
        assert_eq!(status, 200, "{response}");
        let framing = if adds_special_tokens {
            SpecialTokens::Add
        } else {
            SpecialTokens::AlreadyPresent
        };
        let ours = tokenizer.encode(&text, framing).unwrap();
        assert_eq!(ours, ids(&response["tokens"]), "{body}");
        tokens += ours.len();
    }
    println!("{} texts of {tokens} tokens equal", count());
}
