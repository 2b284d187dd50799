//! Many saves, readers and pins at once: whatever the interleaving, saves stay whole and nothing being read is
//! overwritten. A regression here means torn checkpoints or a store that hangs.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{disk, region_in, save_one, Region, WAIT};
use pccheck::engine::{Select, Store};
use pccheck::medium::Durability;
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

fn region(slots: u32, payload_bytes: u64) -> Region {
    region_in(disk(), &FormatOptions::new(slots, payload_bytes))
}

fn options(max_in_flight: u32) -> OpenOptions {
    OpenOptions {
        max_in_flight,
        chunk_bytes: 64 << 10,
        staging_bytes: u64::from(max_in_flight + 4) * (64 << 10),
        required: Durability::Process,
        ..OpenOptions::default()
    }
}

/// A state that only its step explains.
fn state(step: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i.wrapping_mul(step | 1) >> 3) as u8 ^ step as u8).collect()
}

fn check_newest(store: &Store, len: usize) -> u64 {
    let opened = store.open_checkpoint(Select::Newest, false).expect("open newest");
    let step = opened.checkpoint.record().step;
    assert!(opened.checkpoint.read_tensor("w").expect("read") == state(step, len), "step {step} is torn");
    step
}

#[test]
fn sixty_four_saves_are_in_flight_at_once_and_all_become_durable() {
    const N: u32 = 64;
    let region = region(N + 1, 1 << 20);
    let store = Store::open(&region.path, &options(N)).expect("open");
    let data: Vec<Vec<u8>> = (0..u64::from(N)).map(|step| state(step, 700_000)).collect();
    for round in 0..2 {
        // Raw saves stay open until they are committed: all N are in flight together.
        let mut raws: Vec<_> =
            (0..u64::from(N)).map(|step| store.begin_raw(step, 700_000, &[], WAIT).expect("begin")).collect();
        assert_eq!(store.stats().in_flight, N);
        let full = store.begin_raw(999, 1, &[], Some(Duration::ZERO)).err().expect("N are in flight");
        assert_eq!(full.kind(), ErrorKind::NoSlot);
        std::thread::scope(|scope| {
            for (raw, data) in raws.iter().zip(&data) {
                scope.spawn(move || {
                    data.chunks(100_000).enumerate().for_each(|(i, piece)| {
                        raw.write_at(i as u64 * 100_000, piece).expect("write");
                    });
                });
            }
        });
        let saves: Vec<_> = raws.iter_mut().map(|raw| raw.commit().expect("commit")).collect();
        let generations: Vec<u64> =
            saves.iter().map(|save| save.wait_durable(WAIT).expect("durable").generation).collect();
        let newest = store.open_checkpoint(Select::Newest, true).expect("newest");
        assert_eq!(newest.checkpoint.record().generation, *generations.iter().max().expect("some"));
        assert_eq!(newest.checkpoint.record().step, u64::from(N) - 1, "in round {round}");
        let name = newest.checkpoint.tensors()[0].name.clone();
        assert!(newest.checkpoint.read_tensor(&name).expect("read") == data[N as usize - 1]);
    }
    assert_eq!(store.stats().saves_durable, 2 * u64::from(N));
    assert_eq!(store.region().pool().free_count(), store.region().pool().buffer_count());
}

#[test]
fn readers_beside_savers_see_whole_checkpoints_only() {
    const LEN: usize = 1_000_001;
    let region = region(5, 2 << 20);
    let store = Store::open(&region.path, &options(3)).expect("open");
    let other =
        Store::open(&region.path, &OpenOptions { read_only: true, ..options(3) }).expect("open beside");
    let save = |step: u64| save_one(&store, step, &state(step, LEN), &[]).expect("save");
    save(0).wait_durable(WAIT).expect("durable");
    let done = AtomicBool::new(false);
    let (mut own, mut beside, mut overtaken) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for step in 1..150 {
                // Not waited for: up to three are in flight.
                drop(save(step));
            }
            store.drain(WAIT).expect("drain");
            done.store(true, Ordering::Release);
        });
        let reader = scope.spawn(|| {
            let mut reads = 0;
            while !done.load(Ordering::Acquire) {
                check_newest(&store, LEN);
                reads += 1;
            }
            reads
        });
        while !done.load(Ordering::Acquire) {
            let read = other.open_checkpoint(Select::Newest, false).and_then(|opened| {
                let step = opened.checkpoint.record().step;
                Ok((step, opened.checkpoint.read_tensor("w")?))
            });
            match read {
                Ok((step, bytes)) => {
                    assert!(bytes == state(step, LEN), "step {step} is torn");
                    beside += 1;
                }
                // Another process has no pins: the writer may take the slot while it reads.
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Reclaimed, "{error}");
                    overtaken += 1;
                }
            }
        }
        own = reader.join().expect("reader");
    });
    assert!(own > 0 && beside + overtaken > 0, "{own} own reads, {beside} beside, {overtaken} overtaken");
    assert_eq!(check_newest(&store, LEN), 149);
}

#[test]
fn a_checkpoint_that_is_read_stays_while_others_come_and_go() {
    const LEN: usize = 500_000;
    let region = region(4, 1 << 20);
    let store = Store::open(&region.path, &options(2)).expect("open");
    let save = |step: u64| {
        save_one(&store, step, &state(step, LEN), &[]).expect("save").wait_durable(WAIT).expect("durable");
    };
    save(1);
    let held = store.open_checkpoint(Select::Newest, false).expect("open").checkpoint;
    (2..20).for_each(save);
    assert!(held.read_tensor("w").expect("read") == state(1, LEN), "it was overwritten while open");
    let error = store.pin(held.record().generation + 18).expect_err("only N slots would be left less one");
    assert_eq!(error.kind(), ErrorKind::NoSlot);
    drop(held);
    let newest = store.checkpoints().expect("list")[0].record.generation;
    store.pin(newest).expect("there is room again");
    (20..40).for_each(save);
    let pinned = store.open_checkpoint(Select::Generation(newest), true).expect("pinned").checkpoint;
    assert!(pinned.read_tensor("w").expect("read") == state(19, LEN));
}
