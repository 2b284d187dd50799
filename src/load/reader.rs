//! Reading chunks in parallel, several in flight, each verified before the read succeeds.
#![expect(unsafe_code, reason = "several threads copy into disjoint parts of the caller's destinations")]

use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};
use crate::format::SlotRecord;
use crate::load::padded;
use crate::load::plan::{pieces, PartAt, Piece};
use crate::load::upload::{Targets, Uploads};
use crate::medium::{Io, IoOp, IoSink};
use crate::persist::{ChunkHasher, Persister};
use crate::staging::StagingBuffer;
use crate::store::Region;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{share, Arc, Condvar, Mutex};

/// Reads kept in flight by each thread.
const WINDOW: usize = 4;

/// Most buffers that each thread leaves to their uploads while it goes on: enough for a GPU to have the next copy when one
/// ends, and for the thread to find the oldest done when it looks.
const LATE: usize = 3;

/// Piece in which a chunk is hashed and then copied out of the first-level cache.
const PIECE_BYTES: usize = 16 << 10;

/// One chunk to read and where its bytes go.
struct Job<'a> {
    chunk: u64,
    pieces: &'a [Piece],
}

/// Where a part goes, shared by the threads.
struct Destination {
    ptr: *mut u8,
    /// Index of its GPU among the targets; none: host memory.
    device: Option<usize>,
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
    targets: Targets,
    /// Buffers that each thread may leave to their uploads.
    late: usize,
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
///
/// # Safety
///
/// The parts must be writable, by this call alone, and disjoint.
pub(super) unsafe fn read_parts(
    region: &Region,
    record: &SlotRecord,
    hashes: &[u128],
    parts: &[PartAt],
) -> Result<()> {
    let shapes: Vec<(u64, usize)> = parts.iter().map(|part| (part.offset, part.bytes)).collect();
    let pieces = pieces(record, &shapes)?;
    let jobs = pieces
        .chunk_by(|a, b| a.chunk == b.chunk)
        .map(|pieces| Job { chunk: pieces[0].chunk, pieces })
        .collect();
    let used = parts.iter().filter(|part| part.bytes > 0);
    let mut targets = Targets::open(region, used.filter_map(|part| part.device))?;
    let destination = |part: &PartAt| {
        let device = part.device.filter(|_| part.bytes > 0);
        let device =
            device.map(|ordinal| targets.index_of(ordinal, part.ptr as u64, part.bytes)).transpose()?;
        Ok(Destination { ptr: part.ptr, device })
    };
    let destinations = parts.iter().map(destination).collect::<Result<_>>()?;
    run(region, record, hashes, jobs, destinations, targets)
}

/// Verifies every chunk.
pub(super) fn verify_all(region: &Region, record: &SlotRecord, hashes: &[u128]) -> Result<()> {
    let jobs = (0..record.chunk_count).map(|chunk| Job { chunk, pieces: &[] }).collect();
    run(region, record, hashes, jobs, Vec::new(), Targets::open(region, std::iter::empty())?)
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
    targets: Targets,
) -> Result<()> {
    // A thread needs a buffer to have anything to do.
    let buffers = region.pool().buffer_count();
    let threads = (region.options().readers as usize).min(jobs.len()).min(buffers).max(1);
    let work = Work {
        region,
        record,
        hashes,
        jobs,
        destinations,
        targets,
        // Half of the pool at most: reads go on in the rest, which is also what is left should the uploads hang.
        late: LATE.min(buffers / (2 * threads)),
        next: AtomicUsize::new(0),
        failed: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    share("pcc-read", threads - 1, || read_jobs(&work));
    let failure = work.failure.lock().take();
    failure.map_or(Ok(()), Err)
}

/// One read of a chunk, or of as much of it as a staging buffer holds.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    token: u64,
    /// Index among the jobs.
    job: usize,
    /// First byte, within the chunk.
    start: usize,
    len: usize,
    /// The chunk is larger than a buffer: the next stretch goes on where this one ends.
    partial: bool,
}

/// A stretch whose read was started, in the order of starting.
struct Flight {
    stretch: Stretch,
    arrived: Option<(StagingBuffer, Result<()>)>,
}

/// What a thread reads next.
struct Course<'a> {
    work: &'a Work<'a>,
    /// The chunk that is larger than a buffer, and how much of it was handed out.
    begun: Option<(usize, usize)>,
    token: u64,
}

impl Course<'_> {
    fn next(&mut self) -> Option<Stretch> {
        let (job, start) = match self.begun.take() {
            Some(begun) => begun,
            // Relaxed: the jobs themselves were published by spawning the threads.
            None => (self.work.next.fetch_add(1, Ordering::Relaxed), 0),
        };
        let chunk = self.work.jobs.get(job)?.chunk;
        let (chunk_len, room) = (self.work.record.chunk_len(chunk), self.work.region.pool().buffer_bytes());
        let len = (chunk_len - start).min(room);
        if start + len < chunk_len {
            self.begun = Some((job, start + len));
        }
        self.token += 1;
        Some(Stretch { token: self.token, job, start, len, partial: chunk_len > room })
    }
}

/// One thread: keep up to `WINDOW` reads in flight; verify and copy out what arrives; wait for uploads only when too many
/// are on their way, or for want of anything else to do.
fn read_jobs(work: &Work<'_>) {
    let arrivals = Arc::new(Arrivals { queue: Mutex::new(VecDeque::new()), arrived: Condvar::new() });
    let persister = Persister::detect();
    let mut course = Course { work, begun: None, token: 0 };
    let mut flights: VecDeque<Flight> = VecDeque::with_capacity(WINDOW);
    let mut large: Option<Reading<'_>> = None;
    let mut uploads = Uploads::new(&work.targets);
    loop {
        while flights.len() < WINDOW && !work.failed.load(Ordering::Relaxed) {
            // Blocks for a buffer only while it holds none, so that readers never starve one another.
            let pool = work.region.pool();
            let holds_none = flights.is_empty() && uploads.late() == 0;
            let buffer = if holds_none { pool.acquire(None) } else { pool.try_acquire() };
            let Some(buffer) = buffer else { break };
            let Some(stretch) = course.next() else { break };
            let chunk_offset = work.jobs[stretch.job].chunk * work.record.chunk_bytes;
            let slot_offset = work.region.layout().slot_offset(work.record.slot);
            flights.push_back(Flight { stretch, arrived: None });
            work.region.medium().start(Io {
                op: IoOp::Read,
                offset: slot_offset + chunk_offset + stretch.start as u64,
                len: padded(stretch.len),
                buffer,
                token: stretch.token,
                sink: arrivals.clone(),
            });
        }
        if flights.is_empty() && uploads.late() == 0 {
            return;
        }
        let result = match next_arrival(&arrivals, &mut flights, uploads.late() == 0) {
            Some((stretch, buffer, result)) => {
                let result = match work.failed.load(Ordering::Relaxed) {
                    // Of a chunk that failed before its end, the rest has nothing to add to.
                    true => Ok(()),
                    false => result.and_then(|()| {
                        read_stretch(work, stretch, &buffer, &mut large, &persister, &mut uploads)
                    }),
                };
                // Also after an error: what was enqueued reads the buffer.
                uploads.keep(buffer);
                let settled = if uploads.late() > work.late { uploads.settle() } else { Ok(()) };
                settled.and(result)
            }
            // Nothing has arrived, or no buffer was free to read into: an upload that ends gives one back.
            None => uploads.settle(),
        };
        if let Err(error) = result {
            work.failure.lock().get_or_insert(error);
            work.failed.store(true, Ordering::Relaxed);
        }
    }
}

/// The next stretch that can be verified: any whole chunk, but the parts of a larger one in their order. None where it would
/// have to be waited for and is not to be.
fn next_arrival(
    arrivals: &Arrivals,
    flights: &mut VecDeque<Flight>,
    wait: bool,
) -> Option<(Stretch, StagingBuffer, Result<()>)> {
    let mut queue = arrivals.queue.lock();
    loop {
        while let Some((token, buffer, result)) = queue.pop_front() {
            if let Some(flight) = flights.iter_mut().find(|flight| flight.stretch.token == token) {
                flight.arrived = Some((buffer, result));
            }
        }
        let ready = flights
            .iter()
            .enumerate()
            .position(|(at, flight)| flight.arrived.is_some() && (at == 0 || !flight.stretch.partial));
        if let Some(Flight { stretch, arrived: Some((buffer, result)) }) =
            ready.and_then(|at| flights.remove(at))
        {
            return Some((stretch, buffer, result));
        }
        if !wait {
            return None;
        }
        queue = arrivals.arrived.wait_until(queue, None).0;
    }
}

/// Verifies and copies out; `large` is what was seen of a chunk that is larger than a buffer.
fn read_stretch<'a>(
    work: &'a Work<'_>,
    stretch: Stretch,
    buffer: &[u8],
    large: &mut Option<Reading<'a>>,
    persister: &Persister,
    uploads: &mut Uploads<'_>,
) -> Result<()> {
    let job = &work.jobs[stretch.job];
    let mut reading = match large.take() {
        Some(begun) if stretch.partial && stretch.start > 0 => begun,
        // Between the parts of a large chunk the whole, shorter one at the payload's end may arrive.
        other => {
            *large = other.filter(|_| !stretch.partial);
            Reading::new(job)
        }
    };
    let bytes = &buffer[..stretch.len];
    reading.upload(work, bytes, uploads)?;
    reading.absorb(work, bytes, persister);
    if stretch.partial && reading.done < work.record.chunk_len(job.chunk) {
        *large = Some(reading);
        return Ok(());
    }
    // The destination's non-temporal stores must be visible before the caller is told that they are there.
    persister.fence();
    match reading.hasher.finish() == work.hashes[job.chunk as usize] {
        true => Ok(()),
        false => Err(damaged_chunk(work.region, work.record, job.chunk)),
    }
}

/// A chunk of which the first `done` bytes were hashed and copied out.
struct Reading<'a> {
    hasher: ChunkHasher,
    /// In order of their places; those that ended are no longer among the first.
    pieces: &'a [Piece],
    done: usize,
}

impl<'a> Reading<'a> {
    fn new(job: &Job<'a>) -> Self {
        Reading { hasher: ChunkHasher::new(), pieces: job.pieces, done: 0 }
    }

    /// Has those of the next bytes that go to GPUs copied while they are verified.
    fn upload(&self, work: &Work<'_>, bytes: &[u8], uploads: &mut Uploads<'_>) -> Result<()> {
        let (start, end) = (self.done, self.done + bytes.len());
        let begun = self.pieces.partition_point(|piece| piece.within < end);
        for piece in self.pieces[..begun].iter().filter_map(|piece| piece.clipped(start, end)) {
            let destination = &work.destinations[piece.part];
            if let Some(device) = destination.device {
                let to = destination.ptr.wrapping_add(piece.at);
                uploads.add(device, piece.part, to, &bytes[piece.within..piece.within + piece.len]);
            }
        }
        uploads.enqueue()
    }

    /// Takes the next bytes of the chunk: hashes them, and copies out those that go to host memory.
    fn absorb(&mut self, work: &Work<'_>, bytes: &[u8], persister: &Persister) {
        let (start, end) = (self.done, self.done + bytes.len());
        let begun = self.pieces.partition_point(|piece| piece.within < end);
        // Several pieces may want the same bytes: one that ends here need not be the first that is left.
        let here = self.pieces[..begun].iter().filter(|piece| work.destinations[piece.part].device.is_none());
        let mut pieces = here.filter_map(|piece| piece.clipped(start, end)).peekable();
        let mut done = 0;
        while done < bytes.len() {
            let end = (done + PIECE_BYTES).min(bytes.len());
            self.hasher.update(&bytes[done..end]);
            while let Some(piece) = pieces.peek_mut() {
                if piece.within >= end {
                    break;
                }
                let now = piece.len.min(end - piece.within);
                let src = &bytes[piece.within..piece.within + now];
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
        self.done = end;
        let ended = self.pieces.iter().take_while(|piece| piece.within + piece.len <= end).count();
        self.pieces = &self.pieces[ended..];
    }
}
