//! One slot's state in one 64-bit word, and the transitions that it allows.
//!
//! ```text
//! bit 63                             20 19             4     3    2      0
//!     +-------------------------------+---------------+--------+--------+
//!     | generation (44)               | readers (16)  | pinned | state  |
//!     +-------------------------------+---------------+--------+--------+
//!
//!            claim                 commit                     reclaim
//!   FREE(old) --> WRITING(g) ----------------> COMMITTED(g) ----------> FREE(g)
//!                     |  release                  |  discard
//!                     +----------> FREE(0) <------+
//!                     |               ^           |
//!                     | quarantine    | lift      | quarantine
//!                     +------> QUARANTINED(g) <---+
//! ```
//!
//! Readers are added while COMMITTED only, pins there or by the claim: WRITING(g) with the pin becomes COMMITTED(g)
//! with the pin in one step, and any other way out of WRITING drops it. A COMMITTED slot with a pin or readers leaves
//! that state only for QUARANTINED, which keeps them. A transition is a pure function: the table applies it by
//! compare-and-exchange.

const STATE_MASK: u64 = 0b111;
const PINNED: u64 = 1 << 3;
const READER_SHIFT: u32 = 4;
const READER_ONE: u64 = 1 << READER_SHIFT;
const READER_MASK: u64 = (READERS_MAX as u64) << READER_SHIFT;
const GENERATION_SHIFT: u32 = 20;

const FREE: u64 = 0;
const WRITING: u64 = 1;
const COMMITTED: u64 = 2;
const QUARANTINED: u64 = 3;

/// Most concurrent readers of one slot.
pub const READERS_MAX: u32 = u16::MAX as u32;
/// Highest generation that a slot word can hold: 44 bits.
pub const GENERATION_MAX: u64 = (1 << 44) - 1;

const _: () = assert!(STATE_MASK | PINNED | READER_MASK == (1 << GENERATION_SHIFT) - 1, "fields must tile");
const _: () = assert!(GENERATION_MAX << GENERATION_SHIFT >> GENERATION_SHIFT == GENERATION_MAX);

/// What a slot is being used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SlotState {
    /// Claimable. The generation is that of the old content, whose record may still be valid; 0: nothing.
    Free,
    /// Owned by the save of that generation.
    Writing,
    /// Holds the durable checkpoint of that generation.
    Committed,
    /// Its durability is unknown: neither claimed nor read until repaired.
    Quarantined,
}

/// One slot as it was at one instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SlotView {
    /// What it is being used for.
    pub state: SlotState,
    /// Whose it is or was; 0 means nobody's.
    pub generation: u64,
    /// How many readers hold it.
    pub readers: u32,
    /// Whether it is pinned; of a slot that is being written, whether its checkpoint will be.
    pub pinned: bool,
}

/// The packed word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Word(u64);

impl Word {
    fn new(state: u64, generation: u64) -> Word {
        Word(generation << GENERATION_SHIFT | state)
    }

    pub(super) fn from_bits(bits: u64) -> Word {
        Word(bits)
    }

    pub(super) fn bits(self) -> u64 {
        self.0
    }

    /// The word of a view. One that no transition leads to (no recovery makes such) is quarantined: never
    /// handed out.
    pub(super) fn of(view: &SlotView) -> Word {
        let idle = view.readers == 0 && !view.pinned;
        let reachable = match view.state {
            SlotState::Free => idle,
            SlotState::Writing => view.readers == 0 && view.generation != 0,
            SlotState::Committed => view.generation != 0,
            SlotState::Quarantined => true,
        };
        if !reachable || view.generation > GENERATION_MAX || view.readers > READERS_MAX {
            return Word::new(QUARANTINED, view.generation.min(GENERATION_MAX));
        }
        let state = match view.state {
            SlotState::Free => FREE,
            SlotState::Writing => WRITING,
            SlotState::Committed => COMMITTED,
            SlotState::Quarantined => QUARANTINED,
        };
        let pinned = if view.pinned { PINNED } else { 0 };
        Word(Word::new(state, view.generation).0 | u64::from(view.readers) << READER_SHIFT | pinned)
    }

    pub(super) fn view(self) -> SlotView {
        SlotView {
            state: match self.state() {
                FREE => SlotState::Free,
                WRITING => SlotState::Writing,
                COMMITTED => SlotState::Committed,
                _ => SlotState::Quarantined,
            },
            generation: self.generation(),
            readers: ((self.0 & READER_MASK) >> READER_SHIFT) as u32,
            pinned: self.0 & PINNED != 0,
        }
    }

    fn state(self) -> u64 {
        self.0 & STATE_MASK
    }

    pub(super) fn generation(self) -> u64 {
        self.0 >> GENERATION_SHIFT
    }

    pub(super) fn is_free(self) -> bool {
        self.state() == FREE
    }

    pub(super) fn is_writing(self) -> bool {
        self.state() == WRITING
    }

    pub(super) fn is_committed(self) -> bool {
        self.state() == COMMITTED
    }

    /// Neither pinned nor read.
    pub(super) fn is_idle(self) -> bool {
        self.0 & (PINNED | READER_MASK) == 0
    }

    fn is(self, state: u64, generation: u64) -> bool {
        self.state() == state && self.generation() == generation
    }

    /// FREE -> WRITING(g), with the pin where its checkpoint is to be pinned. Refused for the generations 0 (nobody) and
    /// beyond [`GENERATION_MAX`].
    #[must_use]
    pub(super) fn claim(self, generation: u64, pin: bool) -> Option<Word> {
        let allowed = self.is_free() && (1..=GENERATION_MAX).contains(&generation);
        let pinned = if pin { PINNED } else { 0 };
        allowed.then(|| Word(Word::new(WRITING, generation).0 | pinned))
    }

    /// WRITING(g) -> COMMITTED(g), with the pin that it was claimed with.
    #[must_use]
    pub(super) fn commit(self, generation: u64) -> Option<Word> {
        self.is(WRITING, generation).then_some(Word(self.0 & !STATE_MASK | COMMITTED))
    }

    /// WRITING(g) -> FREE(0): what was there before is overwritten, what was to be there is not.
    #[must_use]
    pub(super) fn release(self, generation: u64) -> Option<Word> {
        self.is(WRITING, generation).then(|| Word::new(FREE, 0))
    }

    /// WRITING(g) -> FREE(g): nothing is there, but the slot is claimed after all others.
    #[must_use]
    pub(super) fn release_last(self, generation: u64) -> Option<Word> {
        self.is(WRITING, generation).then(|| Word::new(FREE, generation))
    }

    /// WRITING(g) or COMMITTED(g) -> QUARANTINED(g); a checkpoint's pin and readers stay, a save that failed pins nothing.
    #[must_use]
    pub(super) fn quarantine(self, generation: u64) -> Option<Word> {
        match self.state() {
            WRITING => self.is(WRITING, generation).then(|| Word::new(QUARANTINED, generation)),
            _ => self.is(COMMITTED, generation).then_some(Word(self.0 & !STATE_MASK | QUARANTINED)),
        }
    }

    /// QUARANTINED(g), idle -> FREE(0).
    #[must_use]
    pub(super) fn lift_quarantine(self, generation: u64) -> Option<Word> {
        (self.is(QUARANTINED, generation) && self.is_idle()).then(|| Word::new(FREE, 0))
    }

    /// COMMITTED(g), idle -> FREE(g): the record stays valid until the slot is claimed.
    #[must_use]
    pub(super) fn reclaim(self, generation: u64) -> Option<Word> {
        (self.is(COMMITTED, generation) && self.is_idle()).then(|| Word::new(FREE, generation))
    }

    /// FREE(g) -> COMMITTED(g): a reclaimed checkpoint whose record is still valid is one again.
    #[must_use]
    pub(super) fn revive(self, generation: u64) -> Option<Word> {
        (self.is(FREE, generation) && generation != 0).then(|| Word::new(COMMITTED, generation))
    }

    /// COMMITTED(g) without readers or FREE(g) -> QUARANTINED(g), with its pin: out of everybody's reach while it
    /// is being discarded.
    #[must_use]
    pub(super) fn withhold(self, generation: u64) -> Option<Word> {
        let unread = self.0 & READER_MASK == 0;
        let held = self.is(COMMITTED, generation) || (self.is(FREE, generation) && generation != 0);
        (unread && held).then_some(Word(self.0 & !STATE_MASK | QUARANTINED))
    }

    /// QUARANTINED(g) -> COMMITTED(g) or FREE(g), as it was before it was withheld.
    #[must_use]
    pub(super) fn give_back(self, generation: u64, committed: bool) -> Option<Word> {
        let state = if committed { COMMITTED } else { FREE };
        self.is(QUARANTINED, generation).then_some(Word(self.0 & !STATE_MASK | state))
    }

    /// COMMITTED(g), idle -> FREE(0).
    #[must_use]
    pub(super) fn discard(self, generation: u64) -> Option<Word> {
        (self.is(COMMITTED, generation) && self.is_idle()).then(|| Word::new(FREE, 0))
    }

    /// COMMITTED(g) -> pinned; also if it was.
    #[must_use]
    pub(super) fn pin(self, generation: u64) -> Option<Word> {
        self.is(COMMITTED, generation).then_some(Word(self.0 | PINNED))
    }

    /// COMMITTED(g) or QUARANTINED(g) -> not pinned; also if it was not.
    #[must_use]
    pub(super) fn unpin(self, generation: u64) -> Option<Word> {
        self.is_held(generation).then_some(Word(self.0 & !PINNED))
    }

    /// COMMITTED(g) -> one reader more, up to [`READERS_MAX`].
    #[must_use]
    pub(super) fn add_reader(self, generation: u64) -> Option<Word> {
        let allowed = self.is(COMMITTED, generation) && self.0 & READER_MASK != READER_MASK;
        allowed.then(|| Word(self.0 + READER_ONE))
    }

    /// COMMITTED(g) or QUARANTINED(g) -> one reader less.
    #[must_use]
    pub(super) fn drop_reader(self, generation: u64) -> Option<Word> {
        let allowed = self.is_held(generation) && self.0 & READER_MASK != 0;
        allowed.then(|| Word(self.0 - READER_ONE))
    }

    /// In a state that pins and readers survive.
    fn is_held(self, generation: u64) -> bool {
        self.is(COMMITTED, generation) || self.is(QUARANTINED, generation)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn view(state: SlotState, generation: u64, readers: u32, pinned: bool) -> SlotView {
        SlotView { state, generation, readers, pinned }
    }

    #[test]
    fn fields_do_not_touch_each_other() {
        let states = [SlotState::Free, SlotState::Writing, SlotState::Committed, SlotState::Quarantined];
        for state in states {
            for generation in [0, 1, GENERATION_MAX - 1, GENERATION_MAX] {
                for readers in [0, 1, READERS_MAX] {
                    for pinned in [false, true] {
                        let view = view(state, generation, readers, pinned);
                        let word = Word::of(&view);
                        assert_eq!(Word::from_bits(word.bits()), word);
                        let idle = readers == 0 && !pinned;
                        let (free, writing) = (state == SlotState::Free, state == SlotState::Writing);
                        let committed = state == SlotState::Committed;
                        let odd = free && !idle
                            || writing && readers > 0
                            || (writing || committed) && generation == 0;
                        match odd {
                            true => assert_eq!(word.view().state, SlotState::Quarantined, "{view:?}"),
                            false => assert_eq!(word.view(), view),
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_never_claimable() {
        for bad in
            [view(SlotState::Free, GENERATION_MAX + 1, 0, false), view(SlotState::Free, 1, 65536, false)]
        {
            assert_eq!(Word::of(&bad).view().state, SlotState::Quarantined);
        }
        let free = Word::new(FREE, 0);
        assert!(free.claim(0, false).is_none() && free.claim(GENERATION_MAX + 1, false).is_none());
        assert_eq!(free.claim(GENERATION_MAX, true).map(Word::generation), Some(GENERATION_MAX));
    }

    #[test]
    fn a_pin_from_the_claim_ends_in_the_checkpoint_and_nowhere_else() {
        let writing = Word::new(FREE, 3).claim(7, true).expect("claim");
        assert_eq!(writing.view(), view(SlotState::Writing, 7, 0, true));
        assert_eq!(writing.commit(7).map(Word::view), Some(view(SlotState::Committed, 7, 0, true)));
        assert_eq!(writing.release(7).map(Word::view), Some(view(SlotState::Free, 0, 0, false)));
        assert_eq!(writing.release_last(7).map(Word::view), Some(view(SlotState::Free, 7, 0, false)));
        assert_eq!(writing.quarantine(7).map(Word::view), Some(view(SlotState::Quarantined, 7, 0, false)));
        assert!(writing.unpin(7).is_none() && writing.pin(7).is_none(), "the save's alone");
        assert!(writing.commit(8).is_none() && writing.quarantine(8).is_none(), "another generation");
    }

    #[test]
    fn readers_stop_at_the_limit() {
        let full = Word::of(&view(SlotState::Committed, 7, READERS_MAX, true));
        assert!(full.add_reader(7).is_none());
        let less = full.drop_reader(7).expect("a reader leaves");
        assert_eq!(less.add_reader(7), Some(full));
        assert!(Word::of(&view(SlotState::Committed, 7, 0, true)).drop_reader(7).is_none());
    }

    #[test]
    fn quarantine_keeps_pins_and_readers_and_is_lifted_only_without() {
        let held = Word::of(&view(SlotState::Committed, 7, 1, true)).quarantine(7).expect("quarantine");
        assert_eq!(held.view(), view(SlotState::Quarantined, 7, 1, true));
        assert!(held.lift_quarantine(7).is_none() && held.add_reader(7).is_none() && held.pin(7).is_none());
        let unread = held.drop_reader(7).expect("reader leaves");
        assert!(unread.lift_quarantine(7).is_none());
        let idle = unread.unpin(7).expect("unpin");
        assert!(idle.lift_quarantine(8).is_none(), "another generation");
        assert_eq!(idle.lift_quarantine(7).map(Word::view), Some(view(SlotState::Free, 0, 0, false)));
    }
}
