//! Copies that are enqueued together, in pieces for which the driver's queues have room.

use std::collections::VecDeque;

use super::flight::Flight;
use super::lane::Between;
use super::ring::Group;
use crate::cuda::{Copy, CopyList, Event};
use crate::sync::Arc;

/// So many copies are enqueued at a time; and no chunk is added to a group of more.
pub(super) const PIECE_COPIES: usize = 400;

/// Copies of one device that are enqueued together.
pub(super) struct Piece {
    pub copies: Vec<Copy>,
    pub between: Between,
}

/// All of one device.
#[derive(Default)]
pub(super) struct Pieces {
    /// What is not enqueued yet.
    pub left: VecDeque<Piece>,
    /// The stream of those that are: of a ring's all go there.
    pub on: Option<usize>,
    /// Of those that are, what is reached when they are done; not of a ring's.
    pub ends: Vec<Arc<Event>>,
}

/// Where they bring bytes, and what keeps that memory.
pub(super) enum To {
    /// Into buffers that are lent to this flight.
    Pool(Flight),
    /// Into spare memory.
    Spare(Flight),
    /// Into the next place of the job's ring.
    Ring(Group),
}

/// See the module.
pub(super) struct Batch {
    /// Of each of the source's devices.
    pub pieces: Vec<Pieces>,
    pub to: To,
    /// The driver has refused one, of which some may run.
    pub refused: bool,
}

impl Batch {
    /// Of lists of copies, one for each device. `between`: the words of each, for a ring.
    pub fn new(to: To, lists: &[CopyList], between: impl Fn(usize) -> Between) -> Batch {
        let of = |(nth, list): (usize, &CopyList)| {
            let piece = |copies: &[Copy]| Piece { copies: copies.to_vec(), between: Between::default() };
            let mut left: VecDeque<_> = list.copies().chunks(PIECE_COPIES).map(piece).collect();
            if !left.is_empty() {
                let last = left.len() - 1;
                left[0].between.free = between(nth).free;
                left[last].between.arrived = between(nth).arrived;
            }
            Pieces { left, ..Pieces::default() }
        };
        Batch { pieces: lists.iter().enumerate().map(of).collect(), to, refused: false }
    }
}
