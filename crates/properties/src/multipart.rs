//! Multipart bodies with the name of a model.

use foresee_engine::multipart::model_field;

/// Content type of the bodies in the corpus that state none.
const CONTENT_TYPE: &str = "multipart/form-data; boundary=x7";

/// Delimiter that ends a body of [`CONTENT_TYPE`].
const END: &[u8] = b"\r\n--x7--\r\n";

/// Maximum length of a model's name, in bytes.
const MAX_MODEL_BYTES: usize = 1 << 10;

/// Checks the model's name in a body, with its own content type and with a usual one. The first
/// line of the bytes is the content type.
///
/// Panics if the name is not a part of the body, is too long, or changes if the body's last
/// delimiter is added or bytes follow that delimiter.
pub fn check(bytes: &[u8]) {
    let line_end = bytes.iter().position(|&byte| byte == b'\n');
    let (head, body) = bytes.split_at(line_end.unwrap_or(0));
    let body = body.strip_prefix(b"\n").unwrap_or(body);
    if let Ok(content_type) = std::str::from_utf8(head) {
        check_name(content_type, body);
    }
    check_name(CONTENT_TYPE, body);
    let found = model_field(CONTENT_TYPE, body);
    let ended = [body, END].concat();
    assert_eq!(model_field(CONTENT_TYPE, &ended), found);
    let followed = [
        &ended,
        &b"Content-Disposition: form-data; name=model\r\n\r\nx"[..],
    ]
    .concat();
    assert_eq!(model_field(CONTENT_TYPE, &followed), found);
}

/// Checks that a model's name is a part of the body, and not too long.
fn check_name(content_type: &str, body: &[u8]) {
    let found = model_field(content_type, body);
    assert_eq!(found, model_field(content_type, body));
    let Ok(Some(model)) = found else {
        return;
    };
    assert!(model.len() <= MAX_MODEL_BYTES);
    let is_part = |window: &[u8]| window == model.as_bytes();
    assert!(model.is_empty() || body.windows(model.len()).any(is_part));
}
