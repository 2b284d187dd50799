//! How bytes become persistent. One trait, four media: `dax`, `mmap`, `direct`, and `sim` for tests; and several of one
//! kind as one, in stripes.
//!
//! # Verbs
//!
//! Each verb means one thing, and each can fail:
//!
//! | verb | promise |
//! |---|---|
//! | [`Medium::start`] with [`IoOp::Copy`], [`Medium::copy`] | bytes are handed over; nothing is promised about a crash |
//! | [`Medium::fence`] | the copies that the *calling thread* completed are ordered before what it does next |
//! | [`Medium::persist`] | copies that had completed (and been fenced by their thread) when the call began are durable when it returns |
//! | [`Medium::write_durable`] | one block is durable when it returns; says nothing of any other bytes |
//!
//! # Fault model
//!
//! What a crash may do to bytes that were copied but not yet made durable, per medium:
//!
//! - `dax`: units of 8 bytes (non-temporal stores). Any subset of the units may have persisted; a unit is
//!   never torn. A fence on the storing thread makes its earlier stores durable: `persist` has then
//!   nothing left to do, and `fence` is the durable step.
//! - `direct`: units of 512-byte sectors. Any subset of the sectors of writes that no completed `persist` covers
//!   may have persisted; the sector being written at the moment of power loss may hold garbage.
//! - `mmap`: as `direct` (dirty pages may be written back early, late or never), `fence` orders nothing on media.
//! - every medium: reads after a process crash (no power loss) see every completed copy.
//!
//! A `persist` or `write_durable` that fails leaves durability unknown for all that was written since the last
//! one that succeeded; it must never be retried into success (the kernel may have dropped the dirty state).

#[cfg(feature = "cuda")]
use std::os::fd::AsRawFd;

use crate::error::{Error, ErrorKind, Result};
use crate::format::BLOCK_BYTES;
use crate::staging::StagingBuffer;
use crate::sync::Arc;

mod aligned;
mod create;
mod direct;
mod file;
mod io;
mod lock;
mod mapped;
mod measure;
mod open;
mod path;
#[cfg(feature = "sim")]
pub mod sim;
mod site;
mod striped;
mod threads;
mod uring;

pub use create::{create_file, Progress};
pub use direct::IoBackend;
pub use file::{sync_parent, RegionFile};
pub use measure::{measure_preferred, Measured};
pub use open::{open_medium, MediumOptions, PreferredHint, Requested};
pub use path::{copy_owner, is_device, is_same_place, read_head, rename_new, rename_over};
pub use site::{into_media, Completion, Site};
pub use striped::{
    erase_labels, read_label, relocate_member, rewrite_label, write_label, write_labels, Striped, Stripes,
};

/// Why a fence or persist is issued: names each ordering point of the protocol, so that the crash checker
/// can remove each in turn and prove that it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Barrier {
    /// At open: what an earlier process wrote becomes durable before recovery is trusted.
    Open,
    /// At open: adopted records are durable again.
    Adopt,
    /// A control block is durable.
    Control,
    /// `writing(g)` is durable before the first payload byte of `g` is submitted.
    WritingMark,
    /// A copying thread orders its own payload stores before it reports them complete.
    Chunk,
    /// Payload and chunk table are durable before `committed(g)` is written.
    Payload,
    /// `committed(g)` is durable before the save is reported durable.
    Commit,
}

/// Direction of one asynchronous operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoOp {
    /// Buffer to medium.
    Copy,
    /// Medium to buffer.
    Read,
}

/// One asynchronous operation on whole blocks. Owns its buffer until it completes.
pub struct Io {
    /// Direction.
    pub op: IoOp,
    /// Byte offset in the region, a multiple of [`crate::format::BLOCK_BYTES`].
    pub offset: u64,
    /// Bytes, a multiple of [`crate::format::BLOCK_BYTES`], at most the buffer's length.
    pub len: usize,
    /// Source or destination.
    pub buffer: StagingBuffer,
    /// Handed back at completion; means nothing to the medium.
    pub token: u64,
    /// Told of the completion exactly once, perhaps before `start` returns, perhaps on another thread.
    pub sink: Arc<dyn IoSink>,
}

/// Receives completions. Must not block on the completion of other operations of the same medium.
pub trait IoSink: Send + Sync {
    /// The operation `token` ended; the buffer is the caller's again. A short transfer is an error.
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>);
}

/// The kinds of media.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MediumKind {
    /// Persistent memory mapped with MAP_SYNC.
    Dax,
    /// A shared mapping of any file, made durable by msync.
    Mmap,
    /// O_DIRECT reads and writes, by io_uring where the kernel allows it.
    Direct,
    /// The crash simulator.
    Sim,
}

/// What a durable save survives. Ordered: `Process < Power`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Durability {
    /// The death of the process (tmpfs is enough).
    Process,
    /// Power loss.
    Power,
}

/// What was got, as opposed to what was asked for.
#[derive(Debug, Clone)]
pub struct MediumInfo {
    /// Kind of the medium.
    pub kind: MediumKind,
    /// What a durable save survives on it.
    pub durability: Durability,
    /// How bytes are moved: `"io_uring"`, `"io_uring, registered buffers"`, `"pwrite"`, `"avx512"`, `"avx2"`, `"sse2"`, ...
    pub path: &'static str,
    /// Notes for people on what was refused and what is used instead.
    pub notes: Vec<String>,
    /// How the region is striped; none where it is not.
    pub stripes: Option<Stripes>,
}

/// A region's bytes and the verbs that make them persistent.
pub trait Medium: Send + Sync {
    /// What was got.
    fn info(&self) -> MediumInfo;

    /// Size of the region in bytes.
    fn len_bytes(&self) -> u64;

    /// Fills `dst` from `offset`, blocking. Any alignment of offset, length and address is accepted.
    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()>;

    /// Starts an operation; the sink is told of its end exactly once, also when it could not be started.
    fn start(&self, io: Io);

    /// Hands `src` to the medium at `offset` (both in whole blocks), blocking; any address alignment.
    fn copy(&self, offset: u64, src: &[u8]) -> Result<()>;

    /// Orders (on persistent memory: makes durable) the copies completed by the calling thread.
    fn fence(&self, barrier: Barrier) -> Result<()>;

    /// Makes durable all completed, fenced copies within `offset..offset + len` (a medium may do more).
    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()>;

    /// [`Medium::persist`] of several `(offset, len)` ranges, as one barrier where one flush covers them all.
    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> Result<()> {
        ranges.iter().try_for_each(|&(offset, len)| self.persist(offset, len, barrier))
    }

    /// The region's bytes as memory, where they are: then copying into a staging buffer first would be one copy too many.
    fn memory(&self) -> Option<&dyn MediumMemory> {
        None
    }

    /// The region's file, open anew with O_DIRECT, where others may write to it beside [`Medium::start`]: every byte of the region is
    /// at its own offset, and what persists those of `start` persists theirs. None of media that are not one such file.
    #[cfg(feature = "cuda")]
    fn direct_file(&self) -> Result<Option<Arc<dyn AsRawFd + Send + Sync>>> {
        Ok(None)
    }

    /// Refuses where the region's file was deleted, replaced or cut short since it was opened: what is saved into it would
    /// be gone, or end a process that stores into its mapping.
    fn check_present(&self) -> Result<()> {
        Ok(())
    }

    /// Makes one block (4 KiB at a block boundary) durable; orders nothing else.
    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        self.copy(offset, block)?;
        self.fence(barrier)?;
        self.persist(offset, block.len() as u64, barrier)
    }
}

/// A medium whose bytes are memory.
pub trait MediumMemory {
    /// Lets `fill` make the `len` bytes from `offset` (a block boundary) on in their place, and zeros the rest of the
    /// last block. Promises what [`IoOp::Copy`] does once it returns, and [`Medium::fence`] by the calling thread orders it.
    /// `fill` is told whether its stores must be written back from the processor's caches.
    fn fill(
        &self,
        offset: u64,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()>;
}

/// Refuses an operation that breaks the contract of [`Medium::start`].
fn check_io(file: &RegionFile, io: &Io) -> Result<()> {
    let op = self::io::op_name(io.op);
    file.check(op, io.offset, io.len as u64, io.op == IoOp::Copy)?;
    if io.len == 0
        || io.len > io.buffer.len()
        || !(io.len as u64).is_multiple_of(BLOCK_BYTES)
        || !io.offset.is_multiple_of(BLOCK_BYTES)
    {
        let room = io.buffer.len();
        let message = format!(
            "expected whole blocks of {BLOCK_BYTES} bytes, at most {room} bytes, found {} bytes",
            io.len
        );
        return Err(file.about(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(io.offset)));
    }
    Ok(())
}

/// Ends an operation that was not started.
fn refuse(io: Io, error: Error) {
    io.sink.finished(io.token, io.buffer, Err(error));
}

#[cfg(test)]
mod tests;
