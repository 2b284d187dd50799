//! One region over several members, so that their bandwidth adds up: the address space goes round the members in
//! units. Whatever lies within one unit goes to its member as it is; what straddles two is split.
//!
//! | verb | on the members |
//! |---|---|
//! | start, write_durable | the one that holds the bytes; each has its own queue |
//! | fence | every one: which of them the calling thread has copied to is not known here |
//! | persist | every one that the ranges touch, at once; durable when all are, failed when one failed |
//!
//! The fault model is that of the members: which of them lose what in a crash is independent.

mod flusher;
mod label;
mod open;
mod relocate;

use self::flusher::{Barriers, Flusher};
use super::{refuse, Barrier, Durability, Io, IoOp, Medium, MediumInfo, MediumKind, MediumMemory};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkStamp;
use crate::format::{StripeLayout, BLOCK_BYTES};
use crate::sync::Arc;

pub use label::{erase_labels, read_label, write_label, write_labels};
pub(super) use label::{label_of, not_the_first};
pub(super) use open::{media_on, open_striped};
pub use relocate::{relocate_member, rewrite_label};

/// How a region is striped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripes {
    /// Members of the region.
    pub members: u32,
    /// Bytes that lie together on one member; chunks of new saves divide it.
    pub unit_bytes: u64,
}

/// A region over several media of one kind.
pub struct Striped {
    // Before the members: their threads end first.
    flushers: Vec<Flusher>,
    members: Vec<Arc<dyn Medium>>,
    layout: StripeLayout,
    data_offset: u64,
    kind: MediumKind,
    notes: Vec<String>,
    stamp: ForkStamp,
}

impl Striped {
    /// The region whose data lies on `members` from `data_offset` on. For a writer, one thread for each member but the
    /// first flushes.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` when the members are not as many or as long as the layout says; `Unsupported` when they are not
    /// of one kind.
    pub fn new(
        layout: StripeLayout,
        data_offset: u64,
        members: Vec<Arc<dyn Medium>>,
        writable: bool,
    ) -> Result<Striped> {
        let refused = |kind, message: String| Error::new(kind, "open", message);
        layout.check().map_err(|message| refused(ErrorKind::InvalidArgument, message))?;
        if members.len() != layout.members as usize {
            let message = format!("expected {} members, found {}", layout.members, members.len());
            return Err(refused(ErrorKind::InvalidArgument, message));
        }
        let infos: Vec<MediumInfo> = members.iter().map(|member| member.info()).collect();
        let kind = infos[0].kind;
        let mut notes = Vec::new();
        for (index, (member, info)) in members.iter().zip(&infos).enumerate() {
            let needed = data_offset.saturating_add(layout.member_bytes);
            if member.len_bytes() < needed {
                let message = format!("member {index} needs {needed} bytes, found {}", member.len_bytes());
                return Err(refused(ErrorKind::InvalidArgument, message));
            }
            if info.kind != kind {
                let message = format!("member 0 is {kind:?}, member {index} is {:?}", info.kind);
                return Err(refused(ErrorKind::Unsupported, message));
            }
            notes.extend(info.notes.iter().map(|note| format!("member {index}: {note}")));
        }
        let mut flushers = Vec::new();
        if writable {
            for (index, member) in members.iter().enumerate().skip(1) {
                match Flusher::start(index, Arc::clone(member)) {
                    Ok(flusher) => flushers.push(flusher),
                    // Slower, not wrong.
                    Err(error) => {
                        notes.push(format!("members from {index} on are flushed one after another: {error}"));
                        break;
                    }
                }
            }
        }
        let stamp = ForkStamp::now();
        Ok(Striped { flushers, members, layout, data_offset, kind, notes, stamp })
    }

    /// Refuses what leaves the region.
    fn check(&self, op: &'static str, offset: u64, len: u64) -> Result<()> {
        self.stamp.check(op)?;
        let bytes = self.layout.region_bytes();
        if offset.checked_add(len).is_none_or(|end| end > bytes) {
            let message = format!("{len} bytes from {offset} leave the region of {bytes} bytes");
            return Err(Error::new(ErrorKind::InvalidArgument, op, message).at_offset(offset));
        }
        Ok(())
    }

    /// Does a transfer that straddles members piece by piece, blocking.
    fn split(&self, io: &mut Io) -> Result<()> {
        match io.op {
            IoOp::Copy => self.copy(io.offset, &io.buffer[..io.len]),
            IoOp::Read => self.read(io.offset, &mut io.buffer[..io.len]),
        }
    }
}

impl Medium for Striped {
    /// The weakest durability; the members' ways of moving bytes are told apart in the notes where they differ.
    fn info(&self) -> MediumInfo {
        let infos: Vec<MediumInfo> = self.members.iter().map(|member| member.info()).collect();
        let mut notes = self.notes.clone();
        let path = infos[0].path;
        if infos.iter().any(|info| info.path != path) {
            let paths =
                infos.iter().enumerate().map(|(index, info)| format!("member {index}: {}", info.path));
            notes.extend(paths);
        }
        let durability = infos.iter().map(|info| info.durability).min().unwrap_or(Durability::Process);
        let stripes = Stripes { members: self.layout.members, unit_bytes: self.layout.unit_bytes };
        MediumInfo { kind: self.kind, durability, path, notes, stripes: Some(stripes) }
    }

    fn len_bytes(&self) -> u64 {
        self.layout.region_bytes()
    }

    fn check_present(&self) -> Result<()> {
        self.members.iter().try_for_each(|member| member.check_present())
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.check("read", offset, dst.len() as u64)?;
        self.layout.pieces(offset, dst.len()).try_for_each(|piece| {
            let part = &mut dst[piece.start..piece.start + piece.len];
            self.members[piece.member].read(self.data_offset + piece.offset, part)
        })
    }

    fn start(&self, mut io: Io) {
        if let Err(error) = self.check(super::io::op_name(io.op), io.offset, io.len as u64) {
            return refuse(io, error);
        }
        if self.layout.is_whole(io.offset, io.len as u64) {
            let (member, offset) = self.layout.locate(io.offset);
            return self.members[member].start(Io { offset: self.data_offset + offset, ..io });
        }
        if io.len > io.buffer.len() {
            let message = format!("expected at most {} bytes, found {}", io.buffer.len(), io.len);
            let error = Error::new(ErrorKind::InvalidArgument, super::io::op_name(io.op), message);
            return refuse(io, error);
        }
        // Chunks divide the unit; this is a chunk table, or a chunk of another size. On persistent memory the sink fences
        // on this thread, which has stored the bytes.
        let result = self.split(&mut io);
        io.sink.finished(io.token, io.buffer, result);
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.members.iter().all(|member| member.memory().is_some()).then_some(self)
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        self.check("copy", offset, src.len() as u64)?;
        self.layout.pieces(offset, src.len()).try_for_each(|piece| {
            let part = &src[piece.start..piece.start + piece.len];
            self.members[piece.member].copy(self.data_offset + piece.offset, part)
        })
    }

    fn fence(&self, barrier: Barrier) -> Result<()> {
        self.members.iter().try_for_each(|member| member.fence(barrier))
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        self.persist_ranges(&[(offset, len)], barrier)
    }

    /// On every member that the ranges touch, at once: the first of them on this thread, each other one on its own.
    /// Returns when all have ended; one that failed fails the barrier.
    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> Result<()> {
        let mut touched = Vec::new();
        for &(offset, len) in ranges {
            self.check("persist", offset, len)?;
        }
        for member in 0..self.members.len() {
            let spans = ranges.iter().filter_map(|&(offset, len)| self.layout.span(member, offset, len));
            let placed = |(offset, len)| match (barrier, offset) {
                // With its label: that, too, may be what a killed process left visible, and not durable.
                (Barrier::Open, 0) => (0, self.data_offset + len),
                _ => (self.data_offset + offset, len),
            };
            let spans: Vec<_> = spans.map(placed).collect();
            if !spans.is_empty() {
                touched.push((member, spans));
            }
        }
        // A fence of the processor: handing it to another thread would cost more, and order that thread's stores.
        let by_fence = self.kind == MediumKind::Dax && barrier != Barrier::Open;
        let mut barriers = Barriers::default();
        let mut here = Vec::new();
        for (member, spans) in touched {
            match member.checked_sub(1).and_then(|at| self.flushers.get(at)) {
                Some(flusher) if !here.is_empty() && !by_fence => barriers.begin(flusher, spans, barrier),
                _ => here.push((member, spans)),
            }
        }
        // All of them, also after one has failed: no flush may be under way when this returns.
        let mut result = Ok(());
        for (member, spans) in here {
            result = result.and(self.members[member].persist_ranges(&spans, barrier));
        }
        result.and(barriers.wait())
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        self.check("write durably", offset, block.len() as u64)?;
        if !self.layout.is_whole(offset, block.len() as u64) {
            let message = format!("expected bytes of one unit, found {} that straddle two", block.len());
            return Err(Error::new(ErrorKind::InvalidArgument, "write durably", message).at_offset(offset));
        }
        let (member, offset) = self.layout.locate(offset);
        self.members[member].write_durable(self.data_offset + offset, block, barrier)
    }
}

impl MediumMemory for Striped {
    fn fill(
        &self,
        offset: u64,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        let padded = len.next_multiple_of(BLOCK_BYTES as usize);
        self.check("copy", offset, padded as u64)?;
        let (member, at) = self.layout.locate(offset);
        if let Some(memory) =
            self.members[member].memory().filter(|_| self.layout.is_whole(offset, padded as u64))
        {
            return memory.fill(self.data_offset + at, len, fill);
        }
        // Chunks do not straddle members; whatever else does is copied twice.
        let mut bytes = vec![0; padded];
        fill(&mut bytes[..len], false)?;
        self.copy(offset, &bytes)
    }
}

#[cfg(all(test, feature = "sim"))]
mod tests;
