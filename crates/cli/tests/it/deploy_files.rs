//! The files in `deploy`: their flags exist, their settings are valid, and the documentation quotes them.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use foresee_cli::config_file_flags;

/// Returns a path in the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(repository(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Returns the files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Returns the flags in a text, such as `--listen`.
fn flags(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let words = text.split(|c: char| !is_part(c));
    let flags = words.filter(|word| {
        word.strip_prefix("--")
            .is_some_and(|name| name.starts_with(|c: char| c.is_ascii_lowercase()))
    });
    flags.map(str::to_owned).collect()
}

/// Returns the flags of all subcommands.
fn known_flags() -> BTreeSet<String> {
    fn collect(command: &clap::Command, known: &mut BTreeSet<String>) {
        let long = command.get_arguments().filter_map(|flag| flag.get_long());
        known.extend(long.map(|name| format!("--{name}")));
        for subcommand in command.get_subcommands() {
            collect(subcommand, known);
        }
    }
    let mut known = BTreeSet::new();
    let mut command = foresee_cli::command();
    command.build();
    collect(&command, &mut known);
    known
}

#[test]
fn flags_in_the_files_of_packages_exist() {
    let known = known_flags();
    let mut seen = 0;
    for folder in ["deploy/systemd", "deploy/helm/foresee"] {
        for path in files(&repository(folder)) {
            let text = fs::read_to_string(&path).unwrap();
            // The other programs that these files name are systemd's and Kubernetes'.
            for flag in flags(&text) {
                assert!(known.contains(&flag), "{}: {flag}", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 20, "{seen}");
    let dockerfile = read("deploy/docker/Dockerfile");
    let command = dockerfile.lines().find(|line| line.starts_with("CMD"));
    assert_eq!(flags(command.unwrap()), BTreeSet::from(["--listen".into()]));
}

/// Returns the value of a setting of a unit.
fn setting<'a>(unit: &'a str, name: &str) -> &'a str {
    let mut lines = unit.lines().filter_map(|line| line.split_once('='));
    let found = lines.find(|(key, _)| *key == name);
    found.unwrap_or_else(|| panic!("{name} is missing")).1
}

#[test]
fn the_unit_starts_the_program_and_lets_it_stop() {
    let unit = read("deploy/systemd/foresee.service");
    let command = setting(&unit, "ExecStart");
    let arguments: Vec<_> = command.split(' ').skip(1).collect();
    // The program parses them; without the file, only the file is wrong.
    let output = Command::new(env!("CARGO_BIN_EXE_foresee"))
        .arg("check-config")
        .args(&arguments[1..])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_valid = output.status.success() || error.contains("cannot read the file");
    assert!(is_valid, "{error}");

    let seconds = |flag: &str| {
        let value = arguments.iter().skip_while(|part| **part != flag).nth(1);
        let value = value.unwrap_or_else(|| panic!("{flag} is missing"));
        let duration: humantime::Duration = value.parse().unwrap();
        duration.as_secs_f64()
    };
    let limit: f64 = setting(&unit, "TimeoutStopSec").parse().unwrap();
    // Aborting responses and ending the admin listener take at most a second each.
    assert!(limit > seconds("--shutdown-delay") + seconds("--shutdown-timeout") + 2.0);
}

#[test]
fn the_settings_of_packages_are_valid() {
    let text = read("deploy/systemd/foresee.toml");
    // The example of a worker becomes one.
    let (settings, example) = text.split_once("# [[worker]]\n").unwrap();
    let example: String = example
        .lines()
        .map(|line| format!("{}\n", line.strip_prefix("# ").unwrap()))
        .collect();
    let flags = config_file_flags(&format!("{settings}[[worker]]\n{example}")).unwrap();
    let worker = "--worker=http://gpu1:8000,name=gpu1";
    assert!(flags.contains(&worker.into()), "{flags:?}");
}

#[test]
fn the_chart_has_the_version_of_the_program() {
    let chart = read("deploy/helm/foresee/Chart.yaml");
    for key in ["version", "appVersion"] {
        let line = format!("\n{key}: {}\n", env!("CARGO_PKG_VERSION"));
        assert!(chart.contains(&line), "{key}");
    }
}

/// A code block of the documentation that begins with `# deploy/…` is that file.
#[test]
fn the_documentation_quotes_the_files_of_packages() {
    let mut quoted = BTreeSet::new();
    for page in files(&repository("docs")) {
        if page.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        let text = fs::read_to_string(&page).unwrap();
        let blocks = text
            .split("\n```")
            .filter_map(|block| block.split_once('\n'));
        for (_, block) in blocks {
            let Some(rest) = block.strip_prefix("# deploy/") else {
                continue;
            };
            let (name, content) = rest.split_once('\n').unwrap();
            let path = format!("deploy/{name}");
            let file = read(&path);
            assert_eq!(content.trim_end(), file.trim_end(), "{}", page.display());
            quoted.insert(path);
        }
    }
    for file in [
        "foresee.service",
        "foresee.socket",
        "foresee-admin.socket",
        "keys.conf",
    ] {
        let path = format!("deploy/systemd/{file}");
        assert!(quoted.contains(&path), "{path} is not quoted");
    }
    let example = "deploy/helm/foresee/examples/secured.yaml";
    assert!(quoted.contains(example), "{example} is not quoted");
}

#[test]
fn the_script_writes_manual_pages_and_completions() {
    let folder = format!("foresee-package-{}", std::process::id());
    let folder = std::env::temp_dir().join(folder);
    let output = Command::new(repository("package"))
        .arg("docs")
        .env("FORESEE_BINARY", env!("CARGO_BIN_EXE_foresee"))
        .env("FORESEE_PACKAGE_DIR", &folder)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error}");
    for path in [
        "share/man/man1/foresee-serve.1",
        "share/completions/foresee.bash",
        "share/completions/_foresee",
        "share/completions/foresee.fish",
    ] {
        let text = fs::read_to_string(folder.join(path)).unwrap();
        assert!(text.contains("worker-urls") || text.contains("worker\\-urls"));
    }
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn the_script_refuses_unknown_steps() {
    let script = |arguments: &[&str]| {
        let mut command = Command::new(repository("package"));
        let folder = std::env::temp_dir().join("foresee-package-usage");
        command.args(arguments).env("FORESEE_PACKAGE_DIR", folder);
        let output = command.stdin(Stdio::null()).output().unwrap();
        let printed = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(printed).unwrap())
    };
    for arguments in [&[][..], &["no-such-step"]] {
        let (code, printed) = script(arguments);
        assert_eq!(code, Some(2), "{printed}");
        assert!(printed.contains("usage: ./package"), "{printed}");
    }
}
