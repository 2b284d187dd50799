//! Which buffers are free: a bitmap that threads take from and put back to without locks.

use std::time::Instant;

use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::Event;

const BITS: usize = u64::BITS as usize;

/// A set of buffer indices `0..len`; at first all are in it.
///
/// An index belongs to whoever took it, until it is put back: one bit, changed only by `fetch_and` and
/// `fetch_or`, whose return value says who changed it.
#[derive(Debug)]
pub struct BufferSet {
    /// Bit set: the buffer is free.
    words: Box<[AtomicU64]>,
    len: usize,
}

impl BufferSet {
    /// The full set of `len` indices.
    pub fn new(len: usize) -> Self {
        let words = (0..len.div_ceil(BITS))
            .map(|word| {
                let bits = (len - word * BITS).min(BITS);
                AtomicU64::new(if bits == BITS { u64::MAX } else { (1 << bits) - 1 })
            })
            .collect();
        BufferSet { words, len }
    }

    /// How many indices exist, free or taken.
    pub fn capacity(&self) -> usize {
        self.len
    }

    /// Takes the lowest free index that it finds: low buffers stay warm in caches and TLB.
    ///
    /// `None` may be out of date at once; a waiter takes an event ticket before it looks.
    #[must_use]
    pub fn take(&self) -> Option<usize> {
        for (at, word) in self.words.iter().enumerate() {
            // Relaxed: a guess; the fetch_and decides.
            let mut seen = word.load(Ordering::Relaxed);
            while seen != 0 {
                let bit = seen & seen.wrapping_neg();
                // Acquire pairs with the Release in `put`: the last owner's accesses to the buffer happen
                // before those of the new one. Takes of other bits in between continue its release sequence.
                let before = word.fetch_and(!bit, Ordering::Acquire);
                if before & bit != 0 {
                    return Some(at * BITS + bit.trailing_zeros() as usize);
                }
                seen = before;
            }
        }
        None
    }

    /// Puts back an index that was taken. Returns false, changing nothing, if it is not out.
    #[must_use]
    pub fn put(&self, index: usize) -> bool {
        if index >= self.len {
            return false;
        }
        let bit = 1 << (index % BITS);
        // Release pairs with the Acquire in `take`: the owner's accesses must not move behind its giving up.
        self.words[index / BITS].fetch_or(bit, Ordering::Release) & bit == 0
    }

    /// How many indices were free when each word was looked at; out of date at once.
    pub fn free_count(&self) -> usize {
        // Relaxed: a number for people and heuristics; nothing is accessed because of it.
        self.words.iter().map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }
}

/// A [`BufferSet`] that can be waited for.
#[derive(Debug)]
pub struct FreeList {
    set: BufferSet,
    freed: Event,
}

impl FreeList {
    /// All of `len` indices, free.
    pub fn new(len: usize) -> Self {
        FreeList { set: BufferSet::new(len), freed: Event::new() }
    }

    /// The set itself.
    pub fn set(&self) -> &BufferSet {
        &self.set
    }

    /// Notified after each return of an index.
    pub fn freed(&self) -> &Event {
        &self.freed
    }

    /// Takes an index, waiting until `deadline` (`None`: for ever); then `None`. Waiters are not queued.
    #[must_use]
    pub fn take_until(&self, deadline: Option<Instant>) -> Option<usize> {
        loop {
            // The ticket comes before the look: an index that returns in between ends the wait.
            let ticket = self.freed.ticket();
            if let Some(index) = self.set.take() {
                return Some(index);
            }
            if self.freed.wait(ticket, deadline) {
                return self.set.take();
            }
        }
    }

    /// Puts back an index that was taken and wakes who waits. False, and nothing changes, if it is not out.
    #[must_use]
    pub fn put(&self, index: usize) -> bool {
        let was_out = self.set.put(index);
        self.freed.notify_all();
        was_out
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(len in 0usize..200, ops in prop::collection::vec(any::<Option<u8>>(), 0..400)) {
            let set = BufferSet::new(len);
            let mut free: BTreeSet<usize> = (0..len).collect();
            for op in ops {
                match op {
                    None => prop_assert_eq!(set.take(), free.pop_first(), "take is the lowest free index"),
                    Some(index) => {
                        let index = usize::from(index);
                        let taken = index < len && free.insert(index);
                        prop_assert_eq!(set.put(index), taken, "put takes what is out, no more");
                    }
                }
                prop_assert_eq!(set.free_count(), free.len());
            }
        }
    }
}
