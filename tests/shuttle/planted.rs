//! Prevents: schedules that find nothing. Each fault in the protocol is planted and must be found.

use crate::ends::cancelled_saves;
use crate::saves::saves_beside_a_reader;
use crate::schedules::must_fail;
use crate::world::Setup;

/// Schedules of either kind in which a fault must show.
const EACH: u64 = 1000;

fn with(setup: Setup, plant: impl FnOnce(&mut pccheck::save::Faults)) -> Setup {
    let mut setup = setup;
    plant(&mut setup.faults);
    setup
}

/// The saves of one batch: none of them may commit by the flush of another that it came too late for.
#[test]
fn a_commit_by_a_flush_that_came_too_early_is_found() {
    let setup = with(Setup { pmem: false, ..Setup::tight(3, 1) }, |faults| faults.join_after_flush = true);
    must_fail("join_after_flush", EACH, &["law: what was reported durable"], saves_beside_a_reader(setup));
}

#[test]
fn a_commit_before_the_payloads_flush_is_found() {
    let setup =
        with(Setup { pmem: false, ..Setup::tight(3, 1) }, |faults| faults.commit_before_payload = true);
    must_fail(
        "commit_before_payload",
        EACH,
        &["law: what was reported durable"],
        saves_beside_a_reader(setup),
    );
}

#[test]
fn a_publication_before_the_commit_is_durable_is_found() {
    let setup = with(Setup::tight(3, 1), |faults| faults.free_before_commit = true);
    must_fail("free_before_commit", EACH, &["law: "], saves_beside_a_reader(setup));
}

/// Who waits for one of N in flight to end looks too early, and never again.
#[test]
fn a_wake_up_that_comes_too_early_is_found() {
    let setup = with(Setup::tight(2, 1), |faults| faults.wake_before_forgetting = true);
    must_fail("wake_before_forgetting", EACH, &["deadlock"], cancelled_saves(setup));
}

/// A late write hits what another save has put into the slot by then.
#[test]
fn a_slot_that_is_given_back_while_it_is_written_is_found() {
    let setup = with(Setup::tight(2, 1), |faults| faults.end_with_writes_under_way = true);
    must_fail("end_with_writes_under_way", EACH, &["law: "], cancelled_saves(setup));
}
