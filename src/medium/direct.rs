//! `direct`: O_DIRECT reads and writes, asynchronous by io_uring where the kernel allows it.

#[cfg(feature = "cuda")]
use std::os::fd::AsRawFd;

use super::aligned::AlignedBuffer;
use super::file::RegionFile;
use super::threads::ThreadEngine;
use super::uring::UringEngine;
use super::{check_io, io as transfer, refuse, Barrier, Io, IoOp, Medium, MediumInfo, MediumKind};
use crate::error::{Error, ErrorKind, Result};
use crate::format::BLOCK_BYTES;
use crate::partial::SAFE_DIO_ALIGN;
use crate::staging::StagingPool;
use crate::sync::Arc;

/// Most bytes that a blocking transfer of unaligned memory copies at a time.
const BOUNCE_MAX_BYTES: usize = 1 << 20;

/// How asynchronous operations are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoBackend {
    /// io_uring, or threads where the kernel refuses it (a note says so).
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Blocking calls on threads.
    Threads,
}

enum Engine {
    Uring(UringEngine),
    Threads(ThreadEngine),
}

/// A region behind O_DIRECT.
pub(super) struct Direct {
    // Before the file: dropped first, when all operations have ended.
    engine: Engine,
    file: Arc<RegionFile>,
    memory_align: usize,
    notes: Vec<String>,
}

impl Direct {
    /// Switches `file` to O_DIRECT and starts a backend.
    pub(super) fn new(
        file: RegionFile,
        pool: Option<&Arc<StagingPool>>,
        backend: IoBackend,
        queue_depth: usize,
        io_threads: usize,
    ) -> Result<Self> {
        let memory_align = file.use_direct()?;
        let mut notes = file.notes();
        let file = Arc::new(file);
        let by_ring = match backend {
            IoBackend::Threads => None,
            IoBackend::Auto if file.is_served_by_a_process() => {
                notes.push(
                    "FUSE: the kernel's io_uring is not safe there, blocking calls on threads instead"
                        .to_string(),
                );
                None
            }
            IoBackend::Auto | IoBackend::Uring => {
                Some(UringEngine::new(Arc::clone(&file), pool, queue_depth, &mut notes))
            }
        };
        let engine = match by_ring {
            Some(Ok(engine)) => Engine::Uring(engine),
            Some(Err(error)) if backend == IoBackend::Uring => {
                return Err(file
                    .about(error.with_kind(ErrorKind::Unsupported))
                    .advise("let the engine choose, or choose threads"))
            }
            refused => {
                if let Some(Err(error)) = refused {
                    notes.push(format!("no io_uring here, blocking calls on threads instead: {error}"));
                }
                Engine::Threads(ThreadEngine::new(Arc::clone(&file), io_threads)?)
            }
        };
        Ok(Direct { engine, file, memory_align, notes })
    }

    fn is_aligned(&self, offset: u64, memory: &[u8]) -> bool {
        offset.is_multiple_of(BLOCK_BYTES)
            && (memory.len() as u64).is_multiple_of(BLOCK_BYTES)
            && memory.as_ptr().addr().is_multiple_of(self.memory_align)
    }

    /// Offset and length must be whole blocks, as the trait says.
    fn check_blocks(&self, op: &'static str, offset: u64, len: usize) -> Result<()> {
        self.file.check(op, offset, len as u64, true)?;
        if !offset.is_multiple_of(BLOCK_BYTES) || !(len as u64).is_multiple_of(BLOCK_BYTES) {
            let message = format!("expected whole blocks of {BLOCK_BYTES} bytes, found {len} bytes");
            return Err(self
                .file
                .about(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(offset)));
        }
        Ok(())
    }

    /// Calls `write` with aligned memory that holds `src`, piece by piece if it must be copied.
    fn with_aligned(&self, offset: u64, src: &[u8], write: impl Fn(u64, &[u8]) -> Result<()>) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        if self.is_aligned(offset, src) {
            return write(offset, src);
        }
        let mut bounce = AlignedBuffer::new(src.len().min(BOUNCE_MAX_BYTES), SAFE_DIO_ALIGN)?;
        let mut at = offset;
        for piece in src.chunks(BOUNCE_MAX_BYTES) {
            let aligned = &mut bounce[..piece.len()];
            aligned.copy_from_slice(piece);
            write(at, aligned)?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

impl Medium for Direct {
    fn info(&self) -> MediumInfo {
        let path = match &self.engine {
            Engine::Uring(engine) if engine.has_registered_buffers() => "io_uring, registered buffers",
            Engine::Uring(_) => "io_uring",
            Engine::Threads(_) => "pwrite",
        };
        MediumInfo {
            kind: MediumKind::Direct,
            durability: self.file.durability(),
            path,
            notes: self.notes.clone(),
            stripes: None,
        }
    }

    fn len_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    #[cfg(feature = "cuda")]
    fn direct_file(&self) -> Result<Option<Arc<dyn AsRawFd + Send + Sync>>> {
        // A process that serves it may know nothing of a GPU's memory.
        if self.file.is_served_by_a_process() {
            return Ok(None);
        }
        self.file.open_again().map(|file| Some(Arc::new(file) as Arc<_>))
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        if self.is_aligned(offset, dst) {
            return self.file.read(offset, dst);
        }
        self.file.check("read", offset, dst.len() as u64, false)?;
        let mut bounce: Option<AlignedBuffer> = None;
        let mut done = 0;
        while done < dst.len() {
            let at = offset + done as u64;
            let skew = (at % BLOCK_BYTES) as usize;
            let wanted = (dst.len() - done).min(BOUNCE_MAX_BYTES - skew);
            let span = (skew + wanted).next_multiple_of(BLOCK_BYTES as usize);
            let bounce = match &mut bounce {
                Some(buffer) if buffer.len() >= span => buffer,
                other => other.insert(AlignedBuffer::new(span, SAFE_DIO_ALIGN)?),
            };
            // A region that was cut short may end in the middle of the last block: only what was asked for must
            // be there.
            let start = at - skew as u64;
            let in_file = usize::try_from(self.file.len_bytes() - start).unwrap_or(usize::MAX).min(span);
            if in_file == span {
                self.file.read(start, &mut bounce[..span])?;
            } else {
                let got = transfer::read_tail(self.file.raw_fd(), start, &mut bounce[..span]);
                let got = got.map_err(|error| self.file.about(error))?;
                if got < skew + wanted {
                    return Err(self
                        .file
                        .about(transfer::short(IoOp::Read, got, skew + wanted).at_offset(start)));
                }
            }
            dst[done..done + wanted].copy_from_slice(&bounce[skew..skew + wanted]);
            done += wanted;
        }
        Ok(())
    }

    fn start(&self, io: Io) {
        if let Err(error) = check_io(&self.file, &io) {
            return refuse(io, error);
        }
        match &self.engine {
            Engine::Uring(engine) => engine.start(io),
            Engine::Threads(engine) => engine.start(io),
        }
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        self.check_blocks("write", offset, src.len())?;
        let written =
            self.with_aligned(offset, src, |at, piece| transfer::write_all(self.file.raw_fd(), at, piece));
        written.map_err(|error| self.file.about(error))
    }

    /// Nothing: a write that completed is ordered before whatever is submitted afterwards.
    fn fence(&self, _barrier: Barrier) -> Result<()> {
        self.file.stamp().check("fence").map_err(|error| self.file.about(error))
    }

    /// fdatasync of the whole file, which is more than was asked for: the device's cache is flushed as a whole.
    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        self.file.check("fdatasync", offset, len, true)?;
        match barrier {
            // An earlier process may have left the page cache something to write back.
            Barrier::Open => self.file.sync_data_behind(transfer::Behind::PageCache),
            _ => self.file.sync_data(),
        }
    }

    /// One fdatasync covers all ranges.
    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> Result<()> {
        ranges.first().map_or(Ok(()), |&(offset, len)| self.persist(offset, len, barrier))
    }

    fn check_present(&self) -> Result<()> {
        self.file.check_present()
    }

    /// RWF_DSYNC: the device writes the block through its cache, and nothing else is flushed.
    fn write_durable(&self, offset: u64, block: &[u8], _barrier: Barrier) -> Result<()> {
        self.check_blocks("write durably", offset, block.len())?;
        let written = self.with_aligned(offset, block, |at, piece| {
            transfer::write_dsync(self.file.raw_fd(), at, piece, transfer::Behind::Nothing)
        });
        written.map_err(|error| self.file.about(error))
    }
}
