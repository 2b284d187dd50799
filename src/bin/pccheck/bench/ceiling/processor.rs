//! What the processor takes for plain copying and plain hashing, and its time spent by this process.
#![expect(unsafe_code, reason = "the process's clock is a system call")]

use std::thread;
use std::time::{Duration, Instant};

use pccheck::format::chunk_hash;

/// Copies `from` to `to` with `threads` threads, each a contiguous part at once; how long that took.
pub fn copy(from: &[u8], to: &mut [u8], threads: usize) -> Duration {
    in_parts(from, to, threads, |from, to| to.copy_from_slice(from))
}

/// Shares two blocks out among threads in contiguous parts.
pub(super) fn in_parts(
    from: &[u8],
    to: &mut [u8],
    threads: usize,
    work: impl Fn(&[u8], &mut [u8]) + Sync,
) -> Duration {
    let began = Instant::now();
    let part = from.len().div_ceil(threads.max(1)).max(1);
    thread::scope(|scope| {
        let work = &work;
        for (from, to) in from.chunks(part).zip(to.chunks_mut(part)) {
            scope.spawn(move || work(from, to));
        }
    });
    began.elapsed()
}

/// Hashes a block chunk by chunk, as the engine does, with `threads` threads; how long that took.
pub fn hash(bytes: &[u8], chunk_bytes: usize, threads: usize) -> Duration {
    let began = Instant::now();
    let chunks = bytes.len().div_ceil(chunk_bytes);
    let part = chunks.div_ceil(threads.max(1)).max(1) * chunk_bytes;
    thread::scope(|scope| {
        for part in bytes.chunks(part) {
            scope.spawn(move || {
                for chunk in part.chunks(chunk_bytes) {
                    std::hint::black_box(chunk_hash(chunk));
                }
            });
        }
    });
    began.elapsed()
}

/// Processor time, user's and kernel's, of all threads of this process so far.
pub fn process_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a clock that every Linux has, and a place for its time.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_whole_whatever_the_number_of_threads() {
        let from: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        for threads in [1, 2, 3, 7, 2000] {
            let mut to = vec![0; from.len()];
            copy(&from, &mut to, threads);
            assert!(to == from, "{threads} threads");
        }
    }

    #[test]
    fn work_takes_processor_time_and_sleep_does_not() {
        let bytes = vec![1u8; 8 << 20];
        let before = process_time();
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(20) {
            hash(&bytes, 1 << 20, 2);
        }
        assert!(process_time() - before > Duration::from_millis(5));
    }
}
