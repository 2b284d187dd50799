//! `pccheck pin` and `pccheck unpin`: keep a checkpoint, or no longer.

use std::path::PathBuf;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::{Error, ErrorKind, Result};
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
    let store = Store::open(&args.path, &options)?;
    match pin {
        true => store.pin(args.generation).map_err(|error| explain(&store, args.generation, error))?,
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

/// A writer must have a slot to write to: in a full region the oldest checkpoint is given up for it.
fn explain(store: &Store, generation: u64, error: Error) -> Error {
    let listed = store.recovered().checkpoints().any(|record| record.generation == generation);
    if error.kind() != ErrorKind::NotFound || !listed {
        return error;
    }
    Error::new(
        ErrorKind::NoSlot,
        "pin",
        format!("generation {generation} is in the only slot that is left to save into"),
    )
    .at_path(store.region().path())
    .advise("grow the region by a slot, then pin")
}
