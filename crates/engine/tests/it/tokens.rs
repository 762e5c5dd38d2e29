//! Token ids are equal to those of the reference library, with and without the tokenizer's cache.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::Path;

use crate::TINY;
use foresee_engine::tokenizer::{SpecialTokens, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

/// Compares a folder's tokenizer with its `reference.jsonl`. Returns the numbers of texts and
/// tokens.
fn compare(folder: &Path) -> (usize, usize) {
    let tokenizer = Tokenizer::load(folder).unwrap();
    let (mut texts, mut tokens) = (0, 0);
    for line in fs::read_to_string(folder.join("reference.jsonl"))
        .unwrap()
        .lines()
    {
        let reference: Reference = serde_json::from_str(line).unwrap();
        // The second time, the ids come from the cache.
        for _ in 0..2 {
            let ids = tokenizer
                .encode(&reference.text, SpecialTokens::AlreadyPresent)
                .unwrap();
            assert_eq!(ids, reference.plain, "{:?}", reference.text);
            let ids = tokenizer
                .encode(&reference.text, SpecialTokens::Add)
                .unwrap();
            assert_eq!(ids, reference.special, "{:?}", reference.text);
        }
        texts += 1;
        tokens += reference.plain.len();
    }
    (texts, tokens)
}

#[test]
fn ids_equal_those_of_the_reference_library() {
    let (texts, tokens) = compare(Path::new(TINY));
    assert!(texts >= 90 && tokens >= 10_000);
}

/// Optional test with real vocabularies: each folder in `$FORESEE_TEST_VOCABULARIES` contains a
/// `tokenizer.json` and its `reference.jsonl`, written by `tests/tiny_model/make.py`.
#[test]
fn ids_of_real_vocabularies_equal_those_of_the_reference_library() {
    let Ok(root) = std::env::var("FORESEE_TEST_VOCABULARIES") else {
        return;
    };
    for folder in fs::read_dir(root).unwrap() {
        let folder = folder.unwrap().path();
        if folder.join("reference.jsonl").is_file() {
            let (texts, tokens) = compare(&folder);
            println!("{}: {texts} texts, {tokens} tokens equal", folder.display());
        }
    }
}

#[test]
fn a_file_and_its_folder_give_the_same_tokenizer() {
    let folder = Tokenizer::load(Path::new(TINY)).unwrap();
    let file = Tokenizer::load(&Path::new(TINY).join("tokenizer.json")).unwrap();
    let text = "<|im_start|>user\nHello<|im_end|>\n";
    assert_eq!(
        folder.encode(text, SpecialTokens::Add).unwrap(),
        file.encode(text, SpecialTokens::Add).unwrap()
    );
}

/// Transformers behaves like this since release 5, and so do vLLM and SGLang.
#[test]
fn only_tokenizer_json_determines_the_added_special_tokens() {
    let folder = std::env::temp_dir().join(format!("foresee-tokens-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let mut file: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new(TINY).join("tokenizer.json")).unwrap()).unwrap();
    file["post_processor"] = serde_json::Value::Null;
    fs::write(folder.join("tokenizer.json"), file.to_string()).unwrap();
    let config = r#"{"add_bos_token": true, "bos_token": "<|endoftext|>"}"#;
    fs::write(folder.join("tokenizer_config.json"), config).unwrap();
    let tokenizer = Tokenizer::load(&folder).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(
        tokenizer.encode("Hi", SpecialTokens::Add).unwrap(),
        tokenizer
            .encode("Hi", SpecialTokens::AlreadyPresent)
            .unwrap()
    );
}

#[test]
fn a_file_without_a_tokenizer_is_rejected() {
    let missing = Tokenizer::load(Path::new("/nowhere")).unwrap_err();
    assert!(matches!(missing, TokenizerError::Missing(_)), "{missing}");
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let unusable = Tokenizer::load(&manifest).unwrap_err();
    assert!(
        matches!(unusable, TokenizerError::Unusable { .. }),
        "{unusable}"
    );
}

#[test]
fn earlier_turns_are_not_tokenised_again() {
    let tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
    let turn = format!(
        "<|im_start|>user\n{}<|im_end|>\n",
        "many words ".repeat(500)
    );
    tokenizer
        .encode(&turn, SpecialTokens::AlreadyPresent)
        .unwrap();
    let (reused, encoded) = tokenizer.reused_and_encoded_bytes();
    let next = format!("{turn}<|im_start|>assistant\nA short answer.<|im_end|>\n");
    tokenizer
        .encode(&next, SpecialTokens::AlreadyPresent)
        .unwrap();
    let (reused_next, encoded_next) = tokenizer.reused_and_encoded_bytes();
    assert!(reused_next - reused > 5_000);
    assert!(encoded_next - encoded < 100);
}

/// Returns texts in which special tokens, parts of special tokens, and spaces around them are
/// frequent.
fn chat_like() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        Just("<|im_start|>".to_owned()),
        Just("<|im_end|>".to_owned()),
        Just("<tool_call>".to_owned()),
        Just("<|im_".to_owned()),
        Just("end|>".to_owned()),
        "[ \n\t]{0,3}",
        "[a-z ']{0,12}",
        "\\PC{0,6}",
    ];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_cache_changes_no_ids(texts in prop::collection::vec(chat_like(), 1..8)) {
        thread_local! {
            // A tokenizer whose cache contains the texts of earlier cases.
            static WARM: Tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
        }
        for (index, text) in texts.iter().enumerate() {
            // A later text starts with an earlier one.
            let text = format!("{}{text}", &texts[index / 2]);
            let cold = Tokenizer::load(Path::new(TINY)).unwrap();
            let expected = cold.encode(&text, SpecialTokens::Add).unwrap();
            for _ in 0..2 {
                let warm = WARM.with(|warm| warm.encode(&text, SpecialTokens::Add).unwrap());
                prop_assert_eq!(&warm, &expected);
            }
        }
    }
}
