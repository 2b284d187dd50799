//! `pccheck format`: a new region.

use std::path::PathBuf;

use clap::ArgGroup;
use pccheck::engine::format_region_with_progress;
use pccheck::store::FormatOptions;
use pccheck::Result;
use serde_json::json;

use super::{open_to_read, Medium};
use crate::{output, table, units};

/// Room for the safetensors header beside the tensors of `--state`: this and 1/256 of the state.
const HEADER_ROOM_BYTES: u64 = 1 << 20;

/// Create a region: a preallocated file, or a block device, with room for checkpoints.
#[derive(Debug, clap::Args)]
#[command(
    group = ArgGroup::new("room").required(true),
    after_help = "\
Slots: saves in flight + checkpoints kept + pinned ones; the engine's defaults (2 in flight, 1 kept)
need 3. Nothing is overwritten without --force.

Examples:
  pccheck format run.pcc --slots 4 --state 10GiB        three saves in flight of up to 10 GiB of tensors
  pccheck format /dev/nvme1n1 --slots 3 --payload 64G   on a whole block device
  pccheck format run.pcc --slots 3 --state 1G --force   destroy what run.pcc holds
  pccheck format /nvme0/run.pcc --stripe /nvme1/run.pcc --slots 3 --state 64G
                                                        over two disks, at the speed of both"
)]
pub struct Args {
    /// File or block device.
    path: PathBuf,
    /// Number of slots, 2 to 240.
    #[arg(long, value_name = "N", default_value_t = 3)]
    slots: u32,
    /// Bytes of the largest state (its tensors); room for names and shapes is added.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, group = "room")]
    state: Option<u64>,
    /// Bytes of the largest payload: a safetensors file, header and tensors.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, group = "room")]
    payload: Option<u64>,
    /// Destroy what the path holds, even a region with checkpoints.
    #[arg(long)]
    force: bool,
    /// Write the whole region once now, so that the first saves are as fast as later ones.
    #[arg(long)]
    prewrite: bool,
    /// Another file or block device over which the region is striped; up to 15 times. The region is opened by the
    /// first path, and all members must be there.
    #[arg(long, value_name = "PATH")]
    stripe: Vec<PathBuf>,
    /// Bytes that lie together on one member: a power of two that the chunks of saves divide.
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = units::parse_size,
        default_value = "4MiB",
        requires = "stripe"
    )]
    stripe_unit: u64,
    /// Medium to prefer; auto measures which is faster here.
    #[arg(long, value_enum, default_value_t = Medium::Auto)]
    medium: Medium,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Payload bytes that hold a state of so many bytes.
pub fn payload_for_state(state_bytes: u64) -> u64 {
    state_bytes.saturating_add(state_bytes / 256).saturating_add(HEADER_ROOM_BYTES)
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let payload_bytes = args.payload.unwrap_or_else(|| payload_for_state(args.state.unwrap_or(0)));
    let options = FormatOptions {
        force: args.force,
        prewrite: args.prewrite,
        medium: args.medium.into(),
        stripe: args.stripe.clone(),
        stripe_unit_bytes: args.stripe_unit,
        ..FormatOptions::new(args.slots, payload_bytes)
    };
    let bar = output::bytes_bar(0, "writing the region", args.json);
    let formatted = format_region_with_progress(&args.path, &options, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    formatted?;
    let store = open_to_read(&args.path)?;
    let superblock = store.region().superblock();
    let layout = &superblock.layout;
    if args.json {
        return output::print_json(&json!({
            "path": args.path,
            "uuid": superblock.uuid.to_string(),
            "slots": layout.slot_count,
            "slot_bytes": layout.slot_bytes,
            "region_bytes": layout.region_bytes(),
            "medium": super::medium_name(store.medium_info().kind),
            "members": args.stripe.len() + 1,
        }));
    }
    let mut pairs = vec![
        ("formatted", args.path.display().to_string()),
        ("region", superblock.uuid.to_string()),
        ("slots", format!("{} of {}", layout.slot_count, units::size(layout.slot_bytes))),
        ("size", units::size(layout.region_bytes())),
        ("medium", super::medium_name(store.medium_info().kind).to_string()),
        ("survives", super::survives(store.medium_info().durability).to_string()),
    ];
    pairs.extend(super::stripes_line(store.medium_info().stripes));
    output::print(&table::pairs(&pairs))
}
