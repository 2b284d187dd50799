//! Checkpoints: open, verify, read in parallel, and fall back when a payload is damaged.

mod plan;
mod reader;

use std::collections::BTreeMap;

pub use plan::Part;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    chunk_hash, decode_table, header_len, parse_header, Payload, SlotRecord, TensorInfo, BLOCK_BYTES,
};
use crate::store::Region;
use crate::sync::Arc;

/// An open, pinned checkpoint: record, chunk table and header are verified, payload chunks as they are read.
///
/// In the writer's own store it cannot be overwritten while open. A read-only store cannot pin: a read that the
/// writer overtakes ends with `Reclaimed`.
pub struct Checkpoint {
    region: Arc<Region>,
    record: SlotRecord,
    payload: Payload,
    hashes: Vec<u128>,
    by_name: BTreeMap<String, usize>,
    pinned: bool,
}

impl Checkpoint {
    /// Opens the checkpoint that `record` describes, verifying its table and header.
    pub(crate) fn open(region: &Arc<Region>, record: SlotRecord) -> Result<Checkpoint> {
        let pinned = !region.options().read_only;
        if pinned && !region.add_reader(&record)? {
            return Err(reclaimed(region, &record));
        }
        let mut checkpoint = Checkpoint {
            region: region.clone(),
            record,
            payload: Payload::default(),
            hashes: Vec::new(),
            by_name: BTreeMap::new(),
            pinned,
        };
        // From here on dropping `checkpoint` gives the pin back.
        checkpoint.read_table_and_header().map_err(|e| checkpoint.explain(e))?;
        Ok(checkpoint)
    }

    fn read_table_and_header(&mut self) -> Result<()> {
        let slot_offset = self.region.layout().slot_offset(self.record.slot);
        let mut table = vec![0u8; self.record.table_bytes() as usize];
        self.region.medium().read(slot_offset + self.record.table_offset, &mut table)?;
        self.hashes = decode_table(&table, &self.record)?;
        let mut first = [0u8; 8];
        self.region.medium().read(slot_offset, &mut first)?;
        let header_bytes = header_len(&first, self.record.payload_bytes)?;
        if header_bytes != self.record.header_bytes {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "open checkpoint",
                format!("payload header has {header_bytes} bytes, its record says {}", self.record.header_bytes),
            ));
        }
        let header = self.read_verified_prefix(header_bytes)?;
        self.payload = parse_header(&header, self.record.payload_bytes)?;
        self.by_name =
            self.payload.tensors.iter().enumerate().map(|(index, t)| (t.name.clone(), index)).collect();
        self.check_not_reclaimed()
    }

    /// The first `len` bytes of the payload, from chunks that verify.
    fn read_verified_prefix(&self, len: u64) -> Result<Vec<u8>> {
        let slot_offset = self.region.layout().slot_offset(self.record.slot);
        let mut prefix = Vec::new();
        let mut chunk = 0;
        while (prefix.len() as u64) < len {
            let mut bytes = vec![0u8; self.record.chunk_len(chunk)];
            self.region.medium().read(slot_offset + chunk * self.record.chunk_bytes, &mut bytes)?;
            if chunk_hash(&bytes) != self.hashes[chunk as usize] {
                return Err(self.damaged(chunk));
            }
            prefix.extend_from_slice(&bytes);
            chunk += 1;
        }
        prefix.truncate(len as usize);
        Ok(prefix)
    }

    /// Generation, step, sizes, times.
    pub fn record(&self) -> &SlotRecord {
        &self.record
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
                format!("checkpoint of generation {} has no tensor {name:?}", self.record.generation),
            )
            .at_path(self.region.path())
        })
    }

    /// Reads any parts of the payload in parallel; every chunk that holds one is verified. Blocks until done.
    ///
    /// On error the destinations hold unspecified bytes.
    pub fn read(&self, parts: &mut [Part<'_>]) -> Result<()> {
        self.region.check_usable("read checkpoint", false)?;
        let result = reader::read_parts(&self.region, &self.record, &self.hashes, parts);
        result.and_then(|()| self.check_not_reclaimed()).map_err(|e| self.explain(e))
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
                .at_path(self.region.path()));
            }
            parts.push(Part { offset: tensor.offset, dst });
        }
        self.read(&mut parts)
    }

    /// One tensor's bytes.
    pub fn read_tensor(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; self.tensor(name)?.bytes as usize];
        self.read_tensors(&mut [(name, &mut bytes)])?;
        Ok(bytes)
    }

    /// Reads and verifies every chunk; nothing is kept.
    pub fn verify(&self) -> Result<()> {
        let result = reader::verify_all(&self.region, &self.record, &self.hashes);
        result.and_then(|()| self.check_not_reclaimed()).map_err(|e| self.explain(e))
    }

    fn damaged(&self, chunk: u64) -> Error {
        reader::damaged_chunk(&self.region, &self.record, chunk)
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

impl Drop for Checkpoint {
    fn drop(&mut self) {
        if self.pinned && !self.region.forked() {
            self.region.drop_reader(self.record.slot, self.record.generation);
        }
    }
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

/// Blocks that hold `bytes` bytes.
pub(crate) fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(BLOCK_BYTES as usize)
}
