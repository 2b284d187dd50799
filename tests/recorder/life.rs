//! A region that lives on a recorded disk, and what was known of it when.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pccheck::engine::{format_region, grow_region, Store};
use pccheck::medium::{create_file, open_medium, Barrier, IoBackend, Medium, MediumOptions};
use pccheck::save::{Save, SaveOptions};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::ErrorKind;

use super::broken::{Broken, Gate, Protocol};
use super::child::Way;
use super::common::{save_bytes_as, WAIT};
use super::content;
use super::crashes::Recording;
use super::disk::{Call, Disk, Trouble};
use super::volume::{Format, Volume};

/// Room for any region that is made here.
const FILE_BYTES: u64 = 20 << 20;

/// How many saves a region has room for.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub slots: u32,
    pub in_flight: u32,
    pub keep: u32,
}

impl Shape {
    /// By name, so that a way that this machine refuses is a failure and not another way.
    pub fn options(self, way: Way) -> OpenOptions {
        let options = way.options(self.in_flight, self.keep);
        match way {
            Way::Uring => OpenOptions { backend: IoBackend::Uring, ..options },
            _ => options,
        }
    }

    pub fn format(self, way: Way) -> FormatOptions {
        FormatOptions {
            medium: way.options(self.in_flight, self.keep).medium,
            ..FormatOptions::new(self.slots, content::PAYLOAD_BYTES)
        }
    }
}

/// A pin of a generation.
#[derive(Debug, Clone, Copy)]
pub struct Pin {
    pub generation: u64,
    /// Events before it was known to be durable: from then on it is found, if its checkpoint is.
    pub from: usize,
    /// Events before it was about to be lifted.
    pub until: usize,
}

/// What came to the disk, and what was known when: always as a number of events.
pub struct Life {
    pub recording: Recording,
    pub format: Format,
    pub way: Way,
    pub shape: Shape,
    /// Before the region was known to be there.
    pub formatted: usize,
    /// Before each save began, and its step.
    pub begun: Vec<(usize, u64)>,
    /// Before each save was reported durable, and its generation.
    pub durable: Vec<(usize, u64)>,
    /// Generations that were reported cancelled.
    pub cancelled: Vec<u64>,
    pub pins: Vec<Pin>,
}

/// How a save ended: events before that was known, its generation, and whether it was durable.
type Outcome = (usize, u64, pccheck::Result<()>);

/// A region that is being used.
pub struct Living {
    /// None while nobody has the region open.
    store: Option<Store>,
    running: Vec<Arc<Save>>,
    pub gate: Arc<Gate>,
    protocol: Protocol,
    /// How saves ended, told on the threads that ended them.
    outcomes: Arc<Mutex<Vec<Outcome>>>,
    /// Saves that were asked to be cancelled, and such as may fail for what a history does to them.
    to_cancel: Vec<u64>,
    may_fail: Vec<u64>,
    life: Life,
    // After the store.
    volume: Volume,
    disk: Arc<Disk>,
}

impl Living {
    /// Formats a region on a disk that remembers everything from before that, and opens it.
    pub fn new(format: Format, way: Way, shape: Shape, protocol: Protocol) -> Living {
        let mut living = Living::unformatted(format, way, shape, protocol);
        format_region(&living.volume.region(), &shape.format(way)).expect("format");
        living.life.formatted = living.disk.position();
        living.open();
        living
    }

    /// The same, of a formatter that was killed just before its flushes: what it wrote is visible and no more.
    pub fn after_a_killed_formatter(format: Format, way: Way, shape: Shape, protocol: Protocol) -> Living {
        let mut living = Living::unformatted(format, way, shape, protocol);
        let region = living.volume.region();
        if format != Format::Bare {
            create_file(&region, FILE_BYTES, None).expect("create");
        }
        let killed = living.medium(&region, Some(Barrier::Control)).expect("open what is to be formatted");
        format_medium(&*killed, &shape.format(way)).expect("format");
        drop(killed);
        living.open();
        // Not before: the store says that it is there.
        living.life.formatted = living.disk.position();
        living
    }

    fn unformatted(format: Format, way: Way, shape: Shape, protocol: Protocol) -> Living {
        let disk = Disk::new(format.disk_bytes());
        let volume = Volume::make(format, disk.path());
        volume.sync();
        let recording =
            Recording { base: disk.record(), events: Vec::new(), never_torn: format.never_torn() };
        let life = Life {
            recording,
            format,
            way,
            shape,
            formatted: 0,
            begun: Vec::new(),
            durable: Vec::new(),
            cancelled: Vec::new(),
            pins: Vec::new(),
        };
        Living {
            store: None,
            running: Vec::new(),
            gate: Arc::default(),
            protocol,
            outcomes: Arc::default(),
            to_cancel: Vec::new(),
            may_fail: Vec::new(),
            life,
            volume,
            disk: Arc::new(disk),
        }
    }

    fn medium(&self, region: &Path, removed: Option<Barrier>) -> pccheck::Result<Arc<dyn Medium>> {
        let OpenOptions { medium: kind, backend, .. } = self.life.shape.options(self.life.way);
        let medium = open_medium(region, &MediumOptions { kind, backend, ..MediumOptions::default() }, None)?;
        Ok(Arc::new(Broken { medium, removed, gate: self.gate.clone() }))
    }

    fn open(&mut self) {
        let (region, options) = (self.volume.region(), self.life.shape.options(self.life.way));
        let Protocol { removed, faults } = self.protocol;
        let store = match self.protocol == Protocol::default() {
            true => Store::open(&region, &options),
            false => {
                self.medium(&region, removed).and_then(|medium| Store::open_on(medium, &options, faults))
            }
        };
        let store = store.expect("open");
        // What an open store lists is promised from then on.
        let at = self.disk.position();
        let listed = store.checkpoints().expect("list");
        self.life.durable.extend(listed.iter().map(|info| (at, info.record.generation)));
        self.store = Some(store);
    }

    /// The same with a gate, also where nothing is broken.
    pub fn reopen_with_gate(&mut self) {
        self.close();
        let options = self.life.shape.options(self.life.way);
        let medium = self.medium(&self.volume.region(), self.protocol.removed).expect("open");
        self.store = Some(Store::open_on(medium, &options, self.protocol.faults).expect("open"));
    }

    fn store(&self) -> &Store {
        self.store.as_ref().expect("open")
    }

    pub fn format(&self) -> Format {
        self.life.format
    }

    fn begin_as(&mut self, step: u64, options: SaveOptions) -> pccheck::Result<Arc<Save>> {
        self.life.begun.push((self.disk.position(), step));
        let save = Arc::new(save(self.store(), step, options)?);
        let (ended, outcomes, disk) = (save.clone(), self.outcomes.clone(), self.disk.clone());
        save.on_end(Box::new(move || {
            let outcome = ended.wait_durable(Some(Duration::ZERO)).map(|_| ());
            let known = (disk.position(), ended.generation(), outcome);
            outcomes.lock().unwrap_or_else(PoisonError::into_inner).push(known);
        }));
        self.running.push(save.clone());
        Ok(save)
    }

    pub fn begin(&mut self, step: u64) -> Arc<Save> {
        self.begin_as(step, WAIT.into()).expect("begin a save")
    }

    pub fn begin_pinned(&mut self, step: u64) {
        let options = SaveOptions { wait: WAIT, pin: true, ..SaveOptions::default() };
        let generation = self.begin_as(step, options).expect("begin a save").generation();
        self.life.pins.push(Pin { generation, from: 0, until: usize::MAX });
    }

    pub fn begin_and_cancel(&mut self, step: u64) {
        let save = self.begin(step);
        self.to_cancel.push(save.generation());
        save.cancel();
    }

    /// One that need neither begin nor succeed.
    pub fn begin_what_may_fail(&mut self, step: u64, wait: Option<Duration>) -> Option<Arc<Save>> {
        let save = self.begin_as(step, wait.into()).ok()?;
        self.may_fail.push(save.generation());
        Some(save)
    }

    /// The next write that comes to the disk fails there.
    pub fn fail_next_write(&self) {
        let mut left = 1;
        self.disk.fail(move |call, _| {
            let hit = left > 0 && call == Call::Write;
            left -= i32::from(hit);
            hit.then_some(Trouble::Errno(libc::EIO))
        });
    }

    /// Until every save has ended; how is told elsewhere.
    pub fn wait(&mut self) {
        for save in self.running.drain(..) {
            let _ = save.wait_durable(WAIT);
        }
    }

    /// Pins the newest checkpoint.
    pub fn pin(&mut self) {
        let generation = self.store().checkpoints().expect("list")[0].record.generation;
        self.store().pin(generation).expect("pin");
        self.life.pins.push(Pin { generation, from: self.disk.position(), until: usize::MAX });
    }

    /// Lifts the last pin, if there is one.
    pub fn unpin(&mut self) {
        let until = self.disk.position();
        let Some(pin) = self.life.pins.last_mut().filter(|pin| pin.until == usize::MAX) else { return };
        pin.until = until;
        let generation = pin.generation;
        self.store().unpin(generation).expect("unpin");
    }

    fn close(&mut self) {
        self.wait();
        self.store = None;
    }

    pub fn reopen(&mut self) {
        self.close();
        self.open();
    }

    /// By one slot.
    pub fn grow(&mut self) {
        self.close();
        let slots = self.life.shape.slots + 1;
        let left_out = grow_region(&self.volume.region(), slots, content::PAYLOAD_BYTES, WAIT).expect("grow");
        assert!(left_out.is_empty(), "not taken along: {left_out:?}");
        self.open();
    }

    /// Ends the recording.
    ///
    /// # Panics
    ///
    /// If a save never ended, or was neither durable nor to be expected not to be.
    pub fn end(mut self) -> Life {
        // Its threads end: every save has told by then.
        self.close();
        let Living { mut life, disk, outcomes, to_cancel, may_fail, volume, .. } = self;
        life.recording.events = disk.events();
        drop(volume);
        let outcomes = std::mem::take(&mut *outcomes.lock().unwrap_or_else(PoisonError::into_inner));
        let begun = life.begun.len();
        assert!(outcomes.len() == begun || !may_fail.is_empty(), "{} of {begun} saves ended", outcomes.len());
        for (events, generation, outcome) in outcomes {
            match outcome {
                Ok(()) => life.durable.push((events, generation)),
                Err(error) if error.kind() == ErrorKind::Cancelled && to_cancel.contains(&generation) => {
                    life.cancelled.push(generation);
                }
                Err(_) if may_fail.contains(&generation) => {}
                Err(error) => panic!("generation {generation}: {error}"),
            }
        }
        life
    }
}

/// Begins a save of what a step holds.
pub fn save(store: &Store, step: u64, options: impl Into<SaveOptions>) -> pccheck::Result<Save> {
    save_bytes_as(store, step, &content::tensors_of(step), &[("step", &step.to_string())], options)
}
