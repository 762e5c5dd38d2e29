//! `foresee demo`.
use clap::Args;
#[derive(Args, Debug)]
pub(crate) struct DemoArgs {}
pub(crate) fn demo(_: DemoArgs) -> anyhow::Result<()> {
    Ok(())
}
