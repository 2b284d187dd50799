//! `pccheck export`: a checkpoint as a safetensors file.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use indicatif::ProgressBar;
use pccheck::engine::{Opened, Store};
use pccheck::format::{label, superblock, SUPERBLOCK_OFFSETS};
use pccheck::load::{Checkpoint, Part};
use pccheck::medium::{rename_new, rename_over};
use pccheck::{Error, ErrorKind, Result};
use serde_json::json;

use super::{open_to_read, Which};
use crate::{output, table, units};

const OP: &str = "export";
/// Payload read, verified and written at a time, at least; whole chunks.
const WINDOW_BYTES: u64 = 64 << 20;
/// As of regions: a state is its owner's, unless they decide otherwise.
const MODE: u32 = 0o600;
/// Times that the newest checkpoint is tried while a trainer overwrites one after the other.
const ATTEMPTS: u32 = 5;

/// Write a checkpoint to a safetensors file, verifying every byte on the way.
///
/// Every safetensors reader takes the file. It appears whole and durable, or not at all; only its owner may read it, until
/// they say otherwise. Where the output is a symbolic link, --force replaces the link, not what it leads to.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pccheck export run.pcc -o model.safetensors
  pccheck export run.pcc -o step-500.safetensors --step 500
  python3 -c 'from safetensors.numpy import load_file; print(load_file(\"model.safetensors\").keys())'

Where the newest checkpoint is damaged the next newest is exported, and a note says so; with --generation
or --step nothing else is taken.")]
pub struct Args {
    /// Region file or block device.
    path: PathBuf,
    /// File to write.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    which: Which,
    /// Replace the file if it exists.
    #[arg(long)]
    force: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    check_output(args)?;
    let store = open_to_read(&args.path)?;
    let began = Instant::now();
    let mut attempt = 1;
    let opened = loop {
        match write_beside(&store, args) {
            Err(error) if error.kind() == ErrorKind::Reclaimed && attempt < ATTEMPTS => attempt += 1,
            done => break done?,
        }
    };
    let record = opened.checkpoint.record();
    for (passed_over, error) in &opened.rejected {
        output::complain(&format!("note: generation {} was passed over: {error}", passed_over.generation));
    }
    if args.json {
        return output::print_json(&json!({
            "output": args.output,
            "generation": record.generation,
            "step": record.step,
            "bytes": record.payload_bytes,
            "tensors": opened.checkpoint.tensors().len(),
            "passed_over": opened.rejected.iter().map(|(record, _)| record.generation).collect::<Vec<_>>(),
            "seconds": began.elapsed().as_secs_f64(),
        }));
    }
    output::print(&table::pairs(&[
        ("exported", args.output.display().to_string()),
        ("checkpoint", format!("generation {}, step {}", record.generation, record.step)),
        ("tensors", opened.checkpoint.tensors().len().to_string()),
        (
            "size",
            format!(
                "{}, {}",
                units::size(record.payload_bytes),
                units::rate(record.payload_bytes, began.elapsed())
            ),
        ),
    ]))
}

fn exists(args: &Args) -> Error {
    Error::new(ErrorKind::AlreadyExists, OP, "the file exists, and was left as it is")
        .at_path(&args.output)
        .advise("choose another name, or give --force to replace it")
}

fn check_output(args: &Args) -> Result<()> {
    let output = match fs::metadata(&args.output) {
        Ok(output) => output,
        Err(e) if e.kind() == IoErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(OP, &e).at_path(&args.output)),
    };
    if !output.is_file() {
        return Err(Error::new(ErrorKind::InvalidArgument, OP, "expected a file name, found something else")
            .at_path(&args.output)
            .advise("choose another name"));
    }
    if !output.is_file() {
        return Err(Error::new(ErrorKind::InvalidArgument, OP, "expected a file name, found something else")
            .at_path(&args.output)
            .advise("choose another name"));
    }
    if holds_region(&args.output)? {
        let what = "the output is a region, or a member of one, and was left as it is";
        return Err(Error::new(ErrorKind::InvalidArgument, OP, what)
            .at_path(&args.output)
            .advise("choose another name; --force does not replace regions"));
    }
    if args.force {
        Ok(())
    } else {
        Err(exists(args))
    }
}

/// Whether a superblock or a label is where one would be. No safetensors file begins so: the magic numbers would be lengths of
/// headers beyond every limit.
fn holds_region(output: &Path) -> Result<bool> {
    let file = match File::open(output) {
        Ok(file) => file,
        // Not for this user to read, and so no region that they could have exported from.
        Err(e) if e.kind() == IoErrorKind::PermissionDenied => return Ok(false),
        Err(e) => return Err(Error::io("open", &e).at_path(output)),
    };
    let mut head = Vec::new();
    let bytes = SUPERBLOCK_OFFSETS[1] + superblock::SUPERBLOCK_MAGIC.len() as u64;
    file.take(bytes).read_to_end(&mut head).map_err(|e| Error::io("read", &e).at_path(output))?;
    Ok(SUPERBLOCK_OFFSETS
        .iter()
        .filter_map(|&offset| head.get(offset as usize..))
        .any(|copy| copy.starts_with(&superblock::SUPERBLOCK_MAGIC) || copy.starts_with(&label::LABEL_MAGIC)))
}

/// A file beside the output, removed unless it was put in its place.
struct Beside {
    path: PathBuf,
}

impl Drop for Beside {
    fn drop(&mut self) {
        // Gone where it was put in place; where not, there is nobody to tell.
        let _ = fs::remove_file(&self.path);
    }
}

fn write_beside(store: &Store, args: &Args) -> Result<Opened> {
    let name = args.output.file_name().ok_or_else(|| {
        Error::new(ErrorKind::InvalidArgument, OP, "expected the name of a file").at_path(&args.output)
    })?;
    let beside = format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id());
    let path = args.output.with_file_name(beside);
    let failed = |e: &std::io::Error| Error::io(OP, e).at_path(&path);
    // Never through a link, and never over what is there.
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(MODE);
    let mut file = options.open(&path).map_err(|e| failed(&e))?;
    let beside = Beside { path: path.clone() };
    let bar = output::bytes_bar(0, "exporting", args.json);
    let opened = store.restore(args.which.select(), |checkpoint| {
        // A damaged checkpoint may have left bytes of its own.
        file.set_len(0).map_err(|e| failed(&e))?;
        std::io::Seek::rewind(&mut file).map_err(|e| failed(&e))?;
        bar.set_length(checkpoint.record().payload_bytes);
        bar.set_position(0);
        copy_payload(checkpoint, &mut file, &path, &bar)
    });
    bar.finish_and_clear();
    let opened = opened?;
    file.sync_all().map_err(|e| failed(&e))?;
    put_in_place(&beside, args)?;
    Ok(opened)
}

fn copy_payload(checkpoint: &Checkpoint, file: &mut File, path: &Path, bar: &ProgressBar) -> Result<()> {
    let record = checkpoint.record();
    let window = WINDOW_BYTES.next_multiple_of(record.chunk_bytes).min(record.payload_bytes);
    let mut bytes = vec![0u8; window as usize];
    let mut offset = 0;
    while offset < record.payload_bytes {
        let now = window.min(record.payload_bytes - offset) as usize;
        checkpoint.read(&mut [Part { offset, dst: &mut bytes[..now] }])?;
        // Not an `Io` error: that would make the engine pass on to the next checkpoint.
        file.write_all(&bytes[..now]).map_err(|e| {
            let error = Error::io(OP, &e).at_path(path);
            if error.kind() == ErrorKind::Io {
                error.with_kind(ErrorKind::Internal)
            } else {
                error
            }
        })?;
        offset += now as u64;
        bar.set_position(offset);
    }
    Ok(())
}

/// Without `--force` never over a file that appeared meanwhile. Durable on return.
fn put_in_place(beside: &Beside, args: &Args) -> Result<()> {
    if args.force {
        return rename_over(&beside.path, &args.output);
    }
    rename_new(&beside.path, &args.output).map_err(|error| match error.kind() {
        ErrorKind::AlreadyExists => exists(args),
        ErrorKind::Unsupported => error.advise("this file system can only replace: give --force"),
        _ => error,
    })
}
