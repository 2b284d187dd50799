//! `pcc_store`: regions, and which of their checkpoints are kept.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_char;

use super::codes::{wait_of, PCC_CHECKPOINT_RAW};
use super::guard::{self, Caller, Opaque, Out};
use super::infos::pcc_checkpoint_info;
use super::options::{pcc_format_options, pcc_open_options};
use super::status::pcc_status;
use super::text::CText;
use crate::engine::{format_region, grow_region, CheckpointInfo, Store};
use crate::format::{SlotRecord, RAW_STREAM};
use crate::sync::Arc;

/// An open region and its threads.
#[allow(non_camel_case_types)]
pub struct pcc_store {
    _opaque: [u8; 0],
}

/// What stands behind a [`pcc_store`].
pub(super) struct StoreInner {
    pub store: Arc<Store>,
    pub path_text: CText,
    pub notes_text: CText,
}

impl Opaque for pcc_store {
    type Inner = StoreInner;
    const TAG: u64 = u64::from_le_bytes(*b"pccstore");
    const NAME: &'static str = "pcc_store";

    fn store(inner: &StoreInner) -> Option<Arc<Store>> {
        Some(inner.store.clone())
    }
}

/// Creates a region at `path` (NUL-terminated): a new file, an empty file, or a block device. It has `slot_count`
/// slots (2 to 240): saves in flight + checkpoints kept + pinned; each holds up to `payload_bytes` (see
/// `pcc_payload_bytes`). All space is allocated now. Nothing is ever destroyed unless `options->force` is 1.
///
/// Durability: the empty region is durable on return.
/// Threads: any.
/// Ownership: nothing is kept; `options` may be NULL.
/// Errors: PCC_ALREADY_EXISTS, PCC_NO_SPACE, PCC_IN_USE, PCC_INVALID_ARGUMENT, PCC_TOO_LARGE (the members' paths),
/// PCC_UNSUPPORTED, PCC_IO, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_format(
    path: *const c_char,
    slot_count: u32,
    payload_bytes: u64,
    options: *const pcc_format_options,
) -> pcc_status {
    let body = |caller: &Caller| {
        let path = caller.path(path)?;
        let options = caller.format_options(&caller.options(options)?, slot_count, payload_bytes)?;
        Ok(format_region(path, &options)?)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_format", body) }
}

/// Replaces a region file by a larger one (more slots, larger slots, or both) that holds the same checkpoints and pins.
/// A crash leaves the old file or the new one. Refused on devices and while a writer has the region open; waits for
/// that writer for `lock_wait_ms` milliseconds (negative: for ever). `left_out` (may be NULL) receives how many
/// checkpoints the medium could no longer read, which the new file lacks; where it can read none, the call fails.
///
/// Durability: the new region and its checkpoints are durable on return.
/// Threads: any.
/// Ownership: `left_out` is the caller's; nothing is kept.
/// Errors: PCC_IN_USE, PCC_NO_SPACE, PCC_UNSUPPORTED, PCC_INVALID_ARGUMENT, PCC_NOT_A_REGION, PCC_CORRUPT, PCC_IO,
/// PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_grow(
    path: *const c_char,
    slot_count: u32,
    payload_bytes: u64,
    lock_wait_ms: i64,
    left_out: *mut u64,
) -> pcc_status {
    let body = |caller: &Caller| {
        let out = caller.out_optional("left_out", left_out, 0)?;
        let path = caller.path(path)?;
        // The engine takes no wait as its default; for ever is as long as a clock can tell.
        let wait = wait_of(lock_wait_ms).or(wait_of(LONGEST_WAIT_MS));
        out.set(grow_region(path, slot_count, payload_bytes, wait)?.len() as u64);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_grow", body) }
}

/// A hundred years, less a day.
const LONGEST_WAIT_MS: i64 = (100 * 365 - 1) * 24 * 3600 * 1000;

/// Opens a region, recovers what it holds, and starts the library's threads. One writer at a time has a region open;
/// read-only stores work beside it.
///
/// Durability: every checkpoint that recovery found is durable on return (not made so by a read-only store).
/// Threads: any.
/// Ownership: `store` receives a handle to be given to `pcc_close`, or NULL on failure. `options` may be NULL.
/// Errors: PCC_NOT_FOUND, PCC_NOT_A_REGION, PCC_CORRUPT where both superblocks are damaged, PCC_IN_USE (names the
/// holder), PCC_DURABILITY, PCC_UNSUPPORTED_VERSION, PCC_UNSUPPORTED_FEATURE, PCC_UNSUPPORTED, PCC_OUT_OF_MEMORY,
/// PCC_INVALID_ARGUMENT, PCC_IO, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_open(
    path: *const c_char,
    options: *const pcc_open_options,
    store: *mut *mut pcc_store,
) -> pcc_status {
    let body = |caller: &Caller| {
        let out = caller.out_handle("store", store)?;
        let path = caller.path(path)?;
        let options = caller.open_options(&caller.options(options)?)?;
        let store = Arc::new(Store::open(path, &options)?);
        let info = store.medium_info();
        let recovered = store.recovered();
        let notes: Vec<&str> = info.notes.iter().chain(&recovered.notes).map(String::as_str).collect();
        out.set(guard::new_handle(StoreInner {
            path_text: CText::new(info.path),
            notes_text: CText::new(&notes.join("\n")),
            store,
        }));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_open", body) }
}

/// Closes a store: cancels the saves in flight and waits until their I/O has ended; NULL is fine. Call `pcc_drain`
/// before, to let them become durable. Handles of its saves stay valid until freed. The region's lock is released
/// here, or when the last raw save or checkpoint opened through it is freed.
///
/// Durability: commits nothing.
/// Threads: no other call may use the store meanwhile or later.
/// Ownership: frees `store`. In a forked child it only forgets it.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_close(store: *mut pcc_store) {
    // SAFETY: the header binds the caller.
    unsafe { guard::free("pcc_close", store) }
}

/// Waits until no save is in flight, for at most `timeout_ms` (negative: for ever). Says nothing of how they ended. A save
/// that waits only for `pcc_save_confirm` is in flight: with a timeout it is waited for like any other; for ever, and
/// nothing else in flight, this returns PCC_INVALID_STATE at once, lest it never return.
///
/// Durability: saves that ended with PCC_OK are durable, as ever.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: PCC_TIMED_OUT, PCC_INVALID_STATE, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_drain(store: *const pcc_store, timeout_ms: i64) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_drain", store, |_, inner| Ok(inner.store.drain(wait_of(timeout_ms))?)) }
}

/// Lists the checkpoints, newest first: fills up to `capacity` elements of `infos`, which are `info_bytes`
/// (sizeof(pcc_checkpoint_info)) apart, and stores in `count` how many there are, which may be more. With `capacity` 0
/// it only counts. Another save may become durable between two calls.
///
/// Durability: all listed checkpoints are durable.
/// Threads: any number at once.
/// Ownership: `infos` and `count` are the caller's; nothing refers to the store.
/// Errors: PCC_IO (read-only stores read the medium), PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
#[no_mangle]
pub unsafe extern "C" fn pcc_list(
    store: *const pcc_store,
    infos: *mut pcc_checkpoint_info,
    info_bytes: u64,
    capacity: u64,
    count: *mut u64,
) -> pcc_status {
    let places = |caller: &Caller| caller.out("count", count, 0);
    let body = |caller: &Caller, inner: &StoreInner, count: Out<u64>| {
        let found = inner.store.checkpoints()?;
        caller.fill_array(infos, info_bytes, capacity, found.iter().map(listed))?;
        count.set(found.len() as u64);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_list", store, places, body) }
}

/// Keeps the checkpoint of `generation` until it is unpinned, also across restarts. Pinning twice is pinning once.
///
/// Durability: the pin is durable on return.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: PCC_NOT_FOUND; PCC_NO_SLOT where fewer than N slots would be left to save into; PCC_READ_ONLY, PCC_IO,
/// PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_pin(store: *const pcc_store, generation: u64) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_pin", store, |_, inner| Ok(inner.store.pin(generation)?)) }
}

/// Lifts a pin; the checkpoint is then kept as long as it is among the newest K. No error where it was not pinned.
///
/// Durability: durable on return.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: PCC_NOT_FOUND, PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_unpin(store: *const pcc_store, generation: u64) -> pcc_status {
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_unpin", store, |_, inner| Ok(inner.store.unpin(generation)?)) }
}

/// Marks `step` of run `run_id` as durable on every rank of a group: a store opened with `hold` may now reclaim what is
/// older. How ranks learn that of each other is the caller's business. `generation` (may be NULL) receives the
/// checkpoint's generation here.
///
/// Durability: the mark is durable on return.
/// Threads: any number at once.
/// Ownership: `generation` is the caller's.
/// Errors: PCC_NOT_FOUND where this rank has no such checkpoint; PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN,
/// PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_mark_global(
    store: *const pcc_store,
    run_id: u64,
    step: u64,
    generation: *mut u64,
) -> pcc_status {
    let body = |inner: &StoreInner| inner.store.mark_global(run_id, step);
    // SAFETY: the header binds the caller.
    unsafe { guard::optional_result_on("pcc_mark_global", store, "generation", generation, body) }
}

/// Gives up `step` of run `run_id`, which some rank skipped, lost or failed: cancels its saves in flight, waits until
/// their I/O has ended (for at most `timeout_ms`; negative: for ever), and discards the step's checkpoints. Every rank
/// calls it. `discarded` (may be NULL) receives how many checkpoints went.
///
/// Durability: the discard is durable on return.
/// Threads: any number at once.
/// Ownership: `discarded` is the caller's.
/// Errors: PCC_TIMED_OUT: the saves are cancelled but have not ended, nothing is discarded yet, call again;
/// PCC_INVALID_STATE where the step is marked as durable everywhere, or its checkpoint is open; PCC_READ_ONLY,
/// PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_abandon(
    store: *const pcc_store,
    run_id: u64,
    step: u64,
    timeout_ms: i64,
    discarded: *mut u32,
) -> pcc_status {
    let body = |inner: &StoreInner| inner.store.abandon(run_id, step, wait_of(timeout_ms));
    // SAFETY: the header binds the caller.
    unsafe { guard::optional_result_on("pcc_abandon", store, "discarded", discarded, body) }
}

/// Discards every checkpoint newer than `generation` (0: all of them): what a group does after a restart, before any
/// rank saves again. `discarded` (may be NULL) receives how many went.
///
/// Durability: the discard is durable on return.
/// Threads: any number at once, but no save may be in flight.
/// Ownership: `discarded` is the caller's.
/// Errors: PCC_NOT_FOUND where `generation` is not a checkpoint; PCC_INVALID_STATE where saves are in flight or such a
/// checkpoint is open; PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_discard_newer(
    store: *const pcc_store,
    generation: u64,
    discarded: *mut u32,
) -> pcc_status {
    let body = |inner: &StoreInner| inner.store.discard_newer(generation);
    // SAFETY: the header binds the caller.
    unsafe { guard::optional_result_on("pcc_discard_newer", store, "discarded", discarded, body) }
}

/// A checkpoint's record as C sees it.
pub(super) fn info_of(record: &SlotRecord) -> pcc_checkpoint_info {
    pcc_checkpoint_info {
        struct_bytes: 0,
        generation: record.generation,
        step: record.step,
        run_id: record.run_id,
        payload_bytes: record.payload_bytes,
        chunk_bytes: record.chunk_bytes,
        unix_ns: record.unix_ns,
        slot: record.slot,
        tensor_count: record.tensor_count,
        flags: if record.flags & RAW_STREAM != 0 { PCC_CHECKPOINT_RAW } else { 0 },
        pinned: 0,
        readers: 0,
        rejected: 0,
    }
}

fn listed(info: &CheckpointInfo) -> pcc_checkpoint_info {
    pcc_checkpoint_info { pinned: info.pinned.into(), readers: info.readers, ..info_of(&info.record) }
}

#[cfg(test)]
mod tests {
    use super::super::raw::pcc_raw_begin;
    use super::super::status::{PCC_INTERNAL, PCC_OK};
    use super::super::text::pcc_last_error_status;
    use super::*;
    use core::ptr::{null, null_mut};
    use std::ffi::CString;

    /// A defect that shows in one call must not let a later call commit what it left behind.
    #[test]
    fn a_panic_in_a_call_on_a_store_poisons_it_for_saves_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = CString::new(dir.path().join("region").to_str().unwrap()).unwrap();
        let mut options = <pcc_open_options as guard::Versioned>::initial();
        options.required_durability = super::super::codes::PCC_DURABILITY_PROCESS;
        let (mut store, mut raw, mut count) = (null_mut(), null_mut(), 9);
        // SAFETY: all arguments are what the header asks for, here and below.
        assert_eq!(unsafe { pcc_format(path.as_ptr(), 3, 1 << 20, null()) }, PCC_OK);
        // SAFETY: as above.
        assert_eq!(unsafe { pcc_open(path.as_ptr(), &options, &mut store) }, PCC_OK);
        // SAFETY: as above.
        let status = unsafe { guard::on("pcc_test", store, |_, _: &StoreInner| panic!("a defect")) };
        assert_eq!((status, pcc_last_error_status()), (PCC_INTERNAL, PCC_INTERNAL));
        // SAFETY: as above.
        let status = unsafe { pcc_raw_begin(store, 1, 10, null(), 0, null(), &mut raw) };
        assert_eq!((status, raw), (PCC_INTERNAL, null_mut()));
        // SAFETY: as above.
        assert_eq!(unsafe { pcc_list(store, null_mut(), 0, 0, &mut count) }, PCC_OK);
        assert_eq!(count, 0);
        // SAFETY: as above.
        unsafe { pcc_close(store) };
    }
}
