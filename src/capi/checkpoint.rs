//! `pcc_checkpoint`: finding and restoring checkpoints, and what is in them.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_char;
use core::fmt::Write;
use std::collections::BTreeMap;

use super::guard::{self, Caller, Opaque, Out, Outcome};
use super::infos::{pcc_checkpoint_info, pcc_tensor_info};
use super::options::{pcc_select_options, pcc_tensor};
use super::read::{placed, read_places};
use super::status::pcc_status;
use super::store::{info_of, pcc_store, StoreInner};
use super::text::CText;
use crate::engine::{Opened, Store};
use crate::error::{Error, ErrorKind};
use crate::load::Checkpoint;
use crate::sync::{Arc, Weak};

/// An open checkpoint. It is not overwritten while it is open (a read-only store cannot promise that: it gives
/// PCC_RECLAIMED when the writer was faster).
#[allow(non_camel_case_types)]
pub struct pcc_checkpoint {
    _opaque: [u8; 0],
}

/// What stands behind a [`pcc_checkpoint`].
pub(super) struct CheckpointInner {
    pub checkpoint: Checkpoint,
    rejected: u32,
    rejected_text: String,
    /// Per tensor, its name and that of the tensor it is tied to.
    names: Vec<(CText, Option<CText>)>,
    indices: BTreeMap<String, u64>,
    /// Sorted by key.
    metadata: Vec<(CText, CText)>,
    store: Weak<Store>,
}

impl Opaque for pcc_checkpoint {
    type Inner = CheckpointInner;
    const TAG: u64 = u64::from_le_bytes(*b"pcc_chkp");
    const NAME: &'static str = "pcc_checkpoint";

    fn store(inner: &CheckpointInner) -> Option<Arc<Store>> {
        inner.store.upgrade()
    }
}

impl CheckpointInner {
    fn new(opened: Opened, store: &Arc<Store>) -> CheckpointInner {
        let Opened { checkpoint, rejected } = opened;
        let mut rejected_text = String::new();
        for (record, error) in &rejected {
            // Writing to a String cannot fail.
            let _ = writeln!(rejected_text, "generation {} step {}: {error}", record.generation, record.step);
        }
        let tensors = checkpoint.tensors();
        let names = tensors.iter().map(|t| (CText::new(&t.name), t.alias_of.as_deref().map(CText::new)));
        let metadata = checkpoint.metadata().iter().map(|(key, value)| (CText::new(key), CText::new(value)));
        CheckpointInner {
            names: names.collect(),
            indices: tensors.iter().enumerate().map(|(index, t)| (t.name.clone(), index as u64)).collect(),
            metadata: metadata.collect(),
            rejected: rejected.len() as u32,
            rejected_text,
            store: Arc::downgrade(store),
            checkpoint,
        }
    }

    fn not_found(&self, op: &'static str, message: String) -> Error {
        let record = self.checkpoint.record();
        let message =
            format!("checkpoint of generation {} step {}: {message}", record.generation, record.step);
        Error::new(ErrorKind::NotFound, op, message)
    }

    pub fn tensor_at(&self, op: &'static str, index: u64) -> Outcome<usize> {
        let count = self.names.len();
        usize::try_from(index).ok().filter(|&index| index < count).ok_or_else(|| {
            self.not_found(op, format!("no tensor has index {index}, there are {count}")).into()
        })
    }

    pub fn tensor_named(&self, op: &'static str, name: &str) -> Outcome<u64> {
        self.indices
            .get(name)
            .copied()
            .ok_or_else(|| self.not_found(op, format!("no tensor is called {name:?}")).into())
    }
}

/// Opens the checkpoint that `options` select (NULL: the newest), passing over damaged ones where the selection allows
/// it; `pcc_checkpoint_info` and `pcc_checkpoint_rejected` tell of those.
///
/// Durability: what was opened is durable.
/// Threads: any number at once.
/// Ownership: `checkpoint` receives a handle to be given to `pcc_checkpoint_close`, or NULL on failure.
/// Errors: PCC_NOT_FOUND; PCC_CORRUPT where all candidates are damaged; PCC_NO_SLOT where holding it would leave fewer
/// than N slots to save into; PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_open(
    store: *const pcc_store,
    options: *const pcc_select_options,
    checkpoint: *mut *mut pcc_checkpoint,
) -> pcc_status {
    let places = |caller: &Caller| caller.out_handle("checkpoint", checkpoint);
    let body = |caller: &Caller, inner: &StoreInner, out: Out<*mut pcc_checkpoint>| {
        let (select, verify) = caller.select(options)?;
        let opened = inner.store.open_checkpoint(select, verify)?;
        out.set(guard::new_handle(CheckpointInner::new(opened, &inner.store)));
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_checkpoint_open", store, places, body) }
}

/// Restores in one verified pass: reads the `tensor_count` named tensors of the checkpoint that `options` select (NULL:
/// the newest) into their `data`, in parallel, verifying every chunk on the way. Name, dtype, shape and size must be
/// those of the checkpoint; it may hold further tensors. Where a payload turns out to be damaged, the next candidate is
/// read instead. Tensors may be on GPUs, where nothing that was enqueued before may still be at work on them: synchronise
/// first. `checkpoint` (may be NULL) receives the checkpoint that was restored, for its step and metadata.
///
/// Durability: what was restored is durable.
/// Threads: any number at once.
/// Ownership: on failure the tensors hold unspecified bytes, unless it is PCC_NOT_FOUND or PCC_INVALID_ARGUMENT: then
/// nothing was written. `checkpoint` receives a handle to be given to `pcc_checkpoint_close`, or NULL on failure.
/// Errors: as `pcc_checkpoint_open`, so that PCC_NOT_FOUND says that there is no such checkpoint; PCC_INVALID_ARGUMENT
/// also for a tensor that it lacks or that differs in dtype, shape or size, and for memory that overlaps (but for tied
/// tensors).
#[no_mangle]
pub unsafe extern "C" fn pcc_restore(
    store: *const pcc_store,
    options: *const pcc_select_options,
    tensors: *const pcc_tensor,
    tensor_count: u64,
    checkpoint: *mut *mut pcc_checkpoint,
) -> pcc_status {
    let places = |caller: &Caller| caller.out_optional("checkpoint", checkpoint, core::ptr::null_mut());
    let body = |caller: &Caller, inner: &StoreInner, out: Out<*mut pcc_checkpoint>| {
        let (select, _) = caller.select(options)?;
        let tensors = caller.tensors(tensors, tensor_count)?;
        let mut refused = None;
        let result = inner.store.restore(select, |checkpoint| {
            let places = match placed(caller, checkpoint, &tensors) {
                Ok(places) => places,
                Err(fault) => {
                    // The engine carries errors, not statuses.
                    let error = fault.error.clone();
                    refused = Some(fault);
                    return Err(error);
                }
            };
            read_places(caller, checkpoint, &places)
        });
        let opened = result.map_err(|error| refused.take().unwrap_or(error.into()))?;
        if out.is_wanted() {
            out.set(guard::new_handle(CheckpointInner::new(opened, &inner.store)));
        }
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_restore", store, places, body) }
}

/// Fills `info` for an open checkpoint. Set `info->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `info` is the caller's.
/// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_get_info(
    checkpoint: *const pcc_checkpoint,
    info: *mut pcc_checkpoint_info,
) -> pcc_status {
    let body = |caller: &Caller, inner: &CheckpointInner| {
        let record = inner.checkpoint.record();
        let listed = match inner.store.upgrade() {
            Some(store) => store.checkpoints()?.into_iter().find(|found| found.record == *record),
            None => None,
        };
        let value = pcc_checkpoint_info {
            rejected: inner.rejected,
            pinned: listed.as_ref().is_some_and(|found| found.pinned).into(),
            readers: listed.map_or(0, |found| found.readers),
            ..info_of(record)
        };
        caller.fill(info, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_checkpoint_get_info", checkpoint, body) }
}

/// Copies why newer candidates were passed over when this checkpoint was opened, one line each; as `pcc_last_error`.
/// Returns 0 where none was.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_rejected(
    checkpoint: *const pcc_checkpoint,
    buf: *mut c_char,
    cap: u64,
) -> u64 {
    let body = |caller: &Caller, inner: &CheckpointInner| {
        if inner.rejected == 0 {
            caller.copy_text(buf, cap, "");
            return Ok(0);
        }
        Ok(caller.text_to(buf, cap, &inner.rejected_text))
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::value_on("pcc_checkpoint_rejected", checkpoint, 0, body) }
}

/// Number of entries of metadata; 0 on failure.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_metadata_count(checkpoint: *const pcc_checkpoint) -> u64 {
    let body = |_: &Caller, inner: &CheckpointInner| Ok(inner.metadata.len() as u64);
    // SAFETY: the header binds the caller.
    unsafe { guard::value_on("pcc_checkpoint_metadata_count", checkpoint, 0, body) }
}

/// Entry `index` of the metadata, in the order of the keys' bytes. Each text is UTF-8 and followed by a NUL; the
/// lengths (either may be NULL) do not count it.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the texts live until `pcc_checkpoint_close`.
/// Errors: PCC_NOT_FOUND where there is no such index; PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_metadata_get(
    checkpoint: *const pcc_checkpoint,
    index: u64,
    key: *mut *const c_char,
    key_bytes: *mut u64,
    value: *mut *const c_char,
    value_bytes: *mut u64,
) -> pcc_status {
    let places = |caller: &Caller| {
        let texts =
            (caller.out("key", key, core::ptr::null())?, caller.out("value", value, core::ptr::null())?);
        let lengths = (
            caller.out_optional("key_bytes", key_bytes, 0)?,
            caller.out_optional("value_bytes", value_bytes, 0)?,
        );
        Ok((texts, lengths))
    };
    type Places = ((Out<*const c_char>, Out<*const c_char>), (Out<u64>, Out<u64>));
    let body = |caller: &Caller,
                inner: &CheckpointInner,
                ((key, value), (key_bytes, value_bytes)): Places| {
        let found = usize::try_from(index).ok().and_then(|index| inner.metadata.get(index));
        let (key_text, value_text) = found.ok_or_else(|| {
            let count = inner.metadata.len();
            inner.not_found(caller.op(), format!("no metadata has index {index}, there are {count} entries"))
        })?;
        key.set(key_text.as_ptr());
        value.set(value_text.as_ptr());
        key_bytes.set(key_text.len());
        value_bytes.set(value_text.len());
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_checkpoint_metadata_get", checkpoint, places, body) }
}

/// The value of a metadata key (NUL-terminated UTF-8). `value_bytes` may be NULL, and does not count the final NUL.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the value lives until `pcc_checkpoint_close`.
/// Errors: PCC_NOT_FOUND where there is no such key; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_metadata_find(
    checkpoint: *const pcc_checkpoint,
    key: *const c_char,
    value: *mut *const c_char,
    value_bytes: *mut u64,
) -> pcc_status {
    let places = |caller: &Caller| {
        Ok((
            caller.out("value", value, core::ptr::null())?,
            caller.out_optional("value_bytes", value_bytes, 0)?,
        ))
    };
    type Places = (Out<*const c_char>, Out<u64>);
    let body = |caller: &Caller, inner: &CheckpointInner, (value, value_bytes): Places| {
        let key = caller.text("key", key)?;
        let found = inner.metadata.binary_search_by(|(candidate, _)| candidate.bytes().cmp(key.as_bytes()));
        let index =
            found.map_err(|_| inner.not_found(caller.op(), format!("no metadata has the key {key:?}")))?;
        let text = &inner.metadata[index].1;
        value.set(text.as_ptr());
        value_bytes.set(text.len());
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_checkpoint_metadata_find", checkpoint, places, body) }
}

/// Number of tensors, tied ones included; 0 on failure. Stored tensors come first, in payload order.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_tensor_count(checkpoint: *const pcc_checkpoint) -> u64 {
    let body = |_: &Caller, inner: &CheckpointInner| Ok(inner.names.len() as u64);
    // SAFETY: the header binds the caller.
    unsafe { guard::value_on("pcc_checkpoint_tensor_count", checkpoint, 0, body) }
}

/// Fills `info` for tensor `index`. Set `info->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `info` is the caller's; name and shape in it live until `pcc_checkpoint_close`.
/// Errors: PCC_NOT_FOUND where there is no such index; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_tensor_get(
    checkpoint: *const pcc_checkpoint,
    index: u64,
    info: *mut pcc_tensor_info,
) -> pcc_status {
    let body = |caller: &Caller, inner: &CheckpointInner| {
        let at = inner.tensor_at(caller.op(), index)?;
        let (tensor, (name, tied_to)) = (&inner.checkpoint.tensors()[at], &inner.names[at]);
        let value = pcc_tensor_info {
            struct_bytes: 0,
            name: name.as_ptr(),
            name_bytes: name.len(),
            shape: tensor.shape.as_ptr(),
            tied_to: tied_to.as_ref().map_or(core::ptr::null(), CText::as_ptr),
            bytes: tensor.bytes,
            payload_offset: tensor.offset,
            dtype: tensor.dtype.code(),
            rank: tensor.shape.len() as u32,
        };
        caller.fill(info, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_checkpoint_tensor_get", checkpoint, body) }
}

/// Stores in `index` the index of the tensor called `name` (NUL-terminated UTF-8).
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `index` is the caller's.
/// Errors: PCC_NOT_FOUND; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for text that is not UTF-8.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_tensor_find(
    checkpoint: *const pcc_checkpoint,
    name: *const c_char,
    index: *mut u64,
) -> pcc_status {
    let places = |caller: &Caller| caller.out("index", index, u64::MAX);
    let body = |caller: &Caller, inner: &CheckpointInner, out: Out<u64>| {
        out.set(inner.tensor_named(caller.op(), caller.text("name", name)?)?);
        Ok(())
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::results_on("pcc_checkpoint_tensor_find", checkpoint, places, body) }
}
