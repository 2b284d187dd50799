//! Reading chunks in parallel, several in flight, each verified before the read succeeds.
#![expect(unsafe_code, reason = "several threads copy into disjoint parts of the caller's destinations")]

use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{ChunkHasher, SlotRecord};
use crate::load::padded;
use crate::load::plan::{pieces, Part, Piece};
use crate::medium::{Io, IoOp, IoSink};
use crate::persist::Persister;
use crate::staging::StagingBuffer;
use crate::store::Region;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{thread, Arc, Condvar, Mutex};

/// Reads kept in flight by each thread.
const WINDOW: usize = 4;

/// Piece in which a chunk is hashed and then copied out of the cache.
const PIECE_BYTES: usize = 2 << 10;

/// One chunk to read and where its bytes go.
struct Job<'a> {
    chunk: u64,
    pieces: &'a [Piece],
}

/// Where a part goes, shared by the threads.
struct Destination {
    ptr: *mut u8,
}

// SAFETY: each byte of a destination belongs to exactly one piece, and each piece to one job of one thread.
unsafe impl Send for Destination {}
// SAFETY: as above.
unsafe impl Sync for Destination {}

struct Work<'a> {
    region: &'a Region,
    record: &'a SlotRecord,
    hashes: &'a [u128],
    jobs: Vec<Job<'a>>,
    destinations: Vec<Destination>,
    next: AtomicUsize,
    failed: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// Completions of one thread's reads.
struct Arrivals {
    queue: Mutex<VecDeque<(u64, StagingBuffer, Result<()>)>>,
    arrived: Condvar,
}

impl IoSink for Arrivals {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        self.queue.lock().push_back((token, buffer, result));
        self.arrived.notify_one();
    }
}

/// Reads the parts; every chunk that holds a byte of them is verified as a whole.
pub(super) fn read_parts(
    region: &Region,
    record: &SlotRecord,
    hashes: &[u128],
    parts: &mut [Part<'_>],
) -> Result<()> {
    let shapes: Vec<(u64, usize)> = parts.iter().map(|part| (part.offset, part.dst.len())).collect();
    let pieces = pieces(record, &shapes)?;
    let jobs = pieces
        .chunk_by(|a, b| a.chunk == b.chunk)
        .map(|pieces| Job { chunk: pieces[0].chunk, pieces })
        .collect();
    let destinations = parts.iter_mut().map(|part| Destination { ptr: part.dst.as_mut_ptr() }).collect();
    run(region, record, hashes, jobs, destinations)
}

/// Verifies every chunk.
pub(super) fn verify_all(region: &Region, record: &SlotRecord, hashes: &[u128]) -> Result<()> {
    let jobs = (0..record.chunk_count).map(|chunk| Job { chunk, pieces: &[] }).collect();
    run(region, record, hashes, jobs, Vec::new())
}

pub(super) fn damaged_chunk(region: &Region, record: &SlotRecord, chunk: u64) -> Error {
    let offset = region.layout().slot_offset(record.slot) + chunk * record.chunk_bytes;
    Error::new(
        ErrorKind::Corrupt,
        "verify checkpoint",
        format!(
            "chunk {chunk} of generation {} in slot {} does not match its hash: the medium was damaged, or the \
             state was changed while it was being copied",
            record.generation, record.slot
        ),
    )
    .at_path(region.path())
    .at_offset(offset)
    .advise("restore an older checkpoint")
}

fn run<'a>(
    region: &'a Region,
    record: &'a SlotRecord,
    hashes: &'a [u128],
    jobs: Vec<Job<'a>>,
    destinations: Vec<Destination>,
) -> Result<()> {
    let threads = (region.options().readers as usize).min(jobs.len()).max(1);
    let work = Work {
        region,
        record,
        hashes,
        jobs,
        destinations,
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    if padded(record.chunk_len(0)) > region.pool().buffer_bytes() {
        read_large_chunks(&work);
        let failure = work.failure.lock().take();
        return failure.map_or(Ok(()), Err);
    }
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where the system refuses a thread, those that run do the work.
            let _ = thread::Builder::new().name("pcc-read".into()).spawn_scoped(scope, || read_jobs(&work));
        }
        read_jobs(&work);
    });
    let failure = work.failure.lock().take();
    failure.map_or(Ok(()), Err)
}

/// One thread: keep up to `WINDOW` reads in flight; verify and copy out what arrives.
fn read_jobs(work: &Work<'_>) {
    let arrivals = Arc::new(Arrivals { queue: Mutex::new(VecDeque::new()), arrived: Condvar::new() });
    let persister = Persister::detect();
    let mut in_flight = 0;
    loop {
        while in_flight < WINDOW && !work.failed.load(Ordering::Relaxed) {
            // Blocks for a buffer only while it holds none, so that readers never starve one another.
            let pool = work.region.pool();
            let buffer = if in_flight == 0 { pool.acquire(None) } else { pool.try_acquire() };
            let Some(buffer) = buffer else { break };
            // Relaxed: the jobs themselves were published by spawning the threads.
            let index = work.next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = work.jobs.get(index) else { break };
            let offset =
                work.region.layout().slot_offset(work.record.slot) + job.chunk * work.record.chunk_bytes;
            in_flight += 1;
            work.region.medium().start(Io {
                op: IoOp::Read,
                offset,
                len: padded(work.record.chunk_len(job.chunk)),
                buffer,
                token: index as u64,
                sink: arrivals.clone(),
            });
        }
        if in_flight == 0 {
            return;
        }
        let (token, buffer, result) = next_arrival(&arrivals);
        in_flight -= 1;
        let job = &work.jobs[token as usize];
        let result = result.and_then(|()| verify_and_copy(work, job, &buffer, &persister));
        drop(buffer);
        if let Err(error) = result {
            work.failure.lock().get_or_insert(error);
            work.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// For a checkpoint saved with larger chunks than this store's buffers: one heap buffer of one chunk, no overlap.
fn read_large_chunks(work: &Work<'_>) {
    let persister = Persister::detect();
    let mut buffer = vec![0u8; padded(work.record.chunk_len(0))];
    for job in &work.jobs {
        let offset = work.region.layout().slot_offset(work.record.slot) + job.chunk * work.record.chunk_bytes;
        let bytes = &mut buffer[..padded(work.record.chunk_len(job.chunk))];
        let read = work.region.medium().read(offset, bytes);
        if let Err(error) = read.and_then(|()| verify_and_copy(work, job, bytes, &persister)) {
            *work.failure.lock() = Some(error);
            return;
        }
    }
}

fn next_arrival(arrivals: &Arrivals) -> (u64, StagingBuffer, Result<()>) {
    let mut queue = arrivals.queue.lock();
    loop {
        if let Some(arrival) = queue.pop_front() {
            return arrival;
        }
        queue = arrivals.arrived.wait_until(queue, None).0;
    }
}

fn verify_and_copy(work: &Work<'_>, job: &Job<'_>, buffer: &[u8], persister: &Persister) -> Result<()> {
    let len = work.record.chunk_len(job.chunk);
    let mut hasher = ChunkHasher::new();
    let mut pieces = job.pieces.iter().copied().peekable();
    let mut done = 0;
    while done < len {
        let end = (done + PIECE_BYTES).min(len);
        hasher.update(&buffer[done..end]);
        while let Some(piece) = pieces.peek_mut() {
            if piece.within >= end {
                break;
            }
            let now = piece.len.min(end - piece.within);
            let src = &buffer[piece.within..piece.within + now];
            // SAFETY: `plan::pieces` keeps `at + len` within the part's destination.
            let to = unsafe { work.destinations[piece.part].ptr.add(piece.at) };
            // SAFETY: `to` has room for `now` bytes, belongs to this job alone, and is no staging memory.
            unsafe { persister.copy_streaming(to, src.as_ptr(), now) };
            piece.within += now;
            piece.at += now;
            piece.len -= now;
            if piece.len > 0 {
                break;
            }
            pieces.next();
        }
        done = end;
    }
    // The destination's non-temporal stores must be visible before the caller is told that they are there.
    persister.fence();
    match hasher.finish() == work.hashes[job.chunk as usize] {
        true => Ok(()),
        false => Err(damaged_chunk(work.region, work.record, job.chunk)),
    }
}
