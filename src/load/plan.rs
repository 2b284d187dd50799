//! Which chunks a read needs, and what goes where.

use crate::error::{Error, ErrorKind, Result};
use crate::format::SlotRecord;

/// One contiguous piece of the payload and where it goes.
pub struct Part<'a> {
    /// First payload byte.
    pub offset: u64,
    /// Destination; its length is the number of bytes wanted.
    pub dst: &'a mut [u8],
}

/// As [`Part`], by address, in host memory or that of a GPU.
#[derive(Debug, Clone, Copy)]
pub struct PartAt {
    /// First payload byte.
    pub offset: u64,
    /// First byte of the destination.
    pub ptr: *mut u8,
    /// How many bytes are wanted.
    pub bytes: usize,
    /// The GPU whose memory it is, as CUDA counts them in this process; none: host memory.
    pub device: Option<u32>,
}

/// A piece of one chunk that goes to one destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub chunk: u64,
    /// Offset within the chunk.
    pub within: usize,
    pub part: usize,
    /// Offset within the part's destination.
    pub at: usize,
    pub len: usize,
}

impl Piece {
    /// The part of it that lies in `start..end` of the chunk, with its place from `start`.
    pub fn clipped(&self, start: usize, end: usize) -> Option<Piece> {
        let (from, to) = (self.within.max(start), (self.within + self.len).min(end));
        let at = self.at + (from - self.within);
        (from < to).then(|| Piece { within: from - start, at, len: to - from, ..*self })
    }
}

/// All pieces, ordered by chunk. Errors where a part passes the payload.
pub(super) fn pieces(record: &SlotRecord, parts: &[(u64, usize)]) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    for (part, &(offset, len)) in parts.iter().enumerate() {
        if offset.checked_add(len as u64).is_none_or(|end| end > record.payload_bytes) {
            return Err(Error::new(
                ErrorKind::InvalidArgument,
                "read checkpoint",
                format!("{len} bytes at {offset} pass the payload of {} bytes", record.payload_bytes),
            ));
        }
        let mut at = 0;
        while at < len {
            let position = offset + at as u64;
            let chunk = position / record.chunk_bytes;
            let within = (position % record.chunk_bytes) as usize;
            let piece = (record.chunk_len(chunk) - within).min(len - at);
            pieces.push(Piece { chunk, within, part, at, len: piece });
            at += piece;
        }
    }
    pieces.sort_by_key(|piece| (piece.chunk, piece.within));
    Ok(pieces)
}
