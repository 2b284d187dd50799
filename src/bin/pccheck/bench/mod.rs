//! `pccheck bench`: the engine beside what the machine can do at best, measured in turns in the same run.
//!
//! | module | what |
//! |---|---|
//! | [`measure`] | one setting: saves and restores, each beside its ceiling |
//! | [`ceiling`] | plain O_DIRECT writing and reading, plain copying; shares no code with the engine |
//! | [`memory`] | huge-page blocks, the state that is saved, resident memory |
//! | [`report`] | medians, spreads and ratios; tables and JSON |

mod ceiling;
mod measure;
mod memory;
mod report;

use std::fs;
use std::path::{Path, PathBuf};

use pccheck::format::BLOCK_BYTES;
use pccheck::store::{DEFAULT_CHUNK_BYTES, DEFAULT_STAGING_BYTES};
use pccheck::{Error, ErrorKind, Result};

use self::ceiling::Plain;
use self::measure::Measurement;
use self::memory::{HugeBlock, State};
use crate::commands::Medium;
use crate::{output, units};

/// Steps of the progress bar for each repetition: save, plain writing, copying, restore, plain reading.
const STEPS: u64 = 5;
/// Buffers beyond the state that a pool needs to hold it: raw saves and the payload's header.
const SPARE_BUFFERS: u64 = 8;

/// Measure saving and restoring beside plain O_DIRECT transfers and plain copying of the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each repetition saves the (changed) state, writes the same bytes plainly with O_DIRECT from huge pages,
several in flight, to a file that was written before, and copies them with as many threads as the engine
has writers; then restores and reads plainly. The order turns from one repetition to the next. Ratios
are medians of the ratios within a repetition, because a disk's speed drifts. The first save of a newly
opened store is told apart.

Examples:
  pccheck bench /mnt/nvme                                  1 GiB, pools of 256 MiB and of the state's size
  pccheck bench . --sizes 64M,1G,4G --in-flight 1,3 --repeat 9
  pccheck bench . --medium direct,mmap --chunk 1M,4M,16M --writers 1,2 --staging 512M --json")]
pub struct Args {
    /// Directory to measure in; needs room for slots and a file of the state's size.
    dir: PathBuf,
    /// Bytes of state.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, value_delimiter = ',', default_value = "1G")]
    sizes: Vec<u64>,
    /// Saves in flight at once; so many are begun one after the other in each repetition.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u32).range(1..=64))]
    in_flight: Vec<u32>,
    /// Threads that copy and hash; the engine's default unless given.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    writers: Vec<u32>,
    /// Bytes per chunk.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, value_delimiter = ',',
          default_values_t = [DEFAULT_CHUNK_BYTES])]
    chunk: Vec<u64>,
    /// Bytes of the staging pool, or `state` for one that holds the state.
    #[arg(long, value_name = "SIZE", value_parser = parse_staging, value_delimiter = ',',
          default_values_t = [Staging::Bytes(DEFAULT_STAGING_BYTES), Staging::State])]
    staging: Vec<Staging>,
    /// Media.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    medium: Vec<Medium>,
    /// Repetitions of each measurement.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Print as JSON, with every single measurement.
    #[arg(long)]
    json: bool,
}

/// Size of the staging pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Staging {
    Bytes(u64),
    State,
}

impl std::fmt::Display for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Staging::Bytes(bytes) => write!(f, "{bytes}"),
            Staging::State => f.write_str("state"),
        }
    }
}

fn parse_staging(text: &str) -> std::result::Result<Staging, String> {
    match text {
        "state" => Ok(Staging::State),
        size => units::parse_size(size).map(Staging::Bytes),
    }
}

/// One combination of the knobs.
#[derive(Debug, Clone, Copy)]
struct Setting {
    state_bytes: u64,
    in_flight: u32,
    writers: u32,
    chunk_bytes: u64,
    staging_bytes: u64,
    medium: Medium,
}

/// A file of the bench, removed with this.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(dir: &Path, name: &str) -> Scratch {
        Scratch { path: dir.join(format!("bench-{}.{name}", std::process::id())) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What could not be removed stays visible in the directory that the user named.
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let metadata = fs::metadata(&args.dir).map_err(|e| Error::io("bench", &e).at_path(&args.dir))?;
    if !metadata.is_dir() {
        return Err(Error::new(
            ErrorKind::InvalidArgument,
            "bench",
            "expected a directory, found something else",
        )
        .at_path(&args.dir)
        .advise("give the directory that regions are to be in; bench makes and removes its own files"));
    }
    let mut settings = Vec::new();
    for &size in &args.sizes {
        settings.push((size, settings_for(args, size)?));
    }
    let count: usize = settings.iter().map(|(_, settings)| settings.len()).sum();
    let bar = output::count_bar(count as u64 * u64::from(args.repeat) * STEPS, "preparing", args.json);
    let mut results: Vec<Measurement> = Vec::new();
    for (size, settings) in settings {
        let mut state = State::new(size)?;
        let mut copy = HugeBlock::new(state.bytes().len())?;
        let scratch = Scratch::new(&args.dir, "plain");
        bar.set_message(format!("preparing {}", units::size(size)));
        let plain = Plain::prepare(&scratch.path, state.bytes(), &mut copy)?;
        for setting in settings {
            let region = Scratch::new(&args.dir, "region");
            let measured =
                measure::run(&region.path, &setting, args.repeat, &mut state, &mut copy, &plain, &bar)?;
            results.push(measured);
        }
    }
    bar.finish_and_clear();
    report::publish(args, &results)
}

/// Every combination for one size, checked before anything is measured.
fn settings_for(args: &Args, state_bytes: u64) -> Result<Vec<Setting>> {
    let invalid = |message: String| Err(Error::new(ErrorKind::InvalidArgument, "bench", message));
    if state_bytes < memory::STATE_BYTES_MIN {
        return invalid(format!(
            "expected a state of at least {}, found {}",
            units::size(memory::STATE_BYTES_MIN),
            units::size(state_bytes)
        ));
    }
    let default_writers = [pccheck::store::OpenOptions::default().writers];
    let writers = if args.writers.is_empty() { &default_writers[..] } else { &args.writers };
    let mut settings = Vec::new();
    for &medium in &args.medium {
        for &in_flight in &args.in_flight {
            for &writers in writers {
                for &chunk_bytes in &args.chunk {
                    if chunk_bytes % BLOCK_BYTES != 0 {
                        return invalid(format!(
                            "expected --chunk to be a multiple of {BLOCK_BYTES}, found {chunk_bytes}"
                        ));
                    }
                    for &staging in &args.staging {
                        let staging_bytes = match staging {
                            Staging::Bytes(bytes) => bytes,
                            Staging::State => {
                                (state_bytes.div_ceil(chunk_bytes) + SPARE_BUFFERS) * chunk_bytes
                            }
                        };
                        settings.push(Setting {
                            state_bytes,
                            in_flight,
                            writers,
                            chunk_bytes,
                            staging_bytes,
                            medium,
                        });
                    }
                }
            }
        }
    }
    Ok(settings)
}
