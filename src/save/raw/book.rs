//! Which chunks of a raw save are open, which of them hold a buffer, and which bytes of them were written.
//!
//! Locks are taken in this order: a chunk's, then the book's. The book's is never held over I/O or a wait.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::save::deadline_in;
use crate::staging::StagingBuffer;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Arc, Event, Mutex};

/// How many separate ranges the chunks of one raw save may have that are not complete: bounds the memory that
/// scattered small writes take (some 32 bytes each) and the number of open chunks.
const RANGES_MAX: usize = 64 << 10;

/// How long a write waits where the save was begun with a wait of 0: that is said of the slot, and a stream whose
/// writes may not wait at all would fail whenever the staging pool is full for a moment.
const ZERO_WAIT_LIMIT: Duration = Duration::from_secs(10);

/// Byte ranges of one chunk by their starts: disjoint, never touching.
#[derive(Default)]
pub(super) struct Ranges(BTreeMap<usize, usize>);

impl Ranges {
    /// Adds `start..end`, merging neighbours; false, without a change, where it overlaps one.
    fn insert(&mut self, start: usize, end: usize) -> bool {
        if start == end {
            return true;
        }
        let before = self.0.range(..=start).next_back().map(|(&start, &end)| (start, end));
        let after = self.0.range(start..).next().map(|(&start, &end)| (start, end));
        if before.is_some_and(|(_, end)| end > start) || after.is_some_and(|(next, _)| next < end) {
            return false;
        }
        let end = match after {
            Some((next, next_end)) if next == end => {
                self.0.remove(&next);
                next_end
            }
            _ => end,
        };
        let start = before.filter(|&(_, before_end)| before_end == start).map_or(start, |(before, _)| before);
        self.0.insert(start, end);
        true
    }

    /// All of a chunk of `len` bytes.
    pub fn is_whole(&self, len: usize) -> bool {
        self.0.get(&0) == Some(&len)
    }

    /// Where the first gap begins.
    pub fn first_gap(&self) -> usize {
        self.0.get(&0).copied().unwrap_or(0)
    }

    /// Fills what was not written with zeros.
    pub fn zero_gaps(&self, buffer: &mut [u8]) {
        let mut at = 0;
        for (&start, &end) in &self.0 {
            buffer[at..start].fill(0);
            at = end;
        }
        buffer[at..].fill(0);
    }
}

/// A chunk that has some of its bytes.
#[derive(Default)]
pub(super) struct OpenChunk {
    pub buffer: Option<StagingBuffer>,
    pub covered: Ranges,
    /// Hash of what was spilled to the slot (padded), for when it is read back.
    pub spilled: Option<u128>,
    pub complete: bool,
}

pub(super) type SharedChunk = Arc<Mutex<OpenChunk>>;

struct Entry {
    chunk: SharedChunk,
    /// When it was last written to.
    age: u64,
    /// It has a buffer of the save's share, or is about to get it.
    holds: bool,
}

#[derive(Default)]
struct Book {
    open: BTreeMap<u64, Entry>,
    /// Age to chunk, of those that hold a buffer: the first was left alone for longest.
    holders: BTreeMap<u64, u64>,
    clock: u64,
    complete: Vec<bool>,
}

/// The half-filled chunks of one raw save.
pub(crate) struct RawChunks {
    book: Mutex<Book>,
    /// Buffers that open chunks may hold.
    limit: usize,
    /// Ranges of all open chunks. Relaxed throughout: a count that orders nothing.
    ranges: AtomicUsize,
    wait: Option<Duration>,
    pub(super) moved: Event,
}

impl RawChunks {
    /// `limit` buffers at most stay half-filled; every wait of a write ends after `wait` (`None`: never).
    pub fn new(limit: usize, wait: Option<Duration>, chunk_count: u64) -> Self {
        let book = Book { complete: vec![false; chunk_count as usize], ..Book::default() };
        let wait = match wait {
            Some(Duration::ZERO) => Some(ZERO_WAIT_LIMIT),
            wait => wait,
        };
        RawChunks {
            book: Mutex::new(book),
            limit: limit.max(1),
            ranges: AtomicUsize::new(0),
            wait,
            moved: Event::new(),
        }
    }

    /// When a wait that begins now must end.
    pub fn deadline(&self) -> Option<Instant> {
        deadline_in(self.wait)
    }

    /// Gives every buffer back.
    pub fn clear(&self) {
        let open = {
            let mut book = self.book.lock();
            book.holders.clear();
            std::mem::take(&mut book.open)
        };
        drop(open);
        self.moved.notify_all();
    }

    /// The chunk that is about to be written to; `None` where it is complete.
    pub(super) fn open(&self, chunk: u64) -> Option<SharedChunk> {
        let mut guard = self.book.lock();
        let book = &mut *guard;
        if book.complete[chunk as usize] {
            return None;
        }
        book.clock += 1;
        let age = book.clock;
        let entry = book.open.entry(chunk).or_insert_with(|| Entry {
            chunk: SharedChunk::default(),
            age,
            holds: false,
        });
        if entry.holds {
            book.holders.remove(&entry.age);
            book.holders.insert(age, chunk);
        }
        entry.age = age;
        Some(entry.chunk.clone())
    }

    /// Counts a buffer of the share as the open chunk's; false where the share is used up.
    pub(super) fn reserve(&self, chunk: u64) -> bool {
        let mut guard = self.book.lock();
        let book = &mut *guard;
        let free = book.holders.len() < self.limit;
        if let (true, Some(entry)) = (free, book.open.get_mut(&chunk)) {
            entry.holds = true;
            book.holders.insert(entry.age, chunk);
        }
        free
    }

    /// The open chunk was spilled, and its buffer is back.
    pub(super) fn release(&self, chunk: u64) {
        {
            let mut guard = self.book.lock();
            let book = &mut *guard;
            if let Some(entry) = book.open.get_mut(&chunk) {
                entry.holds = false;
                book.holders.remove(&entry.age);
            }
        }
        self.moved.notify_all();
    }

    /// The chunk has all its bytes.
    pub(super) fn complete(&self, chunk: u64) {
        let entry = {
            let mut guard = self.book.lock();
            let book = &mut *guard;
            book.complete[chunk as usize] = true;
            let entry = book.open.remove(&chunk);
            if let Some(entry) = entry.as_ref().filter(|entry| entry.holds) {
                book.holders.remove(&entry.age);
            }
            entry
        };
        drop(entry);
        self.ranges.fetch_sub(1, Ordering::Relaxed);
        self.moved.notify_all();
    }

    /// Of the chunks that hold a buffer and were last written to after `age`, the one that was left alone for
    /// longest: its age and itself.
    pub(super) fn idlest_since(&self, age: u64, except: u64) -> Option<(u64, u64, SharedChunk)> {
        let book = self.book.lock();
        let mut holders = book.holders.range((Bound::Excluded(age), Bound::Unbounded));
        let (&age, &chunk) = holders.find(|(_, &chunk)| chunk != except)?;
        Some((age, chunk, book.open.get(&chunk)?.chunk.clone()))
    }

    /// The first chunk that is not complete, and what there is of it.
    pub(super) fn first_incomplete(&self) -> Option<(u64, Option<SharedChunk>)> {
        let book = self.book.lock();
        let chunk = book.complete.iter().position(|complete| !complete)? as u64;
        Some((chunk, book.open.get(&chunk).map(|entry| entry.chunk.clone())))
    }

    /// Notes that `start..end` of the chunk was written; false where a part of it was before.
    pub(super) fn cover(&self, open: &mut OpenChunk, start: usize, end: usize) -> Result<bool> {
        let before = open.covered.0.len();
        if !open.covered.insert(start, end) {
            return Ok(false);
        }
        let after = open.covered.0.len();
        if after < before {
            self.ranges.fetch_sub(before - after, Ordering::Relaxed);
        } else if after > before && self.ranges.fetch_add(1, Ordering::Relaxed) >= RANGES_MAX {
            return Err(Error::new(
                ErrorKind::TooLarge,
                "raw write",
                format!("more than {RANGES_MAX} separate ranges were written, with gaps between them"),
            )
            .advise("write larger pieces, or pieces that adjoin what was written"));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covering_merges_neighbours_and_refuses_overlap() {
        let mut ranges = Ranges::default();
        let list = |ranges: &Ranges| ranges.0.iter().map(|(&a, &b)| (a, b)).collect::<Vec<_>>();
        assert!(ranges.insert(10, 20));
        assert!(ranges.insert(30, 40));
        for (start, end) in [(15, 16), (10, 11), (5, 11), (5, 50), (39, 50), (19, 31)] {
            assert!(!ranges.insert(start, end), "{start}..{end}");
        }
        assert_eq!(list(&ranges), [(10, 20), (30, 40)]);
        assert_eq!(ranges.first_gap(), 0);
        assert!(ranges.insert(20, 30));
        assert_eq!(list(&ranges), [(10, 40)]);
        assert!(ranges.insert(0, 10));
        assert!(ranges.is_whole(40) && !ranges.is_whole(41));
        assert_eq!(ranges.first_gap(), 40);
        assert!(ranges.insert(7, 7));
    }

    #[test]
    fn gaps_become_zero_and_data_stays() {
        let mut buffer = vec![7u8; 10];
        let mut ranges = Ranges::default();
        assert!(ranges.insert(2, 4) && ranges.insert(6, 7));
        ranges.zero_gaps(&mut buffer);
        assert_eq!(buffer, [0, 0, 7, 7, 0, 0, 7, 0, 0, 0]);
    }

    #[test]
    fn the_chunk_left_alone_for_longest_is_spilled_first() {
        let chunks = RawChunks::new(3, None, 10);
        for chunk in [4, 7, 2] {
            assert!(chunks.open(chunk).is_some() && chunks.reserve(chunk));
        }
        assert!(chunks.open(9).is_some() && !chunks.reserve(9), "the share is used up");
        chunks.open(4);
        let order = |except: u64| {
            let mut order = Vec::new();
            let mut age = 0;
            while let Some((next, chunk, _)) = chunks.idlest_since(age, except) {
                age = next;
                order.push(chunk);
            }
            order
        };
        assert_eq!(order(9), [7, 2, 4]);
        assert_eq!(order(7), [2, 4]);
        chunks.release(7);
        assert!(chunks.reserve(9));
        chunks.complete(4);
        assert!(chunks.open(4).is_none());
        assert_eq!(order(0), [2, 9]);
    }

    #[test]
    fn ranges_are_counted_and_bounded() {
        let chunks = RawChunks::new(1, None, 1);
        let mut open = OpenChunk::default();
        for range in 0..RANGES_MAX {
            assert!(chunks.cover(&mut open, 2 * range, 2 * range + 1).unwrap());
        }
        // Filling a gap makes two ranges one.
        assert!(chunks.cover(&mut open, 1, 2).unwrap());
        assert!(chunks.cover(&mut open, 2 * RANGES_MAX, 2 * RANGES_MAX + 1).unwrap());
        let error = chunks.cover(&mut open, 3 * RANGES_MAX, 3 * RANGES_MAX + 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }
}
