//! The real engine on a simulated medium, saves whose steps say what they hold, and notes of what was promised.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use pccheck::engine::{Select, Store, TensorAt};
use pccheck::error::ErrorKind;
use pccheck::format::{encode_table, plan, plan_raw, Dtype, Layout, TensorSpec};
use pccheck::medium::sim::{
    for_each_crash_image, EnumerateOptions, Image, Note, SimMedium, SimModel, SimSchedule,
};
use pccheck::save::{Durable, Faults, Save, SaveOptions};
use pccheck::slots::SlotState;
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::Error;
use shuttle::rand::{thread_rng, Rng};
use shuttle::thread;

use crate::judge;

/// What a note of kind `Other` means. Its value is a generation and a step ([`both`]), or a step.
pub mod label {
    /// A save of this step is about to begin.
    pub const ISSUED: &str = "issued";
    /// A save was reported durable.
    pub const ACKNOWLEDGED: &str = "acknowledged";
    /// A save of this step was reported cancelled: it must never be found.
    pub const CANCELLED: &str = "cancelled";
    /// A save of this step is not confirmed yet.
    pub const UNCONFIRMED: &str = "unconfirmed";
    /// It is about to be.
    pub const CONFIRMING: &str = "confirming";
    /// Wherever this step is found it is pinned.
    pub const PINNED: &str = "pinned";
    /// No more.
    pub const UNPINNING: &str = "unpinning";
    /// This step is about to be given up.
    pub const ABANDONING: &str = "abandoning";
    /// It was reported given up.
    pub const ABANDONED: &str = "abandoned";
    /// Held checkpoints older than this are about to be let go.
    pub const MARKING: &str = "marking";
}

pub const CHUNK_BYTES: u64 = 4096;
const BLOCK: usize = 4096;
pub const RUN_ID: u64 = 77;
const PAYLOAD_MAX: u64 = 16 << 10;

/// How a region is laid out and used.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub slots: u32,
    pub in_flight: u32,
    pub keep: u32,
    pub hold: bool,
    pub staging_chunks: u64,
    pub faults: Faults,
    /// Also persistent memory, into which copiers store by themselves.
    pub pmem: bool,
}

impl Setup {
    /// The fewest slots and buffers for `in_flight` and `keep`, and no fault.
    pub fn tight(in_flight: u32, keep: u32) -> Setup {
        let staging_chunks = u64::from(in_flight) + 1;
        let (slots, hold, pmem) = (in_flight + keep, false, true);
        Setup { slots, in_flight, keep, hold, staging_chunks, faults: Faults::default(), pmem }
    }

    pub fn layout(&self) -> Layout {
        let slot_bytes = Layout::slot_bytes_for(PAYLOAD_MAX, PAYLOAD_MAX).expect("slot size");
        Layout::new(self.slots, slot_bytes).expect("layout")
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            max_in_flight: self.in_flight,
            keep: self.keep,
            hold: self.hold,
            staging_bytes: self.staging_chunks * CHUNK_BYTES,
            chunk_bytes: CHUNK_BYTES,
            writers: 2,
            readers: 2,
            run_id: RUN_ID,
            rewrite_every: 3,
            ..OpenOptions::default()
        }
    }
}

/// Whether a step is saved as a raw stream.
pub fn is_raw(step: u64) -> bool {
    step >= 1000
}

/// What a step saves: a pure function of the step, so that whoever finds it can tell.
pub struct Content {
    pub data: Vec<u8>,
    pub payload: Vec<u8>,
    /// The chunk table as it must stand behind the payload.
    pub table: Vec<u8>,
}

impl Content {
    pub fn of(step: u64) -> Content {
        // One or two chunks beside the header, the last one not full; the second one comes back in other steps.
        let len = (1 + step as usize % 2) * BLOCK - 100;
        let mut data = vec![0; len];
        for at in (0..len - 8).step_by(512) {
            let seed = if at < BLOCK { step } else { 1000 + step / 2 % 2 };
            let word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(at as u32 / 8) ^ at as u64;
            data[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let shape = [len as u64];
        let spec =
            TensorSpec { name: "w", dtype: Dtype::U8, shape: &shape, bytes: len as u64, alias_of: None };
        let planned = if is_raw(step) { plan_raw(len as u64, &[]) } else { plan(&[spec], &[]) };
        let mut payload = planned.expect("plan").header;
        payload.extend_from_slice(&data);
        let hashes: Vec<u128> =
            payload.chunks(CHUNK_BYTES as usize).map(pccheck::format::chunk_hash).collect();
        Content { data, payload, table: encode_table(&hashes) }
    }
}

const MODELS: [SimModel; 3] = [SimModel::Ssd { torn: false }, SimModel::PageCache, SimModel::Pmem];

type Images = Mutex<HashMap<(u32, usize), Arc<Image>>>;
static FORMATTED: std::sync::LazyLock<Images> = std::sync::LazyLock::new(Images::default);

/// Formats the media of the scenarios that follow, outside of their schedules.
pub fn prepare(setup: Setup) {
    crate::schedules::prepare(move || {
        for (at, model) in MODELS.into_iter().enumerate() {
            let sim = SimMedium::new(setup.layout().region_bytes(), model);
            format_medium(&sim, &FormatOptions::new(setup.slots, PAYLOAD_MAX)).expect("format");
            let image = final_image(&sim);
            FORMATTED.lock().expect("no panic under this lock").insert((setup.slots, at), image);
        }
    });
}

fn final_image(sim: &SimMedium) -> Arc<Image> {
    let none = EnumerateOptions { images_per_point: 0, samples_per_point: 0, ..EnumerateOptions::default() };
    let mut last = None;
    for_each_crash_image(&sim.trace(), &none, |_, image| {
        last = Some(image.clone());
        Ok(())
    })
    .expect("nothing is checked");
    last.expect("there is a point at the end")
}

/// A generation and a step in one number.
pub fn both(generation: u64, step: u64) -> u64 {
    generation << 20 | step
}

/// The generation and the step of [`both`].
pub fn split(value: u64) -> (u64, u64) {
    (value >> 20, value & ((1 << 20) - 1))
}

/// An open store.
pub struct World {
    pub store: Store,
    pub sim: Arc<SimMedium>,
    pub setup: Setup,
}

impl World {
    /// Over a medium of some kind, which completes operations at once or in some order.
    pub fn open(setup: Setup) -> Arc<World> {
        let model = thread_rng().gen_range(0..MODELS.len() - usize::from(!setup.pmem));
        let image = FORMATTED.lock().expect("no panic under this lock")[&(setup.slots, model)].clone();
        let sim = Arc::new(image.to_medium());
        if thread_rng().gen() {
            let max_delay = std::time::Duration::from_micros(50);
            sim.set_schedule(SimSchedule::Reordered { seed: thread_rng().gen(), max_delay });
        }
        let store = Store::open_on(sim.clone(), &setup.options(), setup.faults).expect("open");
        Arc::new(World { store, sim, setup })
    }

    pub fn say(&self, label: &'static str, value: u64) {
        self.sim.note(Note::Other { label, value });
    }

    /// Begins a save without a limit to the wait for a slot.
    pub fn begin(self: &Arc<Self>, step: u64) -> Flying {
        self.begin_with(step, None.into()).expect("begin")
    }

    /// Begins a save. It is acknowledged on the thread that ends it, before that does anything else.
    pub fn begin_with(self: &Arc<Self>, step: u64, options: SaveOptions) -> Result<Flying, Error> {
        self.say(label::ISSUED, step);
        if options.pin {
            self.say(label::PINNED, step);
        }
        if options.confirm {
            self.say(label::UNCONFIRMED, step);
        }
        let data = Content::of(step).data;
        let shape = [data.len() as u64];
        let tensor = TensorAt {
            name: "w",
            dtype: Dtype::U8,
            shape: &shape,
            ptr: data.as_ptr(),
            bytes: data.len() as u64,
            device: None,
        };
        // SAFETY: `Flying` keeps the data, unchanged, until it is copied.
        let save = Arc::new(unsafe { self.store.begin_save(step, &[tensor], &[], options) }?);
        Ok(self.watch(save, data))
    }

    fn watch(&self, save: Arc<Save>, data: Vec<u8>) -> Flying {
        let (ended, sim, step) = (save.clone(), self.sim.clone(), save.step());
        save.on_end(Box::new(move || {
            let (label, value) = match ended.wait_durable(Some(std::time::Duration::ZERO)) {
                Ok(durable) => (label::ACKNOWLEDGED, both(durable.generation, step)),
                Err(error) if error.kind() == ErrorKind::Cancelled => (label::CANCELLED, step),
                Err(_) => return,
            };
            sim.note(Note::Other { label, value });
        }));
        Flying { save, data }
    }

    /// Saves as a raw stream that two threads write, from the back, in pieces that straddle chunks.
    pub fn stream(&self, step: u64) -> Flying {
        const PIECE_BYTES: usize = 1500;
        self.say(label::ISSUED, step);
        let data = Arc::new(Content::of(step).data);
        let raw = Arc::new(self.store.begin_raw(step, data.len() as u64, &[], None).expect("begin"));
        let writers = [0, 1].map(|part| {
            let (raw, data) = (raw.clone(), data.clone());
            thread::spawn(move || {
                let pieces = data.chunks(PIECE_BYTES).enumerate().filter(|(at, _)| at % 2 == part);
                for (at, piece) in pieces.collect::<Vec<_>>().into_iter().rev() {
                    raw.write_at((at * PIECE_BYTES) as u64, piece)
                        .expect("law: a piece finds room in the end");
                }
            })
        });
        writers.into_iter().for_each(|writer| writer.join().expect("writer"));
        let mut raw = Arc::into_inner(raw).expect("the writers are done");
        self.watch(Arc::new(raw.commit().expect("all is written")), Vec::new())
    }

    /// Restores the newest checkpoint, if there is one, and compares it. Returns its generation and step.
    pub fn read_newest(&self) -> Option<(u64, u64)> {
        let opened = match self.store.open_checkpoint(Select::Newest, false) {
            Ok(opened) => opened,
            Err(error) if error.kind() == ErrorKind::NotFound => return None,
            Err(error) => panic!("law: the newest can always be opened: {error}"),
        };
        assert!(opened.rejected.is_empty(), "law: no checkpoint is damaged: {}", opened.rejected[0].1);
        Some(check(&opened.checkpoint))
    }

    /// Generation of the newest checkpoint, 0 where there is none.
    pub fn newest(&self) -> u64 {
        self.store.checkpoints().expect("list").first().map_or(0, |info| info.record.generation)
    }

    /// Everything has ended: looks for what is lost, closes, and loses power everywhere.
    pub fn finish(self: Arc<Self>) {
        self.store.drain(None).expect("drain");
        let stats = self.store.stats();
        assert_eq!(stats.in_flight, 0);
        assert_eq!(
            stats.saves_begun,
            stats.saves_durable + stats.saves_failed + stats.saves_cancelled,
            "law: every save ends once"
        );
        for view in self.store.region().slot_views() {
            assert!(view.state != SlotState::Writing && view.readers == 0, "law: no slot is lost: {view:?}");
        }
        let world = Arc::into_inner(self).expect("no thread of the scenario has it any more");
        let pool = world.store.region().pool().clone();
        drop(world.store);
        assert_eq!(pool.free_count(), pool.buffer_count(), "law: no buffer is lost");
        judge::lose_power(&world.setup, &world.sim);
    }
}

/// Reads a checkpoint and compares it with what its step saved.
pub fn check(checkpoint: &pccheck::load::Checkpoint) -> (u64, u64) {
    let (generation, step) = (checkpoint.record().generation, checkpoint.record().step);
    let read = checkpoint.read_tensor(if is_raw(step) { "raw" } else { "w" });
    let bytes = read.unwrap_or_else(|error| panic!("law: what is open can be read: {error}"));
    assert!(bytes == Content::of(step).data, "law: a reader never sees bytes of another step than {step}");
    (generation, step)
}

/// A save and the memory that it copies.
pub struct Flying {
    pub save: Arc<Save>,
    data: Vec<u8>,
}

impl Flying {
    /// Waits without limit.
    pub fn ended(&self) -> Result<Durable, Error> {
        self.save.wait_durable(None)
    }

    pub fn durable(&self) -> Durable {
        self.ended()
            .unwrap_or_else(|error| panic!("law: a save that nothing hinders becomes durable: {error}"))
    }
}

impl Drop for Flying {
    fn drop(&mut self) {
        // The callback owns the save, too, and the memory goes.
        if self.save.wait_copied(None).is_ok() {
            self.data.fill(0xee);
        }
    }
}

/// What one thread of a scenario does.
pub type Work = Box<dyn FnOnce(&Arc<World>) + Send>;

/// Each on a thread of its own.
pub fn together(world: &Arc<World>, work: Vec<Work>) {
    let threads: Vec<_> = work
        .into_iter()
        .map(|work| {
            let world = world.clone();
            thread::spawn(move || work(&world))
        })
        .collect();
    for thread in threads {
        thread.join().expect("thread of the scenario");
    }
}
