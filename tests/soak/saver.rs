//! The process that saves, until it is killed: tensors or streams, some cancelled, some pinned, and repairs what a failing
//! disk leaves. Reports every step of it; see [`super::reports`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::save::Save;
use pccheck::{ErrorKind, Result};

use super::common::{save_bytes, WAIT};
use super::content::{self, Random};
use super::reports::Reports;
use super::shape::{Orders, Planted, Way};

/// Of so many saves one is cancelled as soon as it is copied.
const CANCEL_EVERY: u64 = 11;
/// Of so many durable checkpoints one is pinned, or its pin lifted.
const PIN_EVERY: u64 = 7;

struct Saver {
    store: Store,
    reports: Arc<Reports>,
    next_step: AtomicU64,
    planted: Option<Planted>,
    fails: bool,
    is_mapped: bool,
}

/// Saves until it is killed, if this process is a saver; returns at once if it is not.
pub fn run_if_saver() {
    let Some(orders) = Orders::from_env() else { return };
    let reports = Arc::new(Reports::open());
    reports.say("opening");
    if orders.shape.planted == Some(Planted::NeverOpens) {
        return;
    }
    let store = match Store::open(&orders.region, &orders.shape.options()) {
        Ok(store) => store,
        // A disk that fails may not let it open: the next life will.
        Err(error) if orders.shape.fails => return reports.say(&format!("failed {:?}", error.kind())),
        Err(error) => return reports.say(&format!("error {error}")),
    };
    reports.say(&format!("ready {}", store.medium_info().path));
    let saver = Saver {
        store,
        reports,
        next_step: AtomicU64::new(orders.first_step),
        planted: orders.shape.planted,
        fails: orders.shape.fails,
        is_mapped: orders.shape.way == Way::Mmap,
    };
    thread::scope(|scope| {
        for nth in 0..orders.shape.in_flight {
            let saver = &saver;
            scope.spawn(move || saver.run(Random(orders.first_step + u64::from(nth))));
        }
    });
}

impl Saver {
    fn run(&self, mut random: Random) {
        loop {
            // Relaxed: only makes steps distinct.
            let step = self.next_step.fetch_add(1, Ordering::Relaxed);
            self.reports.say(&format!("begin {step}"));
            let outcome = match self.planted {
                Some(Planted::Quits) => return,
                Some(Planted::Lies) => self.lie(step),
                Some(Planted::Fails) => self.save_too_much(step),
                _ => self.save(step, &mut random),
            };
            match outcome.map_err(|error| error.kind()) {
                Ok(()) => {}
                Err(kind) if self.is_cost(kind) => {
                    self.reports.say(&format!("failed {kind:?}"));
                    if let Ok(repaired @ 1..) = self.store.repair(Some(Duration::from_secs(5))) {
                        self.reports.say(&format!("repaired {repaired}"));
                    }
                }
                Err(kind) => return self.reports.say(&format!("error step {step}: {kind:?}")),
            }
        }
    }

    /// What a failing device costs.
    fn is_cost(&self, kind: ErrorKind) -> bool {
        match kind {
            // All slots of a dead one are quarantined in the end.
            ErrorKind::Io | ErrorKind::NoSpace | ErrorKind::DurabilityUnknown | ErrorKind::NoSlot => {
                self.fails
            }
            // A half-filled chunk of a stream, which the page cache could not write back and has dropped.
            ErrorKind::Corrupt => self.fails && self.is_mapped,
            _ => false,
        }
    }

    fn save(&self, step: u64, random: &mut Random) -> Result<()> {
        let tensors = content::tensors_of(step);
        let save = match content::is_raw(step) {
            true => self.stream(step, &tensors[0].1, random)?,
            false => save_bytes(&self.store, step, &tensors, &[("step", &step.to_string())])?,
        };
        let generation = save.generation();
        self.reports.say(&format!("issued {generation} {step}"));
        if random.below(CANCEL_EVERY) == 0 {
            save.cancel();
        }
        match save.wait_durable(WAIT) {
            Ok(durable) => self.reports.say(&format!("durable {} {step}", durable.generation)),
            Err(error) if error.kind() == ErrorKind::Cancelled => {
                self.reports.say("cancelled");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        if random.below(PIN_EVERY) == 0 {
            self.pin_or_unpin(generation)?;
        }
        Ok(())
    }

    /// Pieces of any size, the last first.
    fn stream(&self, step: u64, data: &[u8], random: &mut Random) -> Result<Save> {
        let mut raw = self.store.begin_raw(step, data.len() as u64, &[("step", &step.to_string())], WAIT)?;
        let cut = random.below(data.len() as u64) as usize;
        let (first, second) = data.split_at(cut);
        raw.write_at(cut as u64, second)?;
        raw.write_at(0, first)?;
        raw.commit()
    }

    fn pin_or_unpin(&self, generation: u64) -> Result<()> {
        let pinned = self.store.checkpoints()?.into_iter().find(|info| info.pinned);
        match pinned.map(|info| info.record.generation) {
            Some(pinned) => {
                self.reports.say(&format!("unpin {pinned}"));
                match self.store.unpin(pinned) {
                    // Another thread was first.
                    Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                    other => other,
                }
            }
            None => match self.store.pin(generation) {
                Ok(()) => {
                    self.reports.say(&format!("pinned {generation}"));
                    Ok(())
                }
                // No slot to spare, or newer ones have pushed it out.
                Err(error) if matches!(error.kind(), ErrorKind::NoSlot | ErrorKind::NotFound) => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    fn save_too_much(&self, step: u64) -> Result<()> {
        self.store.begin_raw(step, 2 * content::PAYLOAD_BYTES, &[], WAIT).map(drop)
    }

    fn lie(&self, step: u64) -> Result<()> {
        let never = self.store.begin_raw(step, 1, &[], WAIT)?;
        self.reports.say(&format!("issued {} {step}", never.generation()));
        self.reports.say(&format!("durable {} {step}", never.generation()));
        Ok(())
    }
}
