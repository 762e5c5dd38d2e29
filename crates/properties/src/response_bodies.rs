//! Bodies of responses that are not streamed, of all APIs.

use foresee_engine::output_text::parse_output_text_for;
use foresee_engine::request::Endpoint;
use foresee_engine::stream::{MAX_ID_BYTES, parse_response_id};
use foresee_engine::usage::parse_usage;

/// One API for each form of a body.
const ENDPOINTS: [Endpoint; 4] = [
    Endpoint::ChatCompletions,
    Endpoint::Responses,
    Endpoint::Messages,
    Endpoint::SglangGenerate,
];

/// Checks what is read in a body. Panics if white space around the body changes it, or if a text is
/// longer than the body.
pub fn check(body: &[u8]) {
    let padded = [b"\n ", body, b" \r\n"].concat();
    assert_eq!(parse_usage(&padded), parse_usage(body));
    let id = parse_response_id(body);
    assert_eq!(parse_response_id(&padded), id);
    assert!(id.is_none_or(|id| id.len() <= MAX_ID_BYTES.min(body.len())));
    for endpoint in ENDPOINTS {
        let read = |body| {
            let output = parse_output_text_for(endpoint, body);
            output.map(|output| output.text().to_owned())
        };
        let text = read(body);
        assert_eq!(read(&padded), text);
        assert!(text.is_none_or(|text| text.len() <= body.len()));
    }
}
