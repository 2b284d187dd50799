//! `pccheck bench`: the engine beside what the machine can do at best, measured in turns in the same run.
//!
//! | module | what |
//! |---|---|
//! | [`transfer`] | whole saves and restores, each beside its ceiling |
//! | [`small`] | the smallest save beside its flushes and writes by hand |
//! | [`unchanged`] | saves of a state of which little changes |
//! | [`opening`] | format, open, the first save after it |
//! | [`tensor`] | one tensor of a large checkpoint |
//! | [`ceiling`] | plain writing and reading, plain copying and hashing, the protocol by hand |
//! | [`memory`] | huge-page blocks, the state that is saved, resident memory |
//! | [`figures`] | medians, spreads and intervals |

mod ceiling;
mod figures;
mod memory;
mod opening;
mod small;
mod tensor;
mod transfer;
mod unchanged;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use indicatif::ProgressBar;
use pccheck::format::BLOCK_BYTES;
use pccheck::medium::{Durability, IoBackend};
use pccheck::store::{OpenOptions, DEFAULT_CHUNK_BYTES, DEFAULT_STAGING_BYTES};
use pccheck::{Error, ErrorKind, Result};
use serde_json::{json, Map, Value};

use self::ceiling::Plain;
use self::memory::{HugeBlock, State};
use crate::commands::Medium;
use crate::{output, units};

/// Buffers beyond the state that a pool needs to hold it: raw saves and the payload's header.
const SPARE_BUFFERS: u64 = 8;
/// Places of the file in which the fastest plain transfers are found.
const PLAIN_PLACES: usize = 2;
/// Longer than any disk takes for one save.
const WAIT: Option<Duration> = Some(Duration::from_secs(3600));

/// Measure saving and restoring beside what the machine can do at best with the same bytes.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
What --measure takes:
  transfer   each repetition saves the (changed) state, writes the same bytes plainly with O_DIRECT from
             huge pages, several in flight, to the slots that saves go to, and hashes and copies them;
             then restores and reads the same slot plainly
  small      saves of 4 KiB beside the same flushes and writes done by hand
  unchanged  one chunk in 100 changes between saves, beside one hashing pass and plain writing of those
  opening    format, open with recovery, the first save after opening over later ones
  tensor     one tensor of a checkpoint: what is read of the rest

The order turns from one repetition to the next. Ratios are medians of the ratios within a repetition,
because a disk's speed drifts; from six repetitions on with their 95% interval (sign test).

Examples:
  pccheck bench /mnt/nvme                                  1 GiB, pools of 256 MiB and of the state's size
  pccheck bench . --sizes 64M,1G,4G --in-flight 1,3 --repeat 15
  pccheck bench . --measure small,unchanged,opening,tensor --sizes 4G --staging 256M
  pccheck bench . --medium direct,mmap --chunk 1M,4M,16M --writers 1,2 --staging 512M --json")]
pub struct Args {
    /// Directory to measure in; needs room for slots and a file of the state's size.
    dir: PathBuf,
    /// What to measure.
    #[arg(long, value_enum, value_name = "WHAT", value_delimiter = ',', default_value = "transfer")]
    measure: Vec<What>,
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
    /// Operations in flight on `direct`; the engine's default unless given.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=4096))]
    queue_depth: Vec<u32>,
    /// Bytes of the staging pool, or `state` for one that holds the state.
    #[arg(long, value_name = "SIZE", value_parser = parse_staging, value_delimiter = ',',
          default_values_t = [Staging::Bytes(DEFAULT_STAGING_BYTES), Staging::State])]
    staging: Vec<Staging>,
    /// Media.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    medium: Vec<Medium>,
    /// How `direct` reaches the kernel.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "auto")]
    backend: Vec<Backend>,
    /// Repetitions of each measurement.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeat: u32,
    /// Print as JSON, with every single measurement.
    #[arg(long)]
    json: bool,
}

/// A measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Whole saves and restores.
    Transfer,
    /// The smallest save.
    Small,
    /// Little changes between saves.
    Unchanged,
    /// Format, open, the first save.
    Opening,
    /// One tensor of a checkpoint.
    Tensor,
}

impl What {
    /// Steps of the progress bar for one setting and repetition.
    fn steps(self) -> u64 {
        match self {
            What::Transfer => 5,
            What::Small | What::Opening => 1,
            What::Tensor => 2,
            What::Unchanged => 3,
        }
    }
}

/// How the `direct` medium reaches the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// io_uring, or threads where the kernel refuses it.
    Auto,
    /// io_uring.
    IoUring,
    /// Blocking calls on threads.
    Threads,
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
    backend: Backend,
    queue_depth: u32,
}

/// What all measurements of one size share.
struct Bed {
    dir: PathBuf,
    repeat: u32,
    state: State,
    /// As large as the state; overwritten.
    copy: HugeBlock,
    plain: Plain,
    bar: ProgressBar,
}

/// What was measured, in the order in which it is shown.
#[derive(Default)]
struct Results {
    transfer: Vec<transfer::Measurement>,
    small: Vec<small::Measured>,
    unchanged: Vec<unchanged::Measured>,
    opening: Vec<opening::Measured>,
    tensor: Vec<tensor::Measured>,
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
    let steps: u64 = args.measure.iter().map(|what| what.steps()).sum();
    let bar = output::count_bar(count as u64 * u64::from(args.repeat) * steps, "preparing", args.json);
    let mut results = Results::default();
    for (size, settings) in settings {
        bar.set_message(format!("preparing {}", units::size(size)));
        let state = State::new(size)?;
        let mut copy = HugeBlock::new(state.bytes().len())?;
        let scratch = Scratch::new(&args.dir, "plain");
        let plain = Plain::prepare(&scratch.path, state.bytes(), &mut copy, PLAIN_PLACES)?;
        let (dir, repeat, bar) = (args.dir.clone(), args.repeat, bar.clone());
        let mut bed = Bed { dir, repeat, state, copy, plain, bar };
        for setting in &settings {
            for &what in &args.measure {
                bed.bar.set_message(format!(
                    "{}, {} in flight, pool {}",
                    units::size(setting.state_bytes),
                    setting.in_flight,
                    units::size(setting.staging_bytes)
                ));
                results.measure(what, &mut bed, setting)?;
            }
        }
    }
    bar.finish_and_clear();
    match args.json {
        true => output::print_json(&results.json(args.repeat)),
        false => output::print(results.text().trim_start_matches('\n')),
    }
}

impl Results {
    fn measure(&mut self, what: What, bed: &mut Bed, setting: &Setting) -> Result<()> {
        match what {
            What::Transfer => self.transfer.push(transfer::run(bed, setting)?),
            What::Small => self.small.push(small::run(bed, setting)?),
            What::Unchanged => self.unchanged.extend(unchanged::run(bed, setting)?),
            What::Opening => self.opening.push(opening::run(bed, setting)?),
            What::Tensor => self.tensor.extend(tensor::run(bed, setting)?),
        }
        Ok(())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        let mut add = |measured: bool, table: String| {
            if measured {
                text += &table;
            }
        };
        add(!self.transfer.is_empty(), transfer::tables(&self.transfer));
        add(!self.small.is_empty(), small::table(&self.small));
        add(!self.unchanged.is_empty(), unchanged::table(&self.unchanged));
        add(!self.opening.is_empty(), opening::table(&self.opening));
        add(!self.tensor.is_empty(), tensor::table(&self.tensor));
        text
    }

    fn json(&self, repeat: u32) -> Value {
        let mut object = Map::new();
        object.insert("repeat".to_string(), json!(repeat));
        let mut add = |name: &str, results: Vec<Value>| {
            if !results.is_empty() {
                object.insert(name.to_string(), Value::Array(results));
            }
        };
        add("settings", self.transfer.iter().map(transfer::json).collect());
        add("small", self.small.iter().map(small::Measured::json).collect());
        add("unchanged", self.unchanged.iter().map(unchanged::Measured::json).collect());
        add("opening", self.opening.iter().map(opening::Measured::json).collect());
        add("tensor", self.tensor.iter().map(tensor::Measured::json).collect());
        Value::Object(object)
    }
}

fn open_options(setting: &Setting) -> OpenOptions {
    OpenOptions {
        medium: setting.medium.into(),
        backend: match setting.backend {
            Backend::Auto => IoBackend::Auto,
            Backend::IoUring => IoBackend::Uring,
            Backend::Threads => IoBackend::Threads,
        },
        required: Durability::Process,
        max_in_flight: setting.in_flight,
        staging_bytes: setting.staging_bytes,
        chunk_bytes: setting.chunk_bytes,
        writers: setting.writers,
        queue_depth: setting.queue_depth,
        ..OpenOptions::default()
    }
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
    if let Some(&chunk_bytes) = args.chunk.iter().find(|&chunk_bytes| chunk_bytes % BLOCK_BYTES != 0) {
        return invalid(format!("expected --chunk to be a multiple of {BLOCK_BYTES}, found {chunk_bytes}"));
    }
    let defaults = OpenOptions::default();
    let writers = or_default(&args.writers, defaults.writers);
    let depths = or_default(&args.queue_depth, defaults.queue_depth);
    let first = Setting {
        state_bytes,
        in_flight: 1,
        writers: defaults.writers,
        chunk_bytes: DEFAULT_CHUNK_BYTES,
        staging_bytes: DEFAULT_STAGING_BYTES,
        medium: Medium::Auto,
        backend: Backend::Auto,
        queue_depth: defaults.queue_depth,
    };
    let mut settings = vec![first];
    vary(&mut settings, &args.medium, |setting, &medium| setting.medium = medium);
    vary(&mut settings, &args.backend, |setting, &backend| setting.backend = backend);
    vary(&mut settings, &args.in_flight, |setting, &in_flight| setting.in_flight = in_flight);
    vary(&mut settings, &writers, |setting, &writers| setting.writers = writers);
    vary(&mut settings, &depths, |setting, &depth| setting.queue_depth = depth);
    vary(&mut settings, &args.chunk, |setting, &chunk_bytes| setting.chunk_bytes = chunk_bytes);
    vary(&mut settings, &args.staging, |setting, staging| {
        setting.staging_bytes = match *staging {
            Staging::Bytes(bytes) => bytes,
            Staging::State => {
                (state_bytes.div_ceil(setting.chunk_bytes) + SPARE_BUFFERS) * setting.chunk_bytes
            }
        }
    });
    Ok(settings)
}

/// Each setting with each of the values.
fn vary<T>(settings: &mut Vec<Setting>, values: &[T], set: impl Fn(&mut Setting, &T)) {
    let varied = settings.iter().flat_map(|setting| {
        values.iter().map(|value| {
            let mut setting = *setting;
            set(&mut setting, value);
            setting
        })
    });
    *settings = varied.collect();
}

fn or_default(given: &[u32], default: u32) -> Vec<u32> {
    if given.is_empty() {
        vec![default]
    } else {
        given.to_vec()
    }
}
