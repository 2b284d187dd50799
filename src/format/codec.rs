//! Little-endian fields at fixed offsets of a block, and the checksum that seals one.
//!
//! Each structure declares its fields as a chain of constants (`Field::first(..)`, then `.then(..)`), so that
//! two fields cannot overlap and no byte is without a name. The same constants drive encoding,
//! decoding and the test that compares the specification with the code.

use twox_hash::XxHash3_64;

use crate::error::{Error, ErrorKind, Result};

/// An empty vector with room for `count` elements, or an error: `count` was read from a medium, where vectors that grow
/// by themselves would end the process.
pub(crate) fn reserved<T>(count: u64, op: &'static str) -> Result<Vec<T>> {
    let mut empty = Vec::new();
    let room = usize::try_from(count).ok().and_then(|count| empty.try_reserve_exact(count).ok());
    room.map(|()| empty).ok_or_else(|| {
        let bytes = u128::from(count) * size_of::<T>() as u128;
        Error::new(ErrorKind::OutOfMemory, op, format!("cannot get {bytes} bytes of memory"))
            .advise("free memory, or raise the memory limit of the process (ulimit -v, cgroup)")
    })
}

/// One block of the medium: 4096 bytes.
pub type Block = [u8; 4096];

/// A named run of bytes within a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// Name in the specification.
    pub name: &'static str,
    /// First byte, from the start of the structure.
    pub offset: usize,
    /// Length in bytes.
    pub bytes: usize,
}

impl Field {
    /// The field at offset 0.
    pub const fn first(name: &'static str, bytes: usize) -> Field {
        Field { name, offset: 0, bytes }
    }

    /// The field that follows this one without a gap.
    pub const fn then(self, name: &'static str, bytes: usize) -> Field {
        Field { name, offset: self.end(), bytes }
    }

    /// The byte after the field's last.
    pub const fn end(self) -> usize {
        self.offset + self.bytes
    }

    /// The bytes of the field in `block`.
    fn of(self, block: &[u8]) -> &[u8] {
        &block[self.offset..self.end()]
    }

    /// The first `N` bytes of the field in `block`.
    pub(crate) fn array<const N: usize>(self, block: &[u8]) -> [u8; N] {
        debug_assert_eq!(self.bytes, N, "field {} read with the wrong width", self.name);
        let mut array = [0; N];
        array.copy_from_slice(self.of(block));
        array
    }

    pub(crate) fn u8(self, block: &[u8]) -> u8 {
        u8::from_le_bytes(self.array(block))
    }

    pub(crate) fn u32(self, block: &[u8]) -> u32 {
        u32::from_le_bytes(self.array(block))
    }

    pub(crate) fn u64(self, block: &[u8]) -> u64 {
        u64::from_le_bytes(self.array(block))
    }

    pub(crate) fn u128(self, block: &[u8]) -> u128 {
        u128::from_le_bytes(self.array(block))
    }

    /// Writes `value`, which has exactly the field's length, into `block`.
    pub(crate) fn put<const N: usize>(self, block: &mut [u8], value: [u8; N]) {
        debug_assert_eq!(self.bytes, N, "field {} written with the wrong width", self.name);
        block[self.offset..self.end()].copy_from_slice(&value);
    }
}

/// XXH3-64 with seed 0: the checksum of superblocks, control blocks and slot records.
pub fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Stores in `field` the checksum of all bytes before it.
pub(crate) fn seal(block: &mut [u8], field: Field) {
    let sum = checksum(&block[..field.offset]);
    field.put(block, sum.to_le_bytes());
}

/// Whether `field` holds the checksum of all bytes before it; if not, says what was expected and found.
pub(crate) fn check_seal(block: &[u8], field: Field) -> Result<(), String> {
    let expected = checksum(&block[..field.offset]);
    let found = field.u64(block);
    if expected == found {
        return Ok(());
    }
    Err(format!("checksum mismatch: the bytes hash to {expected:016x}, stored is {found:016x}"))
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// `value` rounded up to a multiple of `unit`, or `None` on overflow.
pub(crate) fn round_up(value: u64, unit: u64) -> Option<u64> {
    value.checked_next_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference vector for empty input from the XXH3 specification pins algorithm, seed and byte order.
    #[test]
    fn checksum_is_xxh3_64_with_seed_zero() {
        assert_eq!(checksum(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(checksum(b"a"), 0xe6c6_32b6_1e96_4e1f);
    }

    #[test]
    fn seal_is_found_broken_by_any_change() {
        const BODY: Field = Field::first("body", 24);
        const SUM: Field = BODY.then("checksum", 8);
        let mut bytes = [7u8; 32];
        seal(&mut bytes, SUM);
        assert_eq!(check_seal(&bytes, SUM), Ok(()));
        for index in 0..bytes.len() {
            let mut changed = bytes;
            changed[index] ^= 0x10;
            assert!(check_seal(&changed, SUM).is_err(), "change of byte {index} went unnoticed");
        }
    }
}
