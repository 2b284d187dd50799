//! Images of regions: the golden one, alone or on the members of a striped region, and what an input makes of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use arbitrary::Arbitrary;
use pccheck::format::codec::checksum;
use pccheck::format::layout::{table_offset_for, CONTROL_OFFSETS, SUPERBLOCK_OFFSETS};
use pccheck::format::record::RECORD_BYTES;
use pccheck::format::{
    chunk_hash, encode_table, table_hash, Block, Label, Layout, SlotRecord, StripeLayout, Uuid, BLOCK_BYTES,
    HEADER_HASHED, LABEL_AREA_BYTES, LABEL_OFFSETS, SLOT_ALIGN_BYTES,
};

const GOLDEN: &[u8] = include_bytes!("../../../tests/data/region-v1.golden");
pub const REGION: Uuid = Uuid(*b"golden image v1\0");
const SLOTS: u32 = 5;
const UNIT_BYTES: u64 = 2 << 20;
/// Longest file that an input asks for; what it does not write is a hole.
const LEN_MAX: u64 = 256 << 20;

/// A place that means something.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Spot {
    Superblock(bool),
    Control(bool),
    Record(u8),
    /// The start of a slot: header and data.
    Payload(u8),
    Table(u8),
    Label(bool, bool),
    Anywhere(u32),
}

/// One change of the image.
#[derive(Arbitrary, Debug)]
pub enum Edit {
    Write {
        spot: Spot,
        at: u16,
        bytes: Vec<u8>,
    },
    /// One field that a number fits in, at eight bytes from each other.
    Number {
        spot: Spot,
        word: u8,
        value: Value,
    },
    /// A block that was left in a wrong place.
    Move {
        from: Spot,
        to: Spot,
    },
    Clear(Spot),
    /// The checkpoint of a slot again in other chunks, with a table and a record that fit.
    Rechunk {
        slot: u8,
        blocks: u8,
    },
    /// Table and record again after the payload was changed, so that all of it verifies.
    Forge(u8),
    /// Another JSON in front of a slot's payload.
    Header {
        slot: u8,
        json: String,
    },
    /// Checksums of a block made right again.
    Seal(Spot),
    Length(u32),
}

/// Numbers about which bounds may be wrong.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Value {
    Small(u8),
    Blocks(u16),
    Power(u8, i8),
    Any(u64),
}

impl Value {
    fn number(self) -> u64 {
        match self {
            Value::Small(value) => value.into(),
            Value::Blocks(value) => u64::from(value) * BLOCK_BYTES,
            Value::Power(shift, more) => (1u64 << (shift % 64)).wrapping_add_signed(more.into()),
            Value::Any(value) => value,
        }
    }
}

/// A region of which only the blocks that were written exist.
#[derive(Default, Clone)]
pub struct Image {
    blocks: BTreeMap<u64, Block>,
    labels: BTreeMap<(bool, bool), Block>,
    len: u64,
    striped: bool,
}

pub fn layout() -> Layout {
    Layout::new(SLOTS, SLOT_ALIGN_BYTES).expect("a layout")
}

fn stripe() -> StripeLayout {
    StripeLayout::new(2, UNIT_BYTES, layout().region_bytes()).expect("stripes")
}

/// The payloads of the golden image by the hash of their table: what verification may return for it, and nothing else.
pub fn golden_payloads() -> &'static BTreeMap<u128, Vec<u8>> {
    static PAYLOADS: OnceLock<BTreeMap<u128, Vec<u8>>> = OnceLock::new();
    PAYLOADS.get_or_init(|| {
        let image = Image::golden(false);
        let committed =
            (0..SLOTS).filter_map(|slot| image.record(slot)).filter(|record| record.payload_bytes > 0);
        let payloads: BTreeMap<u128, Vec<u8>> = committed
            .map(|record| {
                let payload = image.read(layout().slot_offset(record.slot), record.payload_bytes as usize);
                (record.table_hash, payload)
            })
            .collect();
        assert_eq!(payloads.len(), 2, "two different checkpoints are in the golden image");
        payloads
    })
}

impl Image {
    pub fn golden(striped: bool) -> Image {
        let mut image = Image { len: layout().region_bytes(), striped, ..Image::default() };
        let mut runs = GOLDEN;
        while let Some((offset, rest)) = runs.split_first_chunk() {
            let (used, rest) = rest.split_first_chunk().expect("a length after each offset");
            let (bytes, rest) = rest.split_at(u32::from_le_bytes(*used) as usize);
            image.write(u64::from_le_bytes(*offset), bytes);
            runs = rest;
        }
        for member in [false, true].into_iter().filter(|_| striped) {
            let block = label(member.into()).encode().expect("a label");
            image.labels.insert((member, false), block);
            image.labels.insert((member, true), block);
        }
        image
    }

    fn block(&mut self, offset: u64) -> &mut Block {
        self.blocks.entry(offset / BLOCK_BYTES * BLOCK_BYTES).or_insert([0; BLOCK_BYTES as usize])
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (at, &byte) in (offset..).zip(bytes) {
            self.block(at)[(at % BLOCK_BYTES) as usize] = byte;
        }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        for (at, byte) in (offset..).zip(&mut bytes) {
            if let Some(block) = self.blocks.get(&(at / BLOCK_BYTES * BLOCK_BYTES)) {
                *byte = block[(at % BLOCK_BYTES) as usize];
            }
        }
        bytes
    }

    /// What the record of a slot says, if it is one of the golden layout.
    fn record(&self, slot: u32) -> Option<SlotRecord> {
        let block = self.blocks.get(&layout().record_offset(slot))?;
        SlotRecord::decode(block, &REGION, slot, &layout()).ok().flatten()
    }

    fn offset(&self, spot: Spot) -> u64 {
        let (layout, slot) = (layout(), |slot: u8| u32::from(slot) % SLOTS);
        match spot {
            Spot::Superblock(copy) => SUPERBLOCK_OFFSETS[usize::from(copy)],
            Spot::Control(copy) => CONTROL_OFFSETS[usize::from(copy)],
            Spot::Record(at) => layout.record_offset(slot(at)),
            Spot::Payload(at) => layout.slot_offset(slot(at)),
            Spot::Table(at) => {
                let record = self.record(slot(at));
                layout.slot_offset(slot(at)) + record.map_or(0, |record| record.table_offset)
            }
            Spot::Anywhere(at) => u64::from(at) % layout.region_bytes(),
            Spot::Label(..) => 0,
        }
    }

    fn at(&mut self, spot: Spot) -> &mut Block {
        match spot {
            Spot::Label(member, copy) if self.striped => {
                self.labels.entry((member, copy)).or_insert([0; BLOCK_BYTES as usize])
            }
            _ => {
                let offset = self.offset(spot);
                self.block(offset)
            }
        }
    }

    pub fn edit(&mut self, edit: &Edit) {
        match edit {
            Edit::Write { spot, at, bytes } => {
                let block = self.at(*spot);
                let at = *at as usize % block.len();
                let len = bytes.len().min(block.len() - at);
                block[at..at + len].copy_from_slice(&bytes[..len]);
            }
            Edit::Number { spot, word, value } => {
                let (at, block) = (*word as usize % 32 * 8, self.at(*spot));
                block[at..at + 8].copy_from_slice(&value.number().to_le_bytes());
            }
            Edit::Move { from, to } => *self.at(*to) = *self.at(*from),
            Edit::Clear(spot) => self.at(*spot).fill(0),
            Edit::Rechunk { slot, blocks } => {
                let chunk_bytes = (u64::from(*blocks) % 64 + 1) * BLOCK_BYTES;
                self.recommit(u32::from(*slot) % SLOTS, |record| record.chunk_bytes = chunk_bytes);
            }
            Edit::Forge(slot) => self.recommit(u32::from(*slot) % SLOTS, |_| {}),
            Edit::Header { slot, json } => {
                let slot = u32::from(*slot) % SLOTS;
                let mut header = json.as_bytes().to_vec();
                header.resize(header.len().max(1).next_multiple_of(BLOCK_BYTES as usize) - 8, b' ');
                let start = layout().slot_offset(slot);
                self.write(start, &(header.len() as u64).to_le_bytes());
                self.write(start + 8, &header);
                self.recommit(slot, |record| record.header_bytes = header.len() as u64 + 8);
            }
            Edit::Seal(spot) => {
                let end = if matches!(spot, Spot::Record(_)) { RECORD_BYTES } else { BLOCK_BYTES as usize };
                let block = self.at(*spot);
                let sum = checksum(&block[..end - 8]);
                block[end - 8..end].copy_from_slice(&sum.to_le_bytes());
            }
            Edit::Length(len) => self.len = u64::from(*len) % LEN_MAX,
        }
    }

    /// A record, changed, with the table and the hashes that its payload has now.
    fn recommit(&mut self, slot: u32, change: impl FnOnce(&mut SlotRecord)) {
        let Some(mut record) = self.record(slot).filter(|record| record.chunk_count > 0) else { return };
        change(&mut record);
        record.payload_bytes = record.payload_bytes.min(SLOT_ALIGN_BYTES / 2);
        let start = layout().slot_offset(slot);
        let payload = self.read(start, record.payload_bytes as usize);
        let hashes: Vec<u128> = payload.chunks(record.chunk_bytes as usize).map(chunk_hash).collect();
        let table = encode_table(&hashes);
        record.chunk_count = hashes.len() as u64;
        record.table_offset = table_offset_for(record.payload_bytes).expect("a small payload");
        record.table_hash = table_hash(&table);
        if let Some(header) = payload.get(..record.header_bytes as usize) {
            record.header_hash = chunk_hash(header);
            record.flags |= HEADER_HASHED;
        }
        self.write(start + record.table_offset, &table);
        *self.block(layout().record_offset(slot)) = record.encode();
    }

    /// Every block that is not protected by a payload's hash gets a right checksum.
    pub fn seal_all(&mut self) {
        let control = [false, true].map(Spot::Control);
        let superblocks = [false, true].map(Spot::Superblock);
        for spot in superblocks.into_iter().chain(control).chain((0..SLOTS as u8).map(Spot::Record)) {
            if self.blocks.contains_key(&self.offset(spot)) {
                self.edit(&Edit::Seal(spot));
            }
        }
        for (member, copy) in self.labels.clone().into_keys() {
            self.edit(&Edit::Seal(Spot::Label(member, copy)));
        }
    }

    /// Writes the image's files; the region is opened by the first.
    pub fn write_to(&self, dir: &Path) -> PathBuf {
        let paths = [dir.join("r0"), dir.join("r1")];
        let create = |path: &PathBuf| File::create(path).expect("create the image");
        if !self.striped {
            let file = create(&paths[0]);
            file.set_len(self.len).expect("set its length");
            for (&offset, block) in self.blocks.range(..self.len) {
                let len = block.len().min((self.len - offset) as usize);
                file.write_all_at(&block[..len], offset).expect("write the image");
            }
            return paths[0].clone();
        }
        let (stripe, files) = (stripe(), [create(&paths[0]), create(&paths[1])]);
        for (member, file) in files.iter().enumerate() {
            // The length that an input asks for is that of the second.
            let full = LABEL_AREA_BYTES + stripe.member_bytes;
            let len = if member == 1 && self.len != layout().region_bytes() { self.len } else { full };
            file.set_len(len).expect("set its length");
        }
        for (&offset, block) in &self.blocks {
            let (member, within) = stripe.locate(offset);
            files[member].write_all_at(block, LABEL_AREA_BYTES + within).expect("write a member");
        }
        for (&(member, copy), block) in &self.labels {
            let offset = LABEL_OFFSETS[usize::from(copy)];
            files[usize::from(member)].write_all_at(block, offset).expect("write a label");
        }
        paths[0].clone()
    }
}

fn label(index: u32) -> Label {
    Label {
        set: Uuid(*b"golden, striped\0"),
        index,
        sequence: 1,
        stripe: stripe(),
        data_offset: LABEL_AREA_BYTES,
        created_unix_ns: 1_750_000_000_000_000_000,
        // Not where they are: members that moved together are found.
        paths: vec![b"/pccheck-fuzz/r0".to_vec(), b"/pccheck-fuzz/r1".to_vec()],
    }
}

/// Bytes that were never a region.
pub fn write_raw(bytes: &[u8], dir: &Path) -> PathBuf {
    let path = dir.join("r0");
    std::fs::write(&path, bytes).expect("write the image");
    path
}
