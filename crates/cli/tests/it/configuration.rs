//! Compares `docs/configuration.md` with the command line.

#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;

/// Compares the page and does not write it. The example `generate-docs` writes it.
#[test]
fn the_reference_of_settings_is_up_to_date() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let written = std::fs::read_to_string(page).unwrap_or_default();
    let generated = foresee_cli::reference::configuration();
    let mut lines = written.lines().zip(generated.lines());
    let difference = lines.find(|(written, generated)| written != generated);
    assert!(
        written == generated,
        "docs/configuration.md is out of date: run `cargo run -p foresee --example generate-docs`; \
         first difference: {difference:#?}"
    );
}
