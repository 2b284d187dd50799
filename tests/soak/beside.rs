//! What goes on beside a saver: readers that verify all they see, and exports by the tool.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use pccheck::engine::{Select, Store};
use pccheck::load::Checkpoint;
use pccheck::store::OpenOptions;
use pccheck::{Error, ErrorKind};
use safetensors::SafeTensors;

use super::content;
use super::shape::Shape;

/// What readers and exports saw.
#[derive(Default)]
pub struct Seen {
    pub checkpoints: AtomicU64,
    pub bytes: AtomicU64,
    pub exports: AtomicU64,
}

fn read_only(shape: &Shape) -> OpenOptions {
    OpenOptions { read_only: true, ..shape.options() }
}

/// What a reader beside a live writer may be told, and on a disk that fails.
fn is_no_loss(error: &Error, shape: &Shape) -> bool {
    match error.kind() {
        ErrorKind::Reclaimed | ErrorKind::NotFound => true,
        ErrorKind::Io => shape.fails,
        _ => false,
    }
}

/// Opens the region over and over and verifies whatever is listed, until told to stop.
pub fn read_until(stop: &AtomicBool, region: &Path, shape: &Shape, seen: &Seen) -> Result<(), String> {
    // Relaxed: nothing but the end is told by it.
    while !stop.load(Ordering::Relaxed) {
        match Store::open(region, &read_only(shape)) {
            Ok(store) => verify_listed(&store, shape, seen)?,
            Err(error) if is_no_loss(&error, shape) => {}
            Err(error) => return Err(format!("a reader cannot open: {error}")),
        }
        thread::sleep(Duration::from_millis(3));
    }
    Ok(())
}

fn verify_listed(store: &Store, shape: &Shape, seen: &Seen) -> Result<(), String> {
    for info in store.checkpoints().map_err(|error| format!("list: {error}"))? {
        let opened = match store.open_checkpoint(Select::Generation(info.record.generation), true) {
            Ok(opened) => opened,
            // Damage is what readers must not see; the writer's reuse of the slot is told apart from it.
            Err(error) if is_no_loss(&error, shape) => continue,
            Err(error) => return Err(format!("a reader: {error}")),
        };
        if verify(&opened.checkpoint, shape)? {
            // Relaxed: counters, read when all threads have ended.
            seen.checkpoints.fetch_add(1, Ordering::Relaxed);
            seen.bytes.fetch_add(info.record.payload_bytes, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// False where it was overwritten by its writer meanwhile, or a failing disk did not let it be read.
fn verify(checkpoint: &Checkpoint, shape: &Shape) -> Result<bool, String> {
    let step = checkpoint.record().step;
    for (name, expected) in content::tensors_of(step) {
        match checkpoint.read_tensor(&name) {
            Ok(found) if found == expected => {}
            Ok(_) => return Err(format!("a reader: tensor {name:?} of step {step} differs")),
            Err(error) if is_no_loss(&error, shape) => return Ok(false),
            Err(error) => return Err(format!("a reader: {error}")),
        }
    }
    Ok(true)
}

/// Exit codes that the tool documents: none yet, overwritten meanwhile, and on a disk that fails.
const NOT_FOUND: i32 = 3;
const IN_USE: i32 = 5;
const OTHER: i32 = 1;

/// Has the tool export the newest checkpoint, over and over, and holds the files against what the step saved.
pub fn export_until(stop: &AtomicBool, region: &Path, shape: &Shape, seen: &Seen) -> Result<(), String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let file = folder.path().join("exported");
    while !stop.load(Ordering::Relaxed) {
        let tool = Command::new(env!("CARGO_BIN_EXE_pccheck"))
            .args(["export", "--force", "--output"])
            .args([&file, region])
            .output()
            .map_err(|error| format!("run the tool: {error}"))?;
        if tool.status.success() {
            check_file(&file)?;
            seen.exports.fetch_add(1, Ordering::Relaxed);
        } else {
            let said = String::from_utf8_lossy(&tool.stderr);
            match tool.status.code() {
                Some(NOT_FOUND | IN_USE) => {}
                Some(OTHER) if shape.fails => {}
                _ => return Err(format!("the tool: {}, {said}", tool.status)),
            }
            // Nothing half-written may stay.
            let left = std::fs::read_dir(folder.path()).map_err(|error| error.to_string())?;
            let left: Vec<_> =
                left.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| *path != file).collect();
            if !left.is_empty() {
                return Err(format!("the tool left {left:?}"));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn check_file(file: &Path) -> Result<(), String> {
    let bytes = std::fs::read(file).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| format!("exported: {error}"))?;
    let step = header.metadata().as_ref().and_then(|all| all.get("step")?.parse().ok());
    let step: u64 = step.ok_or("exported: no step")?;
    let exported = SafeTensors::deserialize(&bytes).map_err(|error| format!("exported: {error}"))?;
    for (name, expected) in content::tensors_of(step) {
        let found = exported.tensor(&name).map_err(|error| format!("exported step {step}: {error}"))?;
        if found.data() != expected {
            return Err(format!("exported: tensor {name:?} of step {step} differs"));
        }
    }
    Ok(())
}
