//! A region on a simulated medium, the real engine on top of it, and notes of all that the engine promised.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use pccheck::engine::{Store, Tensor};
use pccheck::error::ErrorKind;
use pccheck::format::{encode_table, plan, plan_raw, Dtype, Layout, TensorSpec};
use pccheck::medium::sim::{for_each_crash_image, EnumerateOptions, Image, Note, SimMedium, SimModel};
use pccheck::medium::Medium;
use pccheck::save::{Durable, Faults, Save, SaveOptions};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::Error;

use crate::stripes::Stripes;

/// What a note of kind `Other` means.
pub mod label {
    /// A save of this generation ended as cancelled: it must never be found.
    pub const CANCELLED: &str = "cancelled";
    /// A pin of this generation was reported durable, or a save that is to be pinned is about to begin: wherever its
    /// checkpoint is found, it is pinned.
    pub const PINNED: &str = "pinned";
    /// The pin is about to be lifted, or the save was refused.
    pub const UNPINNING: &str = "unpinning";
    /// A save of this generation that is to be confirmed is about to begin: it must not be found.
    pub const UNCONFIRMED: &str = "unconfirmed";
    /// It is about to be confirmed, or was refused.
    pub const CONFIRMING: &str = "confirming";
    /// Checkpoints newer than this are about to be discarded.
    pub const DISCARDING: &str = "discarding";
    /// The checkpoint of this generation is about to be abandoned.
    pub const ABANDONING: &str = "abandoning";
    /// It was reported abandoned.
    pub const ABANDONED: &str = "abandoned";
    /// The global mark is about to move here.
    pub const MARKING: &str = "marking";
    /// It was reported durable.
    pub const MARKED: &str = "marked";
    /// From here on the history is interesting.
    pub const WATCH: &str = "watch";
}

/// Long enough for anything that happens at all.
pub const WAIT: Option<Duration> = Some(Duration::from_secs(30));
pub const CHUNK_BYTES: u64 = 4096;
const BLOCK: usize = 4096;

/// How a region is laid out and used.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    pub slots: u32,
    pub in_flight: u32,
    pub keep: u32,
    pub hold: bool,
    /// Every word of a payload differs from that of other generations, instead of one word per block.
    pub dense: bool,
    /// Every third save is a raw stream.
    pub raw: bool,
    /// Most of a payload is as in some generation before, so that saves find chunks in their places.
    pub steady: bool,
    pub staging_chunks: u64,
    /// Over several members.
    pub stripes: Option<Stripes>,
}

impl Setup {
    /// The fewest slots for `in_flight` and `keep`.
    pub const fn tight(in_flight: u32, keep: u32) -> Setup {
        let slots = in_flight + keep;
        let (hold, dense, raw, steady, staging_chunks, stripes) = (false, false, false, false, 24, None);
        Setup { slots, in_flight, keep, hold, dense, raw, steady, staging_chunks, stripes }
    }

    pub const fn over(self, members: u32, unit_bytes: u64) -> Setup {
        Setup { stripes: Some(Stripes { members, unit_bytes, deaf: false }), ..self }
    }

    pub const fn slots(self, slots: u32) -> Setup {
        Setup { slots, ..self }
    }

    pub fn layout(&self) -> Layout {
        Layout::new(self.slots, Layout::slot_bytes_for(64 << 10, 64 << 10).expect("slot size"))
            .expect("layout")
    }

    /// Bytes of the simulated medium that the region takes.
    pub fn sim_bytes(&self) -> u64 {
        let bytes = self.layout().region_bytes();
        self.stripes.map_or(bytes, |stripes| stripes.sim_bytes(bytes))
    }

    /// The region on `sim`.
    pub fn medium(&self, sim: &Arc<SimMedium>) -> Arc<dyn Medium> {
        match self.stripes {
            Some(stripes) => stripes.medium(sim, self.layout().region_bytes()),
            None => sim.clone(),
        }
    }

    /// Reads the region by a function that reads the simulated medium.
    pub fn read(
        &self,
        offset: u64,
        dst: &mut [u8],
        read: impl Fn(u64, &mut [u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        match self.stripes {
            Some(stripes) => stripes.read(self.layout().region_bytes(), (offset, dst), read),
            None => read(offset, dst),
        }
    }

    /// Where a byte of the region lies on the simulated medium.
    pub fn place(&self, offset: u64) -> u64 {
        self.stripes.map_or(offset, |stripes| stripes.place(self.layout().region_bytes(), offset))
    }

    fn is_raw(&self, generation: u64) -> bool {
        self.raw && generation.is_multiple_of(3)
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            max_in_flight: self.in_flight,
            keep: self.keep,
            hold: self.hold,
            staging_bytes: self.staging_chunks * CHUNK_BYTES,
            chunk_bytes: CHUNK_BYTES,
            // On persistent memory a chunk that is held back holds its copier; up to two are, at once.
            writers: 4,
            readers: 1,
            run_id: RUN_ID,
            rewrite_every: 7,
            ..OpenOptions::default()
        }
    }
}

pub const RUN_ID: u64 = 77;

/// What generation `generation` consists of: a pure function, so that the judge needs nothing but the number.
pub struct Content {
    pub step: u64,
    pub data: Vec<u8>,
    pub payload: Vec<u8>,
    /// The chunk table as it must stand behind the payload.
    pub table: Vec<u8>,
}

impl Content {
    pub fn of(setup: &Setup, generation: u64) -> Arc<Content> {
        type Known = Mutex<HashMap<(bool, bool, bool, u64), Arc<Content>>>;
        static KNOWN: OnceLock<Known> = OnceLock::new();
        let key = (setup.dense, setup.steady, setup.is_raw(generation), generation);
        let mut known = KNOWN.get_or_init(Known::default).lock().expect("no panic under this lock");
        known.entry(key).or_insert_with(|| Arc::new(Content::make(setup, generation))).clone()
    }

    fn make(setup: &Setup, generation: u64) -> Content {
        // One to three chunks beside the header, the last one not full: old bytes stay behind shorter payloads.
        let chunks = match setup.steady {
            true => [3, 3, 3, 3, 3, 2, 3, 3, 3, 3, 1][generation as usize % 11],
            false => 1 + generation as usize % 3,
        };
        let len = chunks * BLOCK - 100;
        let mut data = vec![0; len];
        let stride = if setup.dense { 8 } else { 2048 };
        for at in (0..len - 8).step_by(stride) {
            let seed = if setup.steady { variant(generation, at / BLOCK) } else { generation };
            let word = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(at as u32 / 8) ^ at as u64;
            data[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        let shape = [len as u64];
        let spec =
            TensorSpec { name: "w", dtype: Dtype::U8, shape: &shape, bytes: len as u64, alias_of: None };
        // The header, too, differs from one generation to the next: a chunk that is rewritten with what it held
        // would hide a missing mark.
        let metadata = Content::note(setup, generation);
        let metadata = [("step", metadata.as_str())];
        let planned = match setup.is_raw(generation) {
            true => plan_raw(len as u64, &metadata),
            false => plan(&[spec], &metadata),
        };
        let planned = planned.expect("plan");
        let mut payload = planned.header.clone();
        assert_eq!(planned.placements[0], payload.len() as u64, "one tensor follows the header at once");
        payload.extend_from_slice(&data);
        assert_eq!(planned.payload_bytes, payload.len() as u64);
        let hashes: Vec<u128> =
            payload.chunks(CHUNK_BYTES as usize).map(pccheck::format::chunk_hash).collect();
        Content { step: step_of(generation), data, payload, table: encode_table(&hashes) }
    }

    /// The metadata that goes with it.
    pub fn note(setup: &Setup, generation: u64) -> String {
        if setup.steady {
            "any".into()
        } else {
            step_of(generation).to_string()
        }
    }
}

/// What a steady payload's block of data is made from: the first is always new, the others come and go.
fn variant(generation: u64, block: usize) -> u64 {
    match block {
        0 => generation,
        1 => 1_000_000 + generation / 3 % 2,
        _ => 2_000_000 + generation / 5 % 2,
    }
}

pub fn step_of(generation: u64) -> u64 {
    10 * generation + 7
}

/// A freshly formatted, wholly durable region. Formatting itself is enumerated by its own test.
pub fn formatted(setup: &Setup, model: SimModel) -> Arc<SimMedium> {
    let sim = Arc::new(SimMedium::new(setup.sim_bytes(), model));
    format_on(&sim, setup);
    Arc::new(final_image(&sim).to_medium())
}

pub fn format_on(sim: &Arc<SimMedium>, setup: &Setup) {
    format_medium(&*setup.medium(sim), &FormatOptions::new(setup.slots, 64 << 10)).expect("format");
}

/// The state after a crash that loses nothing.
pub fn final_image(sim: &SimMedium) -> Arc<Image> {
    let mut last = None;
    let none = EnumerateOptions { images_per_point: 0, samples_per_point: 0, ..EnumerateOptions::default() };
    for_each_crash_image(&sim.trace(), &none, |_, image| {
        // At the end nothing is pending on a quiet medium, and "nothing persisted" and "all persisted" agree.
        last = Some(image.clone());
        Ok(())
    })
    .expect("nothing is checked");
    last.expect("there is a point at the end")
}

/// One process's use of the region, from open to close or kill.
pub struct Life {
    pub store: Store,
    pub sim: Arc<SimMedium>,
    setup: Setup,
    next: AtomicU64,
}

impl Life {
    pub fn open(sim: &Arc<SimMedium>, setup: &Setup, faults: Faults) -> Result<Life, Error> {
        let store = Store::open_on(setup.medium(sim), &setup.options(), faults)?;
        // What an open store shows is promised: a trainer goes on from it.
        for info in store.checkpoints()? {
            sim.note(Note::Acknowledged { generation: info.record.generation });
        }
        let next = AtomicU64::new(store.recovered().next_generation);
        Ok(Life { store, sim: sim.clone(), setup: *setup, next })
    }

    /// Begins the next save. It is noted as issued before anything of it can reach the medium, and as
    /// acknowledged on the thread that ends it, before that thread does anything else.
    pub fn begin_within(&self, wait: Option<Duration>) -> Result<Arc<Save>, Error> {
        self.begin_with(wait.into())
    }

    /// [`Life::begin_within`], also to be confirmed or pinned.
    pub fn begin_with(&self, options: SaveOptions) -> Result<Arc<Save>, Error> {
        let generation = self.next.load(Ordering::Relaxed);
        let promised = [(options.pin, label::PINNED), (options.confirm, label::UNCONFIRMED)];
        promised.iter().filter(|(asked, _)| *asked).for_each(|(_, label)| self.say(label, generation));
        let content = Content::of(&self.setup, generation);
        self.sim.note(Note::Issued { generation, fingerprint: content.data.len() as u64 });
        let shape = [content.data.len() as u64];
        let begun = if self.setup.is_raw(generation) {
            self.stream(&content, &Content::note(&self.setup, generation), options)
        } else {
            let tensor = Tensor { name: "w", dtype: Dtype::U8, shape: &shape, data: &content.data };
            self.store.save(
                content.step,
                &[tensor],
                &[("step", &Content::note(&self.setup, generation))],
                options,
            )
        };
        if begun.is_err() {
            self.say(label::UNPINNING, generation);
            self.say(label::CONFIRMING, generation);
        }
        // Only where there was no slot was no generation used up.
        let used = !begun.as_ref().is_err_and(|e| e.kind() == ErrorKind::NoSlot);
        self.next.store(generation + u64::from(used), Ordering::Relaxed);
        let save = begun?;
        assert_eq!(save.generation(), generation, "generations are handed out one by one");
        Ok(self.watch(save))
    }

    /// Odd pieces, back to front, so that chunks are spilled and read back in a small pool.
    fn stream(&self, content: &Content, note: &str, options: SaveOptions) -> Result<Save, Error> {
        let mut raw =
            self.store.begin_raw(content.step, content.data.len() as u64, &[("step", note)], options)?;
        let starts: Vec<usize> = (0..content.data.len()).step_by(1500).collect();
        for &at in starts.iter().rev() {
            raw.write_at(at as u64, &content.data[at..(at + 1500).min(content.data.len())])?;
        }
        raw.commit()
    }

    fn watch(&self, save: Save) -> Arc<Save> {
        let save = Arc::new(save);
        let (ended, sim, generation) = (save.clone(), self.sim.clone(), save.generation());
        save.on_end(Box::new(move || match ended.wait_durable(Some(Duration::ZERO)) {
            Ok(_) => sim.note(Note::Acknowledged { generation }),
            Err(e) if e.kind() == ErrorKind::Cancelled => {
                sim.note(Note::Other { label: label::CANCELLED, value: generation });
            }
            Err(_) => {}
        }));
        save
    }

    pub fn begin(&self) -> Arc<Save> {
        self.begin_within(WAIT).unwrap_or_else(|e| panic!("begin: {e}"))
    }

    pub fn begin_pinned(&self) -> Result<Arc<Save>, Error> {
        self.begin_with(SaveOptions { wait: WAIT, pin: true, ..SaveOptions::default() })
    }

    pub fn begin_unconfirmed(&self) -> Arc<Save> {
        self.begin_with(SaveOptions { wait: WAIT, confirm: true, ..SaveOptions::default() })
            .unwrap_or_else(|e| panic!("begin: {e}"))
    }

    pub fn confirm(&self, save: &Save) {
        self.say(label::CONFIRMING, save.generation());
        save.confirm().expect("confirm");
    }

    pub fn save(&self) -> Durable {
        durable(&self.begin())
    }

    /// `rounds` times as many saves at once as may be in flight. Returns the slots used.
    pub fn rounds(&self, rounds: u32) -> Vec<u32> {
        let mut slots = Vec::new();
        for _ in 0..rounds {
            let saves: Vec<_> = (0..self.setup.in_flight).map(|_| self.begin()).collect();
            slots.extend(saves.iter().map(|save| durable(save).slot));
        }
        slots
    }

    pub fn newest(&self) -> u64 {
        self.store.checkpoints().expect("list")[0].record.generation
    }

    fn say(&self, label: &'static str, value: u64) {
        self.sim.note(Note::Other { label, value });
    }

    pub fn pin(&self, generation: u64) -> Result<(), Error> {
        self.store.pin(generation)?;
        self.say(label::PINNED, generation);
        Ok(())
    }

    pub fn unpin(&self, generation: u64) {
        self.say(label::UNPINNING, generation);
        self.store.unpin(generation).expect("unpin");
    }

    pub fn discard_newer(&self, generation: u64) -> Result<u32, Error> {
        self.say(label::DISCARDING, generation);
        let count = self.store.discard_newer(generation)?;
        self.sim.note(Note::Discarded { newer_than: generation });
        Ok(count)
    }

    pub fn abandon(&self, generation: u64) {
        self.say(label::ABANDONING, generation);
        self.store.abandon(RUN_ID, step_of(generation), None).expect("abandon");
        self.say(label::ABANDONED, generation);
    }

    pub fn mark_global(&self, generation: u64) {
        self.say(label::MARKING, generation);
        self.store.mark_global(RUN_ID, step_of(generation)).expect("mark");
        self.say(label::MARKED, generation);
    }

    pub fn watch_from_here(&self) {
        self.say(label::WATCH, 0);
    }

    /// The slot that the save of `generation` owns.
    pub fn slot_of(&self, generation: u64) -> u32 {
        let views = self.store.region().slot_views();
        let found = views.iter().position(|view| view.generation == generation);
        found.unwrap_or_else(|| panic!("no slot belongs to generation {generation}")) as u32
    }

    /// Bytes of the simulated medium that chunk `chunk` (0: the header) of the save in `slot` takes.
    pub fn chunk_range(&self, slot: u32, chunk: u64) -> Range<u64> {
        let at = self.setup.place(self.setup.layout().slot_offset(slot) + chunk * CHUNK_BYTES);
        at..at + CHUNK_BYTES
    }
}

/// Waits until the save has ended and that is noted.
pub fn ended(save: &Arc<Save>) -> Result<Durable, Error> {
    let outcome = save.wait_durable(WAIT);
    // The callback that notes it owns the other reference.
    while Arc::strong_count(save) > 1 && !outcome.as_ref().is_err_and(|e| e.kind() == ErrorKind::TimedOut) {
        std::thread::yield_now();
    }
    outcome
}

pub fn durable(save: &Arc<Save>) -> Durable {
    ended(save).unwrap_or_else(|e| panic!("generation {}: {e}", save.generation()))
}
