//! The slot allocator: claim, commit, reclaim, pin and read, over one atomic word per slot.
//!
//! # Who may do what, when
//!
//! 1. A WRITING(g) slot belongs to the save of generation `g`: it alone commits, releases or quarantines it.
//! 2. A slot is claimed only while FREE, by one compare-and-exchange from the FREE word that was seen to
//!    WRITING(g). Of two claimers that saw the same word one fails, since generations are never reused and
//!    the word has changed; so a slot is never handed out twice. That the word went away and came back
//!    (A-B-A) does no harm: the same FREE word means that the slot is free, whatever happened between.
//! 3. A COMMITTED slot leaves that state only by reclaim, discard and quarantine, all of which hold the
//!    `retention` lock; reclaim and discard also fail, by the same exchange, while it is pinned or read.
//! 4. Claim, commit, release, pins and readers take no lock.
//! 5. A slot that was claimed with a pin becomes COMMITTED and pinned by one exchange: no reclaim comes between.
//!
//! # Why reclaim may look at the words one after the other
//!
//! It frees a committed slot of generation `g` after it saw `keep` committed slots newer than `g`. Others
//! commit meanwhile, which adds newer ones; but none of those that were seen can leave COMMITTED, by rule 3.
//! So at the exchange there still are `keep` newer ones, and the newest `keep` (at least one) are never
//! freed. For the same reason [`SlotTable::newest`], which holds the lock too, cannot miss a checkpoint that
//! was committed when it was called, nor return one that is gone.
//!
//! # What the orderings publish
//!
//! Payload and records reach the medium by I/O, ordered by its completion and by the protocol's barriers, not
//! by these words. The words order what is in DRAM: a save's bookkeeping of its slot, and loads and stores of
//! mapped media. Every change is one read-modify-write with AcqRel: its Release half ends the changer's use
//! of the slot before others see the new word (a reader's loads before `drop_reader`, the save's stores
//! before `commit`), its Acquire half starts a use only after the earlier owner's end (`claim` pairs with the
//! `reclaim`, `release`, `discard` or `lift_quarantine` that freed the slot, `reclaim` with `drop_reader` and
//! `unpin`, `add_reader` with `commit`). All changes of a word form one release sequence, so intermediate
//! changes by third parties break no pair.

use crossbeam_utils::CachePadded;

use super::word::{SlotState, SlotView, Word};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::Mutex;

/// A slot that now belongs to the caller's save.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// Its index.
    pub slot: u32,
    /// Generation of the content that will be overwritten; 0 when there was none.
    pub previous_generation: u64,
}

/// The slots of one open region.
#[derive(Debug)]
pub struct SlotTable {
    /// Each in a cache line of its own: saves and readers of different slots must not slow one another.
    pub(super) words: Box<[CachePadded<AtomicU64>]>,
    /// Held by whoever ends a COMMITTED state, and by whoever needs that none ends meanwhile.
    retention: Mutex<()>,
}

impl SlotTable {
    /// The table that recovery found, one view per slot. A slot whose save died is to be given as `Free` with
    /// generation 0: a `Writing` one has no owner here, and is never claimed.
    pub fn new(views: &[SlotView]) -> SlotTable {
        let word = |view| CachePadded::new(AtomicU64::new(Word::of(view).bits()));
        let words = views.iter().map(word).collect();
        SlotTable { words, retention: Mutex::new(()) }
    }

    /// How many slots there are.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// Whether there is no slot at all.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// Claims the free slot whose old content is oldest, for the save of `generation`, which must be new and
    /// in `1..=GENERATION_MAX`. `None`: no slot is free (or the generation is out of range). With `pin` the checkpoint
    /// is pinned from the commit on.
    ///
    /// Lock-free: it starts over only when another claim took the slot it had chosen.
    pub fn claim(&self, generation: u64, pin: bool) -> Option<Claim> {
        loop {
            let (slot, seen) = self
                .snapshot()
                .filter(|(_, word)| word.is_free())
                .min_by_key(|(_, word)| word.generation())?;
            let claimed = seen.claim(generation, pin)?;
            if self.exchange(slot, seen, claimed).is_ok() {
                return Some(Claim { slot, previous_generation: seen.generation() });
            }
        }
    }

    /// WRITING(g) to COMMITTED(g), once the record is durable. False if the slot is not WRITING(g).
    #[must_use]
    pub fn commit(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.commit(generation))
    }

    /// Gives up a save that failed or was cancelled: WRITING(g) to FREE(0). False if the slot is not
    /// WRITING(g).
    #[must_use]
    pub fn release(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.release(generation))
    }

    /// Gives up a save whose medium refused a write: WRITING(g) to FREE(g), so that the slot is claimed after all
    /// others and one bad place does not fail every save. False if the slot is not WRITING(g).
    #[must_use]
    pub fn release_last(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.release_last(generation))
    }

    /// Takes a slot whose durability is unknown out of use: WRITING(g) or COMMITTED(g) to QUARANTINED(g).
    /// Pins and readers of a checkpoint stay and can be dropped. False if the slot holds something else.
    #[must_use]
    pub fn quarantine(&self, slot: u32, generation: u64) -> bool {
        let _retained = self.retention.lock();
        self.change(slot, |word| word.quarantine(generation))
    }

    /// QUARANTINED(g), neither pinned nor read, to FREE(0). False otherwise.
    #[must_use]
    pub fn lift_quarantine(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.lift_quarantine(generation))
    }

    /// Frees the committed, unpinned, unread slots that are older than the newest `keep` committed ones
    /// (pinned and read ones count among these; `keep` 0 is taken as 1), and with `hold_floor` only those of
    /// a generation below it. Returns slot and generation of each; its media record stays valid until
    /// claimed.
    pub fn reclaim(&self, keep: usize, hold_floor: Option<u64>) -> Vec<(u32, u64)> {
        let _retained = self.retention.lock();
        let limit = self.reclaim_limit(keep, hold_floor);
        let mut freed = Vec::new();
        for (slot, word) in
            self.snapshot().filter(|(_, word)| word.is_committed() && word.generation() < limit)
        {
            // Refused while the slot is pinned or read: it stays.
            if self.change(slot, |now| now.reclaim(word.generation())) {
                freed.push((slot, word.generation()));
            }
        }
        freed
    }

    /// Takes a reclaimed checkpoint back: FREE(g) to COMMITTED(g). False if it was claimed meanwhile. Whether its
    /// record is still valid is the caller's to know.
    #[must_use]
    pub fn revive(&self, slot: u32, generation: u64) -> bool {
        let _retained = self.retention.lock();
        self.change(slot, |word| word.revive(generation))
    }

    /// Puts a checkpoint (committed, or reclaimed and not yet claimed) out of everybody's reach while it is being
    /// discarded: no reader, claim or pin gets it. `None` if it is read or gone; otherwise whether it was committed, for
    /// [`give_back`](SlotTable::give_back).
    #[must_use]
    pub fn withhold(&self, slot: u32, generation: u64) -> Option<bool> {
        let _retained = self.retention.lock();
        let was_committed = self.view(slot).state == SlotState::Committed;
        // Both states lead to one; a reclaim between look and change is excluded by the lock, a claim by the change.
        self.change(slot, |word| word.withhold(generation)).then_some(was_committed)
    }

    /// Undoes [`withhold`](SlotTable::withhold), when the discard could not be made durable.
    pub fn give_back(&self, slot: u32, generation: u64, committed: bool) {
        let was_withheld = self.change(slot, |word| word.give_back(generation, committed));
        debug_assert!(was_withheld, "slot {slot} of generation {generation} was not withheld");
    }

    /// Pins a checkpoint: never reclaimed until unpinned. True if the slot is COMMITTED(g), pinned before or
    /// not.
    #[must_use]
    pub fn pin(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.pin(generation))
    }

    /// Ends a pin; the next [`reclaim`](SlotTable::reclaim) may free the slot. True if the slot holds
    /// `generation` (committed or quarantined), pinned before or not.
    #[must_use]
    pub fn unpin(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.unpin(generation))
    }

    /// Registers a reader: the slot keeps its content until [`drop_reader`](SlotTable::drop_reader). False if
    /// it is not COMMITTED(g) any more, or has [`READERS_MAX`](super::READERS_MAX) readers.
    #[must_use]
    pub fn add_reader(&self, slot: u32, generation: u64) -> bool {
        self.change(slot, |word| word.add_reader(generation))
    }

    /// Ends one reader that [`add_reader`](SlotTable::add_reader) registered; the next reclaim may free the
    /// slot.
    pub fn drop_reader(&self, slot: u32, generation: u64) {
        let was_reading = self.change(slot, |word| word.drop_reader(generation));
        debug_assert!(was_reading, "slot {slot} has no reader of generation {generation}");
    }

    /// Gives up a checkpoint: COMMITTED(g), neither pinned nor read, to FREE(0). False otherwise. The caller
    /// has made this durable, and answers for what remains: the newest may be discarded.
    #[must_use]
    pub fn discard(&self, slot: u32, generation: u64) -> bool {
        let _retained = self.retention.lock();
        self.change(slot, |word| word.discard(generation))
    }

    /// The slot at this instant.
    ///
    /// # Panics
    ///
    /// If there is no such slot.
    pub fn view(&self, slot: u32) -> SlotView {
        // Acquire pairs with the Release of the last change, for what the owner published with it.
        Word::from_bits(self.words[slot as usize].load(Ordering::Acquire)).view()
    }

    /// All slots. No checkpoint disappears while they are looked at; other changes may happen meanwhile.
    pub fn views(&self) -> Vec<SlotView> {
        let _retained = self.retention.lock();
        self.snapshot().map(|(_, word)| word.view()).collect()
    }

    /// Slot and generation of the newest checkpoint: at least as new as the newest when the call began. It
    /// may be reclaimed after the return; [`add_reader`](SlotTable::add_reader) tells, and then a newer one
    /// exists.
    pub fn newest(&self) -> Option<(u32, u64)> {
        let _retained = self.retention.lock();
        self.snapshot()
            .filter(|(_, word)| word.is_committed())
            .map(|(slot, word)| (slot, word.generation()))
            .max_by_key(|&(_, generation)| generation)
    }

    /// How many slots serve saves: free, being written, or such that [`reclaim`](SlotTable::reclaim) would
    /// free them. So neither quarantined, nor pinned (or about to be), nor read, nor among the newest `keep`, nor held.
    pub fn claimable_count(&self, keep: usize, hold_floor: Option<u64>) -> usize {
        let _retained = self.retention.lock();
        let limit = self.reclaim_limit(keep, hold_floor);
        let reclaimable = |word: &Word| word.is_committed() && word.is_idle() && word.generation() < limit;
        let serves = |word: &Word| word.is_free() || word.is_writing() && word.is_idle() || reclaimable(word);
        self.snapshot().filter(|(_, word)| serves(word)).count()
    }

    /// Whether [`reclaim`](SlotTable::reclaim) would free this slot now. Where not, one more reader of its
    /// checkpoint takes nothing from saves.
    pub fn is_reclaimable(&self, slot: u32, keep: usize, hold_floor: Option<u64>) -> bool {
        let _retained = self.retention.lock();
        let limit = self.reclaim_limit(keep, hold_floor);
        let mut slots = self.snapshot();
        slots.any(|(at, word)| {
            at == slot && word.is_committed() && word.is_idle() && word.generation() < limit
        })
    }

    /// Committed generations below this may be freed. Only under the retention lock.
    fn reclaim_limit(&self, keep: usize, hold_floor: Option<u64>) -> u64 {
        let mut newest_first: Vec<u64> = self
            .snapshot()
            .filter(|(_, word)| word.is_committed())
            .map(|(_, word)| word.generation())
            .collect();
        newest_first.sort_unstable_by(|a, b| b.cmp(a));
        // The lowest generation to keep; with fewer than `keep` nothing may be freed.
        let kept = newest_first.get(keep.max(1) - 1).copied().unwrap_or(0);
        kept.min(hold_floor.unwrap_or(u64::MAX))
    }

    /// Each slot's word, each at its own instant.
    fn snapshot(&self) -> impl Iterator<Item = (u32, Word)> + '_ {
        // Acquire pairs with the Release of the last change of each word: who learns that a slot is committed
        // also sees what its save published before.
        (0..).zip(self.words.iter().map(|word| Word::from_bits(word.load(Ordering::Acquire))))
    }

    fn exchange(&self, slot: u32, seen: Word, new: Word) -> Result<(), Word> {
        // AcqRel: see the head of this file. Acquire on failure: the word is judged anew.
        self.words[slot as usize]
            .compare_exchange(seen.bits(), new.bits(), Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(Word::from_bits)
    }

    /// Applies a transition as one read-modify-write; false if the slot's state does not allow it (or no such
    /// slot exists). Repeats only when another thread changed the word.
    fn change(&self, slot: u32, transition: impl Fn(Word) -> Option<Word>) -> bool {
        let Some(word) = self.words.get(slot as usize) else { return false };
        // Acquire: a refusal is an answer too, and orders what the caller does next behind the change it saw.
        let mut seen = Word::from_bits(word.load(Ordering::Acquire));
        while let Some(new) = transition(seen) {
            match self.exchange(slot, seen, new) {
                Ok(()) => return true,
                Err(now) => seen = now,
            }
        }
        false
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
