//! Writes the generated pages of `docs/`: `cargo run -p foresee --example generate-docs`.

use std::path::Path;

fn main() -> std::io::Result<()> {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    std::fs::write(
        docs.join("configuration.md"),
        foresee_cli::reference::configuration(),
    )?;
    std::fs::write(docs.join("metrics.md"), foresee_gateway::metrics_page())
}
