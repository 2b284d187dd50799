//! Copies that are enqueued together, in pieces for which the driver's queues have room.

use std::collections::VecDeque;

use super::flight::Flight;
use super::lane::Between;
use super::ring::Group;
use crate::cuda::{Copy, CopyList};

/// So many copies are enqueued at a time; and no chunk is added to a group of more.
pub(super) const PIECE_COPIES: usize = 400;

/// Copies of one device.
pub(super) struct Piece {
    /// Which of the source's devices.
    pub nth: usize,
    pub copies: Vec<Copy>,
    pub between: Between,
    /// It goes on the stream of the piece before.
    pub follows: bool,
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
    /// What is not enqueued yet.
    pub pieces: VecDeque<Piece>,
    pub to: To,
    /// The stream of the last piece.
    pub on: Option<usize>,
    /// The driver has refused one, of which some may run.
    pub refused: bool,
}

impl Batch {
    /// Of lists of copies, one for each device. `between`: the words of each, for a ring.
    pub fn new(to: To, lists: &[CopyList], between: impl Fn(usize) -> Between) -> Batch {
        let mut pieces = VecDeque::new();
        for (nth, list) in lists.iter().enumerate() {
            let (words, first) = (between(nth), pieces.len());
            for copies in list.copies().chunks(PIECE_COPIES) {
                let follows = pieces.len() > first;
                let between = Between { free: words.free.filter(|_| !follows), arrived: None };
                pieces.push_back(Piece { nth, copies: copies.to_vec(), between, follows });
            }
            if let Some(last) = pieces.iter_mut().skip(first).last() {
                last.between.arrived = words.arrived;
            }
        }
        Batch { pieces, to, on: None, refused: false }
    }
}
