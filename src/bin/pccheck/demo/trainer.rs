//! The process that trains, saves while it computes, and resumes from whatever recovery finds.
#![expect(unsafe_code, reason = "lends the state to saves while the next iteration only reads it")]

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pccheck::engine::{Select, Store, TensorAt};
use pccheck::format::Dtype;
use pccheck::load::Checkpoint;
use pccheck::medium::Durability;
use pccheck::save::Save;
use pccheck::store::{OpenOptions, DEFAULT_CHUNK_BYTES};
use pccheck::{Error, ErrorKind, Result};

use super::data::Dataset;
use super::message::Message;
use super::network::{Network, Tensor, Values, ValuesMut};
use super::training::Gradients;

const STAGING_BYTES_MIN: u64 = 64 << 20;
const STAGING_BYTES_MAX: u64 = 512 << 20;
/// Longer than any disk takes: a save that takes longer hangs.
const WAIT: Option<Duration> = Some(Duration::from_secs(600));
/// Multiply-adds spent on testing at the end, at most; wide networks are tested on fewer digits.
const TEST_OPS_MAX: u64 = 4 << 30;

/// How the parent starts a trainer.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Region to save in; without one nothing is saved.
    #[arg(long)]
    pub region: Option<PathBuf>,
    /// Bytes of state.
    #[arg(long)]
    pub state: u64,
    /// Seed of the network.
    #[arg(long)]
    pub seed: u64,
    /// Iterations in all.
    #[arg(long)]
    pub iterations: u64,
    /// Save after every so many iterations.
    #[arg(long)]
    pub every: u64,
    /// Saves in flight.
    #[arg(long)]
    pub in_flight: u32,
}

/// A tensor of the network as the engine takes it.
pub fn host_tensor<'a>(tensor: &'a Tensor<'_>) -> TensorAt<'a> {
    let dtype = match tensor.values {
        Values::F32(_) => Dtype::F32,
        Values::U64(_) => Dtype::U64,
    };
    TensorAt {
        name: &tensor.name,
        dtype,
        shape: &tensor.shape,
        ptr: tensor.pointer(),
        bytes: tensor.bytes() as u64,
        device: None,
    }
}

/// Trains to the end, or until it is killed.
pub fn run(args: &Args) -> Result<()> {
    let began = Instant::now();
    let dataset = Dataset::embedded()?;
    let store = args.region.as_ref().map(|path| open(path, args)).transpose()?;
    let width = Network::width_for_state_bytes(args.state);
    let new = || Network::new(width, dataset.train.len(), args.seed);
    let (mut network, generation, passed_over) = match &store {
        Some(store) => resume(store, Network::blank(width, dataset.train.len())?, new)?,
        None => (new()?, 0, 0),
    };
    let mut gradients = Gradients::new(&network)?;
    let after_us = began.elapsed().as_micros() as u64;
    Message::Started { step: network.step(), generation, passed_over, after_us }.send()?;
    match &store {
        Some(store) => train_and_save(&mut network, &mut gradients, &dataset, args, store)?,
        None => {
            while network.step() < args.iterations {
                forward_backward(&network, &mut gradients, &dataset)?;
                network.update(&gradients);
            }
        }
    }
    let samples = (TEST_OPS_MAX / (width * width) as u64).clamp(1, dataset.test.len() as u64);
    let accuracy = network.test_accuracy(&dataset.test, samples as usize)?;
    Message::Done { digest: network.digest(), accuracy_bits: accuracy.to_bits() }.send()
}

fn open(path: &Path, args: &Args) -> Result<Store> {
    let staging_bytes = (2 * args.state).clamp(STAGING_BYTES_MIN, STAGING_BYTES_MAX);
    let options = OpenOptions {
        required: Durability::Process,
        max_in_flight: args.in_flight,
        staging_bytes: staging_bytes.max(u64::from(args.in_flight + 2) * DEFAULT_CHUNK_BYTES),
        ..OpenOptions::default()
    };
    Store::open(path, &options)
}

/// The newest checkpoint's state, its generation, and how many newer ones were damaged; a new network where there is
/// no checkpoint yet.
fn resume(
    store: &Store,
    mut network: Network,
    new: impl Fn() -> Result<Network>,
) -> Result<(Network, u64, u64)> {
    match store.restore(Select::Newest, |checkpoint| read_state(checkpoint, &mut network)) {
        Ok(opened) => Ok((network, opened.checkpoint.record().generation, opened.rejected.len() as u64)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok((new()?, 0, 0)),
        Err(error) => Err(error),
    }
}

fn read_state(checkpoint: &Checkpoint, network: &mut Network) -> Result<()> {
    let mut tensors = network.tensors_mut();
    let mut wanted: Vec<(&str, &mut [u8])> = Vec::with_capacity(tensors.len());
    for tensor in &mut tensors {
        let stored = checkpoint.tensor(&tensor.name)?;
        let dtype = match tensor.values {
            ValuesMut::F32(_) => Dtype::F32,
            ValuesMut::U64(_) => Dtype::U64,
        };
        if (stored.dtype, &stored.shape) != (dtype, &tensor.shape) {
            let message = format!(
                "expected tensor {:?} to be {dtype:?} {:?}, found {:?} {:?}",
                tensor.name, tensor.shape, stored.dtype, stored.shape
            );
            return Err(Error::new(ErrorKind::InvalidState, "resume", message));
        }
        let (bytes, first) = (tensor.bytes(), tensor.pointer());
        // SAFETY: the tensor's own memory, borrowed exclusively by `tensors` for as long; any bytes make floats and
        // integers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(first, bytes) };
        wanted.push((&tensor.name, bytes));
    }
    checkpoint.read_tensors(&mut wanted)?;
    network.check()
}

fn forward_backward(network: &Network, gradients: &mut Gradients, dataset: &Dataset) -> Result<()> {
    let loss = network.forward_backward(gradients, &dataset.train);
    Message::Loss { iteration: network.step(), bits: loss.to_bits() }.send()
}

/// A save whose state must not change yet, and what it cost so far.
struct Pending {
    save: Arc<Save>,
    begin_took: Duration,
}

impl Pending {
    fn wait_copied(self) -> Result<()> {
        let began = Instant::now();
        self.save.wait_copied(WAIT)?;
        let stall = self.begin_took + began.elapsed();
        Message::Copied { step: self.save.step(), stall_us: stall.as_micros() as u64 }.send()
    }
}

/// Saves begin after an update and copy while the next iteration computes; the next update waits for the copy.
fn train_and_save(
    network: &mut Network,
    gradients: &mut Gradients,
    dataset: &Dataset,
    args: &Args,
    store: &Store,
) -> Result<()> {
    let (to_reporter, saves) = mpsc::sync_channel(args.in_flight as usize);
    // The scope ends when the reporter has dropped every save: none outlives `network`.
    thread::scope(|scope| {
        let reporter = scope.spawn(|| report_durable(saves));
        let trained = (|| {
            let mut pending: Option<Pending> = None;
            while network.step() < args.iterations {
                forward_backward(network, gradients, dataset)?;
                pending.take().map_or(Ok(()), Pending::wait_copied)?;
                network.update(gradients);
                if network.step().is_multiple_of(args.every) {
                    pending = Some(begin(network, store, &to_reporter)?);
                }
            }
            pending.map_or(Ok(()), Pending::wait_copied)
        })();
        drop(to_reporter);
        let reported = reporter.join().unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Internal, "demo", "the thread that waits for saves panicked"))
        });
        // A reporter that gave up is the cause of a failure to reach it.
        reported.and(trained)
    })
}

fn begin(network: &Network, store: &Store, to_reporter: &SyncSender<Arc<Save>>) -> Result<Pending> {
    let began = Instant::now();
    let tensors = network.tensors();
    let host: Vec<TensorAt<'_>> = tensors.iter().map(host_tensor).collect();
    // SAFETY: `train_and_save` changes the network only after `wait_copied` succeeded, and its scope ends
    // only after the save was dropped.
    let save = Arc::new(unsafe { store.begin_save(network.step(), &host, &[], WAIT) }?);
    let begin_took = began.elapsed();
    to_reporter
        .send(save.clone())
        .map_err(|_| Error::new(ErrorKind::Internal, "demo", "the thread that waits for saves is gone"))?;
    Ok(Pending { save, begin_took })
}

/// Tells of every save as soon as it is durable.
fn report_durable(saves: Receiver<Arc<Save>>) -> Result<()> {
    for save in saves {
        let durable = save.wait_durable(WAIT)?;
        Message::Durable { step: save.step(), after_us: durable.durable_after.as_micros() as u64 }.send()?;
    }
    Ok(())
}
