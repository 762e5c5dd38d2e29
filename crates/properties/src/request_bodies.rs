//! Bodies of requests, of all APIs.

use std::num::NonZeroU32;

use foresee_core::batch::MAX_BATCH_PROMPTS;
use foresee_engine::chat_template::ChatTemplate;
use foresee_engine::conversion::{Conversion, Dialect};
use foresee_engine::prompt_encoder::parse_chat;
use foresee_engine::request::{ApiRequest, BodyError, Endpoint, Prompt};

/// All APIs.
const ENDPOINTS: [Endpoint; 15] = [
    Endpoint::ChatCompletions,
    Endpoint::Completions,
    Endpoint::Embeddings,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::MessagesCountTokens,
    Endpoint::VllmGenerate,
    Endpoint::SglangGenerate,
    Endpoint::Rerank,
    Endpoint::Score,
    Endpoint::Classify,
    Endpoint::Pooling,
    Endpoint::Tokenize,
    Endpoint::Detokenize,
    Endpoint::Other,
];

/// A template that writes all messages and tools.
const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}\
                        {% for tool in tools or [] %}{{ tool.function | tojson }}{% endfor %}";

/// Maximum bytes of hashed text for each byte of a body. The shortest item of a body, `{},`, becomes
/// a message with a role.
const MAX_TEXT_PER_BYTE: usize = 16;

/// Maximum bytes of a rendered chat for each byte of a body. The shortest tool, `{},`, is rendered
/// with all fields of a function, and SGLang writes a constant text before some messages.
const MAX_RENDERED_PER_BYTE: usize = 64;

/// Bytes that a rendered chat and a hashed text may have in addition.
const FIXED_BYTES: usize = 256;

/// Tokens that are assumed for one image or other medium.
const TOKENS_PER_MEDIUM: usize = 1024;

/// Checks the parse of a body by all APIs, and the chats that it is rendered as. Panics if two
/// parses differ, if white space around or between the values of the body changes the result, or if
/// the result is larger than the body allows.
pub fn check(body: &[u8]) {
    let spaced = with_spaces(body);
    for endpoint in ENDPOINTS {
        let parsed = ApiRequest::parse(endpoint, body);
        assert_eq!(parsed, ApiRequest::parse(endpoint, body));
        match parsed {
            Ok(request) => {
                check_size(&request, body.len());
                check_sequences(&request, body.len());
                check_spaces(endpoint, &request, body, &spaced);
            }
            Err(error) => check_error(&error, body),
        }
        if endpoint.has_chat_template() {
            check_chat(endpoint, body);
        }
    }
}

/// Checks that the prompts and the other texts are bounded by the body.
fn check_size(request: &ApiRequest, body_bytes: usize) {
    let (mut text_bytes, mut tokens) = (0, 0);
    for prompt in request.all_prompts() {
        match prompt {
            Prompt::Text(text) => text_bytes += text.len(),
            Prompt::Tokens(ids) => tokens += ids.len(),
        }
    }
    assert!(text_bytes <= MAX_TEXT_PER_BYTE * body_bytes + FIXED_BYTES);
    assert!(tokens <= body_bytes);
    assert!(request.model.len() <= body_bytes);
    assert!(request.prompts >= 1 && request.choices >= 1);
    assert!(request.prompts as usize <= body_bytes.max(1));
    assert!(request.rest.len() < MAX_BATCH_PROMPTS);
    // A query counts once for each document.
    let squared = body_bytes.saturating_mul(body_bytes);
    assert!(request.unhashed.bytes <= MAX_TEXT_PER_BYTE * squared + FIXED_BYTES);
    assert!(request.unhashed.tokens <= TOKENS_PER_MEDIUM * squared.max(1));
}

/// Checks that the sequences to book are a function of the request, and bounded.
fn check_sequences(request: &ApiRequest, body_bytes: usize) {
    for (block_size, bytes_per_token) in [(16, 4.0), (1, 0.25)] {
        let block_size = NonZeroU32::new(block_size).unwrap_or(NonZeroU32::MIN);
        let sequences = request.sequences(&[], block_size, bytes_per_token);
        assert_eq!(
            sequences,
            request.clone().sequences(&[], block_size, bytes_per_token)
        );
        assert!(sequences.rest.len() < MAX_BATCH_PROMPTS);
        for sequence in std::iter::once(&sequences.first).chain(&sequences.rest) {
            let blocks = sequence.hashes().len();
            assert!(blocks <= MAX_TEXT_PER_BYTE * body_bytes + FIXED_BYTES);
            assert!(blocks <= sequence.blocks() as usize);
        }
        let continuation = request.continuation(None, block_size, bytes_per_token);
        let is_single = request.prompts == 1 && request.choices == 1;
        assert!(continuation.is_none() || is_single && request.is_fully_hashed());
    }
}

/// Checks that the request does not depend on the white space of its JSON. `spaced` is the body with
/// more white space.
///
/// Tools and calls of tools are hashed as they were written, and a number of unknown items by their
/// length. A body that may contain one of them is only checked with white space around it.
fn check_spaces(endpoint: Endpoint, request: &ApiRequest, body: &[u8], spaced: &[u8]) {
    let padded = [b" \n", body, b"\r\n\t "].concat();
    assert_eq!(
        ApiRequest::parse(endpoint, &padded).as_ref(),
        Ok(request),
        "white space around the body of {endpoint:?}"
    );
    let has_raw_text = ["tool", "function", "\\"]
        .iter()
        .any(|text| contains(body, text.as_bytes()));
    if has_raw_text {
        return;
    }
    let Ok(mut same) = ApiRequest::parse(endpoint, spaced) else {
        panic!("white space in the body of {endpoint:?} makes it invalid");
    };
    same.unhashed = request.unhashed;
    same.media_hash = request.media_hash;
    assert_eq!(&same, request, "white space in the body of {endpoint:?}");
}

/// Checks that an error is a sentence of bounded length, and quotes no long part of the body.
fn check_error(error: &BodyError, body: &[u8]) {
    assert!(error.message.ends_with('.'), "{}", error.message);
    assert!(error.message.len() < 512, "{}", error.message);
    if let Some(param) = error.param {
        assert!(error.message.contains(param), "{}", error.message);
    }
    assert!(body.len() < 512 || !error.message.as_bytes().ends_with(body));
}

/// Checks that a chat is rendered as a function of the body, to a bounded text.
fn check_chat(endpoint: Endpoint, body: &[u8]) {
    let Ok(template) = ChatTemplate::from_source(TEMPLATE) else {
        panic!("the template is invalid");
    };
    for dialect in [Dialect::Vllm, Dialect::Sglang] {
        for merges_system in [false, true] {
            let conversion = Conversion {
                dialect,
                merges_system,
            };
            let render = || {
                let chat = parse_chat(endpoint, conversion, body);
                chat.and_then(|chat| template.render(&chat))
            };
            let Ok(text) = render() else {
                continue;
            };
            assert_eq!(render().ok().as_ref(), Some(&text));
            assert!(text.len() <= MAX_RENDERED_PER_BYTE * body.len() + FIXED_BYTES);
        }
    }
}

/// Returns JSON with white space after each structural character that is not part of a string.
fn with_spaces(json: &[u8]) -> Vec<u8> {
    let mut spaced = Vec::with_capacity(2 * json.len());
    let (mut in_string, mut is_escaped) = (false, false);
    for &byte in json {
        spaced.push(byte);
        if in_string {
            in_string = byte != b'"' || is_escaped;
            is_escaped = byte == b'\\' && !is_escaped;
        } else if byte == b'"' {
            in_string = true;
        } else if b"{}[]:,".contains(&byte) {
            spaced.extend_from_slice(b"\n ");
        }
    }
    spaced
}

/// Returns whether `bytes` contain `part`, which must not be empty.
fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}
