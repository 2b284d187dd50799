//! A source that fails in every way: only its own save is lost, and nobody hangs.

use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use crate::medium::sim::{SimMedium, SimModel};
use crate::persist::ChunkHasher;
use crate::source::Source;
use crate::staging::{StagingOptions, StagingPool};
use crate::store::{format_medium, FormatOptions, OpenOptions};

const CHUNK: u64 = 8192;
const PROMPT: Duration = Duration::from_secs(10);

/// Panics in its `panics_at`th chunk.
struct Bytes {
    panics_at: Option<u64>,
    slow: Duration,
}

impl Source for Bytes {
    fn fill(&self, offset: u64, dst: &mut [u8], hasher: &mut ChunkHasher, _: bool) -> Result<()> {
        std::thread::sleep(self.slow);
        assert!(self.panics_at != Some(offset / CHUNK), "the source dies (expected by the test)");
        dst.fill(7);
        hasher.update(dst);
        Ok(())
    }

    fn hash(&self, offset: u64, len: usize, hasher: &mut ChunkHasher) -> Result<()> {
        self.fill(offset, &mut vec![0; len], hasher, false)
    }
}

fn saver() -> Saver {
    let sim = Arc::new(SimMedium::new(6 << 21, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(4, 10 * CHUNK)).unwrap();
    let options = OpenOptions {
        chunk_bytes: CHUNK,
        staging_bytes: 6 * CHUNK,
        max_in_flight: 3,
        writers: 2,
        ..OpenOptions::default()
    };
    let pool = StagingPool::new(6 * CHUNK, CHUNK as usize, &StagingOptions::default()).unwrap();
    let region = Region::open_on(Path::new("sim"), sim, pool, options).unwrap();
    Saver::start(Arc::new(region), Arc::new(Metrics::default()), Faults::default()).unwrap()
}

/// Saves until a save finds its slot's content unchanged and only looks at the state.
fn settle(saver: &Saver) {
    for _ in 0..3 * 4 {
        begin(saver, None, Duration::ZERO).unwrap().wait_durable(None).unwrap();
    }
    let before = saver.shared().metrics.snapshot();
    begin(saver, None, Duration::ZERO).unwrap().wait_durable(None).unwrap();
    let after = saver.shared().metrics.snapshot();
    assert_eq!(after.unchanged_bytes - before.unchanged_bytes, 5 * CHUNK);
}

fn begin(saver: &Saver, panics_at: Option<u64>, slow: Duration) -> Result<Arc<SaveCore>> {
    let spec = SaveSpec {
        step: 1,
        payload_bytes: 5 * CHUNK,
        header_bytes: CHUNK,
        header_hash: 0,
        tensor_count: 1,
        flags: 0,
        confirm: false,
        pin: false,
    };
    saver.begin(spec, Origin::Source(Arc::new(Bytes { panics_at, slow })), None)
}

#[test]
fn a_source_that_panics_fails_its_save_and_no_other() {
    panics_and_fails_alone(saver());
}

#[test]
fn a_source_that_panics_while_it_is_only_looked_at_fails_its_save_and_no_other() {
    let saver = saver();
    settle(&saver);
    panics_and_fails_alone(saver);
}

fn panics_and_fails_alone(saver: Saver) {
    let slow = begin(&saver, None, Duration::from_millis(30)).unwrap();
    let broken = begin(&saver, Some(2), Duration::ZERO).unwrap();
    let deadline = Some(Instant::now() + PROMPT);
    assert_eq!(broken.wait_copied(deadline).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(broken.wait_durable(deadline).unwrap_err().kind(), ErrorKind::Internal);
    slow.wait_durable(deadline).unwrap();
    assert_eq!(begin(&saver, None, Duration::ZERO).err().unwrap().kind(), ErrorKind::Internal);
    let pool = saver.shared().region.pool().clone();
    let closing = Instant::now();
    saver.close();
    assert!(closing.elapsed() < PROMPT);
    assert_eq!(
        pool.free_count(),
        pool.buffer_count() - 1,
        "the buffer that it was filling is never used again"
    );
}

#[test]
fn an_end_by_force_gives_nothing_back_that_is_in_use_and_tells_once() {
    let saver = saver();
    let save = begin(&saver, None, Duration::from_millis(100)).unwrap();
    let told = Arc::new(crate::sync::atomic::AtomicU32::new(0));
    let (counter, copying) = (told.clone(), Arc::downgrade(&save));
    save.set_on_end(Box::new(move || {
        // What a callback may do: drop the save, which waits until its memory is not read.
        let save = copying.upgrade().unwrap();
        assert!(save.wait_copied(Some(Instant::now())).is_err_and(|e| e.kind() == ErrorKind::Internal));
        counter.fetch_add(1, Ordering::SeqCst);
    }));
    while !saver.shared().copy_queue.lock().is_empty() && save.progress().copied_bytes == 0 {
        std::thread::yield_now();
    }
    saver.shared().give_up();
    let deadline = Some(Instant::now() + PROMPT);
    assert_eq!(save.wait_durable(deadline).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(save.wait_copied(deadline).unwrap_err().kind(), ErrorKind::Internal);
    let view = saver.shared().region.slot_views()[save.claim.slot as usize];
    assert_eq!(
        (view.state, view.generation),
        (SlotState::Writing, save.claim.generation),
        "its slot stays its own"
    );
    let pool = saver.shared().region.pool().clone();
    saver.close();
    assert_eq!(pool.free_count(), pool.buffer_count());
    assert_eq!(told.load(Ordering::SeqCst), 1);
}
