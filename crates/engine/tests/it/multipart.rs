//! The model's name in multipart bodies.
#![allow(clippy::unwrap_used, missing_docs)]

use foresee_engine::multipart::model_field;
use proptest::prelude::*;

/// Returns a body with these parts, each with a name and a value.
fn body(boundary: &str, parts: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, value) in parts {
        let head =
            format!("--{boundary}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n");
        body.extend_from_slice(head.as_bytes());
        body.extend_from_slice(value);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    body
}

const TYPE: &str = "multipart/form-data; boundary=x7";

#[test]
fn the_model_is_found_before_and_after_a_file() {
    let file: &[u8] = b"RIFF\x00\xff\r\n--x\r\n\r\n--x6\r\n";
    for parts in [
        [("model", b"whisper".as_slice()), ("file", file)],
        [("file", file), ("model", b"whisper")],
    ] {
        let found = model_field(TYPE, &body("x7", &parts));
        assert_eq!(found, Ok(Some("whisper".to_owned())));
    }
    assert_eq!(model_field(TYPE, &body("x7", &[("file", file)])), Ok(None));
    let empty = body("x7", &[("model", b"")]);
    assert_eq!(model_field(TYPE, &empty), Ok(Some(String::new())));
    // An engine could use the other one.
    let twice = body("x7", &[("model", b"a"), ("file", file), ("model", b"b")]);
    assert_eq!(model_field(TYPE, &twice).unwrap_err().param, Some("model"));
}

#[test]
fn an_empty_part_ends_at_the_line_end_that_begins_it() {
    let epilogue = b"--x7\r\n--x7--\r\nContent-Disposition: form-data; name=model\r\n\r\nx";
    assert_eq!(model_field(TYPE, epilogue), Ok(None));
    let next = b"--x7\r\n--x7\r\nContent-Disposition: form-data; name=model\r\n\r\nx\r\n--x7--";
    assert_eq!(model_field(TYPE, next), Ok(Some("x".to_owned())));
}

/// As `curl` and the libraries `requests` and `undici` write it.
#[test]
fn the_forms_of_real_clients_are_read() {
    let python = "--b1\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a; name=model.wav\"\r\nContent-Type: audio/wav\r\n\r\nxx\r\n--b1\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\nm\r\n--b1--\r\n";
    let quoted = "Multipart/Form-Data; charset=utf-8; BOUNDARY=\"b1\"";
    for content_type in [quoted, "multipart/form-data;boundary=b1"] {
        let found = model_field(content_type, python.as_bytes());
        assert_eq!(found, Ok(Some("m".to_owned())), "{content_type}");
    }
    let preamble =
        "ignored\r\n--b1 \r\ncontent-disposition:form-data;name=model\r\nx: y\r\n\r\nm\r\n--b1--";
    assert_eq!(
        model_field(quoted, preamble.as_bytes()),
        Ok(Some("m".to_owned()))
    );
}

#[test]
fn a_file_named_model_is_not_the_model() {
    let parts = "--x7\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model\"\r\n\r\nm\r\n--x7--\r\n";
    assert_eq!(model_field(TYPE, parts.as_bytes()), Ok(None));
    let other = "--x7\r\nContent-Disposition: attachment; name=\"model\"\r\n\r\nm\r\n--x7--\r\n";
    assert_eq!(model_field(TYPE, other.as_bytes()), Ok(None));
}

#[test]
fn invalid_forms_are_errors() {
    let long = format!("multipart/form-data; boundary={}", "x".repeat(71));
    for content_type in [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        &long,
    ] {
        assert!(model_field(content_type, b"").is_err(), "{content_type}");
    }
    let binary = body("x7", &[("model", b"\xff")]);
    assert_eq!(model_field(TYPE, &binary).unwrap_err().param, Some("model"));
    let long = body("x7", &[("model", &[b'm'; 1025])]);
    assert!(model_field(TYPE, &long).is_err());
}

proptest! {
    #[test]
    fn the_only_model_is_found_among_other_parts(
        parts in prop::collection::vec(
            ("(model|file|language|models)", prop::collection::vec(any::<u8>(), 0..40)),
            0..6,
        ),
        text in "[a-z/]{0,20}",
    ) {
        // A random value cannot contain the boundary, which has 20 characters.
        let boundary = "boundary-0123456789ab";
        let content_type = format!("multipart/form-data; boundary={boundary}");
        let parts: Vec<(&str, &[u8])> = parts
            .iter()
            .map(|(name, value)| match name.as_str() {
                "model" => ("model", text.as_bytes()),
                name => (name, value.as_slice()),
            })
            .collect();
        let models = parts.iter().filter(|(name, _)| *name == "model").count();
        let found = model_field(&content_type, &body(boundary, &parts));
        match models {
            0 => prop_assert_eq!(found, Ok(None)),
            1 => prop_assert_eq!(found, Ok(Some(text.clone()))),
            _ => prop_assert!(found.is_err()),
        }
    }

    #[test]
    fn no_bytes_cause_a_panic(
        content_type in "(multipart/form-data; boundary=|)[ -~]{0,20}",
        bytes in "(--|x7|\r\n|\n|content-disposition: form-data; name=|\"model\"|model|:|;|m| ){0,24}",
    ) {
        let _ = model_field(&content_type, bytes.as_bytes());
        let _ = model_field(TYPE, bytes.as_bytes());
        let whole = body("x7", &[("file", b"x"), ("model", b"m")]);
        let cut = bytes.len() % (whole.len() + 1);
        let _ = model_field(TYPE, &whole[..cut]);
    }
}
