//! Where each byte of a striped region lies: its address space goes round the members, unit by unit.

use super::codec::round_up;
use super::layout::MAX_REGION_BYTES;
use super::{BLOCK_BYTES, SLOT_ALIGN_BYTES};
use crate::error::{Error, ErrorKind, Result};

/// Fewest members of a striped region.
pub const MIN_MEMBERS: u32 = 2;

/// Most members of a striped region.
pub const MAX_MEMBERS: u32 = 16;

/// Smallest unit that format makes, in bytes: superblocks, control blocks and records fit in the first, on member 0.
pub const MIN_UNIT_BYTES: u64 = SLOT_ALIGN_BYTES;

/// Largest unit that format makes, in bytes.
pub const MAX_UNIT_BYTES: u64 = 1 << 30;

/// Unit unless the caller chooses another: the default chunk, so that each chunk is one transfer on one member.
pub const DEFAULT_UNIT_BYTES: u64 = 4 << 20;

/// The geometry of a striped region: unit `u` lies on member `u % members`, at unit `u / members` of its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripeLayout {
    /// Members of the region.
    pub members: u32,
    /// Bytes that lie together on one member: a power of two.
    pub unit_bytes: u64,
    /// Bytes of the region on each member: a multiple of `unit_bytes`.
    pub member_bytes: u64,
}

/// A part of a transfer that lies on one member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StripePiece {
    /// The member.
    pub member: usize,
    /// First byte, in the member's data.
    pub offset: u64,
    /// First byte, in the transfer.
    pub start: usize,
    /// Bytes.
    pub len: usize,
}

impl StripeLayout {
    /// The layout of a region of at least `region_bytes`. Any power of two from a block on serves as a unit here;
    /// what a region on files may have is [`check_unit`].
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for impossible numbers.
    pub fn new(members: u32, unit_bytes: u64, region_bytes: u64) -> Result<StripeLayout> {
        let bad = |message| Error::new(ErrorKind::InvalidArgument, "lay out stripes", message);
        let turn = unit_bytes.checked_mul(members.into()).filter(|&turn| turn > 0);
        let turn = turn.ok_or_else(|| bad("expected members and bytes per unit".to_owned()))?;
        let member_bytes = region_bytes.div_ceil(turn).max(1).saturating_mul(unit_bytes);
        let layout = StripeLayout { members, unit_bytes, member_bytes };
        layout.check().map_err(bad)?;
        Ok(layout)
    }

    /// Whether the layout is possible; if not, what is wrong. Once it is, no offset within the region overflows.
    pub(crate) fn check(&self) -> Result<(), String> {
        let StripeLayout { members, unit_bytes, member_bytes } = *self;
        if !(MIN_MEMBERS..=MAX_MEMBERS).contains(&members) {
            return Err(format!("expected {MIN_MEMBERS} to {MAX_MEMBERS} members, found {members}"));
        }
        if !unit_bytes.is_power_of_two() || !(BLOCK_BYTES..=MAX_UNIT_BYTES).contains(&unit_bytes) {
            return Err(format!(
                "expected a power of two from {BLOCK_BYTES} to {MAX_UNIT_BYTES} as bytes per unit, found {unit_bytes}"
            ));
        }
        if member_bytes == 0 || !member_bytes.is_multiple_of(unit_bytes) {
            return Err(format!(
                "expected whole units of {unit_bytes} bytes on a member, found {member_bytes}"
            ));
        }
        let total = member_bytes.checked_mul(members.into()).filter(|&total| total <= MAX_REGION_BYTES);
        total.map(drop).ok_or_else(|| {
            format!(
                "{members} members of {member_bytes} bytes pass the largest region, {MAX_REGION_BYTES} bytes"
            )
        })
    }

    /// Bytes of the region on all members together.
    pub fn region_bytes(&self) -> u64 {
        self.member_bytes * u64::from(self.members)
    }

    /// The member that holds the byte at `offset` of the region, and where in its data.
    pub fn locate(&self, offset: u64) -> (usize, u64) {
        let members = u64::from(self.members);
        let (unit, within) = (offset / self.unit_bytes, offset % self.unit_bytes);
        ((unit % members) as usize, unit / members * self.unit_bytes + within)
    }

    /// The byte of the region that lies at `offset` of the data of `member`: the inverse of [`StripeLayout::locate`].
    pub fn region_offset(&self, member: usize, offset: u64) -> u64 {
        let (row, within) = (offset / self.unit_bytes, offset % self.unit_bytes);
        (row * u64::from(self.members) + member as u64) * self.unit_bytes + within
    }

    /// Whether `len` bytes from `offset` lie within one unit.
    pub fn is_whole(&self, offset: u64, len: u64) -> bool {
        offset % self.unit_bytes + len <= self.unit_bytes
    }

    /// The parts of `len` bytes from `offset`, in order.
    pub fn pieces(self, offset: u64, len: usize) -> impl Iterator<Item = StripePiece> {
        let mut start = 0;
        std::iter::from_fn(move || {
            if start >= len {
                return None;
            }
            let at = offset + start as u64;
            let room = usize::try_from(self.unit_bytes - at % self.unit_bytes).unwrap_or(usize::MAX);
            let (member, offset) = self.locate(at);
            let piece = StripePiece { member, offset, start, len: room.min(len - start) };
            start += piece.len;
            Some(piece)
        })
    }

    /// What of `len` bytes from `offset` lies on `member`: one `(offset, len)` of its data, without gaps.
    pub fn span(&self, member: usize, offset: u64, len: u64) -> Option<(u64, u64)> {
        let last_byte = offset.checked_add(len)?.checked_sub(1).filter(|_| len > 0)?;
        let (members, member) = (u64::from(self.members), member as u64);
        let (first, last) = (offset / self.unit_bytes, last_byte / self.unit_bytes);
        // The first unit from `first` on and the last one up to `last` that are the member's.
        let from = first + (member + members - first % members) % members;
        let to = last.checked_sub((last % members + members - member) % members)?;
        if from > to {
            return None;
        }
        let start =
            from / members * self.unit_bytes + if from == first { offset % self.unit_bytes } else { 0 };
        let end_in_unit = if to == last { last_byte % self.unit_bytes + 1 } else { self.unit_bytes };
        Some((start, to / members * self.unit_bytes + end_in_unit - start))
    }
}

/// Whether `unit_bytes` may be the unit of a region on files; if not, what is wrong.
pub fn check_unit(unit_bytes: u64) -> Result<(), String> {
    if unit_bytes.is_power_of_two() && (MIN_UNIT_BYTES..=MAX_UNIT_BYTES).contains(&unit_bytes) {
        return Ok(());
    }
    Err(format!(
        "expected a power of two from {MIN_UNIT_BYTES} to {MAX_UNIT_BYTES} as bytes per unit, found {unit_bytes}"
    ))
}

/// `bytes` rounded up so that slots and what is before them take whole units: then chunks that divide the unit never
/// straddle two members.
pub(crate) fn round_to_units(bytes: u64, unit_bytes: u64) -> Option<u64> {
    round_up(bytes, unit_bytes.max(SLOT_ALIGN_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn units_go_round_the_members() {
        let layout = StripeLayout::new(3, 8192, 7 * 8192).unwrap();
        assert_eq!((layout.member_bytes, layout.region_bytes()), (3 * 8192, 9 * 8192));
        let located: Vec<_> = (0..7).map(|unit| layout.locate(unit * 8192 + 5)).collect();
        assert_eq!(located, [(0, 5), (1, 5), (2, 5), (0, 8197), (1, 8197), (2, 8197), (0, 16389)]);
        assert!(layout.is_whole(8192, 8192) && !layout.is_whole(8193, 8192));
        assert_eq!(layout.span(1, 0, 8192), None);
        assert_eq!(layout.span(1, 0, 9 * 8192), Some((0, 3 * 8192)));
        assert_eq!(layout.span(0, 0, 0), None);
    }

    #[test]
    fn impossible_layouts_are_refused() {
        for (members, unit) in [(1, 8192), (17, 8192), (2, 0), (2, 8191), (2, 12288), (2, MAX_UNIT_BYTES * 2)]
        {
            assert!(StripeLayout::new(members, unit, 1 << 20).is_err(), "{members} {unit}");
        }
        assert!(StripeLayout::new(2, 4096, u64::MAX).is_err());
        assert!(check_unit(MIN_UNIT_BYTES / 2).is_err() && check_unit(MIN_UNIT_BYTES).is_ok());
    }

    proptest! {
        /// Byte by byte: pieces and spans are exactly the bytes that `locate` names, and no two bytes share a place.
        #[test]
        fn pieces_and_spans_agree_with_locate(members in 2u32..=16, shift in 12u32..15,
                                              offset in 0u64..300_000, len in 0usize..200_000) {
            let unit = 1u64 << shift;
            let layout = StripeLayout::new(members, unit, 600_000).unwrap();
            let mut next = 0;
            let mut held = vec![Vec::new(); members as usize];
            for piece in layout.pieces(offset, len) {
                prop_assert_eq!(piece.start, next);
                next += piece.len;
                let at = offset + piece.start as u64;
                prop_assert_eq!(layout.locate(at), (piece.member, piece.offset));
                prop_assert_eq!(layout.region_offset(piece.member, piece.offset), at);
                prop_assert!(layout.is_whole(at, piece.len as u64));
                held[piece.member].push((piece.offset, piece.offset + piece.len as u64));
            }
            prop_assert_eq!(next, len);
            for (member, held) in held.iter().enumerate() {
                let expected = held.first().zip(held.last()).map(|(first, last)| (first.0, last.1 - first.0));
                prop_assert_eq!(layout.span(member, offset, len as u64), expected, "member {}", member);
                prop_assert!(held.windows(2).all(|pair| pair[0].1 == pair[1].0), "a gap on member {}", member);
            }
        }
    }
}
