//! Real saves into a region on a recorded disk, and what was known of them when.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pccheck::engine::{format_region, Store};
use pccheck::medium::{open_medium, IoBackend, MediumOptions};
use pccheck::save::Save;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

use super::broken::Protocol;
use super::child::Way;
use super::common::{save_bytes, WAIT};
use super::content::{self, Random};
use super::crashes::Recording;
use super::disk::Disk;
use super::volume::{Format, Volume};

const SLOTS: u32 = 6;
const IN_FLIGHT: u32 = 3;
pub const KEEP: u32 = 2;
/// Every so many saves one is cancelled as soon as it is copied.
const CANCEL_EVERY: u64 = 7;

/// By name, so that a way that this machine refuses is a failure and not another way.
pub fn options(way: Way) -> OpenOptions {
    let options = way.options(IN_FLIGHT, KEEP);
    match way {
        Way::Uring => OpenOptions { backend: IoBackend::Uring, ..options },
        _ => options,
    }
}

pub fn open(region: &Path, way: Way, protocol: Protocol) -> pccheck::Result<Store> {
    let options = options(way);
    if protocol == Protocol::default() {
        return Store::open(region, &options);
    }
    let medium = open_medium(
        region,
        &MediumOptions { kind: options.medium, backend: options.backend, ..MediumOptions::default() },
        None,
    )?;
    Store::open_on(protocol.on(medium), &options, protocol.faults)
}

/// A life of a region: what came to the disk, and what was known when.
pub struct Life {
    pub recording: Recording,
    pub format: Format,
    pub way: Way,
    /// Events before each save began, and its step.
    pub begun: Vec<(usize, u64)>,
    /// Events before each save was reported durable, and its generation.
    pub durable: Vec<(usize, u64)>,
    /// Generations that were reported cancelled.
    pub cancelled: Vec<u64>,
}

/// How a save ended: events before that was known, its generation, and whether it was durable.
type Outcome = (usize, u64, pccheck::Result<()>);

/// How all saves ended, told on the threads that ended them.
#[derive(Clone, Default)]
struct Outcomes(Arc<Mutex<Vec<Outcome>>>);

impl Outcomes {
    fn of(&self, save: &Arc<Save>, disk: &Arc<Disk>) {
        let (ended, outcomes, disk) = (save.clone(), self.clone(), disk.clone());
        save.on_end(Box::new(move || {
            let outcome = ended.wait_durable(Some(Duration::ZERO)).map(|_| ());
            let known = (disk.position(), ended.generation(), outcome);
            outcomes.0.lock().unwrap_or_else(PoisonError::into_inner).push(known);
        }));
    }

    /// Durable ones with their events, and cancelled ones, of `begun` saves.
    ///
    /// # Panics
    ///
    /// If one never ended, or was neither: no fault that is planted here makes a save fail.
    fn sorted(&self, begun: usize, asked_to_cancel: &[u64]) -> (Vec<(usize, u64)>, Vec<u64>) {
        let outcomes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(outcomes.len(), begun, "of the saves that began, so many told of their end");
        let (mut durable, mut cancelled) = (Vec::new(), Vec::new());
        for (events, generation, outcome) in outcomes.iter() {
            match outcome {
                Ok(()) => durable.push((*events, *generation)),
                Err(error)
                    if error.kind() == ErrorKind::Cancelled && asked_to_cancel.contains(generation) =>
                {
                    cancelled.push(*generation);
                }
                Err(error) => panic!("generation {generation}: {error}"),
            }
        }
        (durable, cancelled)
    }
}

/// Saves so many times, several at once.
pub fn live(format: Format, way: Way, protocol: Protocol, saves: u64, seed: u64) -> Life {
    let disk = Disk::new(format.disk_bytes());
    let volume = Volume::make(format, disk.path());
    let format_options = FormatOptions {
        medium: way.options(1, 1).medium,
        ..FormatOptions::new(SLOTS, content::PAYLOAD_BYTES)
    };
    format_region(&volume.region(), &format_options).expect("format");
    let store = open(&volume.region(), way, protocol).expect("open");
    let first = save(&store, 0).and_then(|save| save.wait_durable(WAIT)).expect("the first save");
    volume.sync();
    let disk = Arc::new(disk);
    let base = disk.record();
    let mut begun = vec![(0, 0)];
    let (outcomes, mut asked_to_cancel) = (Outcomes::default(), Vec::new());
    let mut random = Random(seed);
    let mut running: Vec<Arc<Save>> = Vec::new();
    // How they end is told to `outcomes`.
    let wait =
        |running: &mut Vec<Arc<Save>>| running.drain(..).for_each(|save| drop(save.wait_durable(WAIT)));
    for step in 1..=saves {
        begun.push((disk.position(), step));
        let save = Arc::new(save(&store, step).expect("begin a save"));
        outcomes.of(&save, &disk);
        if step % CANCEL_EVERY == 0 {
            asked_to_cancel.push(save.generation());
            save.cancel();
        }
        running.push(save);
        // Sometimes several are in flight, sometimes one.
        if random.below(3) == 0 {
            wait(&mut running);
        }
    }
    wait(&mut running);
    // Its threads end: every save has told by then.
    drop(store);
    let recording = Recording { base, events: disk.events() };
    drop(volume);
    let (mut durable, cancelled) = outcomes.sorted(saves as usize, &asked_to_cancel);
    durable.push((0, first.generation));
    Life { recording, format, way, begun, durable, cancelled }
}

pub fn save(store: &Store, step: u64) -> pccheck::Result<Save> {
    save_bytes(store, step, &content::tensors_of(step), &[("step", &step.to_string())])
}
