//! Laws of the slot table under every schedule.
//!
//! A slot's content is a cell whose accesses loom checks, so that a missing ordering fails as surely as a
//! wrong state. Each model also runs over a broken table, which proves that it can fail.
//!
//! loom remembers one access per word, and so may miss that a thread which only looks could have come later. Whoever is to
//! come late is therefore the last to be spawned, which makes it so from the start.

mod ends;
mod keeping;

use super::table::{Claim, SlotTable};
use super::word::{SlotState, SlotView, Word};
use crate::sync::atomic::Ordering;
use crate::sync::model::{explore, UnsafeCell};
use crate::sync::{thread, Arc};

/// The preemptions that each model explores at least.
const PREEMPTIONS: usize = 2;

/// What is under test: the shipped table, or one with a single broken verb.
trait Verbs: Sized + 'static {
    fn wrap(table: SlotTable) -> Self;
    fn table(&self) -> &SlotTable;
    fn claim(&self, generation: u64) -> Option<Claim> {
        self.table().claim(generation, false)
    }
    fn reclaim(&self) {
        let _freed = self.table().reclaim(1, None);
    }
    fn claim_pinned(&self, generation: u64) -> Option<Claim> {
        self.table().claim(generation, true)
    }
    fn commit_pinned(&self, slot: u32, generation: u64) -> bool {
        self.table().commit(slot, generation)
    }
    fn commit(&self, slot: u32, generation: u64) -> bool {
        self.table().commit(slot, generation)
    }
    fn release(&self, slot: u32, generation: u64) -> bool {
        self.table().release(slot, generation)
    }
    fn add_reader(&self, slot: u32, generation: u64) -> bool {
        self.table().add_reader(slot, generation)
    }
    fn drop_reader(&self, slot: u32, generation: u64) {
        self.table().drop_reader(slot, generation);
    }
    fn reclaim_held(&self, floor: u64) {
        let _freed = self.table().reclaim(1, Some(floor));
    }
    fn withhold(&self, slot: u32, generation: u64) -> Option<bool> {
        self.table().withhold(slot, generation)
    }
    fn revive(&self, slot: u32, generation: u64) -> bool {
        self.table().revive(slot, generation)
    }
    fn lift_quarantine(&self, slot: u32, generation: u64) -> bool {
        self.table().lift_quarantine(slot, generation)
    }
}

/// A table of which verbs are broken: its name, and what they do instead.
macro_rules! broken {
    ($(#[$doc:meta])* $name:ident { $($verbs:tt)* }) => {
        $(#[$doc])*
        struct $name(SlotTable);

        impl Verbs for $name {
            fn wrap(table: SlotTable) -> Self {
                $name(table)
            }
            fn table(&self) -> &SlotTable {
                &self.0
            }
            $($verbs)*
        }
    };
}
use broken;

/// A transition with an ordering of its own; false where the state does not allow it.
fn change_by(
    table: &SlotTable,
    slot: u32,
    ordering: Ordering,
    transition: impl Fn(Word) -> Option<Word>,
) -> bool {
    let word = &table.words[slot as usize];
    let mut seen = Word::from_bits(word.load(Ordering::Relaxed));
    while let Some(new) = transition(seen) {
        match word.compare_exchange(seen.bits(), new.bits(), ordering, Ordering::Relaxed) {
            Ok(_) => return true,
            Err(now) => seen = Word::from_bits(now),
        }
    }
    false
}

/// The shipped table.
struct Shipped(SlotTable);

impl Verbs for Shipped {
    fn wrap(table: SlotTable) -> Self {
        Shipped(table)
    }
    fn table(&self) -> &SlotTable {
        &self.0
    }
}

/// The table and what its slots hold.
struct Region<V> {
    verbs: V,
    contents: Vec<UnsafeCell<()>>,
    watched: bool,
}

impl<V: Verbs> Region<V> {
    /// Slots in the given states; a broken table is run unwatched, so that it is the law that fails.
    fn new(slots: &[(SlotState, u64)], watched: bool) -> Arc<Self> {
        let view = |&(state, generation)| SlotView { state, generation, readers: 0, pinned: false };
        let verbs = V::wrap(SlotTable::new(&slots.iter().map(view).collect::<Vec<_>>()));
        let contents = slots.iter().map(|_| UnsafeCell::new(())).collect();
        Arc::new(Region { verbs, contents, watched })
    }

    fn table(&self) -> &SlotTable {
        self.verbs.table()
    }

    /// Panics if another access is not ordered before or after this one.
    fn write(&self, slot: u32) {
        if self.watched {
            self.contents[slot as usize].with_mut(|_| ());
        }
    }

    /// Panics if a write is not ordered before or after this one.
    fn read(&self, slot: u32) {
        if self.watched {
            self.contents[slot as usize].with(|_| ());
        }
    }
}

fn spawn<V: Verbs>(
    region: &Arc<Region<V>>,
    work: impl FnOnce(&Region<V>) + 'static,
) -> thread::JoinHandle<()> {
    let region = Arc::clone(region);
    thread::spawn(move || work(&region))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    for thread in threads {
        thread.join().expect("thread of the model");
    }
}

/// Law: two claims never get one slot, and none is lost.
fn claims_are_exclusive<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS + 1, move || {
        let region = Region::<V>::new(&[(SlotState::Free, 0), (SlotState::Free, 5)], watched);
        let saver = |generation| {
            move |region: &Region<V>| {
                if let Some(claim) = region.verbs.claim(generation) {
                    region.write(claim.slot);
                    let mine = region.table().release(claim.slot, generation);
                    assert!(mine, "law: two claims never get one slot");
                }
            }
        };
        let others = [spawn(&region, saver(11)), spawn(&region, saver(12))];
        saver(13)(&region);
        join(others);
        let free = region.table().views().iter().filter(|view| view.state == SlotState::Free).count();
        assert_eq!(free, 2, "law: no slot is lost");
    });
}

#[test]
fn two_claims_never_get_one_slot() {
    claims_are_exclusive::<Shipped>(true);
}

/// Law: a reclaimed checkpoint is taken back by a reader, withheld for a discard, or claimed by a save, and never two of
/// these at once.
fn reclaimed_has_one_taker<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let region = Region::<V>::new(&[(SlotState::Free, 5), (SlotState::Committed, 9)], watched);
        let saver = spawn(&region, |region| {
            if let Some(claim) = region.verbs.claim(11) {
                assert_eq!(claim.slot, 0, "law: a committed slot is not claimed");
                region.write(claim.slot);
                assert!(region.table().release(claim.slot, 11), "law: a claimed slot is the save's alone");
            }
        });
        let discarder = spawn(&region, |region| {
            if region.table().withhold(0, 5).is_some() {
                region.write(0);
                assert!(region.table().lift_quarantine(0, 5), "law: a withheld slot is the discard's alone");
            }
        });
        if region.verbs.revive(0, 5) && region.table().add_reader(0, 5) {
            region.read(0);
            region.table().drop_reader(0, 5);
        }
        join([saver, discarder]);
        let state = region.table().view(0).state;
        assert!(matches!(state, SlotState::Free | SlotState::Committed), "law: no slot is lost: {state:?}");
    });
}

#[test]
fn a_reclaimed_slot_has_one_taker() {
    reclaimed_has_one_taker::<Shipped>(true);
}

broken! {
    /// Takes a reclaimed checkpoint back by load and store.
    TornRevive {
        fn revive(&self, slot: u32, generation: u64) -> bool {
            let revived = Word::of(&self.0.view(slot)).revive(generation);
            revived.map(|word| self.0.words[slot as usize].store(word.bits(), Ordering::Release)).is_some()
        }
    }
}

#[test]
#[should_panic(expected = "law: ")]
fn a_revival_by_load_and_store_is_caught() {
    reclaimed_has_one_taker::<TornRevive>(false);
}

/// Claims by load and store.
struct TornClaim(SlotTable);

impl Verbs for TornClaim {
    fn wrap(table: SlotTable) -> Self {
        TornClaim(table)
    }
    fn table(&self) -> &SlotTable {
        &self.0
    }
    fn claim(&self, generation: u64) -> Option<Claim> {
        let views = self.0.views();
        let slot = views.iter().position(|view| view.state == SlotState::Free)?;
        let claimed = Word::of(&views[slot]).claim(generation, false)?;
        self.0.words[slot].store(claimed.bits(), Ordering::Release);
        Some(Claim { slot: slot as u32, previous_generation: views[slot].generation })
    }
}

#[test]
#[should_panic(expected = "law: two claims never get one slot")]
fn a_claim_by_load_and_store_is_caught() {
    claims_are_exclusive::<TornClaim>(false);
}

/// Law: the newest checkpoint is never freed or reused, whoever commits, in whatever order.
fn newest_stays<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let slots = [(SlotState::Committed, 1), (SlotState::Free, 0), (SlotState::Free, 0)];
        let region = Region::<V>::new(&slots, watched);
        let save = |generation| {
            move |region: &Region<V>| {
                let Some(claim) = region.verbs.claim(generation) else { return };
                let newest = region.table().newest().map(|(_, newest)| newest);
                assert!(newest > Some(claim.previous_generation), "law: the newest is never reused");
                region.write(claim.slot);
                assert!(
                    region.table().commit(claim.slot, generation),
                    "law: a slot being written stays its save's"
                );
                region.verbs.reclaim();
                let newest = region.table().newest().map(|(_, newest)| newest);
                assert!(
                    newest >= Some(generation),
                    "law: the newest is never freed ({newest:?} < {generation})"
                );
            }
        };
        let others = [
            spawn(&region, move |region| {
                save(2)(region);
                save(4)(region);
            }),
            spawn(&region, save(3)),
        ];
        let (slot, first) = region.table().newest().expect("law: a newest checkpoint always exists");
        if region.table().add_reader(slot, first) {
            region.read(slot);
            region.table().drop_reader(slot, first);
        }
        let (_, second) = region.table().newest().expect("law: a newest checkpoint always exists");
        assert!(second >= first, "law: the newest never goes back ({second} < {first})");
        join(others);
    });
}

#[test]
fn the_newest_is_never_freed_or_reused() {
    newest_stays::<Shipped>(true);
}

/// Frees whatever is not the newest that it saw before, so also what was committed meanwhile.
struct HastyReclaim(SlotTable);

impl Verbs for HastyReclaim {
    fn wrap(table: SlotTable) -> Self {
        HastyReclaim(table)
    }
    fn table(&self) -> &SlotTable {
        &self.0
    }
    fn reclaim(&self) {
        let newest = self.0.newest().map(|(_, generation)| generation);
        for (word, view) in self.0.words.iter().zip(self.0.views()) {
            let seen = Word::of(&view);
            let other = view.state == SlotState::Committed && Some(view.generation) != newest;
            if let Some(freed) = seen.reclaim(view.generation).filter(|_| other) {
                let _raced =
                    word.compare_exchange(seen.bits(), freed.bits(), Ordering::AcqRel, Ordering::Acquire);
            }
        }
    }
}

#[test]
#[should_panic(expected = "law: ")]
fn a_reclaim_of_what_was_committed_meanwhile_is_caught() {
    newest_stays::<HastyReclaim>(false);
}

/// Law: while a slot is pinned or read it keeps its checkpoint; afterwards it can be claimed again.
fn held_slots_stay<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS + 1, move || {
        let region = Region::<V>::new(&[(SlotState::Committed, 1), (SlotState::Committed, 2)], watched);
        let holds_1 = |region: &Region<V>| {
            let view = region.table().view(0);
            view.state == SlotState::Committed && view.generation == 1
        };
        let reader = spawn(&region, move |region| {
            if region.table().add_reader(0, 1) {
                region.read(0);
                assert!(holds_1(region), "law: a read slot is never reused");
                region.table().drop_reader(0, 1);
            }
        });
        let pinner = spawn(&region, move |region| {
            if region.table().pin(0, 1) {
                region.read(0);
                assert!(holds_1(region), "law: a pinned slot is never reused");
                assert!(region.table().unpin(0, 1), "law: a pin stays until it is taken away");
            }
        });
        let save = |generation| {
            region.verbs.reclaim();
            let claim = region.verbs.claim(generation)?;
            region.write(claim.slot);
            assert!(
                region.table().release(claim.slot, generation),
                "law: a slot being written stays its save's"
            );
            Some(claim.slot)
        };
        let _held = save(3);
        join([reader, pinner]);
        assert_eq!(save(4), Some(0), "law: a slot that nobody holds can be claimed");
    });
}

#[test]
fn a_pinned_or_read_slot_is_never_reused() {
    held_slots_stay::<Shipped>(true);
}

/// Looks whether a slot is held, then frees it by a store.
struct TornReclaim(SlotTable);

impl Verbs for TornReclaim {
    fn wrap(table: SlotTable) -> Self {
        TornReclaim(table)
    }
    fn table(&self) -> &SlotTable {
        &self.0
    }
    fn reclaim(&self) {
        let view = self.0.view(0);
        if let Some(freed) = Word::of(&view).reclaim(1) {
            self.0.words[0].store(freed.bits(), Ordering::Release);
        }
    }
}

#[test]
#[should_panic(expected = "law: a ")]
fn a_reclaim_by_load_and_store_is_caught() {
    held_slots_stay::<TornReclaim>(false);
}

/// Law: a checkpoint whose save was to be pinned is pinned when it is first seen committed, and stays until it is
/// unpinned, however many newer ones are committed and reclaim meanwhile.
fn pinned_saves_stay<V: Verbs>(watched: bool) {
    explore(PREEMPTIONS, move || {
        let slots = [(SlotState::Committed, 1), (SlotState::Free, 0), (SlotState::Free, 0)];
        let region = Region::<V>::new(&slots, watched);
        let keeper = region.verbs.claim_pinned(2).expect("a slot is free").slot;
        let saver = spawn(&region, move |region| {
            for generation in [3, 4] {
                region.verbs.reclaim();
                let Some(claim) = region.verbs.claim(generation) else { continue };
                assert_ne!(claim.slot, keeper, "law: a pinned save's slot is never reused");
                region.write(claim.slot);
                assert!(
                    region.table().commit(claim.slot, generation),
                    "law: a slot being written stays its save's"
                );
                region.verbs.reclaim();
            }
        });
        region.write(keeper);
        assert!(region.verbs.commit_pinned(keeper, 2), "law: a slot being written stays its save's");
        let view = region.table().view(keeper);
        let held = (view.state, view.generation, view.pinned) == (SlotState::Committed, 2, true);
        assert!(held, "law: a pinned save's checkpoint stays: {view:?}");
        region.read(keeper);
        join([saver]);
        assert!(region.table().unpin(keeper, 2), "law: a pin stays until it is taken away");
    });
}

#[test]
fn a_pinned_save_is_never_reclaimed() {
    pinned_saves_stay::<Shipped>(true);
}

/// Pins only after the commit.
struct LatePin(SlotTable);

impl Verbs for LatePin {
    fn wrap(table: SlotTable) -> Self {
        LatePin(table)
    }
    fn table(&self) -> &SlotTable {
        &self.0
    }
    fn claim_pinned(&self, generation: u64) -> Option<Claim> {
        self.0.claim(generation, false)
    }
    fn commit_pinned(&self, slot: u32, generation: u64) -> bool {
        let committed = self.0.commit(slot, generation);
        let _too_late = self.0.pin(slot, generation);
        committed
    }
}

#[test]
#[should_panic(expected = "law: a pinned save")]
fn a_pin_after_the_commit_is_caught() {
    pinned_saves_stay::<LatePin>(false);
}
