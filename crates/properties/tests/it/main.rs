//! A short run of all fuzz targets: the committed corpus, and mutations of it.
#![allow(clippy::unwrap_used, missing_docs)]

mod mutations;

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use foresee_properties::{TARGETS, Target};
use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::mutations::mutate;

/// The folder of the fuzz targets.
const FUZZ: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz");

/// Number of mutations for each target, unless [`MUTATIONS_VARIABLE`] sets another.
const MUTATIONS: usize = 500;

/// Environment variable with the number of mutations for each target, for a longer run.
const MUTATIONS_VARIABLE: &str = "FORESEE_TEST_MUTATIONS";

/// Maximum length of a file in the corpus, in bytes.
const MAX_FILE_BYTES: usize = 8 << 10;

/// Returns the names of the files in a folder of the fuzz project, and their contents.
fn files(folder: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(FUZZ).join(folder);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap())
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Returns the inputs of a target's corpus.
fn corpus(target: Target) -> Vec<(String, Vec<u8>)> {
    files(&format!("corpus/{}", target.name))
}

/// Checks an input. If a property does not hold, panics with `description` and the input.
fn check(target: Target, description: &str, input: &[u8]) {
    if catch_unwind(AssertUnwindSafe(|| (target.check)(input))).is_err() {
        let name = target.name;
        let input = input.escape_ascii();
        panic!("{name}: a property does not hold for {description}: b\"{input}\"");
    }
}

#[test]
fn the_properties_hold_for_the_corpus() {
    for target in TARGETS {
        check(target, "no bytes", &[]);
        for (name, input) in corpus(target) {
            check(target, &name, &input);
        }
    }
}

#[test]
fn the_properties_hold_for_mutations_of_the_corpus() {
    let mutations = std::env::var(MUTATIONS_VARIABLE);
    let mutations = mutations.map_or(MUTATIONS, |number| number.parse().unwrap());
    // Each target has a thread, so that one failure does not hide another.
    std::thread::scope(|scope| {
        for target in TARGETS {
            scope.spawn(move || {
                let inputs: Vec<Vec<u8>> =
                    corpus(target).into_iter().map(|(_, input)| input).collect();
                let mut random = SmallRng::seed_from_u64(7);
                for number in 0..mutations {
                    let input = mutate(&inputs, &mut random);
                    check(target, &format!("mutation {number}"), &input);
                }
            });
        }
    });
}

#[test]
fn each_target_has_a_wrapper_and_a_small_corpus() {
    let manifest = fs::read_to_string(Path::new(FUZZ).join("Cargo.toml")).unwrap();
    let wrappers: BTreeSet<String> = files("fuzz_targets")
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    let names = TARGETS.iter().map(|target| format!("{}.rs", target.name));
    assert_eq!(wrappers, names.collect());
    for (wrapper, source) in files("fuzz_targets") {
        let name = wrapper.trim_end_matches(".rs");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let source = String::from_utf8(source).unwrap();
        let call = format!("foresee_properties::{name}::check(bytes)");
        assert!(source.contains(&call), "{name}");
    }
    for target in TARGETS {
        let corpus = corpus(target);
        assert!(corpus.len() >= 5, "{}", target.name);
        for (name, input) in corpus {
            assert!(input.len() <= MAX_FILE_BYTES, "{}/{name}", target.name);
        }
    }
}

#[test]
fn an_input_that_breaks_a_property_is_shown() {
    let target = Target {
        name: "broken",
        check: |input| assert!(input.len() < 3, "too long"),
    };
    check(target, "a short input", b"ab");
    let shown = catch_unwind(|| check(target, "a long input", b"ab\n")).unwrap_err();
    let shown = shown.downcast_ref::<String>().unwrap();
    assert_eq!(
        shown,
        "broken: a property does not hold for a long input: b\"ab\\n\""
    );
}
