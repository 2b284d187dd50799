//! What a save can be begun with: to be confirmed before it commits, to be pinned when it does. A regression here makes a
//! trainer keep a torn state, or lose the checkpoint that it meant to keep.

use std::time::{Duration, Instant};

use super::bed::*;

/// Begins a save of `state` with options that `set` fills in.
fn begin_with(
    store: *const pcc_store,
    step: u64,
    state: &mut State,
    set: impl Fn(&mut pcc_save_options),
) -> (pcc_status, *mut pcc_save) {
    let tensors = state.tensors();
    let mut options = sized!(pcc_save_options);
    ok(c!(pcc_save_options_init(&mut options, options.struct_bytes)));
    set(&mut options);
    let mut save = std::ptr::dangling_mut();
    let count = tensors.len() as u64;
    let status = c!(pcc_save_begin(store, step, tensors.as_ptr(), count, null(), 0, &options, &mut save));
    (status, save)
}

fn begin_unconfirmed(store: *const pcc_store, step: u64, state: &mut State) -> *mut pcc_save {
    let (status, save) = begin_with(store, step, state, |options| options.confirm = 1);
    ok(status);
    save
}

fn begin_pinned(store: *const pcc_store, step: u64, state: &mut State) -> (pcc_status, *mut pcc_save) {
    begin_with(store, step, state, |options| options.pin = 1)
}

fn durable(save: *mut pcc_save) -> pcc_durable {
    let mut durable = sized!(pcc_durable);
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, &mut durable)));
    c!(pcc_save_free(save));
    durable
}

/// Generations and pins, newest first.
fn list(store: *const pcc_store) -> Vec<(u64, u32)> {
    let mut infos = [sized!(pcc_checkpoint_info); 16];
    let mut count = 0;
    let bytes = size_of::<pcc_checkpoint_info>() as u64;
    ok(c!(pcc_list(store, infos.as_mut_ptr(), bytes, infos.len() as u64, &mut count)));
    infos[..count as usize].iter().map(|info| (info.generation, info.pinned)).collect()
}

fn stats(store: *const pcc_store) -> pcc_stats_info {
    let mut stats = sized!(pcc_stats_info);
    ok(c!(pcc_stats(store, &mut stats)));
    stats
}

/// Until nothing of the save is left to do but its commit.
fn written(save: *const pcc_save) {
    ok(c!(pcc_save_wait_copied(save, WAIT_MS)));
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut progress = sized!(pcc_progress);
    while progress.written_bytes == 0 || progress.written_bytes < progress.total_bytes {
        ok(c!(pcc_save_progress(save, &mut progress)));
        assert!(Instant::now() < deadline, "it is not written");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((progress.copied, progress.ended), (1, 0));
}

#[test]
fn nothing_is_durable_before_it_is_confirmed() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let save = begin_unconfirmed(store, 1, &mut state);
    written(save);
    fails(c!(pcc_save_wait_durable(save, 100, null_mut())), PCC_TIMED_OUT, &[]);
    assert_eq!(list(store), []);
    // A wait of its own for the caller who asks for one, and a refusal for the one who might wait for himself.
    fails(c!(pcc_drain(store, 50)), PCC_TIMED_OUT, &[]);
    fails(c!(pcc_drain(store, -1)), PCC_INVALID_STATE, &["generation 1", "confirm"]);
    ok(c!(pcc_save_confirm(save)));
    ok(c!(pcc_save_confirm(save)));
    assert_eq!(durable(save).superseded_by, 0);
    ok(c!(pcc_drain(store, -1)));
    restores(store, &state);

    // Before it is copied is soon enough, too; and a save that nobody asked to confirm is not concerned.
    let early = begin_unconfirmed(store, 2, &mut state);
    ok(c!(pcc_save_confirm(early)));
    assert_eq!(durable(early).generation, 2);
    let plain = begin(store, 3, &mut state);
    ok(c!(pcc_save_confirm(plain)));
    ok(c!(pcc_save_wait_durable(plain, WAIT_MS, null_mut())));
    ok(c!(pcc_save_confirm(plain)));
    c!(pcc_save_free(plain));
    c!(pcc_close(store));
}

#[test]
fn an_unconfirmed_save_ends_with_its_handle_its_cancel_or_its_store() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let freed = begin_unconfirmed(store, 1, &mut state);
    written(freed);
    c!(pcc_save_free(freed));
    ok(c!(pcc_drain(store, WAIT_MS)));
    let cancelled = begin_unconfirmed(store, 2, &mut state);
    written(cancelled);
    ok(c!(pcc_save_cancel(cancelled)));
    fails(c!(pcc_save_wait_durable(cancelled, WAIT_MS, null_mut())), PCC_CANCELLED, &["caller"]);
    fails(c!(pcc_save_confirm(cancelled)), PCC_CANCELLED, &["caller"]);
    c!(pcc_save_free(cancelled));
    assert_eq!((stats(store).saves_cancelled, stats(store).in_flight), (2, 0));
    assert_eq!(stats(store).claimable_slots, 4, "their slots are free");
    let closed = begin_unconfirmed(store, 3, &mut state);
    written(closed);
    c!(pcc_close(store));
    fails(c!(pcc_save_wait_durable(closed, -1, null_mut())), PCC_CANCELLED, &["closed"]);
    fails(c!(pcc_save_confirm(closed)), PCC_CANCELLED, &["closed"]);
    c!(pcc_save_free(closed));
    let store = open(&region);
    assert_eq!(list(store), []);
    c!(pcc_close(store));
}

#[test]
fn a_raw_save_is_confirmed_after_its_commit_and_pinned_with_it() {
    let region = region(5, 1 << 20);
    let store = open(&region);
    let mut options = sized!(pcc_save_options);
    ok(c!(pcc_save_options_init(&mut options, options.struct_bytes)));
    (options.confirm, options.pin) = (1, 1);
    let mut raw = null_mut();
    ok(c!(pcc_raw_begin(store, 1, 100, null(), 0, &options, &mut raw)));
    ok(c!(pcc_raw_write(raw, 0, [7u8; 100].as_ptr().cast(), 100)));
    let mut save = null_mut();
    ok(c!(pcc_raw_commit(raw, &mut save)));
    c!(pcc_raw_free(raw));
    fails(c!(pcc_save_wait_durable(save, 100, null_mut())), PCC_TIMED_OUT, &[]);
    ok(c!(pcc_save_confirm(save)));
    assert_eq!(durable(save).generation, 1);
    for step in 2..6 {
        save_durably(store, step, &mut State::new(1));
    }
    assert_eq!(list(store), [(5, 0), (1, 1)]);
    c!(pcc_close(store));
}

#[test]
fn a_pinned_save_stays_until_it_is_unpinned_and_needs_room() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let (status, save) = begin_pinned(store, 1, &mut state);
    ok(status);
    // Room for one pin, which is taken although nothing is durable yet.
    let (status, refused) = begin_pinned(store, 2, &mut state);
    fails(status, PCC_NO_SLOT, &["max_in_flight = 2"]);
    assert!(refused.is_null());
    assert_eq!(durable(save).generation, 1);
    for step in 3..6 {
        save_durably(store, step, &mut state);
    }
    assert_eq!(list(store), [(4, 0), (1, 1)]);
    c!(pcc_close(store));
    let store = open(&region);
    assert_eq!(list(store), [(4, 0), (1, 1)], "pins are durable");
    let (status, refused) = begin_pinned(store, 6, &mut state);
    fails(status, PCC_NO_SLOT, &["max_in_flight = 2"]);
    assert!(refused.is_null());
    ok(c!(pcc_unpin(store, 1)));
    assert_eq!(list(store), [(4, 0)]);
    let (status, save) = begin_pinned(store, 6, &mut state);
    ok(status);
    let generation = durable(save).generation;
    assert_eq!(list(store)[0], (generation, 1));
    ok(c!(pcc_pin(store, generation)));
    c!(pcc_close(store));
}

#[test]
fn options_of_an_older_program_and_bad_ones() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    // As the struct was before `confirm` and `pin`: what lies behind it is not read.
    let (status, save) = begin_with(store, 1, &mut state, |options| {
        (options.struct_bytes, options.confirm, options.pin) = (24, 1, 1);
    });
    ok(status);
    durable(save);
    assert_eq!(list(store), [(1, 0)]);
    for (set, field) in [
        ((|options| options.confirm = 2) as fn(&mut pcc_save_options), "confirm"),
        (|options| options.pin = 7, "pin"),
    ] {
        let (status, save) = begin_with(store, 2, &mut state, set);
        fails(status, PCC_INVALID_ARGUMENT, &[field]);
        assert!(save.is_null());
    }
    c!(pcc_close(store));
}
