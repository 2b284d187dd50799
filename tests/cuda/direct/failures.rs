//! Calls that fail, and what `Auto` does then.

use super::*;

/// Calls of a save that goes directly, beside those of every save.
const CALLS: &[&str] =
    &["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuMemcpyDtoHAsync_v2", "cuEventRecord"];
/// Behind each group of chunks that goes to a ring.
const ARRIVES: &str = "cuStreamWriteValue32_v2";
const CUFILE_CALLS: &[&str] = &["cuFileHandleRegister", "cuFileBufRegister", "cuFileWrite"];

#[test]
fn a_call_that_fails_costs_its_save_at_most_and_nothing_else() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let calls = CALLS.iter().map(|call| (call, false)).chain(CUFILE_CALLS.iter().map(|call| (call, true)));
    let mut failed = 0;
    for (call, of_cufile) in calls {
        for (nth, how) in [1, 2, 4]
            .into_iter()
            .flat_map(|nth| [DirectStorage::Required, DirectStorage::Auto].map(|how| (nth, how)))
        {
            let what = format!("{call} failing at call {nth}, {how:?}");
            let (home, stream) = (Home::new(), standin.stream(0));
            cufile.set_properties(2, 0);
            let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
            state.fill(|_| stream, 1, 0);
            match of_cufile {
                true => cufile.fail(call, nth, INTERNAL, 0, false),
                false => standin.fail(call, nth, INVALID, false),
            }
            let options = directly(stream, Snapshot::Spare, how);
            let ended = state
                .begin(&store, 1, options)
                .and_then(|save| stream_wait(&save, stream).and_then(|()| save.wait_durable(WAIT)));
            failed += u32::from(ended.is_err());
            match ended {
                Ok(_) => assert!(state.is_saved(&store, 1), "{what}"),
                Err(error) => {
                    let told =
                        matches!(error.kind(), ErrorKind::Device | ErrorKind::Io | ErrorKind::Unsupported);
                    assert!(told, "{what}: {error}");
                    assert!(
                        error.to_string().contains(&if of_cufile { INTERNAL } else { INVALID }.to_string()),
                        "{what}: {error}"
                    );
                }
            }
            standin.reset();
            cufile.reset();
            cufile.set_properties(2, 0);
            assert_idle(&store);
            state.fill(|_| stream, 2, 0);
            let save = state.begin(&store, 2, options).unwrap_or_else(|e| panic!("{what}: {e}"));
            save.wait_durable(WAIT).unwrap_or_else(|e| panic!("after {what}: {e}"));
            assert!(state.is_saved(&store, 2), "after {what}");
            drop(save);
            assert_idle(&store);
            drop((store, state));
            standin.destroy(stream);
            standin.assert_clean(&what);
            cufile.assert_clean(&what);
        }
    }
    assert!(failed > 15, "only {failed} saves failed: are these the calls that are made?");
}

#[test]
fn a_disk_that_refuses_a_write_fails_the_save_with_its_words() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    for (errno, kind) in [(libc::EIO, ErrorKind::Io), (libc::ENOSPC, ErrorKind::NoSpace)] {
        let (home, stream) = (Home::new(), standin.stream(0));
        let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
        state.fill(|_| stream, 1, 0);
        state.begin(&store, 1, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
        state.fill(|_| stream, 2, 0);
        cufile.fail_write(1, errno, false);
        let save = state.begin(&store, 2, required(stream)).expect("begin");
        let error = save.wait_durable(WAIT).expect_err("the disk refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("region.pcc"), "{error}");
        let newest = store.open_checkpoint(Select::Newest, true).expect("the one before is there");
        assert_eq!(newest.checkpoint.record().step, 1);
    }
}

/// What `Auto` was once refused is not tried again: some of those calls may wait for a device, outside of the gate.
#[test]
fn what_was_refused_once_is_not_tried_again_by_auto() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    standin.fail("cuModuleLoadData", 1, 209, true);
    for step in 1..=4 {
        let options = directly(stream, Snapshot::Spare, DirectStorage::Auto);
        state.begin(&store, step, options).expect("begin").wait_durable(WAIT).expect("durable");
    }
    assert_eq!(store.stats().direct_bytes, 0);
    assert_eq!(standin.calls("cuModuleLoadData"), 1);
}

/// What only shows when it is used: `Auto` may lose a save to it, and does without from then on.
fn auto_does_without_what_never_works(fail: impl Fn(&Standin, &Cufile<'_>)) {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    fail(&standin, &cufile);
    let mut ended = Vec::new();
    for step in 1..=4 {
        state.fill(|_| stream, step, 0);
        let save =
            state.begin(&store, step, directly(stream, Snapshot::Spare, DirectStorage::Auto)).expect("begin");
        ended.push(save.wait_durable(WAIT).map(|_| ()).map_err(|error| error.to_string()));
    }
    standin.reset();
    cufile.reset();
    assert!(ended[1..].iter().all(Result::is_ok), "{ended:#?}");
}

#[test]
fn auto_does_without_cufile_that_refuses_every_write() {
    // CU_FILE_IO_NOT_SUPPORTED.
    auto_does_without_what_never_works(|_, cufile| cufile.fail("cuFileWrite", 1, 5008, 0, true));
}

#[test]
fn auto_does_without_a_kernel_that_is_never_launched() {
    auto_does_without_what_never_works(|standin, _| standin.fail("cuLaunchKernel", 1, INVALID, true));
}

/// Calls of cuFile may wait for a device, whose copies may wait for the copiers that make them: so there is either the one or the other.
#[test]
fn copies_that_wait_for_buffers_and_cufile_do_not_meet() {
    const WAITS: &str = "cuStreamWaitValue32_v2";
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream, other) = (Home::new(), standin.stream(0), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.hold_stream(other, true);
    let first = state.begin(&store, 1, crate::rings::queued(other, PROMPT)).expect("begin");
    stream_wait(&first, stream).expect("wait");
    assert!(standin.calls(WAITS) > 0, "all copies are enqueued");
    let second = state.begin(&store, 2, required(stream)).expect("begin");
    std::thread::sleep(std::time::Duration::from_millis(50));
    let called = ["cuFileHandleRegister", "cuFileBufRegister", "cuFileWrite"].map(|call| cufile.calls(call));
    standin.hold_stream(other, false);
    assert_eq!(called, [0; 3]);
    first.wait_durable(WAIT).expect("the first is durable");
    second.wait_durable(WAIT).expect("the second, too");
    assert!(store.stats().direct_bytes > 0);
    let waits = standin.calls(WAITS);
    let third = state.begin(&store, 3, crate::rings::queued(stream, PROMPT)).expect("begin");
    stream_wait(&third, stream).expect("wait");
    third.wait_durable(WAIT).expect("the third, too");
    assert_eq!(standin.calls(WAITS), waits);
    assert_idle(&store);
}

/// Three saves at a time, with room for the chunks of all.
fn roomy(home: &Home) -> Store {
    format_region(&home.other(), &FormatOptions::new(4, 1 << 21)).expect("format");
    let options = OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        max_in_flight: 3,
        chunk_bytes: CHUNK,
        staging_bytes: 24 * CHUNK,
        ..OpenOptions::default()
    };
    Store::open(&home.other(), &options).expect("open")
}

/// Who wants cuFile waits for a ring of another GPU, and is not overtaken by the next.
#[test]
fn a_save_that_wants_cufile_waits_for_one_ring_and_no_other() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream, other) = (Home::new(), standin.stream(0), standin.stream(1));
    let (store, mut state) = (roomy(&home), State::new(&standin, SHAPE));
    let mut small = State::new(&standin, &[(40_000, Some(1))]);
    let mut large = State::new(&standin, &[(250_000, Some(1))]);
    state.fill(|_| stream, 2, 0);
    small.fill(|_| other, 1, 0);
    large.fill(|_| other, 3, 0);
    standin.synchronize(0, stream);
    standin.synchronize(1, other);
    standin.hold_stream(other, true);
    let first = small.begin(&store, 1, crate::rings::queued(other, PROMPT)).expect("begin");
    stream_wait(&first, other).expect("a ring is enqueued");
    let second = state.begin(&store, 2, required(stream)).expect("begin");
    let copies = || standin.calls("cuMemcpyDtoHAsync_v2") + standin.calls("cuMemcpyBatchAsync");
    let (rings, before) = (standin.calls(ARRIVES), copies());
    let third = large.begin(&store, 3, crate::rings::queued(other, PROMPT)).expect("begin");
    until("the third is enqueued", || copies() > before);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let (called, more) = (cufile.calls("cuFileHandleRegister"), standin.calls(ARRIVES) - rings);
    standin.hold_stream(other, false);
    assert_eq!((called, more), (0, 0));
    for save in [first, second, third] {
        save.wait_durable(WAIT).expect("durable");
    }
    assert!(store.stats().direct_bytes > 0);
    assert!(large.is_saved(&store, 3));
    assert_idle(&store);
}

/// Copies to the ring of a save that has failed wait for no copiers any more.
#[test]
fn a_ring_that_has_failed_holds_up_no_cufile() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream, other) = (Home::new(), standin.stream(0), standin.stream(1));
    let (store, mut state) = (roomy(&home), State::new(&standin, SHAPE));
    let lost = State::new(&standin, &[(40_000, Some(1))]);
    state.fill(|_| stream, 2, 0);
    standin.synchronize(0, stream);
    standin.hold_stream(other, true);
    let first = lost.begin(&store, 1, crate::rings::queued(other, PROMPT)).expect("begin");
    stream_wait(&first, other).expect("a ring is enqueued");
    first.cancel();
    let second = state.begin(&store, 2, required(stream)).expect("begin");
    second.wait_durable(WAIT).expect("durable while the other GPU hangs");
    assert!(store.stats().direct_bytes > 0);
    assert!(state.is_saved(&store, 2));
    standin.hold_stream(other, false);
    assert_idle(&store);
}
