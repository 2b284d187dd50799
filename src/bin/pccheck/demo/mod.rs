//! `pccheck demo`: trains a real network on real digits, is killed again and again, and loses nothing.
//!
//! | module | what |
//! |---|---|
//! | [`data`], [`network`], [`training`], [`kernels`] | the digits, the network, how it learns |
//! | [`trainer`] | the process that trains, saves and resumes: the one that is killed |
//! | [`message`] | what it tells its parent |
//! | [`lives`] | the parent: starts trainers, kills them, checks what each finds |
//! | [`report`], [`plot`] | the tables, JSON, and the picture of the loss |

pub mod data;
pub mod kernels;
mod lives;
mod message;
pub mod network;
pub mod plot;
mod report;
pub mod trainer;
pub mod training;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use pccheck::engine::{format_region, Store};
use pccheck::store::FormatOptions;
use pccheck::{Error, ErrorKind, Result};

use self::data::Dataset;
use self::network::Network;
use crate::{output, units};

/// Smallest and largest state that the demonstration trains.
const STATE_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=40 << 30;

/// Train a network on handwritten digits, save every iteration, kill the trainer again and again, and show
/// that the final weights are those of a run that was never interrupted, bit for bit.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Runs an uninterrupted reference first, then trainers that save every iteration while the next one
computes, and that die by SIGKILL at random moments, in the middle of saves and while resuming, too.
Checked after each kill: recovery finds at least the newest step that was reported durable, and nothing
damaged; each loss, and the final state, are bit-identical to the reference. Exit code 1 if not.

Examples:
  pccheck demo                                   10 MiB of state, 10 kills
  pccheck demo --state 1GiB --iterations 60 --kills 5
  pccheck demo --dir /mnt/nvme --out /tmp/demo --seed 7 --json")]
pub struct Args {
    /// Bytes of training state (weights and Adam's averages): 10M to several G.
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size, default_value = "10M")]
    state: u64,
    /// Iterations of training.
    #[arg(long, value_name = "N", default_value_t = 300, value_parser = clap::value_parser!(u64).range(2..))]
    iterations: u64,
    /// Times the trainer is killed.
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u32).range(..=10_000))]
    kills: u32,
    /// Save after every so many iterations.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
    /// Saves in flight at once; the region has one slot more.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=64))]
    in_flight: u32,
    /// Directory for the region, which is removed at the end; the output directory unless given.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Directory for the picture of the loss.
    #[arg(long, value_name = "DIR", default_value = "pccheck-demo")]
    out: PathBuf,
    /// Seed of the network and of the kills.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// The region of the demonstration; removed with this.
struct Scratch {
    path: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What could not be removed stays visible in the directory that the user named.
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if !STATE_BYTES.contains(&args.state) {
        let message = format!(
            "expected --state from {} to {}, found {}",
            units::size(*STATE_BYTES.start()),
            units::size(*STATE_BYTES.end()),
            units::size(args.state)
        );
        return Err(Error::new(ErrorKind::InvalidArgument, "demo", message));
    }
    let began = Instant::now();
    let dir = args.dir.as_ref().unwrap_or(&args.out);
    for dir in [dir, &args.out] {
        fs::create_dir_all(dir).map_err(|e| Error::io("demo", &e).at_path(dir))?;
    }
    let region = Scratch { path: dir.join(format!("demo-{}.pcc", std::process::id())) };
    let payload_bytes = payload_bytes(args.state)?;
    format_region(&region.path, &FormatOptions::new(args.in_flight + 1, payload_bytes))?;
    let bar = output::count_bar(args.iterations, "uninterrupted", args.json);
    let lived = lives::all(args, &region.path, &bar);
    bar.finish_and_clear();
    drop(region);
    report::publish(args, &lived?, payload_bytes, began.elapsed())
}

/// Exactly what a save of such a network takes in a slot.
fn payload_bytes(state_bytes: u64) -> Result<u64> {
    let samples = Dataset::embedded()?.train.len();
    let network = Network::blank(Network::width_for_state_bytes(state_bytes), samples)?;
    let tensors = network.tensors();
    let host: Vec<_> = tensors.iter().map(trainer::host_tensor).collect();
    Store::payload_bytes(&host, &[])
}
