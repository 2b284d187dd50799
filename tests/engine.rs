//! The engine end to end on real files: what was saved is what comes back, whatever the shape, medium and number
//! of saves in flight. A regression here means lost or wrong training state.

mod common;

use std::path::Path;
use std::time::Duration;

use common::{disk, disk_is_dax, region_in, save_bytes, Region, WAIT};
use pccheck::engine::{grow_region, Select, Store};
use pccheck::medium::{Durability, IoBackend, MediumKind, Requested};
use pccheck::save::Save;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

fn small() -> OpenOptions {
    OpenOptions {
        chunk_bytes: 64 << 10,
        staging_bytes: 1 << 20,
        required: Durability::Process,
        ..OpenOptions::default()
    }
}

/// Bytes that differ at every place and for every seed.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 24) as u8
        })
        .collect()
}

/// Odd names, sizes and types: empty, scalar, one byte, around the chunk and gather sizes, larger than a chunk.
fn odd_state(seed: u64) -> Vec<(String, Vec<u8>)> {
    let sizes = [0, 1, 3, 4095, 4096, 4097, 16 << 10, (16 << 10) + 1, 65_535, 65_536, 65_537, 300_001, 7];
    sizes
        .iter()
        .enumerate()
        .map(|(i, &len)| (format!("layer.{i}/wéight"), pattern(seed ^ ((i as u64) << 32), len)))
        .collect()
}

fn region(slots: u32, payload_bytes: u64) -> Region {
    region_in(disk(), &FormatOptions::new(slots, payload_bytes))
}

fn save_state(store: &Store, step: u64, state: &[(String, Vec<u8>)]) -> Save {
    save_bytes(store, step, state, &[("epoch", "3")]).expect("save")
}

fn check_state(store: &Store, select: Select, state: &[(String, Vec<u8>)]) {
    let opened = store.open_checkpoint(select, true).expect("open checkpoint");
    assert!(opened.rejected.is_empty(), "nothing was damaged, yet {:?}", opened.rejected);
    assert_eq!(opened.checkpoint.metadata()["epoch"], "3");
    let mut buffers: Vec<Vec<u8>> = state.iter().map(|(_, data)| vec![0xAA; data.len()]).collect();
    let mut wanted: Vec<(&str, &mut [u8])> = state
        .iter()
        .zip(&mut buffers)
        .map(|((name, _), buffer)| (name.as_str(), buffer.as_mut_slice()))
        .collect();
    opened.checkpoint.read_tensors(&mut wanted).expect("read");
    for ((name, data), buffer) in state.iter().zip(&buffers) {
        assert!(data == buffer, "tensor {name} came back changed");
    }
}

fn media() -> Vec<(&'static Path, Requested, IoBackend)> {
    let shm = Path::new("/dev/shm");
    let mut media = vec![
        (disk(), Requested::Direct, IoBackend::Auto),
        (disk(), Requested::Direct, IoBackend::Threads),
        (disk(), Requested::Mmap, IoBackend::Auto),
        (shm, Requested::Mmap, IoBackend::Auto),
    ];
    if disk_is_dax() {
        media.push((disk(), Requested::Dax, IoBackend::Auto));
    }
    media
}

#[test]
fn odd_states_survive_reopening_on_every_medium() {
    for (root, medium, backend) in media() {
        let region = region_in(root, &FormatOptions::new(4, 2 << 20));
        let options = OpenOptions { medium, backend, max_in_flight: 3, ..small() };
        let states: Vec<_> = (0..7u64).map(odd_state).collect();
        {
            let store = Store::open(&region.path, &options).expect("open");
            let saves: Vec<_> =
                states.iter().enumerate().map(|(i, s)| save_state(&store, i as u64, s)).collect();
            for save in &saves {
                save.wait_durable(WAIT).expect("durable");
            }
            check_state(&store, Select::Newest, &states[6]);
        }
        let store = Store::open(&region.path, &options).expect("open again");
        let newest = store.checkpoints().expect("list")[0].record.clone();
        assert_eq!((newest.step, newest.generation), (6, 7), "on {medium:?} {backend:?}");
        check_state(&store, Select::Newest, &states[6]);
        check_state(&store, Select::Step(6), &states[6]);
        let again = save_state(&store, 100, &states[0]);
        let durable = again.wait_durable(WAIT).expect("durable");
        assert!(durable.generation > 7, "generation {} was used before", durable.generation);
    }
}

#[test]
fn a_read_only_store_sees_what_the_live_writer_commits() {
    let region = region(4, 2 << 20);
    let writer = Store::open(&region.path, &small()).expect("open");
    let reader = Store::open(&region.path, &OpenOptions { read_only: true, ..small() }).expect("open beside");
    let state = odd_state(1);
    save_state(&writer, 1, &state).wait_durable(WAIT).expect("durable");
    check_state(&reader, Select::Newest, &state);
    let error = reader.pin(1).expect_err("a read-only store cannot pin");
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    let second = Store::open(&region.path, &OpenOptions { lock_wait: Some(Duration::ZERO), ..small() });
    assert_eq!(second.err().expect("locked").kind(), ErrorKind::InUse);
}

#[test]
fn raw_streams_take_any_order_of_writes_in_a_small_pool() {
    let region = region(3, 2 << 20);
    let options = OpenOptions { staging_bytes: 4 * (64 << 10), max_in_flight: 2, ..small() };
    let store = Store::open(&region.path, &options).expect("open");
    let data = pattern(5, 1_500_001);
    // Every 64 KiB chunk is left half-filled many times over before it is completed.
    let mut pieces: Vec<(usize, usize)> =
        (0..data.len()).step_by(7001).map(|at| (at, (at + 7001).min(data.len()))).collect();
    pieces.sort_by_key(|&(at, _)| at.wrapping_mul(0x9E37_79B9) % 1009);
    let mut raw = store.begin_raw(9, data.len() as u64, &[("kind", "stream")], WAIT).expect("begin raw");
    std::thread::scope(|scope| {
        for half in pieces.chunks(pieces.len() / 3 + 1) {
            let (raw, data) = (&raw, &data);
            scope.spawn(move || {
                half.iter().for_each(|&(a, b)| raw.write_at(a as u64, &data[a..b]).expect("write"))
            });
        }
    });
    assert_eq!(raw.write_at(10, &[1]).expect_err("overlap").kind(), ErrorKind::InvalidArgument);
    let save = raw.commit().expect("commit");
    save.wait_durable(WAIT).expect("durable");
    let opened = store.open_checkpoint(Select::Newest, true).expect("open");
    let name = opened.checkpoint.tensors()[0].name.clone();
    assert!(opened.checkpoint.read_tensor(&name).expect("read") == data, "the stream came back changed");
}

#[test]
fn a_raw_save_with_a_gap_cannot_commit_and_frees_its_slot() {
    let region = region(3, 2 << 20);
    let store = Store::open(&region.path, &OpenOptions { max_in_flight: 1, ..small() }).expect("open");
    let mut raw = store.begin_raw(1, 100, &[], WAIT).expect("begin raw");
    raw.write_at(0, &[1; 40]).expect("write");
    let error = raw.commit().err().expect("60 bytes are missing");
    assert_eq!(error.kind(), ErrorKind::InvalidState);
    assert!(error.message().contains("40"), "{error} does not name the gap");
    drop(raw);
    store.drain(WAIT).expect("drain");
    save_state(&store, 2, &odd_state(2)).wait_durable(WAIT).expect("the slot is free again");
}

#[test]
fn damage_in_the_newest_payload_falls_back_and_says_so() {
    use std::os::unix::fs::FileExt;
    let region = region(4, 2 << 20);
    let states = [odd_state(1), odd_state(2)];
    let (slot, offset) = {
        let store = Store::open(&region.path, &OpenOptions { keep: 2, ..small() }).expect("open");
        for (step, state) in states.iter().enumerate() {
            save_state(&store, step as u64, state).wait_durable(WAIT).expect("durable");
        }
        let newest = store.checkpoints().expect("list")[0].record.clone();
        (newest.slot, store.region().layout().slot_offset(newest.slot) + 200_000)
    };
    let file = std::fs::OpenOptions::new().write(true).read(true).open(&region.path).expect("open file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("read");
    file.write_all_at(&[byte[0] ^ 1], offset).expect("flip a bit");
    file.sync_all().expect("sync");
    let store = Store::open(&region.path, &OpenOptions { keep: 2, ..small() }).expect("open again");
    let opened = store.open_checkpoint(Select::Newest, true).expect("the older one is intact");
    assert_eq!(opened.checkpoint.record().step, 0);
    assert_eq!(opened.rejected.len(), 1);
    assert_eq!(opened.rejected[0].0.slot, slot);
    assert_eq!(opened.rejected[0].1.kind(), ErrorKind::Corrupt);
    check_state_of(&opened.checkpoint, &states[0]);
}

fn check_state_of(checkpoint: &pccheck::load::Checkpoint, state: &[(String, Vec<u8>)]) {
    for (name, data) in state {
        assert!(checkpoint.read_tensor(name).expect("read") == *data, "tensor {name} came back changed");
    }
}

#[test]
fn pins_holds_and_discards_decide_what_stays() {
    let region = region(6, 2 << 20);
    let options = OpenOptions { hold: true, run_id: 77, max_in_flight: 1, ..small() };
    let store = Store::open(&region.path, &options).expect("open");
    for step in 0..4 {
        save_state(&store, step, &odd_state(step)).wait_durable(WAIT).expect("durable");
    }
    let steps = |store: &Store| -> Vec<u64> {
        store.checkpoints().expect("list").iter().map(|info| info.record.step).collect()
    };
    assert_eq!(steps(&store), [3, 2, 1, 0], "hold keeps all");
    assert_eq!(store.mark_global(77, 2).expect("mark"), 3);
    assert_eq!(steps(&store), [3, 2], "older than the mark is reclaimed");
    store.pin(3).expect("pin");
    assert_eq!(store.abandon(77, 3, WAIT).expect("abandon"), 1);
    assert_eq!(steps(&store), [2]);
    save_state(&store, 3, &odd_state(9)).wait_durable(WAIT).expect("durable");
    drop(store);
    let store = Store::open(&region.path, &options).expect("open again");
    assert_eq!(steps(&store), [3, 2], "the abandoned checkpoint must not come back");
    check_state(&store, Select::Newest, &odd_state(9));
    assert!(store.checkpoints().expect("list")[1].pinned, "pins are durable");
    assert_eq!(store.discard_newer(3).expect("discard"), 1);
    drop(store);
    let store = Store::open(&region.path, &options).expect("open again");
    assert_eq!(steps(&store), [2], "the discarded checkpoint must not come back");
}

#[test]
fn growing_keeps_checkpoints_and_pins() {
    let region = region(3, 1 << 20);
    {
        let store = Store::open(&region.path, &OpenOptions { max_in_flight: 1, ..small() }).expect("open");
        save_state(&store, 1, &odd_state(1)).wait_durable(WAIT).expect("durable");
        store.pin(1).expect("pin");
        save_state(&store, 2, &odd_state(2)).wait_durable(WAIT).expect("durable");
    }
    grow_region(&region.path, 5, 8 << 20, WAIT).expect("grow");
    let store = Store::open(&region.path, &small()).expect("open grown");
    assert_eq!(store.region().layout().slot_count, 5);
    check_state(&store, Select::Newest, &odd_state(2));
    check_state(&store, Select::Generation(1), &odd_state(1));
    assert!(store.checkpoints().expect("list")[1].pinned);
    let large = vec![("large".to_string(), pattern(4, 7 << 20))];
    save_state(&store, 3, &large).wait_durable(WAIT).expect("fits now");
    check_state(&store, Select::Newest, &large);
}

#[test]
fn cancelled_saves_free_slots_and_a_full_house_times_out() {
    let region = region(2, 64 << 20);
    let store = Store::open(&region.path, &OpenOptions { max_in_flight: 1, ..small() }).expect("open");
    let raw = store.begin_raw(1, 1 << 20, &[], WAIT).expect("begin");
    let error = store.begin_raw(2, 1, &[], Some(Duration::from_millis(30))).err().expect("no slot");
    assert_eq!(error.kind(), ErrorKind::NoSlot);
    drop(raw);
    store.drain(WAIT).expect("drain");
    for step in 0..20 {
        let state = vec![("w".to_string(), pattern(step, 5 << 20))];
        let save = save_state(&store, step, &state);
        save.cancel();
        match save.wait_durable(WAIT) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled),
        }
    }
    save_state(&store, 50, &odd_state(3)).wait_durable(WAIT).expect("still works");
    check_state(&store, Select::Newest, &odd_state(3));
    assert_eq!(store.region().pool().free_count(), store.region().pool().buffer_count(), "a buffer was lost");
}

#[test]
fn auto_on_tmpfs_needs_leave_to_be_volatile() {
    let region = region_in(Path::new("/dev/shm"), &FormatOptions::new(3, 1 << 20));
    let error =
        Store::open(&region.path, &OpenOptions::default()).err().expect("tmpfs does not survive power loss");
    assert_eq!(error.kind(), ErrorKind::Durability);
    let store = Store::open(&region.path, &small()).expect("process durability is enough");
    assert_eq!(store.medium_info().kind, MediumKind::Mmap);
}
