//! `pccheck grow`: more or larger slots, nothing lost.

use std::path::PathBuf;
use std::time::Duration;

use clap::ArgGroup;
use pccheck::engine::grow_region;
use pccheck::format::Layout;
use pccheck::Result;
use serde_json::json;

use super::format::payload_for_state;
use super::open_to_read;
use crate::{output, table, units};

/// Chunk size for whose table a slot keeps room beside its largest payload.
const TABLE_CHUNK_BYTES: u64 = 64 << 10;

/// Give a region file more or larger slots; its checkpoints and pins stay.
#[derive(Debug, clap::Args)]
#[command(
    group = ArgGroup::new("room"),
    group = ArgGroup::new("what").required(true).multiple(true).args(["slots", "state", "payload"]),
    after_help = "\
A larger copy is written beside the file and renamed over it: a crash leaves the old region or the new
one. Needs free space for the copy; refused while a trainer has the region open, and on devices. A
checkpoint that the medium can no longer read is left out, and named.

Examples:
  pccheck grow run.pcc --slots 6
  pccheck grow run.pcc --state 20GiB"
)]
pub struct Args {
    /// Region file.
    path: PathBuf,
    /// New number of slots; as many as before unless given.
    #[arg(long, value_name = "N")]
    slots: Option<u32>,
    /// Bytes of the largest state (its tensors).
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, group = "room")]
    state: Option<u64>,
    /// Bytes of the largest payload: a safetensors file, header and tensors.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, group = "room")]
    payload: Option<u64>,
    /// Seconds to wait for another writer to close the region.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let before = *open_to_read(&args.path)?.region().layout();
    let slots = args.slots.unwrap_or(before.slot_count);
    // A slot's bytes hold payload and chunk table; asking for its table's room again would grow it.
    let payload = args.payload.or_else(|| args.state.map(payload_for_state));
    let payload = payload.unwrap_or_else(|| largest_payload(before.slot_bytes));
    let left_out = grow_region(&args.path, slots, payload, Some(Duration::from_secs(args.wait)))?;
    let after = *open_to_read(&args.path)?.region().layout();
    if args.json {
        return output::print_json(&json!({
            "path": args.path,
            "before": { "slots": before.slot_count, "slot_bytes": before.slot_bytes },
            "after": { "slots": after.slot_count, "slot_bytes": after.slot_bytes },
            "region_bytes": after.region_bytes(),
            "left_out": left_out
                .iter()
                .map(|lost| json!({ "generation": lost.generation, "error": lost.error.to_string() }))
                .collect::<Vec<_>>(),
        }));
    }
    let slots =
        |layout: &Layout| format!("{} slots of {}", layout.slot_count, units::size(layout.slot_bytes));
    let mut pairs = vec![
        ("grew", args.path.display().to_string()),
        ("before", slots(&before)),
        ("after", slots(&after)),
        ("size", units::size(after.region_bytes())),
    ];
    for lost in &left_out {
        pairs.push((
            "left out",
            format!("generation {}, which cannot be read: {}", lost.generation, lost.error),
        ));
    }
    output::print(&table::pairs(&pairs))
}

/// The largest payload for which `format` and `grow` make a slot of at most `slot_bytes`.
fn largest_payload(slot_bytes: u64) -> u64 {
    let fits = |payload: u64| {
        Layout::slot_bytes_for(payload, TABLE_CHUNK_BYTES).is_ok_and(|needed| needed <= slot_bytes)
    };
    let (mut low, mut high) = (1, slot_bytes);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        match fits(middle) {
            true => low = middle,
            false => high = middle - 1,
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_payload_just_fits() {
        for slot_bytes in [2 << 20, 10 << 20, 3 << 30] {
            let payload = largest_payload(slot_bytes);
            assert_eq!(Layout::slot_bytes_for(payload, TABLE_CHUNK_BYTES).unwrap(), slot_bytes);
            assert!(Layout::slot_bytes_for(payload + 1, TABLE_CHUNK_BYTES).unwrap() > slot_bytes);
        }
    }
}
