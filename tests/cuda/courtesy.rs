//! While the copies of the only save are on their way, only some copiers are at what has arrived; before and afterwards all are.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::Arc;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::medium::sim::{SimMedium, SimModel};
use pccheck::medium::{Barrier, Io, Medium, MediumInfo};
use pccheck::save::{Faults, Snapshot};
use pccheck::store::{format_medium, FormatOptions, OpenOptions};
use pccheck::Result;

use super::bed::{on, until, State, CHUNK, PROMPT, WAIT};
use super::rings::queued;
use super::standin::Standin;

const WRITERS: u32 = 8;
const CHUNKS: usize = 120;

/// A medium that copiers take their time to hand chunks to, and that counts how many do at once.
struct Slow {
    medium: SimMedium,
    inside: AtomicU32,
    most: AtomicU32,
    handed: AtomicU32,
}

impl Slow {
    /// Most at once since this was asked.
    fn most(&self) -> u32 {
        self.most.swap(0, Ordering::SeqCst)
    }
}

impl Medium for Slow {
    fn info(&self) -> MediumInfo {
        self.medium.info()
    }

    fn len_bytes(&self) -> u64 {
        self.medium.len_bytes()
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.medium.read(offset, dst)
    }

    fn start(&self, io: Io) {
        let inside = self.inside.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(inside, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(3));
        self.inside.fetch_sub(1, Ordering::SeqCst);
        self.handed.fetch_add(1, Ordering::SeqCst);
        self.medium.start(io);
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        self.medium.copy(offset, src)
    }

    fn fence(&self, barrier: Barrier) -> Result<()> {
        self.medium.fence(barrier)
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        self.medium.persist(offset, len, barrier)
    }
}

fn open(buffers: u64) -> (Arc<Slow>, Store) {
    let medium = SimMedium::new(8 << 21, SimModel::Ssd { torn: false });
    format_medium(&medium, &FormatOptions::new(3, 1 << 21)).expect("format");
    let slow = Slow { medium, inside: AtomicU32::new(0), most: AtomicU32::new(0), handed: AtomicU32::new(0) };
    let slow = Arc::new(slow);
    let options = OpenOptions {
        max_in_flight: 2,
        chunk_bytes: CHUNK,
        staging_bytes: buffers * CHUNK,
        writers: WRITERS,
        ..OpenOptions::default()
    };
    let store = Store::open_on(slow.clone(), &options, Faults::default()).expect("open");
    (slow, store)
}

const SHAPE: &[(usize, Option<u32>)] = &[(CHUNKS * CHUNK as usize, Some(0))];

#[test]
fn few_copiers_write_while_the_only_save_is_still_being_copied_and_all_of_them_afterwards() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (slow, store) = open(200);
    let mut state = State::new(&standin, SHAPE);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    // Four groups, one behind the other on two streams: what has come keeps copiers at work for long.
    standin.delay_us(60_000);
    let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
    until("some are written", || slow.handed.load(Ordering::SeqCst) > 3);
    slow.most();
    until("more are written", || slow.handed.load(Ordering::SeqCst) > 10);
    assert!(!save.progress().copied, "it is too late to tell anything");
    assert!(slow.most() <= 2);
    save.wait_copied(WAIT).expect("copied");
    slow.most();
    save.wait_durable(WAIT).expect("durable");
    assert!(slow.most() > 4, "those who rested were not woken");
    assert!(state.is_saved(&store, 1));
}

#[test]
fn all_copiers_write_where_the_copies_wait_for_their_buffers() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (slow, store) = open(40);
    let mut state = State::new(&standin, SHAPE);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    // Something is always on its way.
    standin.delay_us(20_000);
    for options in [on(stream, Snapshot::Staging), queued(stream, PROMPT)] {
        let before = slow.handed.load(Ordering::SeqCst);
        let save = state.begin(&store, 1, options).expect("begin");
        until("some are written", || slow.handed.load(Ordering::SeqCst) > before + 40);
        assert!(slow.most() > 4);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1));
    }
}

/// Saves that are begun one after the other while the copies of the first one are on their way.
fn all_copiers_write(saves: usize, snapshot: Snapshot) {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (slow, store) = open(200);
    let mut state = State::new(&standin, SHAPE);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    // Three groups on two streams: two copiers would be done with the first two long before the third one comes.
    standin.delay_us(500_000);
    let begin = || state.begin(&store, 1, on(stream, snapshot)).expect("begin");
    let mut saves_begun = vec![begin()];
    until("some are written", || slow.handed.load(Ordering::SeqCst) > 3);
    saves_begun.extend((1..saves).map(|_| begin()));
    slow.most();
    until("more are written", || slow.handed.load(Ordering::SeqCst) > 40);
    assert!(slow.most() > 4, "{saves} saves, {snapshot:?}");
    standin.delay_us(0);
    for save in &saves_begun {
        save.wait_durable(WAIT).expect("durable");
    }
    assert!(state.is_saved(&store, 1));
}

#[test]
fn all_copiers_write_once_a_second_save_is_in_flight() {
    all_copiers_write(2, Snapshot::Staging);
}

#[test]
fn all_copiers_write_where_the_state_is_in_spare_memory() {
    all_copiers_write(1, Snapshot::Spare);
}
