//! `pccheck bench`.
use pccheck::Result;
/// Measure.
#[derive(Debug, clap::Args)]
pub struct Args {}
/// Runs the command.
pub fn run(_args: &Args) -> Result<()> {
    Ok(())
}
