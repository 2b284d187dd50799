//! What the machine can do at best: plain O_DIRECT transfers of one block of memory, and plain copying; on a file system in
//! memory also plain copying into a mapped file, through the caches and around them.
//!
//! Nothing of the engine is used but its loops for copying around the caches and for hashing: no chunks, no staging, no
//! protocol. Memory is the same huge-page block that the engine saves, so not even a copy stands between it and the disk.
//!
//! | module | what |
//! |---|---|
//! | [`by_hand`] | the flushes and writes of the smallest save |
//! | [`processor`] | plain copying, plain hashing, processor time |
#![expect(
    unsafe_code,
    reason = "ring entries carry raw pointers to buffers, a mapping is written through one"
)]

mod by_hand;
mod processor;

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use io_uring::{opcode, types, IoUring};
use memmap2::{MmapOptions, MmapRaw};
use pccheck::persist::Persister;
use pccheck::{Error, ErrorKind, Result};

pub use by_hand::ByHand;
pub use processor::{copy, hash, process_time};

const OP: &str = "plain transfer";
/// Operations in flight and bytes of each that are tried; the ceiling is what is fastest at the median: one lucky trial would
/// choose a way that is slower afterwards, and a ceiling that is too low.
const MODES: [(usize, usize); 7] =
    [(4, 4 << 20), (8, 4 << 20), (8, 1 << 20), (32, 1 << 20), (32, 1 << 19), (4, 16 << 20), (2, 16 << 20)];
/// Trials of each mode, in turns.
const TRIALS: usize = 5;
/// Threads that write pieces.
const PIECE_WRITERS: usize = 4;

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Direction {
    Write,
    Read,
}

/// How many operations are in flight, and how large each is.
#[derive(Debug, Clone, Copy)]
pub struct Mode {
    /// Operations in flight.
    pub depth: usize,
    /// Bytes of each.
    pub bytes: usize,
    /// What carries them out.
    pub way: Way,
}

/// What carries plain transfers out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// io_uring.
    Ring,
    /// As many threads as there are operations in flight.
    Threads,
    /// As many threads, which copy between the memory and a mapping of the file.
    Mapping,
    /// The same by stores that go around the caches; for writing.
    Streaming,
}

/// A file with places for the state, preallocated and written, and the fastest ways to write and to read it.
pub struct Plain {
    file: File,
    path: PathBuf,
    /// Bytes of one place.
    place_bytes: usize,
    /// Where the places begin in the file.
    places: Vec<u64>,
    /// Writes so far; each goes to the next place, as saves go from slot to slot.
    written: usize,
    /// Of files in memory, which have no flush that it would evade.
    mapping: Option<MmapRaw>,
    /// False where the file system refuses O_DIRECT: then transfers go through the page cache.
    pub direct: bool,
    /// Fastest way of writing.
    pub write_mode: Mode,
    /// Fastest way of reading.
    pub read_mode: Mode,
}

impl Plain {
    /// Creates the file, writes `source` to each of its places, and finds the fastest modes. `copy` is overwritten.
    pub fn prepare(path: &Path, source: &[u8], copy: &mut [u8], places: usize) -> Result<Plain> {
        let failed = |e: &std::io::Error| Error::io(OP, e).at_path(path);
        // Nobody's file, and through nobody's link.
        File::create_new(path).map_err(|e| failed(&e))?;
        let (file, direct) = open(path)?;
        // SAFETY: touches no memory; the descriptor is the file's.
        let allocated =
            unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, (source.len() * places) as libc::off_t) };
        if allocated != 0 {
            return Err(failed(&std::io::Error::from_raw_os_error(allocated)));
        }
        let way = if IoUring::new(2).is_ok() { Way::Ring } else { Way::Threads };
        let first = Mode { depth: MODES[0].0, bytes: MODES[0].1, way };
        let mut plain = Plain {
            mapping: map_memory(&file).map_err(|e| failed(&e))?,
            file,
            path: path.to_path_buf(),
            place_bytes: source.len(),
            places: (0..places).map(|place| (place * source.len()) as u64).collect(),
            written: 0,
            direct,
            write_mode: first,
            read_mode: first,
        };
        // Allocated extents are slower until they were written once.
        plain.write(source, places)?;
        plain.choose_reading(copy)?;
        plain.choose_writing(source)?;
        Ok(plain)
    }

    /// The same ways of writing and reading, in another file, which must have been written before: the engine's own, so that
    /// both meet the same places of the disk.
    pub fn within(&self, path: &Path, places: Vec<u64>) -> Result<Plain> {
        let (file, direct) = open(path)?;
        Ok(Plain {
            mapping: map_memory(&file).map_err(|e| Error::io(OP, &e).at_path(path))?,
            file,
            path: path.to_path_buf(),
            places,
            written: 0,
            direct,
            ..*self
        })
    }

    /// Places for what follows.
    pub fn go_to(&mut self, places: Vec<u64>) {
        (self.places, self.written) = (places, 0);
    }

    /// Finds the fastest way of writing `source` to the places.
    pub fn choose_writing(&mut self, source: &[u8]) -> Result<()> {
        let mut modes = self.modes();
        if let Some(&mapping) = modes.last().filter(|_| self.mapping.is_some()) {
            modes.push(Mode { way: Way::Streaming, ..mapping });
        }
        self.write_mode = fastest(&modes, |mode| self.write_in(source, 1, mode))?;
        Ok(())
    }

    /// Finds the fastest way of reading the place that was written last; overwrites `copy`.
    pub fn choose_reading(&mut self, copy: &mut [u8]) -> Result<()> {
        self.read_mode = fastest(&self.modes(), |mode| self.read_in(copy, mode))?;
        Ok(())
    }

    /// All that is tried for reading; where the file is mapped, that comes last.
    fn modes(&self) -> Vec<Mode> {
        let way = if IoUring::new(2).is_ok() { Way::Ring } else { Way::Threads };
        let mut modes = MODES.map(|(depth, bytes)| Mode { depth, bytes, way }).to_vec();
        if self.mapping.is_some() {
            let depth = thread::available_parallelism().map_or(2, |cores| cores.get());
            modes.push(Mode { depth, bytes: self.place_bytes.div_ceil(depth), way: Way::Mapping });
        }
        modes
    }

    /// Writes `source` so many times in one go, each time to the next place, then makes it durable; how long that took.
    pub fn write(&mut self, source: &[u8], times: usize) -> Result<Duration> {
        self.write_in(source, times, self.write_mode)
    }

    /// Reads the place that was written last to `to`; how long that took.
    pub fn read(&self, to: &mut [u8]) -> Result<Duration> {
        self.read_in(to, self.read_mode)
    }

    /// Writes pieces to their offsets in the place that was written last, several at once, then makes them durable; how long that took.
    pub fn write_pieces(&self, pieces: &[(u64, &[u8])]) -> Result<Duration> {
        let place = self.place();
        let began = Instant::now();
        let threads = PIECE_WRITERS.min(pieces.len().max(1));
        let write = |share: usize| {
            let mut mine = pieces.iter().skip(share).step_by(threads);
            mine.try_for_each(|&(at, piece)| self.file.write_all_at(piece, place + at))
        };
        let written: std::io::Result<()> = thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|share| scope.spawn(move || write(share))).collect();
            threads.into_iter().try_for_each(joined)
        });
        written.and_then(|()| self.file.sync_data()).map_err(|e| self.failed(&e))?;
        Ok(began.elapsed())
    }

    fn write_in(&mut self, source: &[u8], times: usize, mode: Mode) -> Result<Duration> {
        let began = Instant::now();
        if mode.way == Way::Ring {
            let places: Vec<u64> = (0..times).map(|_| self.next_place()).collect();
            let start = source.as_ptr().cast_mut();
            // SAFETY: writing only reads the memory.
            unsafe { self.through_ring(Direction::Write, start, source.len(), &places, mode) }?;
        } else {
            for _ in 0..times {
                let place = self.next_place();
                self.write_pass(source, place, mode)?;
            }
        }
        self.file.sync_data().map_err(|e| self.failed(&e))?;
        Ok(began.elapsed())
    }

    /// Writes `source` to the place once, but by a ring.
    fn write_pass(&self, source: &[u8], place: u64, mode: Mode) -> Result<()> {
        if mode.way == Way::Threads {
            let write = |at: u64, piece: &[u8]| self.file.write_all_at(piece, place + at);
            return in_threads(mode, source.chunks(mode.bytes), write).map_err(|e| self.failed(&e));
        }
        // SAFETY: nobody else uses the mapping: each call ends before the next one begins.
        let mapped = unsafe { self.mapped() };
        let _ = match mode.way {
            Way::Streaming => stream(source, mapped, mode.depth),
            _ => copy(source, mapped, mode.depth),
        };
        Ok(())
    }

    fn read_in(&self, to: &mut [u8], mode: Mode) -> Result<Duration> {
        let at = self.place();
        let began = Instant::now();
        match mode.way {
            Way::Ring => {
                let start = to.as_mut_ptr();
                // SAFETY: `to` is borrowed exclusively until every operation has completed.
                unsafe { self.through_ring(Direction::Read, start, to.len(), &[at], mode) }?
            }
            Way::Mapping | Way::Streaming => {
                // SAFETY: as in `write_pass`.
                let mapped = unsafe { self.mapped() };
                let _ = copy(mapped, to, mode.depth);
            }
            Way::Threads => in_threads(mode, to.chunks_mut(mode.bytes), |offset, piece| {
                self.file.read_exact_at(piece, at + offset)
            })
            .map_err(|e| self.failed(&e))?,
        }
        Ok(began.elapsed())
    }

    fn next_place(&mut self) -> u64 {
        self.written += 1;
        self.place()
    }

    /// Where the place that was written last begins in the file.
    fn place(&self) -> u64 {
        self.places[self.written % self.places.len()]
    }

    /// That place, mapped; empty where the file is not.
    ///
    /// # Safety
    ///
    /// What an earlier call returned must not be in use any more.
    #[expect(clippy::mut_from_ref, reason = "the mapping is shared memory, not part of the value")]
    unsafe fn mapped(&self) -> &mut [u8] {
        match &self.mapping {
            Some(map) => {
                let place = self.place() as usize;
                assert!(place + self.place_bytes <= map.len(), "a place lies beyond the file");
                // SAFETY: within the mapping, as was just asked.
                let start = unsafe { map.as_mut_ptr().add(place) };
                // SAFETY: mapped for a place's length; the caller's promise makes this the only reference through this mapping,
                // and an engine that has mapped the same file is idle meanwhile.
                unsafe { std::slice::from_raw_parts_mut(start, self.place_bytes) }
            }
            None => &mut [],
        }
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        Error::io(OP, error).at_path(&self.path)
    }

    /// Moves `len` bytes from or to each of the places in the file with `mode.depth` operations in flight; returns when all have completed.
    ///
    /// # Safety
    ///
    /// `start..start + len` must be valid for the direction and be accessed by nobody else meanwhile.
    unsafe fn through_ring(
        &self,
        direction: Direction,
        start: *mut u8,
        len: usize,
        places: &[u64],
        mode: Mode,
    ) -> Result<()> {
        let total = len * places.len();
        let mut ring = IoUring::new(mode.depth as u32).map_err(|e| self.failed(&e))?;
        let file = types::Fd(self.file.as_raw_fd());
        let (mut next, mut in_flight) = (0, 0);
        let mut failure: Option<Error> = None;
        while in_flight > 0 || (next < total && failure.is_none()) {
            while in_flight < mode.depth && next < total && failure.is_none() {
                let within = next % len;
                let bytes = mode.bytes.min(len - within);
                let memory = start.wrapping_add(within);
                let at = places[next / len] + within as u64;
                let entry = match direction {
                    Direction::Write => opcode::Write::new(file, memory, bytes as u32).offset(at).build(),
                    Direction::Read => opcode::Read::new(file, memory, bytes as u32).offset(at).build(),
                };
                // SAFETY: the caller's promise; the loop ends only when nothing is in flight.
                let pushed = unsafe { ring.submission().push(&entry.user_data(bytes as u64)) };
                if pushed.is_err() {
                    failure = Some(Error::new(ErrorKind::Internal, OP, "the ring is full"));
                    break;
                }
                next += bytes;
                in_flight += 1;
            }
            match ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                // Nothing can be waited for any more; the caller ends the process with this error.
                Err(e) => return Err(self.failed(&e)),
            }
            for done in ring.completion() {
                in_flight -= 1;
                let result = done.result();
                if result < 0 {
                    let error = std::io::Error::from_raw_os_error(-result);
                    failure.get_or_insert(self.failed(&error));
                } else if result as u64 != done.user_data() {
                    let message = format!("expected {} bytes moved, found {result}", done.user_data());
                    failure.get_or_insert(Error::new(ErrorKind::Io, OP, message).at_path(&self.path));
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }
}

/// The mode whose median over the trials is least.
fn fastest(modes: &[Mode], mut run: impl FnMut(Mode) -> Result<Duration>) -> Result<Mode> {
    let mut took = vec![Vec::with_capacity(TRIALS); modes.len()];
    for _ in 0..TRIALS {
        for (&mode, took) in modes.iter().zip(&mut took) {
            took.push(run(mode)?);
        }
    }
    let median = |mut took: Vec<Duration>| {
        took.sort_unstable();
        took[took.len() / 2]
    };
    let medians = took.into_iter().map(median);
    let best = modes.iter().zip(medians).min_by_key(|&(_, median)| median);
    best.map(|(&mode, _)| mode).ok_or_else(|| Error::new(ErrorKind::Internal, OP, "no way was tried"))
}

/// For reading and writing, around the page cache where the file system can: whether it can. Not through a link.
fn open(path: &Path) -> Result<(File, bool)> {
    let with =
        |flags| OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW | flags).open(path);
    let failed = |e: std::io::Error| Error::io(OP, &e).at_path(path);
    match with(libc::O_DIRECT) {
        Ok(file) => Ok((file, true)),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok((with(0).map_err(failed)?, false)),
        Err(e) => Err(failed(e)),
    }
}

/// All of a file in memory, mapped, its pages at hand; none of any other file.
fn map_memory(file: &File) -> std::io::Result<Option<MmapRaw>> {
    if !in_memory(file) {
        return Ok(None);
    }
    let mapping = MmapOptions::new().map_raw(file)?;
    // Older kernels cannot: then the first transfers take the faults.
    let _ = mapping.advise(memmap2::Advice::PopulateWrite);
    Ok(Some(mapping))
}

/// Whether the file system keeps its files in memory alone.
fn in_memory(file: &File) -> bool {
    const TMPFS_MAGIC: libc::c_long = 0x0102_1994;
    // SAFETY: zero is a value of every field.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor and a struct to fill.
    let asked = unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) };
    asked == 0 && found.f_type as libc::c_long == TMPFS_MAGIC
}

/// Shares pieces of `mode.bytes` out among `mode.depth` threads.
fn in_threads<P: Send>(
    mode: Mode,
    pieces: impl Iterator<Item = P>,
    work: impl Fn(u64, P) -> std::io::Result<()> + Sync,
) -> std::io::Result<()> {
    let mut shares: Vec<Vec<(u64, P)>> = (0..mode.depth).map(|_| Vec::new()).collect();
    for (index, piece) in pieces.enumerate() {
        shares[index % mode.depth].push(((index * mode.bytes) as u64, piece));
    }
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = shares
            .into_iter()
            .map(|share| scope.spawn(move || share.into_iter().try_for_each(|(at, piece)| work(at, piece))))
            .collect();
        threads.into_iter().try_for_each(joined)
    })
}

fn joined(thread: thread::ScopedJoinHandle<'_, std::io::Result<()>>) -> std::io::Result<()> {
    thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")))
}

/// Copies around the caches with `threads` threads, each a contiguous part at once; how long that took.
fn stream(from: &[u8], to: &mut [u8], threads: usize) -> Duration {
    let persister = Persister::detect();
    processor::in_parts(from, to, threads, |from, to| {
        // SAFETY: both are of the same length and borrowed, `to` exclusively.
        unsafe { persister.copy_streaming(to.as_mut_ptr(), from.as_ptr(), from.len()) };
        persister.fence();
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::memory::{HugeBlock, State, STATE_BYTES_MIN};

    #[test]
    fn what_is_written_plainly_is_read_back_in_every_mode() {
        let dir = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let mut state = State::new(STATE_BYTES_MIN * 3).unwrap();
        let mut copied = HugeBlock::new(state.bytes().len()).unwrap();
        let mut plain = Plain::prepare(&dir.path().join("plain"), state.bytes(), &mut copied, 2).unwrap();
        for way in [plain.write_mode.way, Way::Threads] {
            state.change();
            let mode = Mode { depth: 3, bytes: 1 << 18, way };
            plain.write_in(state.bytes(), 2, mode).unwrap();
            copied.fill(0);
            plain.read_in(&mut copied, mode).unwrap();
            assert!(&copied[..] == state.bytes());
        }
        state.change();
        let third = state.bytes().len() / 3 / 4096 * 4096;
        let pieces = [0, 2 * third, third].map(|at| (at as u64, &state.bytes()[at..at + third]));
        plain.write_pieces(&pieces).unwrap();
        plain.read(&mut copied).unwrap();
        assert!(copied[..3 * third] == state.bytes()[..3 * third]);
    }

    #[test]
    fn a_file_in_memory_is_also_copied_to_through_a_mapping() {
        let Ok(dir) = tempfile::tempdir_in("/dev/shm") else { return };
        let mut state = State::new(STATE_BYTES_MIN).unwrap();
        let mut copied = HugeBlock::new(state.bytes().len()).unwrap();
        let mut plain = Plain::prepare(&dir.path().join("plain"), state.bytes(), &mut copied, 2).unwrap();
        assert!(plain.mapping.is_some());
        state.change();
        let mode = Mode { depth: 2, bytes: state.bytes().len() / 2, way: Way::Mapping };
        for way in [Way::Mapping, Way::Streaming] {
            state.change();
            plain.write_in(state.bytes(), 2, Mode { way, ..mode }).unwrap();
            copied.fill(0);
            plain.read_in(&mut copied, Mode { depth: 2, bytes: 1 << 18, way: Way::Threads }).unwrap();
            assert!(&copied[..] == state.bytes());
        }
        copied.fill(0);
        plain.read_in(&mut copied, mode).unwrap();
        assert!(&copied[..] == state.bytes());
    }
}
