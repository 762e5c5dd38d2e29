//! The commands of the pages in `docs/deploy` work as they are written.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::process::{Command, Stdio};

use crate::ports::free_port;

/// Returns the commands of a page.
fn commands(page: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/deploy");
    let page = std::fs::read_to_string(path.join(page)).unwrap();
    let blocks = page.split("```sh\n").skip(1);
    let blocks: Vec<_> = blocks
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    blocks.join("\n")
}

/// Returns whether a program can be started.
fn is_installed(program: &str) -> bool {
    let mut command = Command::new(program);
    command
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.status().is_ok()
}

#[test]
fn a_request_with_a_key_over_tls_reaches_discovered_workers() {
    if !["bash", "curl", "openssl", "timeout"]
        .into_iter()
        .all(is_installed)
    {
        eprintln!("skipped: bash, curl, openssl and timeout are needed");
        return;
    }
    let mut script = commands("quick.md");
    for port in ["8000", "8001", "8080", "8081"] {
        assert!(script.contains(&format!(":{port}")), "{port}");
        script = script.replace(&format!(":{port}"), &format!(":{}", free_port()));
    }
    let folder = format!("foresee-deploy-{}", std::process::id());
    let folder = std::env::temp_dir().join(folder);
    std::fs::create_dir_all(&folder).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_foresee")).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    let script = format!("set -eu\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{script}");
    let output = Command::new("timeout")
        .args(["90", "bash", "-c", &script])
        .current_dir(&folder)
        .env("PATH", format!("{}:{path}", program.display()))
        .output();
    let output = output.unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(output.status.success(), "{printed}\n{errors}");
    // Two requests succeed, and the one without a key does not.
    assert_eq!(printed.matches("chat.completion").count(), 2, "{printed}");
    assert!(printed.contains("invalid_api_key"), "{printed}");
}
