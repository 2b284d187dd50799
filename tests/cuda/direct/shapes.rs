//! States of all shapes.

use super::*;

/// A number that looks random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % most
    }
}

#[test]
fn states_of_any_shape_come_back_as_they_were() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let mut dice = Dice(std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1));
    let mut went_directly = 0;
    for case in 0..120 {
        cufile.set_properties(2, 0);
        let chunk = 4096 * (1 + dice.below(4));
        let buffers = 3 + dice.below(20);
        let most = if dice.below(4) == 0 { 120 } else { 14 };
        let count = 1 + dice.below(most);
        let shape: Vec<(usize, Option<u32>)> = (0..count)
            .map(|_| {
                let bytes = match dice.below(6) {
                    0 => 0,
                    1 => dice.below(50),
                    2 => 4096 * dice.below(8),
                    3 => dice.below(3 * chunk),
                    _ => dice.below(if count > 20 { 5000 } else { 60_000 }),
                };
                (bytes as usize, (dice.below(4) > 0).then_some(0))
            })
            .collect();
        let (home, stream) = (Home::new(), standin.stream(0));
        let options = OpenOptions {
            medium: Requested::Direct,
            required: Durability::Process,
            max_in_flight: 2,
            chunk_bytes: chunk,
            staging_bytes: buffers * chunk,
            writers: 1 + dice.below(3) as u32,
            rewrite_every: 1 + dice.below(4) as u32,
            ..OpenOptions::default()
        };
        let store = Store::open(&home.path(), &options).expect("open");
        let mut state = State::new(&standin, &shape);
        let mut last = None;
        for step in 1..=8 {
            // Some of them have the bytes that the one before had.
            let filled = if dice.below(3) == 0 { last.unwrap_or(step) } else { step };
            state.fill(|_| stream, filled, dice.below(300));
            let how = [DirectStorage::Auto, DirectStorage::Auto, DirectStorage::Off][dice.below(3) as usize];
            cufile.delay_us(dice.below(3000));
            let mut save = state.begin(&store, step, directly(stream, Snapshot::Spare, how)).expect("begin");
            if dice.below(5) == 0 {
                let again = directly(stream, Snapshot::Spare, DirectStorage::Auto);
                stream_wait(&save, stream).expect("wait");
                standin.synchronize(0, stream);
                if dice.below(2) == 0 {
                    save.cancel();
                }
                save = state.begin(&store, step, again).expect("begin");
            }
            stream_wait(&save, stream).expect("wait");
            save.wait_copied(WAIT).expect("copied");
            last = Some(filled);
            state.fill(|_| stream, 77, 0);
            save.wait_durable(WAIT)
                .unwrap_or_else(|error| panic!("case {case}, step {step}: {error}, {shape:?}"));
            let opened = store.open_checkpoint(Select::Newest, true).expect("verified");
            let right = state.expected(filled);
            for (at, right) in right.iter().enumerate() {
                let found = opened.checkpoint.read_tensor(&format!("t{at:03}")).expect("read");
                assert!(
                    found == *right,
                    "case {case}, step {step}, tensor {at}, chunks of {chunk}: {shape:?}"
                );
            }
        }
        went_directly += u64::from(store.stats().direct_bytes > 0);
        assert_idle(&store);
        standin.synchronize(0, stream);
        drop((store, state));
        standin.destroy(stream);
        standin.assert_clean("states of any shape");
        cufile.assert_clean("states of any shape");
        cufile.reset();
    }
    assert!(went_directly > 60, "{went_directly}");
}

/// More hashes than a buffer takes, and more chunks than a copier writes at a time.
#[test]
fn a_state_of_many_pieces_goes_directly() {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    for (chunk, bytes) in [(4096, 6 << 20), (1 << 20, 35 << 20)] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
        let (path, stream) = (folder.path().join("region.pcc"), standin.stream(0));
        format_region(&path, &FormatOptions::new(3, 64 << 20)).expect("format");
        let options = OpenOptions {
            medium: Requested::Direct,
            required: Durability::Process,
            max_in_flight: 2,
            chunk_bytes: chunk,
            staging_bytes: 16 * chunk,
            ..OpenOptions::default()
        };
        let store = Store::open(&path, &options).expect("open");
        let mut state = State::new(&standin, &[(bytes + 1, Some(0)), (7 << 10, None), (bytes / 8, Some(0))]);
        state.fill(|_| stream, 1, 0);
        state.begin(&store, 1, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1), "chunks of {chunk}");
        assert!(store.stats().direct_bytes >= bytes as u64 / 2);
        assert_idle(&store);
    }
}

/// As many as parameters have counters in host memory between what an optimizer keeps on a GPU.
#[test]
fn hashing_of_many_runs_of_chunks_leaves_room_for_the_program() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (stream, home) = (standin.stream(0), Home::new());
    format_region(&home.other(), &FormatOptions::new(3, 24 << 20)).expect("format");
    let options = OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        chunk_bytes: CHUNK,
        staging_bytes: 1_600 * CHUNK,
        ..OpenOptions::default()
    };
    let store = Store::open(&home.other(), &options).expect("open");
    let shape: Vec<_> =
        (0..1_400).map(|nth| if nth % 2 == 0 { (24_000, Some(0)) } else { (4, None) }).collect();
    let mut state = State::new(&standin, &shape);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.queue_limit(950);
    let save = without_jams(&standin, stream, || {
        let save = state.begin(&store, 1, required(stream)).expect("begin");
        until("hashing is enqueued", || standin.calls("cuLaunchKernel") > 0);
        std::thread::sleep(std::time::Duration::from_millis(100));
        save
    });
    save.wait_durable(WAIT).expect("durable");
    standin.queue_limit(0);
    assert!(store.stats().direct_bytes > 0);
    assert!(state.is_saved(&store, 1));
}
