//! Waits, ends and their callbacks, threads, pins, tuning and forks.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::bed::*;

#[test]
fn waits_keep_their_time() {
    let region = region(3, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 1;
    let store = open_with(&region, &options);
    let raw = occupy(store);
    let mut wait = sized!(pcc_save_options);
    let begun = Instant::now();
    let status = c!(pcc_raw_begin(store, 2, 1, null(), 0, &wait, &mut null_mut()));
    fails(status, PCC_NO_SLOT, &["max_in_flight 1"]);
    fails(c!(pcc_drain(store, 0)), PCC_TIMED_OUT, &[]);
    assert!(begun.elapsed() < Duration::from_secs(5), "0 only looks");
    wait.wait_ms = 80;
    let begun = Instant::now();
    fails(c!(pcc_raw_begin(store, 2, 1, null(), 0, &wait, &mut null_mut())), PCC_NO_SLOT, &[]);
    fails(c!(pcc_drain(store, 80)), PCC_TIMED_OUT, &[]);
    assert!(begun.elapsed() >= Duration::from_millis(160));
    // For ever ends when the save does.
    let shared = raw as usize;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            ok(c!(pcc_raw_cancel(shared as *const pcc_raw)));
        });
        ok(c!(pcc_drain(store, -1)));
    });
    fails(c!(pcc_raw_write(raw, 0, [0u8; 1].as_ptr().cast(), 1)), PCC_CANCELLED, &[]);
    c!(pcc_raw_free(raw));
    let mut state = State::new(1);
    let save = begin(store, 3, &mut state);
    ok(c!(pcc_save_wait_copied(save, -1)));
    ok(c!(pcc_save_wait_durable(save, -1, null_mut())));
    ok(c!(pcc_save_wait_durable(save, 0, null_mut())));
    assert_eq!(c!(pcc_save_error(save, null_mut(), 0)), 0);
    c!(pcc_save_free(save));
    c!(pcc_close(store));
}

#[test]
fn closing_ends_what_is_in_flight_and_saves_outlive_their_store() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let raw = occupy(store);
    ok(c!(pcc_raw_write(raw, 0, [7u8; 100].as_ptr().cast(), 100)));
    let mut save = null_mut();
    ok(c!(pcc_raw_commit(raw, &mut save)));
    let other = occupy(store);
    let tensors = begin(store, 5, &mut state);
    c!(pcc_close(store));
    for save in [save, tensors] {
        let status = c!(pcc_save_wait_durable(save, WAIT_MS, null_mut()));
        assert!([PCC_OK, PCC_CANCELLED].contains(&status), "{}", last_error());
        let text = text_of(|buf, cap| c!(pcc_save_error(save, buf, cap)));
        assert_eq!(text.is_empty(), status == PCC_OK, "{text:?}");
        let mut progress = sized!(pcc_progress);
        ok(c!(pcc_save_progress(save, &mut progress)));
        assert_eq!(progress.ended, 1);
        c!(pcc_save_free(save));
    }
    fails(c!(pcc_raw_write(other, 0, [7u8; 100].as_ptr().cast(), 100)), PCC_CANCELLED, &["closed"]);
    c!(pcc_raw_free(other));
    c!(pcc_raw_free(raw));
    let store = open(&region);
    c!(pcc_close(store));
}

static CALLS: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" fn count_call(user: *mut c_void) {
    assert_eq!(user as usize, 42);
    CALLS.fetch_add(1, Ordering::SeqCst);
}

/// `user` points to the save, which the callback frees.
unsafe extern "C" fn free_from_callback(user: *mut c_void) {
    let save: *mut pcc_save = user.cast();
    assert_eq!(c!(pcc_save_wait_durable(save, 0, null_mut())), PCC_OK);
    c!(pcc_save_free(save));
    CALLS.fetch_add(100, Ordering::SeqCst);
}

#[test]
fn the_end_is_told_once_by_callback_and_by_descriptor() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(1);
    let readable = |fd: i32, timeout_ms: i32| {
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one element.
        let count = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
        count == 1 && poll.revents & libc::POLLIN != 0
    };
    let raw = occupy(store);
    ok(c!(pcc_raw_write(raw, 0, [7u8; 100].as_ptr().cast(), 100)));
    let mut save = null_mut();
    ok(c!(pcc_raw_commit(raw, &mut save)));
    c!(pcc_raw_free(raw));
    ok(c!(pcc_save_on_end(save, Some(count_call), 42 as *mut c_void)));
    let (mut fd, mut again) = (-1, -1);
    ok(c!(pcc_save_event_fd(save, &mut fd)));
    ok(c!(pcc_save_event_fd(save, &mut again)));
    // SAFETY: touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    assert!(flags >= 0 && flags & libc::FD_CLOEXEC != 0, "programs that the process starts inherit it");
    assert!(fd >= 0 && fd == again);
    assert!(readable(fd, WAIT_MS as i32), "the end makes the descriptor readable");
    ok(c!(pcc_save_wait_durable(save, 0, null_mut())));
    let deadline = Instant::now() + Duration::from_secs(60);
    while CALLS.load(Ordering::SeqCst) == 0 && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert_eq!(CALLS.load(Ordering::SeqCst), 1);
    // After the end: at once, on this thread, and once more only because it is another callback.
    ok(c!(pcc_save_on_end(save, Some(count_call), 42 as *mut c_void)));
    assert_eq!(CALLS.load(Ordering::SeqCst), 2);
    c!(pcc_save_free(save));

    let save = begin(store, 2, &mut state);
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    let mut fd = -1;
    ok(c!(pcc_save_event_fd(save, &mut fd)));
    assert!(readable(fd, 0), "a descriptor that is asked for after the end is readable at once");
    ok(c!(pcc_save_on_end(save, Some(free_from_callback), save.cast())));
    assert_eq!(CALLS.load(Ordering::SeqCst), 102);

    // A callback that was taken back by freeing is not called.
    let raw = occupy(store);
    c!(pcc_raw_free(raw));
    ok(c!(pcc_drain(store, WAIT_MS)));
    c!(pcc_close(store));
    assert_eq!(CALLS.load(Ordering::SeqCst), 102);
}

#[test]
fn one_store_serves_many_threads() {
    let region = region(8, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 4;
    let store = open_with(&region, &options);
    let shared = store as usize;
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            scope.spawn(move || {
                let store = shared as *const pcc_store;
                for round in 0..8 {
                    save_durably(store, u64::from(thread * 100 + round), &mut State::new(thread));
                    let mut stats = sized!(pcc_stats_info);
                    ok(c!(pcc_stats(store, &mut stats)));
                    let mut checkpoint = null_mut();
                    match c!(pcc_checkpoint_open(store, null(), &mut checkpoint)) {
                        PCC_OK => {
                            let mut info = sized!(pcc_checkpoint_info);
                            ok(c!(pcc_checkpoint_get_info(checkpoint, &mut info)));
                            let expected = State::new((info.step / 100) as u32);
                            let mut first = vec![0f32; expected.data[4].len()];
                            let read = pcc_read {
                                name: c"läyer.4".as_ptr(),
                                bytes: first.len() as u64 * 4,
                                dst: first.as_mut_ptr().cast(),
                                ..sized!(pcc_read)
                            };
                            ok(c!(pcc_checkpoint_read(checkpoint, &read, 1)));
                            assert!(first == expected.data[4]);
                        }
                        // It was reclaimed between the list and the opening, or readers hold too much.
                        status => assert!([PCC_RECLAIMED, PCC_NO_SLOT].contains(&status), "{}", last_error()),
                    }
                    c!(pcc_checkpoint_close(checkpoint));
                }
            });
        }
    });
    let mut stats = sized!(pcc_stats_info);
    ok(c!(pcc_stats(store, &mut stats)));
    assert_eq!((stats.saves_durable, stats.saves_failed), (32, 0));
    c!(pcc_close(store));
}

#[test]
fn pins_marks_and_discards_reach_the_store() {
    let region = region(6, 1 << 20);
    let mut options = open_options();
    options.max_in_flight = 1;
    options.hold = 1;
    options.run_id = 7;
    let store = open_with(&region, &options);
    for step in 1..=3 {
        save_durably(store, step, &mut State::new(step as u32));
    }
    let count = || {
        let mut count = 0;
        ok(c!(pcc_list(store, null_mut(), 0, 0, &mut count)));
        count
    };
    assert_eq!(count(), 3);
    ok(c!(pcc_pin(store, 1)));
    let (mut generation, mut discarded) = (0, 9);
    ok(c!(pcc_mark_global(store, 7, 2, &mut generation)));
    assert_eq!((generation, count()), (2, 3), "1 is pinned, 2 is marked, 3 is newer");
    ok(c!(pcc_unpin(store, 1)));
    assert_eq!(count(), 2);
    fails(c!(pcc_abandon(store, 7, 2, 0, &mut discarded)), PCC_INVALID_STATE, &["marked"]);
    assert_eq!(discarded, 0);
    ok(c!(pcc_discard_newer(store, 2, &mut discarded)));
    assert_eq!((discarded, count()), (1, 1));
    fails(c!(pcc_mark_global(store, 8, 2, null_mut())), PCC_NOT_FOUND, &["run 8"]);
    let mut repaired = 9;
    ok(c!(pcc_repair(store, 1000, &mut repaired)));
    assert_eq!(repaired, 0);
    c!(pcc_close(store));
    let mut left_out = 9;
    ok(c!(pcc_grow(region.path.as_ptr(), 8, 4 << 20, 0, &mut left_out)));
    assert_eq!(left_out, 0);
    let store = open(&region);
    restores(store, &State::new(2));
    c!(pcc_close(store));
}

#[test]
fn tuning_uses_what_the_store_measured_or_what_it_is_told() {
    let mut options = sized!(pcc_tune_options);
    ok(c!(pcc_tune_options_init(&mut options, options.struct_bytes)));
    options.state_bytes = 1_000_000_000;
    options.iteration_ns = 100_000_000;
    let mut tuning = sized!(pcc_tuning);
    fails(c!(pcc_tune(null(), &options, &mut tuning)), PCC_BAD_POINTER, &["durable_bytes_per_s"]);
    options.durable_bytes_per_s = 1_000_000_000;
    options.stall_ns = 0;
    options.max_in_flight = 2;
    ok(c!(pcc_tune(null(), &options, &mut tuning)));
    assert_eq!((tuning.interval_iterations, tuning.durable_ns), (10, 2_000_000_000));
    let region = region(4, 1 << 20);
    let store = open(&region);
    options.durable_bytes_per_s = 0;
    fails(c!(pcc_tune(store, &options, &mut tuning)), PCC_INVALID_STATE, &["no save"]);
    save_durably(store, 1, &mut State::new(1));
    options.stall_ns = u64::MAX;
    options.max_in_flight = 0;
    ok(c!(pcc_tune(store, &options, &mut tuning)));
    assert!(tuning.interval_iterations >= 1 && tuning.worst_lost_ns > tuning.expected_lost_ns);
    c!(pcc_close(store));
}

#[test]
fn a_forked_child_is_refused_can_free_everything_and_leaves_the_parent_alone() {
    let region = region(4, 1 << 20);
    let store = open(&region);
    let mut state = State::new(4);
    save_durably(store, 1, &mut state);
    let mut checkpoint = null_mut();
    ok(c!(pcc_checkpoint_open(store, null(), &mut checkpoint)));
    let raw = occupy(store);
    let save = begin(store, 2, &mut state);
    // SAFETY: the child calls only the library, whose calls the header allows there, and `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = [
            c!(pcc_drain(store, -1)),
            c!(pcc_pin(store, 1)),
            c!(pcc_save_wait_durable(save, -1, null_mut())),
            c!(pcc_save_confirm(save)),
            c!(pcc_save_cancel(save)),
            c!(pcc_raw_write(raw, 0, [0u8; 1].as_ptr().cast(), 1)),
            c!(pcc_checkpoint_verify(checkpoint)),
        ];
        let all = refused.iter().all(|&status| status == PCC_FORKED) && pcc_last_error_status() == PCC_FORKED;
        c!(pcc_checkpoint_close(checkpoint));
        c!(pcc_save_free(save));
        c!(pcc_raw_free(raw));
        c!(pcc_close(store));
        // SAFETY: ends the child without running the parent's exit handlers.
        unsafe { libc::_exit(if all { 0 } else { 1 }) };
    }
    assert!(child > 0);
    let mut status = 0;
    // SAFETY: waits for the child just made.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child was not refused everywhere, or died");
    ok(c!(pcc_save_wait_durable(save, WAIT_MS, null_mut())));
    ok(c!(pcc_checkpoint_verify(checkpoint)));
    c!(pcc_checkpoint_close(checkpoint));
    c!(pcc_save_free(save));
    c!(pcc_raw_free(raw));
    restores(store, &state);
    c!(pcc_close(store));
}
