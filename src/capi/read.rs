//! Reading from a checkpoint: pieces of tensors, the payload as a whole, and tensors that are restored.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_void;

use super::checkpoint::{pcc_checkpoint, CheckpointInner};
use super::guard::{self, disjoint, Caller, Outcome};
use super::options::pcc_read;
use super::save::TensorArg;
use super::status::pcc_status;
use crate::load::{Checkpoint, Part, PartAt};

/// Reads `read_count` pieces of tensors in parallel; every chunk that holds a byte of them is verified. Blocks until
/// done, also for memory of GPUs, on which nothing that was enqueued before may still be at work: synchronise first.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: on failure the destinations hold unspecified bytes.
/// Errors: PCC_NOT_FOUND for an unknown tensor; PCC_INVALID_ARGUMENT for a piece that passes its tensor, and for
/// destinations that overlap; PCC_CORRUPT where stored bytes are damaged; PCC_UNSUPPORTED for memory of a GPU
/// where this system or this build has none; PCC_DEVICE, PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_read(
    checkpoint: *const pcc_checkpoint,
    reads: *const pcc_read,
    read_count: u64,
) -> pcc_status {
    let body = |caller: &Caller, inner: &CheckpointInner| {
        caller.limit("reads", read_count)?;
        let reads = caller.options_array("reads", reads, read_count)?;
        let places: Vec<Place> = reads
            .iter()
            .enumerate()
            .map(|(number, read)| place_of(caller, inner, number, read))
            .collect::<Outcome<_>>()?;
        check_disjoint(caller, &places)?;
        Ok(read_places(caller, &inner.checkpoint, &places)?)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_checkpoint_read", checkpoint, body) }
}

/// Reads `bytes` bytes of the payload from `offset`, verified. The whole payload (`payload_bytes` of its info) is a
/// complete safetensors file: written to a file, it is the checkpoint's export.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: on failure `dst` holds unspecified bytes.
/// Errors: PCC_INVALID_ARGUMENT for a range that passes the payload; PCC_CORRUPT, PCC_RECLAIMED, PCC_IO, PCC_FORKED,
/// PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_read_payload(
    checkpoint: *const pcc_checkpoint,
    offset: u64,
    dst: *mut c_void,
    bytes: u64,
) -> pcc_status {
    let body = |caller: &Caller, inner: &CheckpointInner| {
        let dst = caller.bytes_mut("dst", dst, bytes)?;
        Ok(inner.checkpoint.read(&mut [Part { offset, dst }])?)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_checkpoint_read_payload", checkpoint, body) }
}

/// Reads and verifies every chunk of the payload; nothing is kept.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: none.
/// Errors: PCC_CORRUPT where stored bytes are damaged; PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_verify(checkpoint: *const pcc_checkpoint) -> pcc_status {
    let body = |_: &Caller, inner: &CheckpointInner| Ok(inner.checkpoint.verify()?);
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_checkpoint_verify", checkpoint, body) }
}

/// Closes a checkpoint, which may then be overwritten unless it is pinned; NULL is fine.
///
/// Durability: none.
/// Threads: no other call may use the handle meanwhile or later.
/// Ownership: frees `checkpoint` and every text that was got from it. In a forked child it only forgets it.
/// Errors: none.
#[no_mangle]
pub unsafe extern "C" fn pcc_checkpoint_close(checkpoint: *mut pcc_checkpoint) {
    // SAFETY: the header binds the caller.
    unsafe { guard::free("pcc_checkpoint_close", checkpoint) }
}

/// Bytes of the payload, and where they go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    dst: *mut c_void,
    bytes: u64,
    offset: u64,
    device: Option<u32>,
}

fn place_of(caller: &Caller, inner: &CheckpointInner, number: usize, read: &pcc_read) -> Outcome<Place> {
    let device = caller.device(&format!("reads[{number}]"), read.device, read.device_index)?;
    let index = match read.name.is_null() {
        true => read.index,
        false => {
            inner.tensor_named(caller.op(), caller.text(&format!("reads[{number}].name"), read.name)?)?
        }
    };
    let tensor = &inner.checkpoint.tensors()[inner.tensor_at(caller.op(), index)?];
    if read.offset.checked_add(read.bytes).is_none_or(|end| end > tensor.bytes) {
        return Err(caller.invalid(format!(
            "reads[{number}]: {} bytes at {} pass tensor {:?} of {} bytes",
            read.bytes, read.offset, tensor.name, tensor.bytes
        )));
    }
    if read.bytes > 0 {
        caller.check_memory(&format!("reads[{number}].dst"), read.dst, read.bytes)?;
    }
    Ok(Place { dst: read.dst, bytes: read.bytes, offset: tensor.offset + read.offset, device })
}

/// Where the tensors of a restore are in a checkpoint. Tied tensors that share memory are read once.
pub(super) fn placed(
    caller: &Caller,
    checkpoint: &Checkpoint,
    tensors: &[TensorArg<'_>],
) -> Outcome<Vec<Place>> {
    let mut places = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        // Not PCC_NOT_FOUND, by which programs know that there is no checkpoint yet: they would start from nothing.
        let stored = checkpoint.tensor(tensor.name).map_err(|error| caller.invalid(error.to_string()))?;
        let same =
            stored.dtype == tensor.dtype && stored.shape == tensor.shape && stored.bytes == tensor.bytes;
        if !same {
            return Err(caller.invalid(format!(
                "tensor {:?} is {} {:?} of {} bytes here, and {} {:?} of {} bytes in the checkpoint of generation {}",
                tensor.name,
                tensor.dtype.name(),
                tensor.shape,
                tensor.bytes,
                stored.dtype.name(),
                stored.shape,
                stored.bytes,
                checkpoint.record().generation
            )));
        }
        let offset = stored.offset;
        places.push(Place { dst: tensor.data, bytes: tensor.bytes, offset, device: tensor.device });
    }
    places.sort_unstable();
    places.dedup();
    check_disjoint(caller, &places)?;
    Ok(places)
}

fn check_disjoint(caller: &Caller, places: &[Place]) -> Outcome<()> {
    let used = places.iter().filter(|place| place.bytes > 0);
    let mut spans: Vec<(usize, u64)> = used.map(|place| (place.dst as usize, place.bytes)).collect();
    match disjoint(&mut spans) {
        true => Ok(()),
        false => Err(caller.invalid("destinations overlap".into())),
    }
}

/// Reads into places that were found to be disjoint.
pub(super) fn read_places(caller: &Caller, checkpoint: &Checkpoint, places: &[Place]) -> crate::Result<()> {
    let mut parts = Vec::with_capacity(places.len());
    for place in places.iter().filter(|place| place.bytes > 0) {
        caller.check_memory("destination", place.dst, place.bytes).map_err(|fault| fault.error)?;
        let (ptr, bytes) = (place.dst.cast(), place.bytes as usize);
        parts.push(PartAt { offset: place.offset, ptr, bytes, device: place.device });
    }
    // SAFETY: disjoint, and by the header's promise writable by this call alone.
    unsafe { checkpoint.read_at(&parts) }
}
