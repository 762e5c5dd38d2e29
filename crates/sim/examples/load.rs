//! Sends a named workload to a running address and prints what its users saw.
//!
//! `cargo run --release -p foresee-sim --example load -- http://127.0.0.1:8080 burst [REQUESTS] [ABORT_SHARE]`
//!
//! The model asked for is `model`, the one that `foresee engine` serves by default.

#![allow(missing_docs)]

use std::error::Error;

use foresee_sim::load::{LiveReport, LoadConfig, NamedOutcome, run};
use foresee_sim::workload::Recipe;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, workload, options @ ..] = arguments.as_slice() else {
        return Err("usage: load ADDRESS WORKLOAD [REQUESTS] [ABORT_SHARE]".into());
    };
    let mut recipe = Recipe::named(workload)?;
    if let (
        Some(requests),
        Recipe::Burst { requests: all, .. } | Recipe::ClosedLoop { requests: all, .. },
    ) = (options.first(), &mut recipe)
    {
        *all = requests.parse()?;
    }
    let mut config = LoadConfig::new(address, "model");
    if let Some(share) = options.get(1) {
        config.abort_share = share.parse()?;
    }
    let outcome = run(&config, &recipe.make(0), |_| {}).await?;
    let report = LiveReport {
        workload: workload.clone(),
        workers: config.workers,
        outcomes: vec![NamedOutcome {
            name: "live".to_owned(),
            outcome,
        }],
    };
    print!("{report}");
    Ok(())
}
