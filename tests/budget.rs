//! What a save costs, counted: a regression here adds flushes, writes, or work on every chunk that no timing would show on a
//! shared machine. Budgets are exact where the protocol fixes them, and tight where threads decide.

#![cfg(feature = "sim")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use common::{disk, region_in, save_one, WAIT};
use pccheck::engine::{Select, Store};
use pccheck::load::Part;
use pccheck::medium::sim::{Event, SimMedium, SimModel};
use pccheck::medium::{Barrier, Durability, IoBackend, Requested};
use pccheck::save::Faults;
use pccheck::store::{format_medium, FormatOptions, OpenOptions};

const CHUNK: u64 = 64 << 10;

/// Counts the allocations of the whole process. Relaxed: read only while nothing is in flight.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The tests take turns, so that each counts only what is its own.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn options() -> OpenOptions {
    OpenOptions {
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: CHUNK,
        staging_bytes: 8 * CHUNK,
        writers: 2,
        rewrite_every: 1,
        ..OpenOptions::default()
    }
}

/// A state whose payload is `chunks` chunks.
fn state(chunks: u64) -> Vec<u8> {
    let header = 4096;
    (0..chunks * CHUNK - header).map(|at| (at * 31 + at / 4096) as u8).collect()
}

fn durable(store: &Store, step: u64, state: &[u8]) {
    save_one(store, step, state, &[]).and_then(|save| save.wait_durable(WAIT)).expect("durable");
}

/// Fewest allocations of ten saves.
fn allocations(store: &Store, state: &[u8]) -> u64 {
    let one = |step| {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        durable(store, step, state);
        ALLOCATIONS.load(Ordering::Relaxed) - before
    };
    (0..10).map(one).min().expect("ten")
}

#[test]
fn no_chunk_costs_an_allocation() {
    let _turn = turn();
    let media = [
        (Requested::Direct, IoBackend::Auto),
        (Requested::Direct, IoBackend::Threads),
        (Requested::Mmap, IoBackend::Auto),
    ];
    for (medium, backend) in media {
        let region = region_in(disk(), &FormatOptions::new(2, 100 * CHUNK));
        let options = OpenOptions { medium, backend, ..options() };
        let store = Store::open(&region.path, &options).expect("open");
        let (few, many) = (state(4), state(90));
        // Queues grow to their largest size first.
        durable(&store, 0, &many);
        let (few, many) = (allocations(&store, &few), allocations(&store, &many));
        println!("{medium:?}, {backend:?}: {few} allocations for 4 chunks, {many} for 90");
        assert!(many <= few + 4, "{medium:?}, {backend:?}: {few} allocations for 4 chunks, {many} for 90");
        assert!((10..=ALLOCATIONS_PER_SAVE).contains(&few), "{medium:?}, {backend:?}: {few} allocations");
    }
}

/// Committed budget of allocations for one save of one tensor.
const ALLOCATIONS_PER_SAVE: u64 = 40;

#[test]
fn a_save_flushes_three_times_and_writes_its_payload_once() {
    let _turn = turn();
    const CHUNKS: u64 = 6;
    for model in [SimModel::Ssd { torn: false }, SimModel::PageCache, SimModel::Pmem] {
        let sim = Arc::new(SimMedium::new(6 << 20, model));
        format_medium(&*sim, &FormatOptions::new(2, CHUNKS * CHUNK)).expect("format");
        let store = Store::open_on(sim.clone(), &options(), Faults::default()).expect("open");
        let state = state(CHUNKS);
        durable(&store, 1, &state);
        let (barriers, events) = (sim.barrier_counts(), sim.trace().events().len());
        durable(&store, 2, &state);
        let spent = |barrier| {
            sim.barrier_counts().get(&barrier).copied().unwrap_or(0)
                - barriers.get(&barrier).copied().unwrap_or(0)
        };
        let flushes = [Barrier::WritingMark, Barrier::Payload, Barrier::Commit, Barrier::Control].map(spent);
        assert_eq!(flushes, [1, 1, 1, 0], "{model:?}: mark, payload, commit, control block");
        let written: u64 = sim.trace().events()[events..]
            .iter()
            .map(|event| match event {
                Event::Copy { data, .. } => data.len() as u64,
                _ => 0,
            })
            .sum();
        // Payload, chunk table, mark and commit record: each once.
        assert_eq!(written, CHUNKS * CHUNK + 3 * 4096, "{model:?}");
    }
}

/// Bytes that this process has had read from devices.
fn bytes_read() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").expect("counters of I/O");
    let line = text.lines().find_map(|line| line.strip_prefix("read_bytes: ")).expect("read_bytes");
    line.parse().expect("a number")
}

#[test]
fn opening_a_checkpoint_reads_its_header_and_table_and_no_chunk() {
    let _turn = turn();
    let region = region_in(disk(), &FormatOptions::new(2, 8 * CHUNK));
    let options = OpenOptions { medium: Requested::Direct, ..options() };
    let store = Store::open(&region.path, &options).expect("open");
    durable(&store, 1, &state(8));
    let before = bytes_read();
    let opened = store.open_checkpoint(Select::Newest, false).expect("open checkpoint");
    let opening = bytes_read() - before;
    assert_eq!(opening, 2 * 4096, "header and table");
    let before = bytes_read();
    let mut part = [0; 100];
    let wanted = opened.checkpoint.tensors()[0].offset + 3 * CHUNK;
    opened.checkpoint.read(&mut [Part { offset: wanted, dst: &mut part }]).expect("read");
    assert_eq!(bytes_read() - before, CHUNK, "the chunk that holds the part");
}

/// Page faults of this process without I/O so far.
fn faults() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("stat");
    // The name in brackets may hold anything; minflt is the eighth field behind it.
    let behind = stat.rsplit_once(')').expect("a name").1;
    behind.split_whitespace().nth(7).expect("minflt").parse().expect("a number")
}

#[test]
fn the_first_save_into_memory_takes_no_fault_for_each_page() {
    let _turn = turn();
    const CHUNKS: u64 = 256;
    let region = region_in(std::path::Path::new("/dev/shm"), &FormatOptions::new(2, CHUNKS * CHUNK));
    let state = state(CHUNKS);
    let store =
        Store::open(&region.path, &OpenOptions { medium: Requested::Mmap, ..options() }).expect("open");
    let before = faults();
    durable(&store, 1, &state);
    let (faults, pages) = (faults() - before, CHUNKS * CHUNK / 4096);
    assert!(faults < pages / 8, "{faults} faults for {pages} pages");
}
