//! The member label: what a file or device of a striped region says of itself, in two copies of which either is
//! enough. It lies where a region of its own would have its superblocks, so that making either destroys the other.

use super::codec::{check_seal, is_zero, seal, Block, Field};
use super::stripe::StripeLayout;
use super::{Uuid, BLOCK_BYTES, SLOT_ALIGN_BYTES, SUPERBLOCK_OFFSETS};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "read member label";

/// The first eight bytes of every member.
pub const LABEL_MAGIC: [u8; 8] = *b"PCCMEMB\0";

/// Version of the label that this build reads and writes.
pub const LABEL_VERSION: u32 = 1;

/// Byte offsets of the two copies of the label.
pub const LABEL_OFFSETS: [u64; 2] = SUPERBLOCK_OFFSETS;

/// Bytes in front of a member's data: both copies, and nothing else.
pub const LABEL_AREA_BYTES: u64 = SLOT_ALIGN_BYTES;

/// Incompat feature bits of labels that this build knows.
pub const KNOWN_LABEL_INCOMPAT: u64 = 0;

/// Most bytes that the paths of all members take in a label, two more for each.
pub const MAX_LABEL_PATHS_BYTES: usize = 3960;

const MAGIC: Field = Field::first("magic", 8);
const VERSION: Field = MAGIC.then("label_version", 4);
const COUNT: Field = VERSION.then("member_count", 4);
const INCOMPAT: Field = COUNT.then("incompat", 8);
const SET: Field = INCOMPAT.then("set_uuid", 16);
const INDEX: Field = SET.then("member_index", 4);
const PATHS_BYTES: Field = INDEX.then("paths_bytes", 4);
const SEQUENCE: Field = PATHS_BYTES.then("sequence", 8);
const UNIT: Field = SEQUENCE.then("unit_bytes", 8);
const MEMBER_BYTES: Field = UNIT.then("member_bytes", 8);
const DATA_OFFSET: Field = MEMBER_BYTES.then("data_offset", 8);
const CREATED: Field = DATA_OFFSET.then("created_unix_ns", 8);
const RESERVED: Field = CREATED.then("reserved", 40);
const PATHS: Field = RESERVED.then("paths", MAX_LABEL_PATHS_BYTES);
const CHECKSUM: Field = PATHS.then("checksum", 8);
const _: () = assert!(CHECKSUM.end() as u64 == BLOCK_BYTES);

/// Every byte of a label, in order.
#[cfg(test)]
pub(crate) const FIELDS: &[Field] = &[
    MAGIC,
    VERSION,
    COUNT,
    INCOMPAT,
    SET,
    INDEX,
    PATHS_BYTES,
    SEQUENCE,
    UNIT,
    MEMBER_BYTES,
    DATA_OFFSET,
    CREATED,
    RESERVED,
    PATHS,
    CHECKSUM,
];

/// What a label says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Label {
    /// Identity of the set of members, the same in all of them.
    pub set: Uuid,
    /// Which member this is; 0 holds superblocks, control blocks and records.
    pub index: u32,
    /// Raised by one with every change; the valid copy with the higher one counts.
    pub sequence: u64,
    /// Geometry of the region.
    pub stripe: StripeLayout,
    /// First byte of the member's data.
    pub data_offset: u64,
    /// When the region was formatted, in nanoseconds since 1970 UTC.
    pub created_unix_ns: u64,
    /// Where each member was, by index: absolute paths as the file system's bytes. Member 0's label counts; in the
    /// others they are as they were at format.
    pub paths: Vec<Vec<u8>>,
}

/// Two bytes of length, then the bytes, for each path.
fn pack(paths: &[Vec<u8>]) -> Vec<u8> {
    let mut packed = Vec::new();
    for path in paths {
        packed.extend_from_slice(&(path.len() as u16).to_le_bytes());
        packed.extend_from_slice(path);
    }
    packed
}

fn unpack(mut packed: &[u8], count: u32) -> Option<Vec<Vec<u8>>> {
    let mut paths = Vec::new();
    for _ in 0..count {
        let (len, rest) = packed.split_first_chunk()?;
        let (path, rest) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
        if path.is_empty() || path.contains(&0) {
            return None;
        }
        paths.push(path.to_vec());
        packed = rest;
    }
    packed.is_empty().then_some(paths)
}

impl Label {
    /// The block to store in both copies.
    ///
    /// # Errors
    ///
    /// `TooLarge` when the paths do not fit, `InvalidArgument` when one is empty.
    pub fn encode(&self) -> Result<Block> {
        let packed = pack(&self.paths);
        if packed.len() > PATHS.bytes {
            let message = format!(
                "the paths of the members take {} bytes together, a label has room for {}",
                packed.len(),
                PATHS.bytes
            );
            return Err(Error::new(ErrorKind::TooLarge, "write member label", message)
                .advise("give shorter paths: mount the members at shorter places, or link to them"));
        }
        if unpack(&packed, self.stripe.members).is_none() {
            let message = "expected one path for each member, not empty";
            return Err(Error::new(ErrorKind::InvalidArgument, "write member label", message));
        }
        let mut block = [0; BLOCK_BYTES as usize];
        MAGIC.put(&mut block, LABEL_MAGIC);
        VERSION.put(&mut block, LABEL_VERSION.to_le_bytes());
        COUNT.put(&mut block, self.stripe.members.to_le_bytes());
        SET.put(&mut block, self.set.0);
        INDEX.put(&mut block, self.index.to_le_bytes());
        PATHS_BYTES.put(&mut block, (packed.len() as u32).to_le_bytes());
        SEQUENCE.put(&mut block, self.sequence.to_le_bytes());
        UNIT.put(&mut block, self.stripe.unit_bytes.to_le_bytes());
        MEMBER_BYTES.put(&mut block, self.stripe.member_bytes.to_le_bytes());
        DATA_OFFSET.put(&mut block, self.data_offset.to_le_bytes());
        CREATED.put(&mut block, self.created_unix_ns.to_le_bytes());
        block[PATHS.offset..PATHS.offset + packed.len()].copy_from_slice(&packed);
        seal(&mut block, CHECKSUM);
        Ok(block)
    }

    /// Reads one copy; none where it does not bear the magic.
    ///
    /// # Errors
    ///
    /// `Corrupt` for a checksum or numbers that are wrong; `UnsupportedVersion`; `UnsupportedFeature`, naming the lowest
    /// unknown incompat bit.
    pub fn decode(block: &Block) -> Result<Option<Label>> {
        if MAGIC.array(block) != LABEL_MAGIC {
            return Ok(None);
        }
        let corrupt = |message| Error::new(ErrorKind::Corrupt, OP, message);
        check_seal(block, CHECKSUM).map_err(corrupt)?;
        let version = VERSION.u32(block);
        if version != LABEL_VERSION {
            let message = format!("expected label version {LABEL_VERSION}, found {version}");
            return Err(Error::new(ErrorKind::UnsupportedVersion, OP, message).advise(NEWER));
        }
        let unknown = INCOMPAT.u64(block) & !KNOWN_LABEL_INCOMPAT;
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            let message = format!("expected no unknown incompat feature bit, found bit {bit}");
            return Err(Error::new(ErrorKind::UnsupportedFeature, OP, message).advise(NEWER));
        }
        let stripe = StripeLayout {
            members: COUNT.u32(block),
            unit_bytes: UNIT.u64(block),
            member_bytes: MEMBER_BYTES.u64(block),
        };
        stripe.check().map_err(corrupt)?;
        let (index, data_offset) = (INDEX.u32(block), DATA_OFFSET.u64(block));
        if index >= stripe.members {
            return Err(corrupt(format!("expected one of {} members, found member {index}", stripe.members)));
        }
        if data_offset < LABEL_AREA_BYTES
            || !data_offset.is_multiple_of(SLOT_ALIGN_BYTES)
            || data_offset.checked_add(stripe.region_bytes()).is_none_or(|end| end > i64::MAX as u64)
        {
            return Err(corrupt(format!("data cannot begin at byte {data_offset}")));
        }
        let field = &block[PATHS.offset..PATHS.end()];
        let (packed, rest) = field.split_at(field.len().min(PATHS_BYTES.u32(block) as usize));
        let paths = unpack(packed, stripe.members).filter(|_| is_zero(rest));
        Ok(Some(Label {
            set: Uuid(SET.array(block)),
            index,
            sequence: SEQUENCE.u64(block),
            stripe,
            data_offset,
            created_unix_ns: CREATED.u64(block),
            paths: paths.ok_or_else(|| corrupt("the paths of the members cannot be read".to_owned()))?,
        }))
    }

    /// The label from its two copies, which one counts, and why the other does not if it is not as it should be. None
    /// where neither copy bears the magic.
    ///
    /// # Errors
    ///
    /// An intact copy of an unknown version or feature refuses the member even if the other copy is readable.
    /// `Corrupt` when no copy is readable and one bears the magic.
    pub fn choose(a: &Block, b: &Block) -> Result<Option<ChosenLabel>> {
        let names = ["A", "B"];
        let decoded = [Label::decode(a), Label::decode(b)];
        let refuses = |error: &&Error| error.kind() != ErrorKind::Corrupt;
        if let Some(error) = decoded.iter().filter_map(|copy| copy.as_ref().err()).find(refuses) {
            return Err(error.clone());
        }
        let sequence = |at: usize| match &decoded[at] {
            Ok(Some(label)) => Some(label.sequence),
            _ => None,
        };
        let copy = usize::from(sequence(1) > sequence(0));
        let other = match &decoded[1 - copy] {
            Err(error) => Some(error.message().to_owned()),
            Ok(None) => Some("it does not bear the mark of a label".to_owned()),
            Ok(Some(_)) if sequence(0) != sequence(1) => Some("it is older".to_owned()),
            Ok(Some(_)) => None,
        };
        match &decoded[copy] {
            Ok(Some(label)) => {
                let note = other.map(|why| format!("label copy {} was not used: {why}", names[1 - copy]));
                Ok(Some(ChosenLabel { label: label.clone(), copy, note }))
            }
            _ if decoded.iter().all(|copy| matches!(copy, Ok(None))) => Ok(None),
            _ => {
                let why = |at: usize| match &decoded[at] {
                    Err(error) => format!("copy {}: {}", names[at], error.message()),
                    Ok(_) => format!("copy {}: not a label", names[at]),
                };
                let message = format!("{}; {}", why(0), why(1));
                Err(Error::new(ErrorKind::Corrupt, OP, message)
                    .advise("restore the first 8192 bytes of the member from a copy"))
            }
        }
    }
}

/// The label that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChosenLabel {
    /// What it says.
    pub label: Label,
    /// The copy that counts, 0 or 1: the other is to be overwritten first.
    pub copy: usize,
    /// Why the other copy does not count, where it is not the same.
    pub note: Option<String>,
}

const NEWER: &str = "use the release of pccheck that wrote the region, or a newer one";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Label {
        Label {
            set: Uuid([0x5a; 16]),
            index: 1,
            sequence: 7,
            stripe: StripeLayout::new(3, 4 << 20, 100 << 20).unwrap(),
            data_offset: LABEL_AREA_BYTES,
            created_unix_ns: 1_700_000_000_123_456_789,
            paths: [&b"/a/r0"[..], b"/b/\xff\xfe", b"/c/r2"].map(<[u8]>::to_vec).to_vec(),
        }
    }

    #[test]
    fn every_single_bit_flip_is_detected_and_the_other_copy_is_enough() {
        let block = sample().encode().unwrap();
        assert_eq!(Label::decode(&block).unwrap(), Some(sample()));
        assert_eq!(Label::choose(&block, &block).unwrap().unwrap().note, None);
        for bit in 0..block.len() * 8 {
            let mut flipped = block;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(!matches!(Label::decode(&flipped), Ok(Some(_))), "bit {bit}");
            for (a, b, copy) in [(&flipped, &block, 1), (&block, &flipped, 0)] {
                let chosen = Label::choose(a, b).unwrap().unwrap();
                assert_eq!((chosen.label, chosen.copy), (sample(), copy));
                assert!(chosen.note.is_some());
            }
        }
    }

    /// What this version wrote stays readable for ever.
    #[test]
    fn the_bytes_of_a_label_never_change() {
        let block = sample().encode().unwrap();
        assert_eq!(CHECKSUM.u64(&block), 0xb397d34c541b9dfa);
        assert_eq!(block[..16], *b"PCCMEMB\0\x01\0\0\0\x03\0\0\0");
    }

    #[test]
    fn the_newer_copy_counts_and_newer_formats_are_refused() {
        let old = sample().encode().unwrap();
        let new = Label { sequence: 8, ..sample() }.encode().unwrap();
        assert_eq!(Label::choose(&old, &new).unwrap().unwrap().copy, 1);
        assert_eq!(Label::choose(&new, &old).unwrap().unwrap().copy, 0);
        let changed = |field: Field, byte: u8| {
            let mut block = old;
            block[field.offset] = byte;
            seal(&mut block, CHECKSUM);
            block
        };
        let kind = |block: &Block| Label::choose(&old, block).unwrap_err().kind();
        assert_eq!(kind(&changed(VERSION, 2)), ErrorKind::UnsupportedVersion);
        assert_eq!(kind(&changed(INCOMPAT, 4)), ErrorKind::UnsupportedFeature);
        for block in [
            changed(INDEX, 3),
            changed(COUNT, 1),
            changed(UNIT, 1),
            changed(DATA_OFFSET, 1),
            changed(PATHS_BYTES, 3),
        ] {
            assert_eq!(Label::decode(&block).unwrap_err().kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn what_bears_no_magic_is_no_member_and_two_damaged_copies_are_named() {
        let zero = [0; 4096];
        assert_eq!(Label::choose(&zero, &zero).unwrap(), None);
        let mut damaged = sample().encode().unwrap();
        damaged[100] ^= 1;
        let error = Label::choose(&damaged, &zero).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.message().contains("copy A") && error.message().contains("copy B"), "{error}");
    }

    #[test]
    fn paths_that_do_not_fit_are_refused() {
        let long = Label { paths: vec![vec![b'x'; 1400]; 3], ..sample() };
        assert_eq!(long.encode().unwrap_err().kind(), ErrorKind::TooLarge);
        let empty = Label { paths: vec![b"/a".to_vec(), Vec::new(), b"/c".to_vec()], ..sample() };
        assert_eq!(empty.encode().unwrap_err().kind(), ErrorKind::InvalidArgument);
    }

    proptest! {
        /// Random bytes under the magic and a good checksum reach every later check.
        #[test]
        fn sealed_noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 4080), plausible in any::<bool>()) {
            let mut block = [0; 4096];
            block[8..4088].copy_from_slice(&noise);
            MAGIC.put(&mut block, LABEL_MAGIC);
            if plausible {
                block[..PATHS_BYTES.offset].copy_from_slice(&sample().encode().unwrap()[..PATHS_BYTES.offset]);
            }
            VERSION.put(&mut block, LABEL_VERSION.to_le_bytes());
            INCOMPAT.put(&mut block, [0; 8]);
            seal(&mut block, CHECKSUM);
            if let Ok(Some(label)) = Label::decode(&block) {
                prop_assert!(label.stripe.region_bytes() > 0);
            }
        }
    }
}
