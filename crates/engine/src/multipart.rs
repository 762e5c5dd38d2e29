//! The model's name in a `multipart/form-data` body, as audio requests have it.
//!
//! Only the field `model` is read; the file in the body is skipped without a copy.

use memchr::memmem;

use crate::body_error::BodyError;

/// Maximum length of a boundary by RFC 2046, in bytes.
const MAX_BOUNDARY_BYTES: usize = 70;
/// Maximum length of a part's head, in bytes. A part with a longer head is skipped.
const MAX_HEAD_BYTES: usize = 8 << 10;
/// Maximum length of a model's name, in bytes.
const MAX_MODEL_BYTES: usize = 1 << 10;
/// Maximum number of parts that are looked at.
const MAX_PARTS: usize = 1_000;

/// Returns the value of the field `model`; `None` if the body has no such field among its first
/// 1,000 parts. `content_type` is the value of the header `Content-Type`.
///
/// # Errors
/// If the content type is not `multipart/form-data` with a boundary, the body has two such fields, or the
/// model's name is not UTF-8 or longer than 1 KiB.
pub fn model_field(content_type: &str, body: &[u8]) -> Result<Option<String>, BodyError> {
    find_model(content_type, body)?.map(parse_model).transpose()
}

/// Returns the bytes of the field `model`: see [`model_field`].
///
/// # Errors
/// If the content type is not `multipart/form-data` with a boundary, or the body has two such fields, of
/// which an engine could use the other one.
pub(crate) fn find_model<'b>(
    content_type: &str,
    body: &'b [u8],
) -> Result<Option<&'b [u8]>, BodyError> {
    let boundary = boundary(content_type).ok_or_else(|| BodyError {
        message: "The content type must be `multipart/form-data` with a boundary of at most 70 \
                  characters."
            .to_owned(),
        param: None,
    })?;
    let delimiter = [b"--", boundary.as_bytes()].concat();
    let part_end = [b"\r\n", delimiter.as_slice()].concat();
    let finder = memmem::Finder::new(&part_end);
    // The first part may follow a preamble.
    let mut rest = match body.strip_prefix(delimiter.as_slice()) {
        Some(rest) => rest,
        None => match finder.find(body) {
            Some(start) => &body[start + part_end.len()..],
            None => return Ok(None),
        },
    };
    let mut model = None;
    for _ in 0..MAX_PARTS {
        // The last delimiter is followed by `--`, any other by a line end.
        let Some(part) = skip_line(rest) else {
            return Ok(model);
        };
        // An empty part may have only the line end that is before it.
        if let Some(after) = part.strip_prefix(delimiter.as_slice()) {
            rest = after;
            continue;
        }
        // The line end before the delimiter belongs to the delimiter.
        let end = finder.find(part);
        let content = &part[..end.unwrap_or(part.len())];
        if let Some(value) = model_value(content)
            && model.replace(value).is_some()
        {
            return Err(BodyError {
                message: "The body has two fields `model`; send one.".to_owned(),
                param: Some("model"),
            });
        }
        match end {
            Some(end) => rest = &part[end + part_end.len()..],
            None => return Ok(model),
        }
    }
    Ok(model)
}

/// Returns the boundary in a content type; `None` if it is not `multipart/form-data`, or has no
/// valid boundary.
fn boundary(content_type: &str) -> Option<&str> {
    let (kind, parameters) = content_type.split_once(';')?;
    if !kind.trim().eq_ignore_ascii_case("multipart/form-data") {
        return None;
    }
    let boundary = parameter(parameters, "boundary")?;
    (1..=MAX_BOUNDARY_BYTES)
        .contains(&boundary.len())
        .then_some(boundary)
}

/// Returns the value of a parameter in `name=value; name="value"`, without its quotes.
fn parameter<'p>(parameters: &'p str, name: &str) -> Option<&'p str> {
    let mut rest = parameters;
    loop {
        let (key, after) = rest.split_once('=')?;
        let key = key.trim_matches([' ', '\t', ';']);
        let after = after.trim_start();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"')?,
            None => after.split_once(';').unwrap_or((after, "")),
        };
        if key.eq_ignore_ascii_case(name) {
            return Some(value.trim_end());
        }
        rest = next;
    }
}

/// Returns the bytes after the rest of a delimiter's line, which may be white space; `None` if the
/// delimiter is the last one or its line does not end.
fn skip_line(rest: &[u8]) -> Option<&[u8]> {
    let end = memmem::find(rest.get(..MAX_HEAD_BYTES).unwrap_or(rest), b"\r\n")?;
    let line = &rest[..end];
    line.iter()
        .all(|byte| matches!(byte, b' ' | b'\t'))
        .then(|| &rest[end + 2..])
}

/// Returns the value of a part, if it is the field `model`.
fn model_value(part: &[u8]) -> Option<&[u8]> {
    let head_end = memmem::find(part.get(..MAX_HEAD_BYTES).unwrap_or(part), b"\r\n\r\n")?;
    let head = std::str::from_utf8(&part[..head_end]).ok()?;
    let is_model = head.split("\r\n").any(|line| {
        let Some((name, value)) = line.split_once(':') else {
            return false;
        };
        let disposition = value.split_once(';');
        name.trim().eq_ignore_ascii_case("content-disposition")
            && disposition.is_some_and(|(kind, parameters)| {
                kind.trim().eq_ignore_ascii_case("form-data")
                    && parameter(parameters, "name") == Some("model")
            })
    });
    is_model.then(|| &part[head_end + 4..])
}

/// Parses the value of the field.
fn parse_model(value: &[u8]) -> Result<String, BodyError> {
    let model = std::str::from_utf8(value).ok();
    match model.filter(|model| model.len() <= MAX_MODEL_BYTES) {
        Some(model) => Ok(model.to_owned()),
        None => Err(BodyError {
            message: format!("`model` must be a text of at most {MAX_MODEL_BYTES} bytes."),
            param: Some("model"),
        }),
    }
}
