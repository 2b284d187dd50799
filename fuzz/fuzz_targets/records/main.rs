//! Every structure on the medium, decoded from arbitrary bytes: no decoder panics, what it accepts keeps the promises of its
//! documentation, and encodes and decodes to the same meaning.
#![no_main]

mod samples;

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use pccheck::format::codec::checksum;
use pccheck::format::layout::MAX_REGION_BYTES;
use pccheck::format::record::RECORD_BYTES;
use pccheck::format::{
    decode_table, encode_table, table_hash, Block, Control, Label, Layout, RecordState, SlotRecord,
    StripeLayout, Superblock, Uuid, BLOCK_BYTES, MAX_CHUNK_BYTES, MAX_GENERATION, MAX_SLOTS, RECORDS_OFFSET,
    SLOT_ALIGN_BYTES,
};
use pccheck::recovery::{decide, read_region, DecisionTable};
use pccheck::{Error, ErrorKind};

use samples::{samples, Kind, REGION};

/// Bytes over those of a sample.
#[derive(Arbitrary, Debug)]
struct Patch {
    at: u16,
    bytes: [u8; 8],
    len: u8,
}

/// One block: noise or a patched sample, perhaps with a checksum that is right again.
#[derive(Arbitrary, Debug)]
struct Made {
    sample: u8,
    noise: Option<Vec<u8>>,
    patches: Vec<Patch>,
    seal: bool,
}

#[derive(Arbitrary, Debug)]
struct Input {
    blocks: Vec<Made>,
    slot: u8,
    slot_count: u16,
    slot_units: u32,
    offset: u64,
    len: u32,
}

impl Made {
    fn block(&self) -> Block {
        let samples = samples();
        let (kind, sample) = &samples[self.sample as usize % samples.len()];
        let mut block = match &self.noise {
            Some(noise) => {
                let mut block = [0; BLOCK_BYTES as usize];
                let len = noise.len().min(block.len());
                block[..len].copy_from_slice(&noise[..len]);
                block
            }
            None => *sample,
        };
        for patch in self.patches.iter().take(32) {
            // Most of what means something lies in front.
            let at =
                if patch.at & 0x8000 != 0 { patch.at % 256 } else { patch.at % BLOCK_BYTES as u16 } as usize;
            let len = (patch.len as usize % 9).min(block.len() - at);
            block[at..at + len].copy_from_slice(&patch.bytes[..len]);
        }
        if self.seal {
            let end = if *kind == Kind::Record { RECORD_BYTES } else { block.len() };
            let sum = checksum(&block[..end - 8]);
            block[end - 8..end].copy_from_slice(&sum.to_le_bytes());
        }
        block
    }
}

/// A refusal is for what the bytes say, never for a defect of the engine.
fn refused(error: &Error) {
    let expected = [
        ErrorKind::Corrupt,
        ErrorKind::NotARegion,
        ErrorKind::UnsupportedVersion,
        ErrorKind::UnsupportedFeature,
        ErrorKind::InvalidArgument,
    ];
    assert!(expected.contains(&error.kind()), "{error:?}");
}

fn layout_holds(layout: &Layout) {
    let last = layout.slot_count - 1;
    assert!((2..=MAX_SLOTS).contains(&layout.slot_count));
    assert!(layout.record_offset(last) + BLOCK_BYTES <= layout.payload_offset);
    assert_eq!(layout.slot_offset(last) + layout.slot_bytes, layout.region_bytes());
    assert!(layout.region_bytes() <= MAX_REGION_BYTES);
}

fn superblock(block: &Block) {
    match Superblock::decode(block) {
        Ok(found) => {
            layout_holds(&found.layout);
            assert_eq!(Superblock::decode(&found.encode()).expect("what was encoded"), found);
        }
        Err(error) => refused(&error),
    }
}

fn control(block: &Block) {
    match Control::decode(block, &REGION) {
        Ok(found) => {
            assert!(found.generation_ceiling >= 1 && found.generation_ceiling <= MAX_GENERATION + 1);
            assert!(found.marks.len() <= MAX_SLOTS as usize);
            let encoded = found.encode(&REGION).expect("what was decoded can be encoded");
            assert_eq!(Control::decode(&encoded, &REGION).expect("what was encoded"), found);
        }
        Err(error) => refused(&error),
    }
}

fn record(block: &Block, uuid: &Uuid, slot: u32, layout: &Layout) {
    match SlotRecord::decode(block, uuid, slot, layout) {
        Ok(Some(found)) => {
            assert_eq!((found.slot, found.uuid), (slot, *uuid));
            assert!((1..=MAX_GENERATION).contains(&found.generation));
            if found.state == RecordState::Committed {
                committed_holds(&found, layout);
            }
            let again = SlotRecord::decode(&found.encode(), uuid, slot, layout);
            assert_eq!(again.expect("what was encoded"), Some(found));
        }
        Ok(None) => assert!(block[..RECORD_BYTES].iter().all(|&byte| byte == 0)),
        Err(error) => refused(&error),
    }
}

/// "A committed record that is returned lies within `layout` in every field."
fn committed_holds(found: &SlotRecord, layout: &Layout) {
    assert!(found.header_bytes <= found.payload_bytes);
    assert!(found.chunk_bytes > 0 && found.chunk_bytes <= MAX_CHUNK_BYTES);
    assert_eq!(found.chunk_count, found.payload_bytes.div_ceil(found.chunk_bytes));
    let last = found.chunk_count - 1;
    assert_eq!(found.chunk_offset(last) + found.chunk_len(last) as u64, found.payload_bytes);
    assert_eq!(found.chunk_len(found.chunk_count), 0);
    assert!(found.payload_bytes <= found.table_offset, "{found:?}");
    let table_end = found.table_offset.checked_add(found.table_bytes()).expect("no overflow");
    assert!(table_end <= layout.slot_bytes, "the table passes its slot: {found:?}");
}

fn label(block: &Block, offset: u64, len: u32) {
    match Label::decode(block) {
        Ok(Some(found)) => {
            assert!(found.index < found.stripe.members && found.paths.len() == found.stripe.members as usize);
            assert!(found.data_offset.checked_add(found.stripe.member_bytes).is_some());
            let encoded = found.encode().expect("what was decoded can be encoded");
            assert_eq!(Label::decode(&encoded).expect("what was encoded"), Some(found.clone()));
            stripes_hold(&found.stripe, offset, len);
        }
        Ok(None) => assert_ne!(block[..8], *b"PCCMEMB\0"),
        Err(error) => refused(&error),
    }
}

/// The pieces of a transfer are on the members, in order and without gaps.
fn stripes_hold(stripe: &StripeLayout, offset: u64, len: u32) {
    let region_bytes = stripe.region_bytes();
    let offset = offset % region_bytes;
    let len = (len as usize % (64 << 10)).min((region_bytes - offset) as usize);
    let mut next = 0;
    for piece in stripe.pieces(offset, len) {
        assert_eq!(piece.start, next);
        assert!(piece.member < stripe.members as usize && piece.len > 0);
        assert!(piece.offset + piece.len as u64 <= stripe.member_bytes);
        assert_eq!(stripe.region_offset(piece.member, piece.offset), offset + piece.start as u64);
        next += piece.len;
    }
    assert_eq!(next, len);
    for member in 0..stripe.members as usize {
        if let Some((start, bytes)) = stripe.span(member, offset, len as u64) {
            assert!(start + bytes <= stripe.member_bytes);
        }
    }
}

/// The table of a record whose geometry is valid: the hashes that went in come out, and nothing else does.
fn table(found: &SlotRecord, noise: &[u8]) {
    if found.state != RecordState::Committed || found.chunk_count > 4096 {
        return;
    }
    if let Ok(hashes) = decode_table(noise, found) {
        assert_eq!(table_hash(&encode_table(&hashes)), found.table_hash);
    }
    let hashes: Vec<u128> = (0..found.chunk_count).map(|chunk| u128::from(chunk) << 77 | 5).collect();
    let bytes = encode_table(&hashes);
    let record = SlotRecord { table_hash: table_hash(&bytes), ..found.clone() };
    assert_eq!(decode_table(&bytes, &record).expect("its own table"), hashes);
    assert!(decode_table(&bytes[..bytes.len() - 1], &record).is_err(), "a byte is missing");
}

fn decision_holds(table: &DecisionTable) {
    layout_holds(&table.superblock.layout);
    assert_eq!(table.slots.len(), table.superblock.layout.slot_count as usize);
    let generations: Vec<u64> = table.checkpoints().map(|record| record.generation).collect();
    assert_eq!(generations.len(), table.newest_first.len());
    assert!(generations.windows(2).all(|pair| pair[0] > pair[1]), "{generations:?}");
    for decision in &table.slots {
        if let Some(record) = &decision.record {
            assert!(record.generation < table.next_generation, "a generation would be used twice");
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(input) = Input::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let blocks: Vec<Block> = input.blocks.iter().take(24).map(Made::block).collect();
    let sizes =
        (u32::from(input.slot_count), (u64::from(input.slot_units) + 1).saturating_mul(SLOT_ALIGN_BYTES));
    let layout = Layout::new(sizes.0, sizes.1).unwrap_or_else(|error| {
        refused(&error);
        samples::layout()
    });
    layout_holds(&layout);
    for block in &blocks {
        superblock(block);
        control(block);
        record(block, &REGION, u32::from(input.slot) % layout.slot_count, &layout);
        label(block, input.offset, input.len);
        if let Ok(Some(found)) = SlotRecord::decode(block, &REGION, samples::SLOT, &samples::layout()) {
            committed_or_writing(&found, block);
        }
    }
    for pair in blocks.windows(2) {
        choices(&pair[0], &pair[1]);
    }
    region(&blocks, input.len);
});

fn committed_or_writing(found: &SlotRecord, noise: &Block) {
    if found.state == RecordState::Committed {
        committed_holds(found, &samples::layout());
    }
    table(found, noise);
}

fn choices(a: &Block, b: &Block) {
    match Superblock::choose(a, b) {
        Ok((chosen, note)) => {
            let copies = [Superblock::decode(a), Superblock::decode(b)];
            assert!(copies.iter().flatten().any(|copy| *copy == chosen));
            assert!(
                note.is_some() || copies.iter().all(|copy| copy.as_ref().is_ok_and(|copy| *copy == chosen))
            );
        }
        Err(error) => refused(&error),
    }
    let (chosen, _) = Control::choose(a, b, &REGION);
    for (copy, block) in [a, b].into_iter().enumerate() {
        if let Ok(found) = Control::decode(block, &REGION) {
            let (best, best_copy) = chosen.as_ref().expect("a valid copy is there");
            assert!(best.sequence > found.sequence || *best_copy == copy || best.sequence == found.sequence);
        }
    }
    match Label::choose(a, b) {
        Ok(Some(chosen)) => {
            let block = [a, b][chosen.copy];
            assert_eq!(Label::decode(block).expect("the copy that counts"), Some(chosen.label));
        }
        Ok(None) => {}
        Err(error) => refused(&error),
    }
}

/// The blocks as the start of a region, of any length.
fn region(blocks: &[Block], len: u32) {
    if let [a, b, c, d, records @ ..] = blocks {
        match decide([a, b], [c, d], records) {
            Ok(table) => decision_holds(&table),
            Err(error) => refused(&error),
        }
    }
    let read = |offset: u64, dst: &mut [u8]| {
        dst.fill(0);
        for (index, place) in dst.chunks_mut(BLOCK_BYTES as usize).enumerate() {
            if let Some(block) = blocks.get((offset / BLOCK_BYTES) as usize + index) {
                place.copy_from_slice(&block[..place.len()]);
            }
        }
        Ok(())
    };
    match read_region(read, u64::from(len) * RECORDS_OFFSET) {
        Ok(table) => {
            decision_holds(&table);
            assert!(table.superblock.layout.region_bytes() <= u64::from(len) * RECORDS_OFFSET);
        }
        Err(error) => refused(&error),
    }
}
