//! The layout of the sources: no circles of files that use each other, and crates in an order.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Circles that are still to be opened, by crate: the files of each. There are none, and none may be
/// added.
const KNOWN_CIRCLES: [(&str, &[&str]); 0] = [];

/// Path of a module in its crate, such as `["workers", "health"]`; empty for the root.
type ModulePath = Vec<String>;

/// Returns the files below a folder that end in `.rs`.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Returns the module of a file, given relative to `src`.
fn module_path(file: &Path) -> ModulePath {
    let file = file.with_extension("");
    let mut parts: ModulePath = file
        .iter()
        .map(|part| part.to_str().unwrap().to_owned())
        .collect();
    if matches!(parts.last().map(String::as_str), Some("lib" | "main")) {
        parts.pop();
    }
    parts
}

/// Returns a source without comments and without its test module.
fn without_comments_and_tests(source: &str) -> String {
    let source = source.split("#[cfg(test)]\nmod ").next().unwrap();
    let lines = source.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

/// Adds the paths that a tree of `use`, such as `a::{b, c::d}`, stands for, each after `prefix`.
fn expand(prefix: &[String], tree: &str, paths: &mut Vec<ModulePath>) {
    let (mut depth, mut start) = (0, 0);
    let mut parts = Vec::new();
    for (index, character) in tree.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[start..]);
    for part in parts
        .into_iter()
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (path, group) = match part.split_once('{') {
            Some((path, group)) => (path, Some(group.strip_suffix('}').unwrap_or(group))),
            None => (part.split(" as ").next().unwrap(), None),
        };
        let names = path
            .split("::")
            .map(str::trim)
            .filter(|name| !name.is_empty());
        let path: ModulePath = prefix
            .iter()
            .cloned()
            .chain(names.map(str::to_owned))
            .collect();
        match group {
            Some(group) => expand(&path, group, paths),
            None => paths.push(path),
        }
    }
}

/// Returns the paths in the crate that a module names, in `use` and elsewhere.
fn named_paths(module: &ModulePath, source: &str) -> Vec<ModulePath> {
    let mut paths = Vec::new();
    let parent = &module[..module.len().saturating_sub(1)];
    for (keyword, base) in [
        ("crate::", &[][..]),
        ("super::", parent),
        ("self::", module),
    ] {
        for (start, _) in source.match_indices(keyword) {
            let rest = &source[start + keyword.len()..];
            let before = source[..start].trim_end();
            let end = match before.ends_with("use") {
                true => rest.find(';').unwrap_or(rest.len()),
                false => rest
                    .find(|character: char| {
                        !(character.is_alphanumeric() || "_:".contains(character))
                    })
                    .unwrap_or(rest.len()),
            };
            expand(base, &rest[..end], &mut paths);
        }
    }
    paths
}

/// Returns the modules that each module of a crate uses, apart from its own parents and children.
fn uses_by_module(src: &Path) -> BTreeMap<ModulePath, BTreeSet<ModulePath>> {
    let files = rust_files(src);
    let sources: BTreeMap<ModulePath, String> = files
        .into_iter()
        .map(|file| {
            let source = fs::read_to_string(&file).unwrap();
            let module = module_path(file.strip_prefix(src).unwrap());
            (module, without_comments_and_tests(&source))
        })
        .collect();
    let used = |module: &ModulePath, path: ModulePath| {
        let found = (1..=path.len()).rev().map(|length| path[..length].to_vec());
        found
            .into_iter()
            .find(|prefix| sources.contains_key(prefix))
            .filter(|other| !module.starts_with(other) && !other.starts_with(module))
    };
    let modules = sources.iter().map(|(module, source)| {
        let paths = named_paths(module, source).into_iter();
        let uses = paths.filter_map(|path| used(module, path)).collect();
        (module.clone(), uses)
    });
    modules.collect()
}

/// Returns the modules that use each other in a circle, however long.
fn in_circles(uses: &BTreeMap<ModulePath, BTreeSet<ModulePath>>) -> BTreeSet<String> {
    let reached_from = |start: &ModulePath| {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&ModulePath> = uses[start].iter().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module) {
                next.extend(&uses[module]);
            }
        }
        reached
    };
    uses.keys()
        .filter(|module| reached_from(module).contains(module))
        .map(|module| module.join("::"))
        .collect()
}

/// The crates in order: a crate may use those after it, never one before it.
const CRATES: [&str; 12] = [
    "properties",
    "cli",
    "gateway",
    "client",
    "mock",
    "report",
    "sim",
    "engine",
    "api",
    "core",
    "forecast",
    "prefix",
];

/// Crates that are of use without the others, and use none of them.
const INDEPENDENT: [&str; 2] = ["forecast", "prefix"];

/// Dependencies that do I/O or need a runtime, which the pure crates must not have.
const IMPURE: [&str; 8] = [
    "clap",
    "hyper",
    "hyper-util",
    "indicatif",
    "socket2",
    "tokio",
    "tracing",
    "zeromq",
];

/// The crates without I/O.
const PURE: [&str; 7] = [
    "report", "sim", "engine", "api", "core", "forecast", "prefix",
];

/// Returns the dependencies of a crate, those of tests not included.
fn dependencies(crates: &Path, name: &str) -> Vec<String> {
    let manifest = fs::read_to_string(crates.join(name).join("Cargo.toml")).unwrap();
    let (_, rest) = manifest.split_once("[dependencies]\n").unwrap();
    let section = rest.split("\n[").next().unwrap();
    let names = section.lines().map(|line| {
        let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
        line[..end].to_owned()
    });
    names.filter(|name| !name.is_empty()).collect()
}

#[test]
fn a_crate_uses_only_crates_below_it() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let entries = fs::read_dir(crates).unwrap();
    let found: BTreeSet<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let expected = CRATES.iter().map(|&name| name.to_owned());
    assert_eq!(found, expected.collect());
    for (position, name) in CRATES.iter().enumerate() {
        for dependency in dependencies(crates, name) {
            let used = match dependency.strip_prefix("foresee-") {
                Some(used) => used,
                None if dependency == "foresee" => "cli",
                None => continue,
            };
            let below = &CRATES[position + 1..];
            assert!(below.contains(&used), "{name} uses {used}");
            assert!(!INDEPENDENT.contains(name), "{name} uses {used}");
        }
    }
}

#[test]
fn pure_crates_have_no_dependency_that_does_io() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for name in PURE {
        for dependency in dependencies(crates, name) {
            assert!(
                !IMPURE.contains(&dependency.as_str()),
                "{name} uses {dependency}"
            );
        }
    }
    for name in ["report", "sim", "core", "forecast", "prefix"] {
        for file in rust_files(&crates.join(name).join("src")) {
            let source = without_comments_and_tests(&fs::read_to_string(&file).unwrap());
            for module in ["std::fs", "std::net", "std::process", "std::env"] {
                assert!(!source.contains(module), "{file:?} uses {module}");
            }
        }
    }
}

#[test]
fn no_further_files_use_each_other_in_a_circle() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for entry in fs::read_dir(crates).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_str().unwrap();
        let found = in_circles(&uses_by_module(&folder.join("src")));
        let known = KNOWN_CIRCLES
            .iter()
            .find(|(crate_name, _)| *crate_name == name);
        let known: BTreeSet<String> = known
            .map(|(_, files)| files.iter().map(|&file| file.to_owned()).collect())
            .unwrap_or_default();
        let new: Vec<&String> = found.difference(&known).collect();
        assert!(new.is_empty(), "{name}: circles through {new:?}");
        let opened: Vec<&String> = known.difference(&found).collect();
        assert!(
            opened.is_empty(),
            "{name}: no longer in a circle: {opened:?}"
        );
    }
}

/// Modules of the gateway that serve connections; the parts below them know none of these.
const FRONT_ENDS: [&str; 14] = [
    "accept",
    "admin",
    "assembly",
    "client_headers",
    "client_socket",
    "config",
    "connection",
    "failover",
    "own_responses",
    "proxy",
    "reply",
    "request_body",
    "server",
    "tracked_body",
];

/// Modules of the gateway's part `workers`.
const WORKERS: [&str; 5] = [
    "engine_metrics",
    "kv_events",
    "subscribe",
    "worker_info",
    "workers",
];

#[test]
fn front_ends_can_be_added_without_a_change_of_the_parts_below() {
    let crates = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let src = crates.join("gateway/src");
    let uses = uses_by_module(&src);
    let files_of = |parts: &[&str]| {
        let modules = uses.keys().filter(|module| !module.is_empty());
        let modules = modules.filter(|module| parts.contains(&module[0].as_str()));
        modules.cloned().collect::<Vec<_>>()
    };
    let (placement, workers) = (files_of(&["placement"]), files_of(&WORKERS));
    assert!(placement.len() > 5 && workers.len() > 5);
    let uses_any = |module: &ModulePath, parts: &[&str]| {
        let mut used = uses[module].iter();
        used.any(|used| parts.contains(&used[0].as_str()))
    };
    for module in &placement {
        assert!(!uses_any(module, &FRONT_ENDS), "{module:?}");
        let file = src.join(module.join("/")).with_extension("rs");
        let source = without_comments_and_tests(&fs::read_to_string(file).unwrap());
        for other in ["http::", "hyper", "tokio::net", "zeromq"] {
            assert!(!source.contains(other), "{module:?} uses {other}");
        }
    }
    for module in &workers {
        assert!(!uses_any(module, &FRONT_ENDS), "{module:?}");
        assert!(!uses_any(module, &["placement"]), "{module:?}");
    }
}

#[test]
fn a_circle_is_found() {
    let uses = |pairs: &[(&str, &[&str])]| {
        let path = |name: &str| vec![name.to_owned()];
        let entries = pairs.iter().map(|(module, used)| {
            let used = used.iter().map(|name| path(name)).collect();
            (path(module), used)
        });
        in_circles(&entries.collect())
    };
    let circle = uses(&[("a", &["b"]), ("b", &["c"]), ("c", &["a"]), ("d", &["a"])]);
    assert_eq!(circle.into_iter().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(uses(&[("a", &["b", "c"]), ("b", &["c"]), ("c", &[])]).is_empty());
}
