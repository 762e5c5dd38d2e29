//! Sets the text of `--version`: the package's version, with the commit if the build runs in a Git
//! checkout.

use std::path::Path;
use std::process::Command;

fn main() {
    let version = env!("CARGO_PKG_VERSION");
    println!("cargo:rerun-if-changed=build.rs");
    let described = match commit() {
        Some(commit) => format!("{version} ({commit})"),
        None => version.to_owned(),
    };
    println!("cargo:rustc-env=FORESEE_VERSION={described}");
}

/// Returns the abbreviated hash and the date of the checked-out commit.
///
/// Returns `None` without Git, and if the package lies in the repository of another project.
fn commit() -> Option<String> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = git(&["rev-parse", "--show-toplevel"])?;
    if Path::new(&root).canonicalize().ok()? != workspace.canonicalize().ok()? {
        return None;
    }
    // Git appends a line to this file at each commit and checkout. A missing file would make Cargo
    // run this script at every build.
    let log = git(&["rev-parse", "--git-path", "logs/HEAD"])?;
    let log = Path::new(env!("CARGO_MANIFEST_DIR")).join(log);
    if log.is_file() {
        println!("cargo:rerun-if-changed={}", log.display());
    }
    git(&["log", "-1", "--date=short", "--format=%h %cd"])
}

/// Runs Git in the package's folder. Returns its output without surrounding white space, or `None`
/// if Git fails or prints nothing.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(arguments)
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let text = text.trim();
    (output.status.success() && !text.is_empty()).then(|| text.to_owned())
}
