//! `pcc_raw`: a save of bytes that the caller pushes, for frameworks that make their own.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_void;

use super::guard::{self, Caller, Opaque, Out};
use super::infos::pcc_progress;
use super::options::{pcc_pair, pcc_save_options};
use super::save::{pcc_save, progress_of, SaveInner};
use super::status::pcc_status;
use super::store::{pcc_store, StoreInner};
use crate::engine::Store;
use crate::error::{Error, ErrorKind};
use crate::save::RawSave;
use crate::sync::{Arc, Weak};

/// A raw save that is being written.
#[allow(non_camel_case_types)]
pub struct pcc_raw {
    _opaque: [u8; 0],
}

/// What stands behind a [`pcc_raw`].
pub(super) struct RawInner {
    raw: RawSave,
    generation: u64,
    step: u64,
    store: Weak<Store>,
}

impl Opaque for pcc_raw {
    type Inner = RawInner;
    const TAG: u64 = u64::from_le_bytes(*b"pcc__raw");
    const NAME: &'static str = "pcc_raw";

    fn store(inner: &RawInner) -> Option<Arc<Store>> {
        inner.store.upgrade()
    }
}

/// Begins a raw save of exactly `data_bytes` bytes with `metadata_count` entries of metadata; waits for a slot as long
/// as `options->wait_ms` says, which also bounds each wait for room to copy to, here and in `pcc_raw_write` (negative:
/// for ever; 0 is said of the slot, the others then take 10 s at most). It is stored as one tensor of bytes
/// (PCC_DTYPE_U8) called "raw". `options->confirm` and `pin` are those of any save: after `pcc_raw_commit` the save is
/// still to be confirmed.
///
/// Durability: none yet.
/// Threads: any number at once; raw saves count among the N in flight.
/// Ownership: `raw` receives a handle to be given to `pcc_raw_free`, or NULL on failure. Nothing else is kept; `options`
/// may be NULL.
/// Errors: PCC_NO_SLOT as `pcc_save_begin`, PCC_TIMED_OUT where the staging pool stayed full, PCC_TOO_LARGE,
/// PCC_INVALID_ARGUMENT, PCC_READ_ONLY, PCC_IO as `pcc_save_begin`, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL, PCC_FORKED,
/// PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_begin(
    store: *const pcc_store,
    step: u64,
    data_bytes: u64,
    metadata: *const pcc_pair,
    metadata_count: u64,
    options: *const pcc_save_options,
    raw: *mut *mut pcc_raw,
) -> pcc_status {
    let places = |caller: &Caller| caller.out_handle("raw", raw);
    let body = |caller: &Caller, inner: &StoreInner, out: Out<*mut pcc_raw>| {
        let options = caller.save_options(options)?;
        let metadata = caller.metadata(metadata, metadata_count)?;
        let raw = inner.store.begin_raw(step, data_bytes, &metadata, options)?;
        let generation = raw.generation();
        out.set(guard::new_handle(RawInner { raw, generation, step, store: Arc::downgrade(&inner.store) }));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_raw_begin", store, places, body) }
}

/// Stores in `payload_bytes` what a raw save of `data_bytes` bytes and this metadata takes: the `payload_bytes` to format
/// a region for.
///
/// Durability: none.
/// Threads: any.
/// Ownership: nothing is kept.
/// Errors: PCC_INVALID_ARGUMENT and PCC_TOO_LARGE as `pcc_raw_begin`; PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_payload_bytes(
    data_bytes: u64,
    metadata: *const pcc_pair,
    metadata_count: u64,
    payload_bytes: *mut u64,
) -> pcc_status {
    let body = |caller: &Caller| {
        let out = caller.out("payload_bytes", payload_bytes, 0)?;
        out.set(Store::raw_payload_bytes(data_bytes, &caller.metadata(metadata, metadata_count)?)?);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_raw_payload_bytes", body) }
}

/// Copies `bytes` bytes of `data` to `offset` of the stream. Each byte is written once, in any order; writing in order
/// is fastest. Blocks while the staging pool is full, but no single wait longer than the `wait_ms` given at begin.
///
/// Durability: none yet.
/// Threads: any number at once on one save.
/// Ownership: `data` is the caller's again on return.
/// Errors: PCC_INVALID_ARGUMENT for a range that passes the end or was written before (nothing is changed by it, unless
/// only a part of the range was written before); PCC_INVALID_STATE after commit. After the following the save has
/// failed: PCC_TIMED_OUT (the write may have taken a part, so it cannot be repeated); PCC_TOO_LARGE after 65536 ranges
/// with gaps between them (write larger or adjoining pieces); PCC_CORRUPT where the medium changed what was put by;
/// otherwise why it failed before. PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_write(
    raw: *const pcc_raw,
    offset: u64,
    data: *const c_void,
    bytes: u64,
) -> pcc_status {
    let body = |caller: &Caller, inner: &RawInner| {
        let data = caller.bytes("data", data, bytes)?;
        Ok(inner.raw.write_at(offset, data)?)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_raw_write", raw, body) }
}

/// Lets the save commit (once it is confirmed, where it was begun with `confirm`); every byte must have been written.
/// `save` receives the save that can be waited for, confirmed, cancelled and freed like any other. The raw handle remains
/// to be freed.
///
/// Durability: none yet: see `pcc_save_wait_durable`.
/// Threads: no other call may use `raw` meanwhile.
/// Ownership: `save` receives a handle to be given to `pcc_save_free`, or NULL on failure.
/// Errors: PCC_INVALID_STATE where bytes are missing (they may still be written) or it was committed before; otherwise
/// why the save failed; PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_commit(raw: *mut pcc_raw, save: *mut *mut pcc_save) -> pcc_status {
    let body = |caller: &Caller| {
        let out = caller.out_handle("save", save)?;
        let inner = caller.handle_mut(raw)?;
        let save = inner.raw.commit()?;
        out.set(guard::new_handle(SaveInner::new(save, inner.store.clone())));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_raw_commit", body) }
}

/// How far a raw save is that was not committed yet. Never blocks. Set `progress->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `progress` is the caller's.
/// Errors: PCC_INVALID_STATE after commit; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_progress(raw: *const pcc_raw, progress: *mut pcc_progress) -> pcc_status {
    let body = |caller: &Caller, inner: &RawInner| {
        let now = inner.raw.progress().ok_or_else(|| {
            Error::new(ErrorKind::InvalidState, caller.op(), "the raw save was committed: ask its pcc_save")
        })?;
        let value = pcc_progress { generation: inner.generation, step: inner.step, ..progress_of(&now) };
        caller.fill(progress, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_raw_progress", raw, body) }
}

/// Cancels a raw save that was not committed yet; writes that are going on in other threads end with PCC_CANCELLED.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the handle remains to be freed.
/// Errors: PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_cancel(raw: *const pcc_raw) -> pcc_status {
    let body = |_: &Caller, inner: &RawInner| {
        inner.raw.cancel();
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_raw_cancel", raw, body) }
}

/// Frees a raw save's handle; NULL is fine. Cancels it unless it was committed.
///
/// Durability: commits nothing, and takes nothing back.
/// Threads: no other call may use the handle meanwhile or later.
/// Ownership: frees `raw`. In a forked child it only forgets it.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_raw_free(raw: *mut pcc_raw) {
    // SAFETY: the header binds the caller.
    unsafe { guard::free("pcc_raw_free", raw) }
}
