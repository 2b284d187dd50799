//! The superblock: identity and geometry of a region, in two copies of which either is enough.

use super::codec::{check_seal, seal, Block, Field};
use super::{Layout, Uuid, BLOCK_BYTES, FORMAT_VERSION};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "read superblock";

/// The first eight bytes of every region.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"PCCHECK\0";

/// Incompat feature bits that this build knows. A region with any other is refused.
pub const KNOWN_INCOMPAT: u64 = 0;

// Magic, format version, both feature words and the checksum keep their places in every later version.
const MAGIC: Field = Field::first("magic", 8);
const VERSION: Field = MAGIC.then("format_version", 4);
const BLOCK_SIZE: Field = VERSION.then("block_bytes", 4);
const COMPAT: Field = BLOCK_SIZE.then("compat", 8);
const INCOMPAT: Field = COMPAT.then("incompat", 8);
const UUID: Field = INCOMPAT.then("uuid", 16);
const SLOT_COUNT: Field = UUID.then("slot_count", 4);
const PREFERRED_MEDIUM: Field = SLOT_COUNT.then("preferred_medium", 1);
const PAD: Field = PREFERRED_MEDIUM.then("reserved", 3);
const SLOT_BYTES: Field = PAD.then("slot_bytes", 8);
const PAYLOAD_OFFSET: Field = SLOT_BYTES.then("payload_offset", 8);
const CREATED: Field = PAYLOAD_OFFSET.then("created_unix_ns", 8);
const RESERVED: Field = CREATED.then("reserved", 4008);
const CHECKSUM: Field = RESERVED.then("checksum", 8);
const _: () = assert!(CHECKSUM.end() as u64 == BLOCK_BYTES);

/// Every byte of a superblock, in order.
#[cfg(test)]
pub(crate) const FIELDS: &[Field] = &[
    MAGIC,
    VERSION,
    BLOCK_SIZE,
    COMPAT,
    INCOMPAT,
    UUID,
    SLOT_COUNT,
    PREFERRED_MEDIUM,
    PAD,
    SLOT_BYTES,
    PAYLOAD_OFFSET,
    CREATED,
    RESERVED,
    CHECKSUM,
];

/// Which medium was faster when the region was formatted: a hint, never a promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PreferredMedium {
    /// Not measured, or a code that this build does not know.
    Unknown = 0,
    /// O_DIRECT.
    Direct = 1,
    /// A shared mapping.
    Mmap = 2,
}

impl PreferredMedium {
    fn from_code(code: u8) -> PreferredMedium {
        match code {
            1 => PreferredMedium::Direct,
            2 => PreferredMedium::Mmap,
            _ => PreferredMedium::Unknown,
        }
    }
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Version of the format that wrote the region.
    pub format_version: u32,
    /// Feature bits that a reader may ignore.
    pub compat: u64,
    /// Feature bits that a reader must know.
    pub incompat: u64,
    /// Identity of the region.
    pub uuid: Uuid,
    /// Geometry of the region.
    pub layout: Layout,
    /// When the region was formatted, in nanoseconds since 1970 UTC.
    pub created_unix_ns: u64,
    /// Hint measured at format.
    pub preferred_medium: PreferredMedium,
}

impl Superblock {
    /// The block to store in both copies.
    pub fn encode(&self) -> Block {
        let mut block = [0; BLOCK_BYTES as usize];
        MAGIC.put(&mut block, SUPERBLOCK_MAGIC);
        VERSION.put(&mut block, self.format_version.to_le_bytes());
        BLOCK_SIZE.put(&mut block, (BLOCK_BYTES as u32).to_le_bytes());
        COMPAT.put(&mut block, self.compat.to_le_bytes());
        INCOMPAT.put(&mut block, self.incompat.to_le_bytes());
        UUID.put(&mut block, self.uuid.0);
        SLOT_COUNT.put(&mut block, self.layout.slot_count.to_le_bytes());
        PREFERRED_MEDIUM.put(&mut block, [self.preferred_medium as u8]);
        SLOT_BYTES.put(&mut block, self.layout.slot_bytes.to_le_bytes());
        PAYLOAD_OFFSET.put(&mut block, self.layout.payload_offset.to_le_bytes());
        CREATED.put(&mut block, self.created_unix_ns.to_le_bytes());
        seal(&mut block, CHECKSUM);
        block
    }

    /// Reads one copy.
    ///
    /// # Errors
    ///
    /// `NotARegion` without the magic; `Corrupt` for a checksum or a geometry that is wrong;
    /// `UnsupportedVersion`; `UnsupportedFeature`, naming the lowest unknown incompat bit.
    pub fn decode(block: &Block) -> Result<Superblock> {
        let magic: [u8; 8] = MAGIC.array(block);
        if magic != SUPERBLOCK_MAGIC {
            return Err(Error::new(
                ErrorKind::NotARegion,
                OP,
                format!(
                    "expected the magic \"{}\", found \"{}\"",
                    SUPERBLOCK_MAGIC.escape_ascii(),
                    magic.escape_ascii()
                ),
            ));
        }
        let corrupt = |message| Error::new(ErrorKind::Corrupt, OP, message);
        check_seal(block, CHECKSUM).map_err(corrupt)?;
        let format_version = VERSION.u32(block);
        if format_version != FORMAT_VERSION {
            return Err(Error::new(
                ErrorKind::UnsupportedVersion,
                OP,
                format!("expected format version {FORMAT_VERSION}, found {format_version}"),
            )
            .advise("use the release of pccheck that wrote the region, or a newer one"));
        }
        let incompat = INCOMPAT.u64(block);
        let unknown = incompat & !KNOWN_INCOMPAT;
        if unknown != 0 {
            return Err(Error::new(
                ErrorKind::UnsupportedFeature,
                OP,
                format!("expected no unknown incompat feature bit, found bit {}", unknown.trailing_zeros()),
            )
            .advise("use the release of pccheck that wrote the region, or a newer one"));
        }
        let block_bytes = BLOCK_SIZE.u32(block);
        if u64::from(block_bytes) != BLOCK_BYTES {
            return Err(corrupt(format!("expected blocks of {BLOCK_BYTES} bytes, found {block_bytes}")));
        }
        let layout = Layout {
            slot_count: SLOT_COUNT.u32(block),
            slot_bytes: SLOT_BYTES.u64(block),
            payload_offset: PAYLOAD_OFFSET.u64(block),
        };
        layout.check().map_err(corrupt)?;
        Ok(Superblock {
            format_version,
            compat: COMPAT.u64(block),
            incompat,
            uuid: Uuid(UUID.array(block)),
            layout,
            created_unix_ns: CREATED.u64(block),
            preferred_medium: PreferredMedium::from_code(PREFERRED_MEDIUM.u8(block)),
        })
    }

    /// The superblock of a region from its two copies, and why a copy was not used, if one was not.
    ///
    /// Copy A is preferred: an upgrade writes A, makes it durable, then writes B.
    ///
    /// # Errors
    ///
    /// An intact copy of an unknown version or feature refuses the region even if the other copy is
    /// readable: an upgrade has begun. Otherwise, when neither copy is readable: `NotARegion` if neither bears the
    /// magic, `Corrupt` if one does.
    pub fn choose(a: &Block, b: &Block) -> Result<(Superblock, Option<String>)> {
        Superblock::choose_decoded(Superblock::decode(a), Superblock::decode(b))
    }

    /// [`choose`](Superblock::choose) for copies of which one or both could perhaps not even be read.
    pub(crate) fn choose_decoded(
        a: Result<Superblock>,
        b: Result<Superblock>,
    ) -> Result<(Superblock, Option<String>)> {
        match (a, b) {
            (Err(error), _) | (_, Err(error)) if refuses(&error) => Err(error),
            (Ok(a), Ok(b)) => {
                let note =
                    (a != b).then(|| "superblock copy B differs from copy A and was not used".to_owned());
                Ok((a, note))
            }
            (Ok(a), Err(error)) => {
                Ok((a, Some(format!("superblock copy B was not used: {}", error.message()))))
            }
            (Err(error), Ok(b)) => {
                Ok((b, Some(format!("superblock copy A was not used: {}", error.message()))))
            }
            (Err(a), Err(b)) => {
                let (kind, advice) = match (a.kind(), b.kind()) {
                    (ErrorKind::NotARegion, ErrorKind::NotARegion) => {
                        (ErrorKind::NotARegion, "name a file that `pccheck format` made, or format this one")
                    }
                    (ErrorKind::Io, ErrorKind::Io) => (ErrorKind::Io, "check the device"),
                    // Power may have been lost while the first of them was being written.
                    (ErrorKind::Corrupt, ErrorKind::NotARegion) => (
                        ErrorKind::Corrupt,
                        "if its formatting was interrupted, format it again with --force (nothing was saved yet); else \
                         restore the first 8192 bytes of the region from a copy",
                    ),
                    _ => (ErrorKind::Corrupt, "restore the first 8192 bytes of the region from a copy"),
                };
                let message = format!("copy A: {}; copy B: {}", a.message(), b.message());
                let errno = a.errno().or(b.errno());
                Err(Error::new(kind, OP, message).with_errno(errno).advise(advice))
            }
        }
    }
}

/// Whether an intact copy forbids using the other one.
fn refuses(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::UnsupportedVersion | ErrorKind::UnsupportedFeature)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::SLOT_ALIGN_BYTES;
    use proptest::prelude::*;

    fn sample() -> Superblock {
        Superblock {
            format_version: FORMAT_VERSION,
            compat: 0x8000_0000_0000_0001,
            incompat: 0,
            uuid: Uuid([0xa5; 16]),
            layout: Layout::new(5, 3 * SLOT_ALIGN_BYTES).unwrap(),
            created_unix_ns: 1_700_000_000_123_456_789,
            preferred_medium: PreferredMedium::Direct,
        }
    }

    fn kind_of(superblock: &Superblock) -> ErrorKind {
        Superblock::decode(&superblock.encode()).unwrap_err().kind()
    }

    #[test]
    fn every_single_bit_flip_is_detected() {
        let block = sample().encode();
        assert_eq!(Superblock::decode(&block).unwrap(), sample());
        for bit in 0..block.len() * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            let error = Superblock::decode(&flipped).unwrap_err();
            assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::NotARegion), "bit {bit}: {error}");
            let (chosen, note) = Superblock::choose(&flipped, &block).unwrap();
            assert_eq!(chosen, sample());
            assert!(note.unwrap().contains("copy A"));
        }
    }

    #[test]
    fn newer_version_and_unknown_feature_are_named() {
        let newer = Superblock { format_version: 2, ..sample() };
        assert_eq!(kind_of(&newer), ErrorKind::UnsupportedVersion);
        let feature = Superblock { incompat: 1 << 37, ..sample() };
        assert_eq!(kind_of(&feature), ErrorKind::UnsupportedFeature);
        let error = Superblock::decode(&feature.encode()).unwrap_err();
        assert!(error.message().contains("bit 37"), "{error}");
    }

    /// A half-done upgrade must not be opened through the copy that still has the old version.
    #[test]
    fn an_intact_unsupported_copy_refuses_the_region() {
        let old = sample().encode();
        let newer = Superblock { format_version: 2, ..sample() }.encode();
        for (a, b) in [(&old, &newer), (&newer, &old)] {
            assert_eq!(Superblock::choose(a, b).unwrap_err().kind(), ErrorKind::UnsupportedVersion);
        }
    }

    #[test]
    fn both_copies_bad_says_why_for_each() {
        let mut damaged = sample().encode();
        damaged[100] ^= 1;
        let zero = [0; 4096];
        assert_eq!(Superblock::choose(&zero, &zero).unwrap_err().kind(), ErrorKind::NotARegion);
        let error = Superblock::choose(&damaged, &zero).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains("copy A") && error.message().contains("copy B"), "{error}");
        // Only the first of them is ever alone.
        assert!(error.to_string().contains("formatting was interrupted"), "{error}");
        let error = Superblock::choose(&zero, &damaged).unwrap_err();
        assert!(!error.to_string().contains("formatting was interrupted"), "{error}");
    }

    #[test]
    fn impossible_geometry_under_a_good_checksum_is_corrupt() {
        for change in [
            |layout: &mut Layout| layout.slot_count = 0,
            |layout: &mut Layout| layout.slot_bytes += 4096,
            |layout: &mut Layout| layout.slot_bytes = u64::MAX / SLOT_ALIGN_BYTES * SLOT_ALIGN_BYTES,
            |layout: &mut Layout| layout.payload_offset = 0,
            |layout: &mut Layout| layout.payload_offset += 4096,
        ] {
            let mut superblock = sample();
            change(&mut superblock.layout);
            assert_eq!(kind_of(&superblock), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn an_unknown_medium_hint_is_only_a_hint() {
        let mut block = sample().encode();
        block[PREFERRED_MEDIUM.offset] = 200;
        seal(&mut block, CHECKSUM);
        assert_eq!(Superblock::decode(&block).unwrap().preferred_medium, PreferredMedium::Unknown);
    }

    proptest! {
        #[test]
        fn round_trip(compat in any::<u64>(), uuid in any::<[u8; 16]>(), slots in 2u32..=240,
                      units in 1u64..1 << 20, created in any::<u64>(), medium in 0u8..3) {
            let superblock = Superblock {
                format_version: FORMAT_VERSION,
                compat,
                incompat: 0,
                uuid: Uuid(uuid),
                layout: Layout::new(slots, units * SLOT_ALIGN_BYTES).unwrap(),
                created_unix_ns: created,
                preferred_medium: PreferredMedium::from_code(medium),
            };
            prop_assert_eq!(Superblock::decode(&superblock.encode()).unwrap(), superblock);
        }

        /// Random bytes under the magic and a good checksum reach every later check.
        #[test]
        fn sealed_noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 80)) {
            let mut block = [0; 4096];
            block[8..88].copy_from_slice(&noise);
            MAGIC.put(&mut block, SUPERBLOCK_MAGIC);
            VERSION.put(&mut block, FORMAT_VERSION.to_le_bytes());
            INCOMPAT.put(&mut block, [0; 8]);
            BLOCK_SIZE.put(&mut block, 4096u32.to_le_bytes());
            seal(&mut block, CHECKSUM);
            if let Ok(superblock) = Superblock::decode(&block) {
                prop_assert!(superblock.layout.region_bytes() > 0);
            }
        }
    }
}
