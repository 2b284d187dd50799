//! `pccheck import`: a safetensors file, whoever wrote it, becomes a checkpoint.
#![expect(unsafe_code, reason = "maps the input file, so that memory stays bounded by the staging pool")]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memmap2::{Advice, Mmap};
use pccheck::engine::{Store, TensorAt};
use pccheck::format::{header_len, parse_header, Payload};
use pccheck::{Error, ErrorKind, Result};
use serde_json::json;

use super::careful_writer;
use crate::{output, table, units};

const OP: &str = "import";
/// Between two looks at how far the save is.
const POLL: Duration = Duration::from_millis(100);

/// Save the tensors of a safetensors file as a new checkpoint.
///
/// Takes files of every safetensors writer, with all dtypes and metadata.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pccheck import run.pcc model.safetensors --step 500
  pccheck format new.pcc --slots 3 --payload 2G && pccheck import new.pcc model.safetensors

The checkpoint is durable when the command returns. It becomes the newest; where every slot is taken it
replaces the oldest checkpoint that is not pinned. The input must not be changed meanwhile.")]
pub struct Args {
    /// Region file or block device.
    path: PathBuf,
    /// Safetensors file.
    file: PathBuf,
    /// Step of the new checkpoint.
    #[arg(long, value_name = "N", default_value_t = 0)]
    step: u64,
    /// Seconds to wait for another writer to close the region.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let map = map_file(&args.file)?;
    let payload = read_header(&map).map_err(|error| {
        error.at_path(&args.file).advise("expected a safetensors file; see whether it was written completely")
    })?;
    let tensors: Vec<TensorAt<'_>> = payload
        .tensors
        .iter()
        .map(|tensor| TensorAt {
            name: &tensor.name,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            ptr: map[tensor.offset as usize..].as_ptr(),
            bytes: tensor.bytes,
            device: None,
        })
        .collect();
    let metadata: Vec<(&str, &str)> =
        payload.metadata.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let store = Store::open(&args.path, &careful_writer(&args.path, Duration::from_secs(args.wait))?)?;
    let began = Instant::now();
    // SAFETY: the mapping outlives the save, which is waited for below, and it is mapped for reading only. That
    // nobody changes the file meanwhile is asked of the user; a change would make wrong bytes, not unsoundness here.
    let save = unsafe { store.begin_save(args.step, &tensors, &metadata, Some(Duration::ZERO)) }?;
    let bar = output::bytes_bar(save.progress().total_bytes, "importing", args.json);
    let durable = loop {
        match save.wait_durable(Some(POLL)) {
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                bar.set_position(save.progress().written_bytes)
            }
            ended => break ended,
        }
    };
    bar.finish_and_clear();
    let durable = durable?;
    let bytes = save.progress().total_bytes;
    let info = store.medium_info();
    if args.json {
        return output::print_json(&json!({
            "path": args.path,
            "file": args.file,
            "generation": durable.generation,
            "step": args.step,
            "slot": durable.slot,
            "bytes": bytes,
            "tensors": tensors.len(),
            "seconds": began.elapsed().as_secs_f64(),
            "survives_power_loss": info.durability == pccheck::medium::Durability::Power,
        }));
    }
    output::print(&table::pairs(&[
        ("imported", args.file.display().to_string()),
        (
            "checkpoint",
            format!("generation {}, step {}, slot {}", durable.generation, args.step, durable.slot),
        ),
        ("tensors", tensors.len().to_string()),
        ("size", format!("{}, {}", units::size(bytes), units::rate(bytes, began.elapsed()))),
        ("survives", super::survives(info.durability).to_string()),
    ]))
}

fn map_file(path: &Path) -> Result<Mmap> {
    let failed = |e: &std::io::Error| Error::io("open", e).at_path(path);
    let file = File::open(path).map_err(|e| failed(&e))?;
    if !file.metadata().map_err(|e| failed(&e))?.is_file() {
        return Err(Error::new(ErrorKind::InvalidArgument, OP, "expected a regular file").at_path(path));
    }
    // SAFETY: only read from; see `run` for changes by others. Truncation by others would end this process with
    // SIGBUS, and the import with it: the region then has one unfinished save, which recovery rejects.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| failed(&e))?;
    // A hint: reading ahead is all that is lost without it.
    let _ = map.advise(Advice::Sequential);
    Ok(map)
}

fn read_header(map: &Mmap) -> Result<Payload> {
    let first8 = map.first_chunk::<8>().ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, OP, format!("expected at least 8 bytes, found {}", map.len()))
    })?;
    let header_bytes = header_len(first8, map.len() as u64)? as usize;
    let mut payload = parse_header(&map[..header_bytes], map.len() as u64)?;
    if let Some(place) = payload.metadata_place {
        // Within the file: the header's parser has checked every tensor's place.
        let bytes = &map[place.offset as usize..(place.offset + place.bytes) as usize];
        payload.load_metadata(bytes)?;
    }
    Ok(payload)
}
