//! Whose spare memory is, and what is believed of slots.

use super::*;

/// Spare memory is the next save's only when all of it has been written.
#[test]
fn a_spare_that_is_still_being_written_from_is_not_the_next_saves() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
    cufile.delay_us(20_000);
    let mut saves = Vec::new();
    for step in 1..=6 {
        state.fill(|_| stream, step, 0);
        let save = state.begin(&store, step, required(stream)).expect("begin");
        stream_wait(&save, stream).expect("wait");
        saves.push(save);
    }
    for save in &saves {
        save.wait_durable(Some(PROMPT)).expect("durable");
    }
    assert!(state.is_saved(&store, 6));
    for kept in store.checkpoints().expect("checkpoints") {
        let opened = store.open_checkpoint(Select::Generation(kept.record.generation), true);
        opened.expect("what was written is what was hashed");
    }
}

/// The job has left the pump long before its chunks are written: only the copiers hold its spare then.
#[test]
fn a_spare_that_copiers_alone_hold_is_not_the_next_saves() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 64), State::new(&standin, SHAPE));
    cufile.delay_us(300_000);
    let mut saves = Vec::new();
    for step in 1..=2 {
        state.fill(|_| stream, step, 0);
        let save = state.begin(&store, step, required(stream)).expect("begin");
        save.wait_copied(WAIT).expect("copied");
        // Its hashes have come, and the pump has nothing more to do for it.
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert!(!save.progress().ended);
        saves.push(save);
    }
    for save in &saves {
        let generation = save.wait_durable(Some(PROMPT)).expect("durable").generation;
        let opened = store.open_checkpoint(Select::Generation(generation), true);
        opened.expect("what was written is what was hashed");
    }
    assert!(state.is_saved(&store, 2));
}

/// Two slots, of which one holds the newest checkpoint: what a save that was given up has written into the other is not taken for
/// what that held before.
#[test]
fn what_a_save_that_was_given_up_has_written_is_not_believed_to_be_what_was_there() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (folder, stream) =
        (tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder"), standin.stream(0));
    let path = folder.path().join("region.pcc");
    format_region(&path, &FormatOptions::new(2, 1 << 21)).expect("format");
    let options = OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: CHUNK,
        staging_bytes: 16 * CHUNK,
        rewrite_every: 1000,
        ..OpenOptions::default()
    };
    let store = Store::open(&path, &options).expect("open");
    let mut state = State::new(&standin, SHAPE);
    for step in 1..=2 {
        state.fill(|_| stream, step, 0);
        state.begin(&store, step, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
    }
    state.fill(|_| stream, 3, 0);
    let confirmed = SaveOptions { confirm: true, ..required(stream) };
    let given_up = state.begin(&store, 3, confirmed).expect("begin");
    crate::bed::until("all is written", || {
        let progress = given_up.progress();
        progress.written_bytes == progress.total_bytes
    });
    given_up.cancel();
    given_up.wait_durable(WAIT).expect_err("given up");
    let before = cufile.calls("cuFileWrite");
    // Those of the first one, whose slot it is.
    state.fill(|_| stream, 1, 0);
    state.begin(&store, 4, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
    assert!(cufile.calls("cuFileWrite") > before, "all was overwritten");
    let opened = store.open_checkpoint(Select::Newest, true).expect("verified");
    for (at, right) in state.expected(1).iter().enumerate() {
        assert!(opened.checkpoint.read_tensor(&format!("t{at:03}")).expect("read") == *right, "tensor {at}");
    }
}
