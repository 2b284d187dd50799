//! States that cannot be saved, and calls that cannot be answered: refused at once, and the store goes on.

use std::ptr;
use std::time::Duration;

use pccheck::engine::{Select, Store, Tensor, TensorAt};
use pccheck::format::{Dtype, MAX_NAME_BYTES, MAX_RANK};
use pccheck::load::Part;
use pccheck::store::OpenOptions;
use pccheck::{ErrorKind, Result};

use super::bed::{self, assert_both, options, reading, refused, refused_at, Bed, NEWEST, OLDER, WAIT};

/// Runs `bad` on an open store: it must be refused, must hold no slot and no buffer, and saving must go on.
struct Case {
    bed: Bed,
    store: Store,
}

impl Case {
    fn new() -> Case {
        let bed = Bed::new();
        let store = Store::open(&bed.path, &options()).expect("open");
        Case { bed, store }
    }

    fn refuses<T>(&self, bad: impl FnOnce(&Store) -> Result<T>, kind: ErrorKind, says: &[&str]) {
        let before = self.store.stats();
        refused(bad(&self.store), kind, says);
        assert_eq!(self.store.stats(), before, "a refused call has left something behind");
        assert_both(&self.store);
    }

    /// What was there is there, and one more save works.
    fn finish(self) {
        assert_both(&self.store);
        bed::save(&self.store, 7).expect("the store still saves");
        let pool = self.store.region().pool();
        assert_eq!(pool.free_count(), pool.buffer_count(), "a staging buffer was lost");
        drop(self.store);
        assert_eq!(self.bed.newest_step().expect("open"), 7);
    }
}

fn tensor<'a>(name: &'a str, shape: &'a [u64], data: &'a [u8]) -> Tensor<'a> {
    Tensor { name, dtype: Dtype::U8, shape, data }
}

#[test]
fn names_that_cannot_be() {
    let case = Case::new();
    let invalid = ErrorKind::InvalidArgument;
    let save = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        move |store: &Store| {
            let tensors: Vec<Tensor<'_>> = names.iter().map(|name| tensor(name, &[2], b"ab")).collect();
            store.save(3, &tensors, &[], WAIT).map(drop)
        }
    };
    case.refuses(save(&["a", "b", "a"]), invalid, &["two tensors", "\"a\""]);
    case.refuses(save(&["a", ""]), invalid, &["tensor 1", "empty name"]);
    case.refuses(save(&["__metadata__"]), invalid, &["__metadata__", "reserved"]);
    case.refuses(save(&["__pccheck_metadata__"]), invalid, &["__pccheck_metadata__", "reserved"]);
    let long = "n".repeat(MAX_NAME_BYTES + 1);
    case.refuses(save(&["a", &long]), invalid, &["tensor 1", "4097 bytes", "limit is 4096"]);
    case.finish();
}

#[test]
fn metadata_that_cannot_be() {
    let case = Case::new();
    let invalid = ErrorKind::InvalidArgument;
    let with = |metadata: &'static [(&'static str, &'static str)]| {
        move |store: &Store| store.save(3, &[tensor("a", &[2], b"ab")], metadata, WAIT).map(drop)
    };
    case.refuses(with(&[("pccheck.tied", "{}")]), invalid, &["pccheck.tied", "reserved"]);
    case.refuses(with(&[("k", "1"), ("k", "2")]), invalid, &["\"k\"", "two"]);
    case.refuses(|store| store.begin_raw(3, 5, &[("pccheck.x", "1")], WAIT), invalid, &["pccheck.x"]);
    case.finish();
}

#[test]
fn shapes_that_do_not_match_their_bytes() {
    let case = Case::new();
    let invalid = ErrorKind::InvalidArgument;
    let with = |dtype: Dtype, shape: &[u64], len: usize| {
        let (shape, data) = (shape.to_vec(), vec![0; len]);
        move |store: &Store| {
            store.save(3, &[Tensor { name: "w", dtype, shape: &shape, data: &data }], &[], WAIT).map(drop)
        }
    };
    case.refuses(with(Dtype::F32, &[3], 11), invalid, &["\"w\"", "F32", "[3]", "12 bytes", "11 were given"]);
    case.refuses(with(Dtype::F32, &[], 0), invalid, &["\"w\"", "4 bytes", "0 were given"]);
    case.refuses(with(Dtype::U8, &[0], 1), invalid, &["\"w\"", "0 bytes", "1 were given"]);
    case.refuses(with(Dtype::F4, &[3], 2), invalid, &["\"w\"", "F4", "whole bytes"]);
    case.refuses(with(Dtype::U8, &[u64::MAX, 2], 4), invalid, &["\"w\"", "overflows"]);
    case.refuses(with(Dtype::F64, &[1 << 61], 8), invalid, &["\"w\"", "overflows"]);
    case.refuses(with(Dtype::U8, &[u64::MAX, u64::MAX, 0], 0), invalid, &["\"w\"", "overflows"]);
    case.refuses(with(Dtype::U8, &[1; MAX_RANK + 1], 1), invalid, &["\"w\"", "65 dimensions", "limit is 64"]);
    case.finish();
}

#[test]
fn addresses_that_cannot_be() {
    let case = Case::new();
    let byte = 0u8;
    let at = |ptr: *const u8, bytes: u64| {
        move |store: &Store| {
            let tensor = TensorAt { name: "w", dtype: Dtype::U8, shape: &[bytes], ptr, bytes, device: None };
            // SAFETY: each of these addresses must be refused before anything is read.
            unsafe { store.begin_save(3, &[tensor], &[], WAIT) }.map(drop)
        }
    };
    let invalid = ErrorKind::InvalidArgument;
    case.refuses(at(ptr::null(), 1), invalid, &["\"w\"", "1 bytes", "null pointer"]);
    case.refuses(at(&byte, u64::MAX), invalid, &["\"w\"", "18446744073709551615", "end of memory"]);
    case.refuses(at(&byte, isize::MAX as u64 + 1), invalid, &["\"w\"", "end of memory"]);
    case.refuses(at(usize::MAX as *const u8, 2), invalid, &["\"w\"", "end of memory"]);
    // Nothing at nowhere is a tensor without elements.
    let empty =
        TensorAt { name: "e", dtype: Dtype::F32, shape: &[0, 7], ptr: ptr::null(), bytes: 0, device: None };
    // SAFETY: no byte is read.
    let save = unsafe { case.store.begin_save(4, &[empty], &[], WAIT) }.expect("an empty tensor");
    save.wait_durable(WAIT).expect("durable");
    let opened = case.store.open_checkpoint(Select::Newest, true).expect("open");
    assert_eq!(opened.checkpoint.tensor("e").expect("there").shape, [0, 7]);
    assert!(opened.checkpoint.read_tensor("e").expect("read").is_empty());
}

#[test]
fn a_state_larger_than_the_slot() {
    let case = Case::new();
    let slot = case.bed.layout.slot_bytes;
    let data = vec![1u8; slot as usize];
    let shape = [slot];
    let slot_text = slot.to_string();
    let says = ["a slot holds", slot_text.as_str(), "region", "grow"];
    case.refuses(
        |store| store.save(3, &[tensor("w", &shape, &data)], &[], WAIT).map(drop),
        ErrorKind::TooLarge,
        &says,
    );
    case.refuses(|store| store.begin_raw(3, slot, &[], WAIT), ErrorKind::TooLarge, &says);
    case.refuses(|store| store.begin_raw(3, 1 << 40, &[], WAIT), ErrorKind::TooLarge, &says);
    let huge = "18446744073709551615";
    case.refuses(|store| store.begin_raw(3, u64::MAX, &[], WAIT), ErrorKind::TooLarge, &[huge]);
    // To the last byte that fits: header, tensor and table fill the slot.
    let most = slot - 4096 - (slot / 4096 * 16 + 4096);
    let shape = [most];
    let save = case.store.save(3, &[tensor("w", &shape, &data[..most as usize])], &[], WAIT).expect("fits");
    save.wait_durable(WAIT).expect("durable");
}

#[test]
fn raw_writes_outside_of_what_was_announced() {
    let case = Case::new();
    let mut raw = case.store.begin_raw(3, 10_000, &[], WAIT).expect("begin");
    let invalid = ErrorKind::InvalidArgument;
    refused(raw.write_at(9_999, &[0; 2]), invalid, &["2 bytes at 9999", "10000"]);
    refused(raw.write_at(u64::MAX, &[0; 2]), invalid, &["18446744073709551615", "10000"]);
    raw.write_at(0, &[7; 10_000]).expect("write");
    refused(raw.write_at(5_000, &[0; 1]), invalid, &["was written before"]);
    raw.commit().expect("commit").wait_durable(WAIT).expect("durable: a refused range changes nothing");
    let opened = case.store.open_checkpoint(Select::Newest, true).expect("open");
    assert_eq!(opened.checkpoint.read_tensor("raw").expect("read"), [7; 10_000]);
}

#[test]
fn reads_of_what_is_not_there() {
    let case = Case::new();
    let path = case.bed.path.clone();
    let not_found = ErrorKind::NotFound;
    for (select, says) in [
        (Select::Generation(77), "generation 77"),
        (Select::Step(77), "step 77"),
        (Select::OlderThan(OLDER), "older than generation 1"),
    ] {
        let error = refused(case.store.open_checkpoint(select, true), not_found, &[says]);
        assert_eq!(error.path(), Some(&*path));
    }
    for result in [case.store.pin(77), case.store.unpin(77), case.store.mark_global(0, 77).map(drop)] {
        assert_eq!(refused(result, not_found, &["77"]).path(), Some(&*path));
    }
    refused(case.store.discard_newer(77), not_found, &["77", "nothing was discarded"]);
    let opened = case.store.open_checkpoint(Select::Newest, false).expect("open");
    refused(opened.checkpoint.read_tensor("nope"), not_found, &["\"nope\"", "generation 2"]);
    let invalid = ErrorKind::InvalidArgument;
    let mut short = [0; 3];
    refused(opened.checkpoint.read_tensors(&mut [("w", &mut short)]), invalid, &["\"w\"", "9001", "3"]);
    for offset in [opened.checkpoint.record().payload_bytes - 2, u64::MAX - 1] {
        let mut parts = [Part { offset, dst: &mut short }];
        refused(opened.checkpoint.read(&mut parts), invalid, &["3 bytes", "pass the payload"]);
    }
    drop(opened);
    case.finish();
}

#[test]
fn a_read_only_store_refuses_every_change() {
    let bed = Bed::new();
    let store = Store::open(&bed.path, &reading()).expect("open");
    let read_only = ErrorKind::ReadOnly;
    let before = bed.bytes();
    for result in [
        bed::save(&store, 3),
        store.begin_raw(3, 1, &[], WAIT).map(drop),
        store.pin(NEWEST),
        store.unpin(NEWEST),
        store.mark_global(0, NEWEST).map(drop),
        store.abandon(0, NEWEST, WAIT).map(drop),
        store.discard_newer(OLDER).map(drop),
        store.repair(WAIT).map(drop),
    ] {
        assert_eq!(refused(result, read_only, &["read-only"]).path(), Some(&*bed.path));
    }
    assert!(before == bed.bytes());
    bed.assert_intact();
}

#[test]
fn no_slot_in_the_time_given() {
    let case = Case::new();
    let held = case.store.begin_raw(3, 100, &[], WAIT).expect("begin");
    let brief = Some(Duration::from_millis(20));
    let says = ["3 slots", "max_in_flight 1", "keep 2"];
    refused_at(case.store.begin_raw(4, 100, &[], brief), &case.bed.path, ErrorKind::NoSlot, &says);
    refused_at(
        case.store.begin_raw(4, 100, &[], Some(Duration::ZERO)),
        &case.bed.path,
        ErrorKind::NoSlot,
        &says,
    );
    drop(held);
    case.store.drain(WAIT).expect("drain");
    case.finish();
}

#[test]
fn pins_that_would_leave_no_room_to_save() {
    let case = Case::new();
    let path = case.bed.path.clone();
    let says = ["max_in_flight = 1", "unpin"];
    // Two are kept and one is being saved: there is no slot for a pin.
    for generation in [OLDER, NEWEST] {
        refused_at(case.store.pin(generation), &path, ErrorKind::NoSlot, &says);
    }
    case.finish();

    let bed = Bed::new();
    let store = Store::open(&bed.path, &OpenOptions { keep: 1, ..options() }).expect("open");
    store.pin(NEWEST).expect("one slot to spare");
    for step in [3, 4, 5] {
        bed::save(&store, step).expect("saving goes on");
        let newest = store.checkpoints().expect("list")[0].record.generation;
        refused_at(store.pin(newest), &bed.path, ErrorKind::NoSlot, &says);
    }
    let opened = store.open_checkpoint(Select::Step(NEWEST), true).expect("the pin holds");
    assert_eq!(opened.checkpoint.read_tensor("w").expect("read"), bed::state(NEWEST));
}
