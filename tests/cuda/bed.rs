//! A store on a simulated medium, and a state of several tensors, some of them on GPUs.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::engine::{Select, Store, TensorAt};
use pccheck::format::Dtype;
use pccheck::medium::sim::{SimMedium, SimModel};
use pccheck::save::{DeviceOptions, Faults, Save, SaveOptions, Snapshot};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::Result;

use super::standin::{Standin, Stream};

pub const CHUNK: u64 = 8192;
/// Nothing here takes this long unless it hangs.
pub const PROMPT: Duration = Duration::from_secs(30);
pub const WAIT: Option<Duration> = Some(PROMPT);

/// A region with 3 slots.
pub fn medium() -> Arc<SimMedium> {
    let sim = Arc::new(SimMedium::new(8 << 21, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(3, 1 << 21)).expect("format");
    sim
}

/// A store on it for 2 saves in flight, with 2 threads that read and so many buffers, each of a chunk.
pub fn open(sim: &Arc<SimMedium>, chunk_bytes: u64, buffers: u64, faults: Faults) -> Store {
    let options = OpenOptions {
        max_in_flight: 2,
        chunk_bytes,
        staging_bytes: buffers * chunk_bytes,
        writers: 2,
        readers: 2,
        ..OpenOptions::default()
    };
    Store::open_on(sim.clone(), &options, faults).expect("open")
}

pub fn store(buffers: u64, faults: Faults) -> Store {
    open(&medium(), CHUNK, buffers, faults)
}

/// A tensor of the program.
pub struct Part {
    name: String,
    bytes: usize,
    shape: [u64; 1],
    place: Memory,
}

impl Part {
    fn tensor(&self) -> TensorAt<'_> {
        let (ptr, device) = match &self.place {
            Memory::Host(bytes) => (bytes.as_ptr(), None),
            Memory::Gpu { device, address } => (*address as *const u8, Some(*device)),
        };
        let (name, shape) = (self.name.as_str(), self.shape.as_slice());
        TensorAt { name, dtype: Dtype::U8, shape, ptr, bytes: self.bytes as u64, device }
    }
}

enum Memory {
    Host(Vec<u8>),
    Gpu { device: u32, address: u64 },
}

/// A program's state.
pub struct State<'a> {
    pub standin: &'a Standin,
    pub parts: Vec<Part>,
}

/// Sizes of tensors, and where they are: `None` is host memory.
pub type Shape = [(usize, Option<u32>)];

/// Many small tensors, some large ones, an empty one, and some in host memory between them.
pub const MIXED: &Shape = &[
    (100_000, Some(0)),
    (3, Some(0)),
    (0, Some(0)),
    (5_000, None),
    (17, Some(0)),
    (40_000, Some(0)),
    (30_000, None),
    (1, Some(0)),
    (9_001, Some(0)),
    (64, None),
    (64, Some(0)),
];

/// On two GPUs and in host memory.
pub const TWO_GPUS: &Shape = &[
    (50_000, Some(0)),
    (30_000, Some(1)),
    (10_000, None),
    (7, Some(1)),
    (20_000, Some(0)),
    (90_000, Some(1)),
];

impl<'a> State<'a> {
    pub fn new(standin: &'a Standin, shape: &Shape) -> State<'a> {
        let part = |(at, &(bytes, device)): (usize, &(usize, Option<u32>))| Part {
            name: format!("t{at:03}"),
            bytes,
            shape: [bytes as u64],
            place: match device {
                None => Memory::Host(vec![0; bytes]),
                Some(device) => Memory::Gpu { device, address: standin.allocate(device, bytes.max(1)) },
            },
        };
        State { standin, parts: shape.iter().enumerate().map(part).collect() }
    }

    /// Has all tensors filled for a step: those of GPUs by kernels on the stream.
    pub fn fill(&mut self, stream: impl Fn(u32) -> Stream, step: u64, delay_us: u64) {
        for (at, part) in self.parts.iter_mut().enumerate() {
            let seed = seed(step, at);
            match &mut part.place {
                Memory::Host(bytes) => *bytes = self.standin.pattern(seed, part.bytes),
                Memory::Gpu { device, address } if part.bytes > 0 => {
                    self.standin.fill(*device, stream(*device), *address, part.bytes, seed, delay_us);
                }
                Memory::Gpu { .. } => {}
            }
        }
    }

    pub fn tensors(&self) -> Vec<TensorAt<'_>> {
        self.parts.iter().map(Part::tensor).collect()
    }

    /// Whether some tensor begins on its GPU where the one before ends.
    pub fn touches(&self) -> bool {
        let ends = |part: &Part| match part.place {
            Memory::Gpu { address, .. } => Some((address, address + part.bytes as u64)),
            Memory::Host(_) => None,
        };
        self.parts.windows(2).any(|two| {
            matches!((ends(&two[0]), ends(&two[1])), (Some((_, end)), Some((start, _))) if start == end)
        })
    }

    pub fn begin(&self, store: &Store, step: u64, options: SaveOptions) -> Result<Save> {
        // SAFETY: the memory lives as long as the state; the tests change it only as the contract allows, or want to see
        // that it matters.
        unsafe { store.begin_save(step, &self.tensors(), &[], options) }
    }

    /// Whether the newest checkpoint is that of the step, byte for byte. One that is damaged is not: bytes that arrive
    /// between hashing and writing differ from their hash.
    pub fn is_saved(&self, store: &Store, step: u64) -> bool {
        let opened = match store.open_checkpoint(Select::Newest, true) {
            Ok(opened) => opened,
            Err(error) => {
                println!("{error}");
                return false;
            }
        };
        assert_eq!(opened.checkpoint.record().step, step);
        self.parts.iter().enumerate().all(|(at, part)| {
            let right = self.standin.pattern(seed(step, at), part.bytes);
            opened.checkpoint.read_tensor(&part.name).is_ok_and(|found| found == right)
        })
    }

    /// What the tensors hold now.
    pub fn now(&self) -> Vec<Vec<u8>> {
        let bytes = |part: &Part| match &part.place {
            Memory::Host(bytes) => bytes.clone(),
            Memory::Gpu { address, .. } => self.standin.bytes(*address, part.bytes),
        };
        self.parts.iter().map(bytes).collect()
    }

    /// What they hold after [`State::fill`].
    pub fn expected(&self, step: u64) -> Vec<Vec<u8>> {
        let pattern = |(at, part): (usize, &Part)| self.standin.pattern(seed(step, at), part.bytes);
        self.parts.iter().enumerate().map(pattern).collect()
    }
}

impl Drop for State<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        for part in &self.parts {
            if let Memory::Gpu { device, address } = part.place {
                self.standin.free(device, address);
            }
        }
    }
}

fn seed(step: u64, tensor: usize) -> u64 {
    step * 1000 + tensor as u64
}

pub fn on(stream: Stream, snapshot: Snapshot) -> SaveOptions {
    let device = DeviceOptions { stream: stream.0, snapshot, timeout: PROMPT, ..DeviceOptions::DEFAULT };
    SaveOptions { wait: WAIT, device, ..SaveOptions::DEFAULT }
}

/// As the trainer does before its update.
pub fn stream_wait(save: &Save, stream: Stream) -> Result<()> {
    // SAFETY: the stream lives.
    unsafe { save.stream_wait_copied(stream.0, WAIT) }
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PROMPT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// What `done` does while a stream is held, in the course of which no call of the driver may find a queue full: where one does, the stream goes
/// on, so that the test ends.
pub fn without_jams<T>(standin: &Standin, held: Stream, done: impl FnOnce() -> T) -> T {
    struct Ended<'a>(&'a AtomicBool);
    impl Drop for Ended<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let ended = AtomicBool::new(false);
    standin.hold_stream(held, true);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) && standin.jams() == 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
            standin.hold_stream(held, false);
        });
        let _ended = Ended(&ended);
        done()
    });
    assert_eq!(standin.jams(), 0);
    result
}

/// Nothing is left of what saves held.
pub fn assert_idle(store: &Store) {
    let pool = store.region().pool();
    until("all buffers are free", || pool.free_count() == pool.buffer_count());
    until("no save is in flight", || store.stats().in_flight == 0);
    assert_eq!(store.stats().quarantined_slots, 0);
}
