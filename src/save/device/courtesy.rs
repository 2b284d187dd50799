//! Leaving memory to a device that is copying into it.
//!
//! Copiers hash and write what has arrived beside the copies that are still on their way, and take from the same memory: on a machine
//! with an H100, four of them cost the copy 5 percent, two cost 1. Where a save's copies have all the buffers that they need, and no
//! other save is in flight, nothing waits for the writing, but a trainer may wait for the copy. Until it has ended, only some
//! copiers are at what has arrived.

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// So many of the copiers, at least.
const AT_LEAST: u32 = 2;
/// Or this share of them.
const SHARE: u32 = 4;

/// Relaxed throughout: it orders nothing, and whoever changes it wakes those whom it concerns.
#[derive(Default)]
pub(crate) struct Courtesy {
    asked_for: AtomicBool,
    at_it: AtomicU32,
}

impl Courtesy {
    /// Asks for it, or no longer. True where it has ended: whoever rests is to be woken.
    pub fn ask(&self, wanted: bool) -> bool {
        let before = self.asked_for.swap(wanted, Ordering::Relaxed);
        before && !wanted
    }

    /// One of so many copiers is at what has arrived, until this is dropped; none where it is to rest.
    pub fn begin(&self, copiers: u32) -> Option<AtIt<'_>> {
        let limit = self.limit(copiers);
        let next = |now: u32| (now < limit).then_some(now + 1);
        let begun = self.at_it.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        begun.is_ok().then(|| AtIt(self))
    }

    /// Whether one more may be at it.
    pub fn has_room(&self, copiers: u32) -> bool {
        self.at_it.load(Ordering::Relaxed) < self.limit(copiers)
    }

    fn limit(&self, copiers: u32) -> u32 {
        match self.asked_for.load(Ordering::Relaxed) {
            true => AT_LEAST.max(copiers / SHARE),
            false => u32::MAX,
        }
    }
}

pub(crate) struct AtIt<'a>(&'a Courtesy);

impl Drop for AtIt<'_> {
    fn drop(&mut self) {
        self.0.at_it.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_at_it_while_it_is_asked_for_and_all_when_not() {
        for (copiers, some) in [(1, 2), (2, 2), (4, 2), (8, 2), (16, 4), (64, 16)] {
            let courtesy = Courtesy::default();
            let before: Vec<_> = (0..3).map(|_| courtesy.begin(copiers).expect("not asked for")).collect();
            assert!(!courtesy.ask(true));
            let all: Vec<_> = std::iter::from_fn(|| courtesy.begin(copiers)).take(100).collect();
            assert_eq!(all.len() + 3, some.max(3), "of {copiers}");
            assert!(!courtesy.has_room(copiers));
            drop((before, all));
            assert!(courtesy.has_room(copiers));
            let all: Vec<_> = std::iter::from_fn(|| courtesy.begin(copiers)).take(100).collect();
            assert_eq!(all.len(), some, "of {copiers}");
            assert!(courtesy.ask(false), "those who rest are to be woken");
            assert!(!courtesy.ask(false));
            assert!(courtesy.begin(copiers).is_some());
        }
    }
}
