//! `pccheck pin` and `pccheck unpin`: keep a checkpoint, or no longer.

use std::path::PathBuf;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::store::OpenOptions;
use pccheck::Result;
use serde_json::json;

use super::careful_writer;
use crate::output;

/// What to pin or unpin.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
A pinned checkpoint takes a slot away from saving: format or grow the region with one more.
A running trainer holds the writer's lock; it can pin by itself.

Examples:
  pccheck inspect run.pcc           shows generations
  pccheck pin run.pcc 1042
  pccheck unpin run.pcc 1042")]
pub struct Args {
    /// Region file or block device.
    path: PathBuf,
    /// Generation of the checkpoint.
    generation: u64,
    /// Seconds to wait for another writer to close the region.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs either command.
pub fn run(args: &Args, pin: bool) -> Result<()> {
    let options = careful_writer(&args.path, Duration::from_secs(args.wait))?;
    // Holding keeps every checkpoint within reach, and leaves to the pin the slots that `keep` would claim.
    let options = OpenOptions { hold: true, keep: 1, ..options };
    let store = Store::open(&args.path, &options)?;
    match pin {
        true => store.pin(args.generation)?,
        false => store.unpin(args.generation)?,
    }
    if args.json {
        return output::print_json(
            &json!({ "path": args.path, "generation": args.generation, "pinned": pin }),
        );
    }
    let done = if pin { "pinned" } else { "unpinned" };
    output::print(&format!("{done} generation {}\n", args.generation))
}
