//! `pccheck verify`: reads every byte of checkpoints and checks it against the stored hashes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use pccheck::engine::{Select, Store};
use pccheck::format::SlotRecord;
use pccheck::load::{Checkpoint, Part};
use pccheck::{Error, ErrorKind, Result};
use serde_json::json;

use super::{open_to_read, Which};
use crate::table::Table;
use crate::{output, units};

/// Chunks verified between two steps of the progress bar; enough to keep all readers busy.
const WINDOW_CHUNKS: u64 = 64;
/// Names of damaged tensors that are printed.
const NAMES_MAX: usize = 8;

/// Read whole checkpoints and check every chunk against its hash.
///
/// Without options: the newest checkpoint. Works beside a live trainer.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  pccheck verify run.pcc
  pccheck verify run.pcc --all
  pccheck verify run.pcc --generation 1042 --json

Exit code 4 when anything is damaged. A checkpoint that a live trainer overwrote meanwhile is no damage.")]
pub struct Args {
    /// Region file or block device.
    path: PathBuf,
    #[command(flatten)]
    which: Which,
    /// Every checkpoint that the region holds.
    #[arg(long, conflicts_with_all = ["generation", "step"])]
    all: bool,
    /// Print as JSON.
    #[arg(long)]
    json: bool,
}

/// How one checkpoint fared.
struct Outcome {
    record: SlotRecord,
    time: Duration,
    /// Chunks that do not match, and the tensors that lie in them.
    damaged_chunks: Vec<u64>,
    damaged_tensors: Vec<String>,
    error: Option<Error>,
}

impl Outcome {
    fn overtaken(&self) -> bool {
        self.error.as_ref().is_some_and(|error| error.kind() == ErrorKind::Reclaimed)
    }

    fn verdict(&self) -> String {
        match &self.error {
            None => "intact".to_string(),
            Some(_) if self.overtaken() => "overwritten by its trainer meanwhile".to_string(),
            Some(error) if self.damaged_chunks.is_empty() => format!("damaged: {}", error.message()),
            Some(_) => {
                let names: Vec<&str> =
                    self.damaged_tensors.iter().take(NAMES_MAX).map(String::as_str).collect();
                let more = match self.damaged_tensors.len().saturating_sub(NAMES_MAX) {
                    0 => String::new(),
                    more => format!(" and {more} more"),
                };
                format!(
                    "damaged: {} of {} chunks (the first is {}), with {}{more}",
                    self.damaged_chunks.len(),
                    self.record.chunk_count,
                    self.damaged_chunks[0],
                    names.join(", ")
                )
            }
        }
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let store = open_to_read(&args.path)?;
    let records = wanted(&store, args)?;
    let total = records.iter().map(|record| record.payload_bytes).sum();
    let bar = output::bytes_bar(total, "verifying", args.json);
    let outcomes = records.into_iter().map(|record| check(&store, record, &bar)).collect::<Result<Vec<_>>>();
    bar.finish_and_clear();
    let outcomes = outcomes?;
    print(&outcomes, args.json)?;
    let damaged: Vec<&Outcome> =
        outcomes.iter().filter(|outcome| outcome.error.is_some() && !outcome.overtaken()).collect();
    if let Some(first) = damaged.first() {
        return Err(Error::new(
            ErrorKind::Corrupt,
            "verify",
            format!(
                "{} of {} checkpoints are damaged, the newest of them is generation {}",
                damaged.len(),
                outcomes.len(),
                first.record.generation
            ),
        )
        .at_path(&args.path)
        .advise("restore an older checkpoint, or read the undamaged tensors alone"));
    }
    if outcomes.iter().all(Outcome::overtaken) {
        return Err(Error::new(
            ErrorKind::Reclaimed,
            "verify",
            "the trainer overwrote every checkpoint before it was verified",
        )
        .at_path(&args.path)
        .advise("try again, or let the trainer keep more checkpoints"));
    }
    Ok(())
}

fn wanted(store: &Store, args: &Args) -> Result<Vec<SlotRecord>> {
    let records = store.checkpoints()?.into_iter().map(|info| info.record);
    let matching = records.filter(|record| match args.which.select() {
        Select::Generation(generation) => record.generation == generation,
        Select::Step(step) => record.step == step,
        _ => true,
    });
    let records: Vec<SlotRecord> = matching.take(if args.all { usize::MAX } else { 1 }).collect();
    if records.is_empty() {
        let what = match (args.which.generation, args.which.step) {
            (Some(generation), _) => format!("no checkpoint has generation {generation}"),
            (_, Some(step)) => format!("no checkpoint of step {step}"),
            _ => "the region holds no checkpoint".to_string(),
        };
        return Err(Error::new(ErrorKind::NotFound, "verify", what)
            .at_path(&args.path)
            .advise("pccheck inspect lists what there is"));
    }
    Ok(records)
}

fn check(store: &Store, record: SlotRecord, bar: &ProgressBar) -> Result<Outcome> {
    let began = Instant::now();
    let mut outcome = Outcome {
        record: record.clone(),
        time: Duration::ZERO,
        damaged_chunks: Vec::new(),
        damaged_tensors: Vec::new(),
        error: None,
    };
    let opened = store.open_checkpoint(Select::Generation(record.generation), false);
    match opened {
        Ok(opened) => check_chunks(&opened.checkpoint, bar, &mut outcome)?,
        // It was listed a moment ago: the trainer has taken its slot since.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            outcome.error = Some(error.with_kind(ErrorKind::Reclaimed))
        }
        Err(error) if is_damage(&error) => outcome.error = Some(error),
        Err(error) => return Err(error),
    }
    outcome.time = began.elapsed();
    Ok(outcome)
}

fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Reclaimed | ErrorKind::Io)
}

fn check_chunks(checkpoint: &Checkpoint, bar: &ProgressBar, outcome: &mut Outcome) -> Result<()> {
    let record = checkpoint.record();
    let mut first = 0;
    while first < record.chunk_count {
        let end = (first + WINDOW_CHUNKS).min(record.chunk_count);
        if let Err(error) = read_chunks(checkpoint, first, end) {
            if !is_damage(&error) {
                return Err(error);
            }
            let overtaken = error.kind() == ErrorKind::Reclaimed;
            outcome.error.get_or_insert(error);
            if overtaken {
                return Ok(());
            }
            let broken = (first..end).filter(|&chunk| read_chunks(checkpoint, chunk, chunk + 1).is_err());
            outcome.damaged_chunks.extend(broken);
        }
        let bytes: usize = (first..end).map(|chunk| record.chunk_len(chunk)).sum();
        bar.inc(bytes as u64);
        first = end;
    }
    let in_damage = |offset: u64, bytes: u64| {
        bytes > 0
            && outcome.damaged_chunks.iter().any(|&chunk| {
                (offset / record.chunk_bytes..=(offset + bytes - 1) / record.chunk_bytes).contains(&chunk)
            })
    };
    let names = checkpoint.tensors().iter().filter(|tensor| in_damage(tensor.offset, tensor.bytes));
    outcome.damaged_tensors = names.map(|tensor| tensor.name.clone()).collect();
    Ok(())
}

/// Has chunks verified: of each, one byte is wanted, so that nothing is copied.
fn read_chunks(checkpoint: &Checkpoint, first: u64, end: u64) -> Result<()> {
    let chunk_bytes = checkpoint.record().chunk_bytes;
    let mut bytes = vec![0u8; (end - first) as usize];
    let mut parts: Vec<Part<'_>> = (first..end)
        .zip(bytes.chunks_mut(1))
        .map(|(chunk, dst)| Part { offset: chunk * chunk_bytes, dst })
        .collect();
    checkpoint.read(&mut parts)
}

fn print(outcomes: &[Outcome], as_json: bool) -> Result<()> {
    if as_json {
        let checkpoints: Vec<_> = outcomes
            .iter()
            .map(|outcome| {
                json!({
                    "generation": outcome.record.generation,
                    "step": outcome.record.step,
                    "payload_bytes": outcome.record.payload_bytes,
                    "intact": outcome.error.is_none(),
                    "overwritten_meanwhile": outcome.overtaken(),
                    "error": outcome.error.as_ref().map(|error| error.to_string()),
                    "damaged_chunks": outcome.damaged_chunks,
                    "damaged_tensors": outcome.damaged_tensors,
                    "seconds": outcome.time.as_secs_f64(),
                    "gb_per_s": units::gb_per_s(outcome.record.payload_bytes, outcome.time.as_secs_f64()),
                })
            })
            .collect();
        return output::print_json(&json!({ "checkpoints": checkpoints }));
    }
    let mut rows = Table::new(&["generation", "step", "payload", "time", "rate", "<verdict"]);
    for outcome in outcomes {
        rows.row(vec![
            outcome.record.generation.to_string(),
            outcome.record.step.to_string(),
            units::size(outcome.record.payload_bytes),
            units::time(outcome.time),
            units::rate(outcome.record.payload_bytes, outcome.time),
            outcome.verdict(),
        ]);
    }
    output::print(&rows.render())
}
