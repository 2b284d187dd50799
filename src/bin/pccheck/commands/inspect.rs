//! `pccheck inspect`: everything that a region says of itself, without changing a byte of it.

use std::path::{Path, PathBuf};

use pccheck::engine::{CheckpointInfo, Select, Store};
use pccheck::format::{Control, SlotMark, MARK_DISCARDED, MARK_PINNED, MARK_QUARANTINED};
use pccheck::load::Checkpoint;
use pccheck::recovery::{DecisionTable, SlotDecision, Verdict};
use pccheck::{Error, ErrorKind, Result};
use serde_json::{json, Value};

use super::{open_to_read, rescue};
use crate::table::{pairs, Table};
use crate::{output, units};

/// Show superblock, control block, slots and checkpoints of a region, and why anything was rejected.
///
/// Changes nothing, and works while a trainer is writing the region.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pccheck inspect run.pcc
  pccheck inspect run.pcc --tensors           with the tensors of the newest checkpoint
  pccheck inspect run.pcc --tensors 1042      of the checkpoint of generation 1042
  pccheck inspect run.pcc --json | jq '.checkpoints[0].step'

Exit code 4 when the region cannot be read; what can still be said is printed nevertheless.")]
pub struct Args {
    /// Region file or block device.
    path: PathBuf,
    /// Also list the tensors of a checkpoint: of this generation, or of the newest.
    #[arg(long, value_name = "GENERATION", num_args = 0..=1)]
    tensors: Option<Option<u64>>,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let store = match open_to_read(&args.path) {
        Ok(store) => store,
        Err(error) => {
            if is_about_content(&error) {
                rescue::report(&args.path, &error, args.json)?;
            }
            return Err(error);
        }
    };
    // Newest facts: between opening and now a trainer may have gone on.
    let table = store.region().read_table()?;
    let checkpoints = store.checkpoints()?;
    let listed = args.tensors.map(|generation| open_listed(&store, generation)).transpose()?;
    if args.json {
        return output::print_json(&to_json(&args.path, &store, &table, &checkpoints, listed.as_ref()));
    }
    let mut text = region_text(&args.path, &store, &table);
    text += "\nSlots\n";
    text += &slots_text(&table);
    text += "\nCheckpoints, newest first\n";
    text += &checkpoints_text(&checkpoints);
    if let Some(checkpoint) = &listed {
        text += &tensors_text(checkpoint);
    }
    output::print(&text)
}

fn is_about_content(error: &Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotARegion
            | ErrorKind::Corrupt
            | ErrorKind::UnsupportedVersion
            | ErrorKind::UnsupportedFeature
    )
}

fn open_listed(store: &Store, generation: Option<u64>) -> Result<Checkpoint> {
    let select = generation.map_or(Select::Newest, Select::Generation);
    Ok(store.open_checkpoint(select, false)?.checkpoint)
}

// ---- text ----------------------------------------------------------------------------------------------

fn region_text(path: &Path, store: &Store, table: &DecisionTable) -> String {
    let superblock = &table.superblock;
    let layout = &superblock.layout;
    let info = store.medium_info();
    let mut lines = vec![
        ("region", path.display().to_string()),
        ("uuid", superblock.uuid.to_string()),
        ("format", format!("version {}{}", superblock.format_version, features(superblock.compat))),
        ("created", units::utc(superblock.created_unix_ns)),
        ("slots", format!("{} of {}", layout.slot_count, units::size(layout.slot_bytes))),
        ("size", units::size(layout.region_bytes())),
        (
            "medium",
            format!(
                "{} here (measured at format: {})",
                super::medium_name(info.kind),
                format!("{:?}", superblock.preferred_medium).to_lowercase()
            ),
        ),
        ("survives", super::survives(info.durability).to_string()),
    ];
    lines.extend(super::stripes_line(info.stripes));
    match &table.control {
        Some(control) => lines.extend(control_lines(control, table.control_copy)),
        None => lines.push(("control", "both copies are lost".to_string())),
    }
    lines.push(("next", format!("generation {}, or higher", table.next_generation)));
    lines.extend(table.notes.iter().map(|note| ("damage", note.clone())));
    pairs(&lines)
}

fn features(compat: u64) -> String {
    match compat {
        0 => String::new(),
        bits => format!(", compat features {bits:#x}"),
    }
}

fn control_lines(control: &Control, copy: Option<usize>) -> Vec<(&'static str, String)> {
    let copy = if copy == Some(0) { "A" } else { "B" };
    let global = control.global.map_or("nothing".to_string(), |mark| {
        format!("step {} of run {} (generation {})", mark.step, mark.run_id, mark.generation)
    });
    let marks = match control.marks.is_empty() {
        true => "none".to_string(),
        false => control.marks.iter().map(mark_text).collect::<Vec<_>>().join(", "),
    };
    vec![
        (
            "control",
            format!(
                "copy {copy}, sequence {}, run {}, generations leased up to {}",
                control.sequence, control.run_id, control.generation_ceiling
            ),
        ),
        ("everywhere", global),
        ("marks", marks),
    ]
}

fn mark_names(flags: u32) -> Vec<&'static str> {
    [(MARK_PINNED, "pinned"), (MARK_QUARANTINED, "quarantined"), (MARK_DISCARDED, "discarded")]
        .into_iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| name)
        .collect()
}

fn mark_text(mark: &SlotMark) -> String {
    format!("slot {} generation {} {}", mark.slot, mark.generation, mark_names(mark.flags).join("+"))
}

fn verdict_name(verdict: &Verdict) -> &'static str {
    match verdict {
        Verdict::Checkpoint => "checkpoint",
        Verdict::Empty => "empty",
        Verdict::Writing => "writing",
        Verdict::Rejected(_) => "rejected",
        Verdict::Quarantined => "quarantined",
        Verdict::Discarded => "discarded",
    }
}

fn slots_text(table: &DecisionTable) -> String {
    let mut rows = Table::new(&["slot", "<verdict", "generation", "step", "<reason"]);
    for slot in &table.slots {
        let number = |value: fn(&pccheck::format::SlotRecord) -> u64| {
            slot.record.as_ref().map_or("-".to_string(), |record| value(record).to_string())
        };
        rows.row(vec![
            slot.slot.to_string(),
            verdict_name(&slot.verdict).to_string(),
            number(|record| record.generation),
            number(|record| record.step),
            slot.reason.clone(),
        ]);
    }
    rows.render()
}

fn checkpoints_text(checkpoints: &[CheckpointInfo]) -> String {
    if checkpoints.is_empty() {
        return "none\n".to_string();
    }
    let mut rows = Table::new(&["generation", "step", "run", "slot", "payload", "tensors", "age", "<pinned"]);
    for info in checkpoints {
        let record = &info.record;
        rows.row(vec![
            record.generation.to_string(),
            record.step.to_string(),
            record.run_id.to_string(),
            record.slot.to_string(),
            units::size(record.payload_bytes),
            record.tensor_count.to_string(),
            units::age(record.unix_ns),
            if info.pinned { "yes" } else { "" }.to_string(),
        ]);
    }
    rows.render()
}

fn tensors_text(checkpoint: &Checkpoint) -> String {
    let record = checkpoint.record();
    let mut text = format!("\nTensors of generation {}, step {}\n", record.generation, record.step);
    let mut rows = Table::new(&["<dtype", "<shape", "bytes", "offset", "<tied to", "<name"]);
    for tensor in checkpoint.tensors() {
        rows.row(vec![
            tensor.dtype.name().to_string(),
            format!("{:?}", tensor.shape),
            tensor.bytes.to_string(),
            tensor.offset.to_string(),
            tensor.alias_of.clone().unwrap_or_default(),
            tensor.name.clone(),
        ]);
    }
    text += &rows.render();
    let metadata = checkpoint.metadata();
    if !metadata.is_empty() {
        let mut rows = Table::new(&["<key", "<value"]);
        for (key, value) in metadata {
            rows.row(vec![key.clone(), value.clone()]);
        }
        text += "\nMetadata\n";
        text += &rows.render();
    }
    text
}

// ---- JSON ----------------------------------------------------------------------------------------------

fn to_json(
    path: &Path,
    store: &Store,
    table: &DecisionTable,
    checkpoints: &[CheckpointInfo],
    listed: Option<&Checkpoint>,
) -> Value {
    let superblock = &table.superblock;
    let info = store.medium_info();
    let mut value = json!({
        "path": path,
        "superblock": {
            "uuid": superblock.uuid.to_string(),
            "format_version": superblock.format_version,
            "compat": superblock.compat,
            "incompat": superblock.incompat,
            "created_unix_ns": superblock.created_unix_ns,
            "slot_count": superblock.layout.slot_count,
            "slot_bytes": superblock.layout.slot_bytes,
            "payload_offset": superblock.layout.payload_offset,
            "region_bytes": superblock.layout.region_bytes(),
            "preferred_medium": format!("{:?}", superblock.preferred_medium).to_lowercase(),
        },
        "medium": {
            "kind": super::medium_name(info.kind),
            "survives_power_loss": info.durability == pccheck::medium::Durability::Power,
            "path": info.path,
            "notes": info.notes,
            "members": info.stripes.map_or(1, |stripes| stripes.members),
            "stripe_unit_bytes": info.stripes.map(|stripes| stripes.unit_bytes),
        },
        "control": table.control.as_ref().map(|control| control_json(control, table.control_copy)),
        "next_generation": table.next_generation,
        "damage": table.notes,
        "slots": table.slots.iter().map(slot_json).collect::<Vec<_>>(),
        "checkpoints": checkpoints.iter().map(checkpoint_json).collect::<Vec<_>>(),
    });
    if let Some(checkpoint) = listed {
        value["tensors_of_generation"] = json!(checkpoint.record().generation);
        value["tensors"] = checkpoint.tensors().iter().map(tensor_json).collect();
        value["metadata"] = json!(checkpoint.metadata());
    }
    value
}

fn control_json(control: &Control, copy: Option<usize>) -> Value {
    json!({
        "copy": copy,
        "sequence": control.sequence,
        "run_id": control.run_id,
        "generation_ceiling": control.generation_ceiling,
        "global_mark": control.global.map(|mark| json!({
            "run_id": mark.run_id, "step": mark.step, "generation": mark.generation,
        })),
        "marks": control.marks.iter().map(|mark| json!({
            "slot": mark.slot, "generation": mark.generation, "flags": mark_names(mark.flags),
        })).collect::<Vec<_>>(),
    })
}

fn slot_json(slot: &SlotDecision) -> Value {
    json!({
        "slot": slot.slot,
        "verdict": verdict_name(&slot.verdict),
        "reason": slot.reason,
        "pinned": slot.pinned,
        "generation": slot.record.as_ref().map(|record| record.generation),
        "step": slot.record.as_ref().map(|record| record.step),
    })
}

fn checkpoint_json(info: &CheckpointInfo) -> Value {
    let record = &info.record;
    json!({
        "generation": record.generation,
        "step": record.step,
        "run_id": record.run_id,
        "slot": record.slot,
        "payload_bytes": record.payload_bytes,
        "header_bytes": record.header_bytes,
        "tensor_count": record.tensor_count,
        "chunk_bytes": record.chunk_bytes,
        "chunk_count": record.chunk_count,
        "unix_ns": record.unix_ns,
        "pinned": info.pinned,
    })
}

fn tensor_json(tensor: &pccheck::format::TensorInfo) -> Value {
    json!({
        "name": tensor.name,
        "dtype": tensor.dtype.name(),
        "shape": tensor.shape,
        "offset": tensor.offset,
        "bytes": tensor.bytes,
        "tied_to": tensor.alias_of,
    })
}
