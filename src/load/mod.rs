//! Checkpoints: open, verify, read in parallel, and fall back when a payload is damaged.

mod plan;
mod reader;
#[cfg_attr(not(feature = "cuda"), path = "no_upload.rs")]
mod upload;

use std::collections::BTreeMap;

pub use plan::{Part, PartAt};

use crate::error::{Error, ErrorKind, Result};
use crate::format::codec::reserved;
use crate::format::{
    chunk_hash, decode_table, header_len, parse_header, Payload, SlotRecord, TensorInfo, BLOCK_BYTES,
    HEADER_HASHED,
};
use crate::store::Region;
use crate::sync::{Arc, Mutex};

/// An open, pinned checkpoint: record, chunk table and header are verified, payload chunks as they are read.
///
/// In the writer's own store it cannot be overwritten while open. A read-only store cannot pin: a read that the
/// writer overtakes ends with `Reclaimed`.
pub struct Checkpoint {
    place: Place,
    payload: Payload,
    hashes: Vec<u128>,
    by_name: BTreeMap<String, usize>,
    /// What reads of this checkpoint met, as opposed to what their caller did with them.
    damage: Mutex<Option<Error>>,
}

/// A checkpoint's slot, protected while this lives where the store can protect it.
struct Place {
    region: Arc<Region>,
    record: SlotRecord,
    pinned: bool,
}

impl Place {
    fn take(region: &Arc<Region>, record: SlotRecord, fallback: bool) -> Result<Place> {
        let pinned = !region.options().read_only;
        if pinned && !region.add_reader(&record, fallback)? {
            return Err(reclaimed(region, &record));
        }
        Ok(Place { region: region.clone(), record, pinned })
    }

    /// Byte offset in the region of a byte of the slot.
    fn offset(&self, within: u64) -> u64 {
        self.region.layout().slot_offset(self.record.slot) + within
    }

    fn read_hashes(&self) -> Result<Vec<u128>> {
        let mut table = zeroed(self.record.table_bytes())?;
        self.region.medium().read(self.offset(self.record.table_offset), &mut table)?;
        decode_table(&table, &self.record)
    }

    fn read_payload_header(&self, hashes: &[u128]) -> Result<Payload> {
        let header = self.read_header(hashes)?;
        // A valid record has room for it.
        let first = header.first_chunk().copied().unwrap_or_default();
        let header_bytes = header_len(&first, self.record.payload_bytes)?;
        if header_bytes != self.record.header_bytes {
            let expected = self.record.header_bytes;
            return Err(corrupt(format!(
                "payload header has {header_bytes} bytes, its record says {expected}"
            )));
        }
        let mut payload = parse_header(&header, self.record.payload_bytes)?;
        if let Some(more) = payload.metadata_place {
            let bytes = self.read_verified(hashes, more.offset, more.bytes)?;
            payload.load_metadata(&bytes)?;
        }
        Ok(payload)
    }

    /// The header's bytes, verified: by a hash of their own where the record has it, else with the chunks that hold them.
    fn read_header(&self, hashes: &[u128]) -> Result<Vec<u8>> {
        let bytes = self.record.header_bytes;
        if self.record.flags & HEADER_HASHED == 0 {
            return self.read_verified(hashes, 0, bytes);
        }
        let mut header = zeroed(bytes)?;
        self.region.medium().read(self.offset(0), &mut header)?;
        match chunk_hash(&header) == self.record.header_hash {
            true => Ok(header),
            false => Err(corrupt(format!(
                "the payload header of generation {} in slot {} does not match its hash: the medium was damaged",
                self.record.generation, self.record.slot
            ))
            .at_offset(self.offset(0))
            .advise("restore an older checkpoint")),
        }
    }

    /// Payload bytes from chunks that verify; `len` was bounded by a limit of the format before.
    fn read_verified(&self, hashes: &[u128], offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = zeroed(len)?;
        let part = [at_address(&mut Part { offset, dst: &mut bytes })];
        // SAFETY: one part, borrowed exclusively.
        #[expect(unsafe_code, reason = "the reader writes by address")]
        unsafe { reader::read_parts(&self.region, &self.record, hashes, &part) }?;
        Ok(bytes)
    }

    fn check_not_reclaimed(&self) -> Result<()> {
        if self.pinned {
            return Ok(());
        }
        match self.region.read_record(self.record.slot) {
            Ok(Some(now)) if now == self.record => Ok(()),
            _ => Err(reclaimed(&self.region, &self.record)),
        }
    }

    /// In a read-only store, bytes that do not verify because the slot was taken again are not damage.
    fn explain(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::Corrupt {
            if let Err(reclaimed) = self.check_not_reclaimed() {
                return reclaimed;
            }
        }
        error.at_path(self.region.path())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.pinned && !self.region.forked() {
            self.region.drop_reader(self.record.slot, self.record.generation);
        }
    }
}

impl Checkpoint {
    /// Opens the checkpoint that `record` describes, verifying its table and header. A `fallback` serves in the place of a
    /// damaged one and is not refused for want of slots.
    pub(crate) fn open(region: &Arc<Region>, record: SlotRecord, fallback: bool) -> Result<Checkpoint> {
        let place = Place::take(region, record, fallback)?;
        let read = || -> Result<(Vec<u128>, Payload)> {
            let hashes = place.read_hashes()?;
            let payload = place.read_payload_header(&hashes)?;
            place.check_not_reclaimed()?;
            Ok((hashes, payload))
        };
        let (hashes, payload) = read().map_err(|e| place.explain(e))?;
        let by_name = payload.tensors.iter().enumerate().map(|(index, t)| (t.name.clone(), index)).collect();
        Ok(Checkpoint { place, payload, hashes, by_name, damage: Mutex::new(None) })
    }

    /// Generation, step, sizes, times.
    pub fn record(&self) -> &SlotRecord {
        &self.place.record
    }

    /// The user's metadata.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.payload.metadata
    }

    /// Every tensor, in payload order, with its place in the payload.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.payload.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        self.by_name.get(name).map(|&index| &self.payload.tensors[index]).ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                "look up tensor",
                format!("checkpoint of generation {} has no tensor {name:?}", self.place.record.generation),
            )
            .at_path(self.place.region.path())
        })
    }

    /// Reads any parts of the payload in parallel; every chunk that holds one is verified. Blocks until done.
    ///
    /// On error the destinations hold unspecified bytes.
    pub fn read(&self, parts: &mut [Part<'_>]) -> Result<()> {
        let parts: Vec<PartAt> = parts.iter_mut().map(at_address).collect();
        // SAFETY: distinct exclusive borrows.
        #[expect(unsafe_code, reason = "the reader writes by address")]
        unsafe {
            self.read_at(&parts)
        }
    }

    /// As [`Checkpoint::read`], by address, also into memory of GPUs. What it writes there is complete on return.
    ///
    /// # Errors
    ///
    /// For memory of GPUs also `Unsupported` where this system or this build has none, `InvalidArgument` where it is not
    /// that GPU's, `Device` where the driver reports a failure.
    ///
    /// # Safety
    ///
    /// Every part must be valid for writes until the call returns, no two may overlap, and nobody else may use them
    /// meanwhile: nothing that was enqueued on a stream before may still be at work on them.
    #[expect(unsafe_code, reason = "the caller promises that the memory is there")]
    pub unsafe fn read_at(&self, parts: &[PartAt]) -> Result<()> {
        self.place.region.check_usable("read checkpoint", false)?;
        // SAFETY: the caller's promise.
        let read = unsafe { reader::read_parts(&self.place.region, &self.place.record, &self.hashes, parts) };
        self.judge(read)
    }

    /// Reads whole tensors by name into buffers of exactly their size.
    pub fn read_tensors(&self, wanted: &mut [(&str, &mut [u8])]) -> Result<()> {
        let mut parts = Vec::with_capacity(wanted.len());
        for (name, dst) in wanted.iter_mut() {
            let tensor = self.tensor(name)?;
            if tensor.bytes != dst.len() as u64 {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    "read tensor",
                    format!("tensor {name:?} has {} bytes, the destination {}", tensor.bytes, dst.len()),
                )
                .at_path(self.place.region.path()));
            }
            parts.push(Part { offset: tensor.offset, dst });
        }
        self.read(&mut parts)
    }

    /// One tensor's bytes.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = zeroed(self.tensor(name)?.bytes)?;
        self.read_tensors(&mut [(name, &mut bytes)])?;
        Ok(bytes)
    }

    /// Reads and verifies every chunk; nothing is kept.
    pub fn verify(&self) -> Result<()> {
        self.judge(reader::verify_all(&self.place.region, &self.place.record, &self.hashes))
    }

    /// What a read came to, remembered where it speaks against the checkpoint.
    fn judge(&self, result: Result<()>) -> Result<()> {
        let result =
            result.and_then(|()| self.place.check_not_reclaimed()).map_err(|e| self.place.explain(e));
        if let Err(error) = result.as_ref() {
            if concerns_one(error) {
                *self.damage.lock() = Some(error.clone());
            }
        }
        result
    }

    /// The last error by which a read of this checkpoint showed that it is damaged, unreadable or overtaken.
    pub(crate) fn damage(&self) -> Option<Error> {
        self.damage.lock().clone()
    }
}

/// Whether an error concerns one checkpoint, so that another may serve in its place.
pub(crate) fn concerns_one(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Reclaimed | ErrorKind::Io)
}

fn reclaimed(region: &Region, record: &SlotRecord) -> Error {
    Error::new(
        ErrorKind::Reclaimed,
        "open checkpoint",
        format!("slot {} of generation {} was taken by a newer save", record.slot, record.generation),
    )
    .at_path(region.path())
    .advise("open the newest checkpoint again, or pin it in the writer")
}

fn corrupt(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, "open checkpoint", message)
}

fn at_address(part: &mut Part<'_>) -> PartAt {
    PartAt { offset: part.offset, ptr: part.dst.as_mut_ptr(), bytes: part.dst.len(), device: None }
}

/// So many zeros; an error where the memory cannot be had.
fn zeroed(bytes: u64) -> Result<Vec<u8>> {
    let mut zeros = reserved(bytes, "read checkpoint")?;
    // It fits the address space: there is room for it.
    zeros.resize(bytes as usize, 0);
    Ok(zeros)
}

/// Blocks that hold `bytes` bytes.
pub(crate) fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(BLOCK_BYTES as usize)
}
