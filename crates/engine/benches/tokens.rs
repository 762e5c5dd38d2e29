//! Benchmarks of tokenisation: `cargo bench -p foresee-engine --bench tokens`.
//!
//! The benchmarks run for each folder in `$FORESEE_TEST_VOCABULARIES` that contains a
//! `tokenizer.json`; without that variable, for the tiny vocabulary of the tests. Texts are source
//! code, and no text occurs twice. A chat has about 7,000 tokens in four turns between the
//! vocabulary's own markers.
//!
//! `cold` benchmarks use a tokenizer that was just loaded. All others use a warm tokenizer, which
//! has cached most words, whether or not it has seen the text.

#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::BytesCount;
use foresee_engine::tokenizer::{SpecialTokens, Tokenizer};

fn main() {
    divan::main();
}

/// The folders with a `tokenizer.json`, by name.
static VOCABULARIES: LazyLock<BTreeMap<String, PathBuf>> = LazyLock::new(|| {
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tiny_model");
    let Some(root) = std::env::var_os("FORESEE_TEST_VOCABULARIES") else {
        return BTreeMap::from([("tiny".to_owned(), tiny)]);
    };
    let folders = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let folders = folders.filter(|folder| folder.join("tokenizer.json").is_file());
    folders
        .map(|folder| (folder.file_name().unwrap().to_string_lossy().into(), folder))
        .collect()
});

/// Returns the names of the vocabularies.
fn names() -> Vec<&'static str> {
    VOCABULARIES.keys().map(String::as_str).collect()
}

/// A tokenizer under test, with a generator of texts that it has not seen.
struct Subject {
    tokenizer: Tokenizer,
    /// Special tokens at the start and the end of a turn.
    markers: (&'static str, &'static str),
    /// Number of texts generated so far.
    turns: usize,
}

/// The sources of this crate: prose, code and numbers.
static SOURCE: LazyLock<String> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect();
    files.sort();
    files
        .iter()
        .map(|file| fs::read_to_string(file).unwrap())
        .collect()
});

thread_local! {
    // Tokenizers are kept because loading a real vocabulary takes a second.
    static SUBJECTS: RefCell<BTreeMap<&'static str, &'static RefCell<Subject>>> = RefCell::default();
}

/// Returns the subject of a vocabulary, which is loaded at first use.
fn subject(name: &'static str) -> &'static RefCell<Subject> {
    SUBJECTS.with_borrow_mut(|subjects| {
        *subjects.entry(name).or_insert_with(|| {
            let tokenizer = Tokenizer::load(&VOCABULARIES[name]).unwrap();
            let markers = [
                ("<|im_start|>", "<|im_end|>"),
                ("<|start_header_id|>", "<|eot_id|>"),
                ("<｜User｜>", "<｜end▁of▁sentence｜>"),
                ("<start_of_turn>", "<end_of_turn>"),
                ("<|start|>", "<|end|>"),
            ];
            let is_one_token = |text: &str| {
                tokenizer
                    .encode(text, SpecialTokens::AlreadyPresent)
                    .unwrap()
                    .len()
                    == 1
            };
            let markers = markers.into_iter().find(|(begin, _)| is_one_token(begin));
            let subject = Subject {
                tokenizer,
                markers: markers.unwrap(),
                turns: 0,
            };
            Box::leak(Box::new(RefCell::new(subject)))
        })
    })
}

/// Returns the first character boundary in the sources at or after `start`.
fn boundary_from(start: usize) -> usize {
    (start..)
        .find(|&position| SOURCE.is_char_boundary(position))
        .unwrap()
}

impl Subject {
    /// Returns a new text of about `tokens` tokens.
    fn text(&mut self, tokens: usize) -> String {
        self.turns += 1;
        // A token has about four bytes. Some words occur only in this text, as in real text.
        let start = boundary_from(self.turns * 7919 % (SOURCE.len() / 2));
        let end = boundary_from((start + 4 * tokens).min(SOURCE.len()));
        let mut text = String::with_capacity(5 * tokens);
        for (line, words) in SOURCE[start..end].split_inclusive('\n').enumerate() {
            if line % 4 == 0 {
                text += &format!("n{:x} ", self.turns * 100_003 + line);
            }
            text += words;
        }
        text
    }

    /// Returns a new chat turn of about `tokens` tokens.
    fn turn(&mut self, tokens: usize) -> String {
        let (begin, end) = self.markers;
        format!("{begin}user\n{}{end}\n", self.text(tokens))
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.tokenizer
            .encode(text, SpecialTokens::AlreadyPresent)
            .unwrap()
    }
}

/// Measures the encoding of texts, each generated by `make` immediately before.
fn measure(
    bencher: Bencher<'_, '_>,
    name: &'static str,
    mut make: impl FnMut(&mut Subject) -> String,
) {
    let subject = subject(name);
    // Warm up: most words are known then, but no text is.
    for _ in 0..20 {
        let text = make(&mut subject.borrow_mut());
        subject.borrow().encode(&text);
    }
    bencher
        .with_inputs(|| make(&mut subject.borrow_mut()))
        .input_counter(|text: &String| BytesCount::of_str(text))
        .bench_local_refs(|text| subject.borrow().encode(text));
}

/// Measures the encoding of a tokenizer's first chat, of which it has encoded the first
/// `known_turns` of four turns before.
fn measure_cold(bencher: Bencher<'_, '_>, name: &'static str, known_turns: usize) {
    let subject = subject(name);
    bencher
        .with_inputs(|| {
            let mut subject = subject.borrow_mut();
            let turns: Vec<String> = (0..4).map(|_| subject.turn(1750)).collect();
            let fresh = Tokenizer::load(&VOCABULARIES[name]).unwrap();
            // Excludes the initialisation at first use from the measurement.
            fresh.encode("x", SpecialTokens::AlreadyPresent).unwrap();
            if known_turns > 0 {
                let known = turns[..known_turns].concat();
                fresh.encode(&known, SpecialTokens::AlreadyPresent).unwrap();
            }
            (fresh, turns.concat())
        })
        .input_counter(|(_, chat)| BytesCount::of_str(chat))
        .bench_local_refs(|(fresh, chat)| fresh.encode(chat, SpecialTokens::AlreadyPresent));
}

#[divan::bench(args = names(), sample_count = 10, sample_size = 1)]
fn cold_chat_of_7000_tokens(bencher: Bencher<'_, '_>, name: &'static str) {
    measure_cold(bencher, name, 0);
}

#[divan::bench(args = names(), sample_count = 10, sample_size = 1)]
fn cold_chat_of_7000_tokens_first_half_known(bencher: Bencher<'_, '_>, name: &'static str) {
    measure_cold(bencher, name, 2);
}

/// A text completion, which has no markers to cut at.
#[divan::bench(args = names())]
fn text_of_7000_tokens(bencher: Bencher<'_, '_>, name: &'static str) {
    measure(bencher, name, |subject| subject.text(7000));
}

#[divan::bench(args = names())]
fn chat_of_7000_tokens_all_new(bencher: Bencher<'_, '_>, name: &'static str) {
    measure(bencher, name, |subject| {
        (0..4).map(|_| subject.turn(1750)).collect()
    });
}

#[divan::bench(args = names())]
fn chat_of_7000_tokens_first_half_known(bencher: Bencher<'_, '_>, name: &'static str) {
    let known: String = {
        let mut subject = subject(name).borrow_mut();
        (0..2).map(|_| subject.turn(1750)).collect()
    };
    measure(bencher, name, |subject| {
        let new: String = (0..2).map(|_| subject.turn(1750)).collect();
        format!("{known}{new}")
    });
}

#[divan::bench(args = names())]
fn chat_of_7000_tokens_all_known(bencher: Bencher<'_, '_>, name: &'static str) {
    let known: String = {
        let mut subject = subject(name).borrow_mut();
        (0..4).map(|_| subject.turn(1750)).collect()
    };
    measure(bencher, name, |_| known.clone());
}

/// One message that grows: its first half is known, but there is no marker to cut at.
#[divan::bench(args = names())]
fn chat_of_7000_tokens_one_growing_message(bencher: Bencher<'_, '_>, name: &'static str) {
    let known = subject(name).borrow_mut().text(3500);
    measure(bencher, name, |subject| {
        let (begin, end) = subject.markers;
        format!("{begin}user\n{known}{}{end}\n", subject.text(3500))
    });
}
