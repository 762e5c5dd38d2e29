//! Ids equal those of the reference library, and the cache changes none.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::fs;
use std::path::Path;

use crate::TINY;
use foresee_engine::tokenizer::{Framing, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Reference {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

/// Compares with a folder's `reference.jsonl`, and says how many texts and tokens were equal.
fn compare(folder: &Path) -> (usize, usize) {
    let tokenizer = Tokenizer::load(folder).unwrap();
    let (mut texts, mut tokens) = (0, 0);
    for line in fs::read_to_string(folder.join("reference.jsonl"))
        .unwrap()
        .lines()
    {
        let reference: Reference = serde_json::from_str(line).unwrap();
        // Twice: from the cache, the second time.
        for _ in 0..2 {
            let ids = tokenizer.encode(&reference.text, Framing::InText).unwrap();
            assert_eq!(ids, reference.plain, "{:?}", reference.text);
            let ids = tokenizer.encode(&reference.text, Framing::Added).unwrap();
            assert_eq!(ids, reference.special, "{:?}", reference.text);
        }
        texts += 1;
        tokens += reference.plain.len();
    }
    (texts, tokens)
}

#[test]
fn ids_are_those_of_the_reference_library() {
    let (texts, tokens) = compare(Path::new(TINY));
    assert!(texts >= 90 && tokens >= 10_000);
}

/// Any number of real vocabularies: each folder in `$FORESEE_TEST_VOCABULARIES` holds a
/// `tokenizer.json` and the `reference.jsonl` that `tests/tiny_model/make.py` made for it.
#[test]
fn ids_of_real_vocabularies_are_those_of_the_reference_library() {
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
fn a_file_and_its_folder_are_the_same_tokenizer() {
    let folder = Tokenizer::load(Path::new(TINY)).unwrap();
    let file = Tokenizer::load(&Path::new(TINY).join("tokenizer.json")).unwrap();
    let text = "<|im_start|>user\nHello<|im_end|>\n";
    assert_eq!(
        folder.encode(text, Framing::Added).unwrap(),
        file.encode(text, Framing::Added).unwrap()
    );
}

/// As transformers has it since release 5, and so vLLM and SGLang.
#[test]
fn what_frames_a_text_is_in_the_file_alone() {
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
        tokenizer.encode("Hi", Framing::Added).unwrap(),
        tokenizer.encode("Hi", Framing::InText).unwrap()
    );
}

#[test]
fn what_is_no_tokenizer_is_refused() {
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
    tokenizer.encode(&turn, Framing::InText).unwrap();
    let (reused, encoded) = tokenizer.reused_and_encoded_bytes();
    let next = format!("{turn}<|im_start|>assistant\nA short answer.<|im_end|>\n");
    tokenizer.encode(&next, Framing::InText).unwrap();
    let (reused_next, encoded_next) = tokenizer.reused_and_encoded_bytes();
    assert!(reused_next - reused > 5_000);
    assert!(encoded_next - encoded < 100);
}

/// Texts in which special tokens, broken ones, and spaces around them are frequent.
fn chat_like() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("<|im_start|>".to_owned()),
        Just("<|im_end|>".to_owned()),
        Just("<tool_call>".to_owned()),
        Just("<|im_".to_owned()),
        Just("end|>".to_owned()),
        "[ \n\t]{0,3}",
        "[a-z ']{0,12}",
        "\\PC{0,6}",
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_cache_changes_no_ids(texts in prop::collection::vec(chat_like(), 1..8)) {
        thread_local! {
            // Its cache is full of what the cases before have left.
            static WARM: Tokenizer = Tokenizer::load(Path::new(TINY)).unwrap();
        }
        for (index, text) in texts.iter().enumerate() {
            // A later text begins with an earlier one.
            let text = format!("{}{text}", &texts[index / 2]);
            let cold = Tokenizer::load(Path::new(TINY)).unwrap();
            let expected = cold.encode(&text, Framing::Added).unwrap();
            for _ in 0..2 {
                let warm = WARM.with(|warm| warm.encode(&text, Framing::Added).unwrap());
                prop_assert_eq!(&warm, &expected);
            }
        }
    }
}
