//! Rendering of chats, equal to the rendering of engines.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::Path;

use crate::TINY;
use foresee_engine::chat::Chat;
use foresee_engine::chat_template::{ChatTemplate, TemplateError};
use proptest::prelude::*;
use serde_json::{Value, json};

fn render_with(template: &str, body: &Value) -> Result<String, TemplateError> {
    let chat = Chat::parse(body.to_string().as_bytes())?;
    ChatTemplate::from_source(template)?.render(&chat)
}

fn render(template: &str, body: &Value) -> String {
    render_with(template, body).unwrap_or_else(|error| panic!("{body}: {error}"))
}

#[test]
fn a_conversation_is_rendered_to_text() {
    let template = ChatTemplate::load(Path::new(TINY)).unwrap();
    let body = json!({"model": "m", "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": ""}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": null},
    ]});
    let chat = Chat::parse(body.to_string().as_bytes()).unwrap();
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne\ntwo<|im_end|>\n\
                <|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(template.render(&chat).unwrap(), text);
    assert!(!chat.adds_special_tokens());
}

#[test]
fn the_last_message_can_be_continued() {
    let body = json!({"messages": [{"role": "assistant", "content": "It is "}],
        "continue_final_message": true, "add_generation_prompt": false});
    let kept = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    assert_eq!(render(kept, &body), "[It is ");
    let stripped = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}";
    assert_eq!(render(stripped, &body), "[It is");
    assert!(render_with("nothing", &body).is_err());
}

#[test]
fn tools_and_tool_calls_are_formatted_as_python_formats_them() {
    let body = r#"{"messages": [{"role": "assistant", "content": "", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"b\": 1e20, \"a\": [1.0, true, null, \"é\"]}"}},
            {"id": "2", "type": "function", "function": {"name": "g", "arguments": "no JSON"}}]}],
        "tools": [{"type": "function", "function": {"strict": true, "parameters": {"z": {}, "a": 1}, "name": "f"}}]}"#;
    let chat = Chat::parse(body.as_bytes()).unwrap();
    let template = ChatTemplate::from_source(
        "{{ tools | tojson }}{% for call in messages[0].tool_calls %} \
         {{ call.function.arguments | tojson }}{% endfor %}",
    );
    assert_eq!(
        template.unwrap().render(&chat).unwrap(),
        r#"[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"z": {}, "a": 1}, "strict": true}}] {"b": 1e+20, "a": [1.0, true, null, "é"]} {}"#
    );
}

#[test]
fn tojson_supports_the_options_of_python() {
    let body =
        json!({"messages": [], "chat_template_kwargs": {"x": {"b": ["é", {}], "a": "\u{7f}\n"}}});
    let rendered = |options: &str| render(&format!("{{{{ x | tojson({options}) }}}}"), &body);
    // `json!` sorts the keys, so `sort_keys` has no visible effect here.
    assert_eq!(rendered(""), "{\"a\": \"\u{7f}\\n\", \"b\": [\"é\", {}]}");
    assert_eq!(
        rendered("separators=(',', ':')"),
        "{\"a\":\"\u{7f}\\n\",\"b\":[\"é\",{}]}"
    );
    assert_eq!(
        rendered("indent=2, ensure_ascii=true"),
        "{\n  \"a\": \"\u{7f}\\n\",\n  \"b\": [\n    \"\\u00e9\",\n    {}\n  ]\n}"
    );
    assert_eq!(rendered("sort_keys=true"), rendered(""));
}

#[test]
fn a_template_that_reads_content_parts_gets_parts() {
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let parts = "{% for message in messages[0:] %}{% for part in message['content'] %}\
                 {{ part.text }}!{% endfor %}{% endfor %}";
    assert_eq!(render(parts, &body), "Hi!");
    let text = "{% for message in messages %}{{ message.content }}{% endfor %}";
    assert_eq!(render(text, &body), "Hi");
}

#[test]
fn generation_tags_for_training_render_nothing() {
    let template = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration %}.{% endfor %}";
    let body = json!({"messages": [{"role": "assistant", "content": "Hi"}]});
    assert_eq!(render(template, &body), "Hi.");
}

#[test]
fn a_chat_that_cannot_be_rendered_is_an_error_with_its_reason() {
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
    assert!(
        matches!(render_with("", &image), Err(TemplateError::Media(kind)) if kind == "image_url")
    );
    let rejected = render_with("{{ raise_exception('no way') }}", &json!({"messages": []}));
    assert!(rejected.unwrap_err().to_string().contains("no way"));
    let own_template = json!({"messages": [], "chat_template": "mine"});
    assert!(matches!(
        render_with("", &own_template),
        Err(TemplateError::Chat(_))
    ));
    assert!(ChatTemplate::from_source("{% for %}").is_err());
    let nowhere = ChatTemplate::load(Path::new("/nowhere"));
    assert!(matches!(nowhere, Err(TemplateError::Missing)));
}

/// Optional test with real templates: each folder in `$FORESEE_TEST_VOCABULARIES` contains a
/// `tokenizer_config.json` and a `chats.jsonl`. Each line of the latter has a `body` and the `text`
/// that Jinja rendered, or null if Jinja failed.
#[test]
fn real_templates_render_as_jinja_does() {
    let Ok(root) = std::env::var("FORESEE_TEST_VOCABULARIES") else {
        return;
    };
    for folder in fs::read_dir(root).unwrap() {
        let folder = folder.unwrap().path();
        let Ok(lines) = fs::read_to_string(folder.join("chats.jsonl")) else {
            continue;
        };
        let template = ChatTemplate::load(&folder).unwrap();
        let mut rendered = 0;
        for line in lines.lines() {
            let line: Line<'_> = serde_json::from_str(line).unwrap();
            let chat = Chat::parse(line.body.get().as_bytes()).unwrap();
            match (template.render(&chat), line.text) {
                (Ok(text), Some(expected)) => assert_eq!(text, expected, "{}", line.body),
                (Err(_), None) => {}
                (actual, expected) => panic!("{}: {actual:?}, not {expected:?}", line.body),
            }
            rendered += 1;
        }
        println!("{}: {rendered} chats equal", folder.display());
    }
}

#[derive(serde::Deserialize)]
struct Line<'l> {
    #[serde(borrow)]
    body: &'l serde_json::value::RawValue,
    text: Option<String>,
}

proptest! {
    #[test]
    fn no_template_and_no_chat_causes_a_panic(
        template in "(\\{%|%\\}|\\{\\{|\\}\\}|-| |for|in|set|=|messages|\\[|\\]|:|\\||generation|x|\\.content){0,12}",
        body in "[\\[\\]{}:,\"a-z ]{0,40}",
    ) {
        let chat = Chat::parse(br#"{"messages": [{"role": "user", "content": "x"}]}"#).unwrap();
        if let Ok(template) = ChatTemplate::from_source(&template) {
            let _ = template.render(&chat);
        }
        let _ = Chat::parse(body.as_bytes());
    }
}
