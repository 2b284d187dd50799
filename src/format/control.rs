//! The control block: what is true of the whole region and changes while it is used.
//!
//! Two copies are written in turn, never both at once, so that a torn write leaves the one before it. The
//! valid copy with the higher sequence counts.

use super::codec::{check_seal, is_zero, seal, Block, Field};
use super::{Uuid, BLOCK_BYTES, MAX_GENERATION, MAX_SLOTS};
use crate::error::{Error, ErrorKind, Result};

const OP: &str = "read control block";

/// The first eight bytes of a control block.
pub const CONTROL_MAGIC: [u8; 8] = *b"PCCCTRL\0";

/// Version of the control block's layout.
pub const CONTROL_VERSION: u32 = 1;

/// The checkpoint is kept until it is unpinned.
pub const MARK_PINNED: u32 = 1;

/// A flush failed while this generation was being written: its durability is unknown and it is not used.
pub const MARK_QUARANTINED: u32 = 2;

/// The caller gave this checkpoint up (`abandon`, `discard_newer`): recovery must not return it.
pub const MARK_DISCARDED: u32 = 4;

/// Bit of `control_flags`: the global mark is present.
const HAS_GLOBAL: u32 = 1;

/// Bytes of one mark.
const MARK_BYTES: usize = 16;

const MAGIC: Field = Field::first("magic", 8);
const VERSION: Field = MAGIC.then("control_version", 4);
const MARK_COUNT: Field = VERSION.then("mark_count", 4);
const UUID: Field = MARK_COUNT.then("uuid", 16);
const SEQUENCE: Field = UUID.then("sequence", 8);
const RUN_ID: Field = SEQUENCE.then("run_id", 8);
const CEILING: Field = RUN_ID.then("generation_ceiling", 8);
const FLAGS: Field = CEILING.then("control_flags", 4);
const PAD: Field = FLAGS.then("reserved", 4);
const GLOBAL_RUN_ID: Field = PAD.then("global_run_id", 8);
const GLOBAL_STEP: Field = GLOBAL_RUN_ID.then("global_step", 8);
const GLOBAL_GENERATION: Field = GLOBAL_STEP.then("global_generation", 8);
const RESERVED: Field = GLOBAL_GENERATION.then("reserved", 152);
const MARKS: Field = RESERVED.then("marks", MAX_SLOTS as usize * MARK_BYTES);
const TAIL: Field = MARKS.then("reserved", 8);
const CHECKSUM: Field = TAIL.then("checksum", 8);
const _: () = assert!(CHECKSUM.end() as u64 == BLOCK_BYTES);

const MARK_SLOT: Field = Field::first("slot", 4);
const MARK_FLAGS: Field = MARK_SLOT.then("flags", 4);
const MARK_GENERATION: Field = MARK_FLAGS.then("generation", 8);
const _: () = assert!(MARK_GENERATION.end() == MARK_BYTES);

/// Every byte of a control block, in order.
#[cfg(test)]
pub(crate) const FIELDS: &[Field] = &[
    MAGIC,
    VERSION,
    MARK_COUNT,
    UUID,
    SEQUENCE,
    RUN_ID,
    CEILING,
    FLAGS,
    PAD,
    GLOBAL_RUN_ID,
    GLOBAL_STEP,
    GLOBAL_GENERATION,
    RESERVED,
    MARKS,
    TAIL,
    CHECKSUM,
];

/// Every byte of a mark, in order.
#[cfg(test)]
pub(crate) const MARK_FIELDS: &[Field] = &[MARK_SLOT, MARK_FLAGS, MARK_GENERATION];

/// The last checkpoint known to be durable on every rank of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GlobalMark {
    /// Group run in which the step was saved.
    pub run_id: u64,
    /// The step, as the trainer counts.
    pub step: u64,
    /// This rank's generation of that step.
    pub generation: u64,
}

/// What is remembered of one slot's checkpoint. Applies only while the slot's record has this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotMark {
    /// The slot.
    pub slot: u32,
    /// The generation in that slot.
    pub generation: u64,
    /// [`MARK_PINNED`], [`MARK_QUARANTINED`], [`MARK_DISCARDED`]; other bits are kept and mean nothing.
    pub flags: u32,
}

/// What a control block says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// Raised by one with every write; the first is 1.
    pub sequence: u64,
    /// Run id of the group, 0 when there is none.
    pub run_id: u64,
    /// Generations below this may have been used; from 1 to [`MAX_GENERATION`] + 1.
    pub generation_ceiling: u64,
    /// The global mark, if one was set.
    pub global: Option<GlobalMark>,
    /// At most one mark per slot.
    pub marks: Vec<SlotMark>,
}

impl Control {
    /// The control block that format writes.
    pub fn initial() -> Control {
        Control { sequence: 1, run_id: 0, generation_ceiling: 1, global: None, marks: Vec::new() }
    }

    /// The sequence of the block that follows this one.
    ///
    /// # Errors
    ///
    /// `Corrupt` where there is none: no region is written to so often.
    pub(crate) fn next_sequence(&self) -> Result<u64> {
        self.sequence.checked_add(1).ok_or_else(|| {
            let message = "the sequence number cannot be raised any more";
            Error::new(ErrorKind::Corrupt, "write control block", message)
                .advise("export the checkpoints, which can be read, and format a new region")
        })
    }

    /// The block to store.
    ///
    /// # Errors
    ///
    /// `Internal` when [`decode`](Control::decode) would refuse the result: nothing that a reader cannot read
    /// may reach the medium.
    pub fn encode(&self, uuid: &Uuid) -> Result<Block> {
        self.check().map_err(|message| Error::new(ErrorKind::Internal, "encode control block", message))?;
        let mut block = [0; BLOCK_BYTES as usize];
        MAGIC.put(&mut block, CONTROL_MAGIC);
        VERSION.put(&mut block, CONTROL_VERSION.to_le_bytes());
        MARK_COUNT.put(&mut block, (self.marks.len() as u32).to_le_bytes());
        UUID.put(&mut block, uuid.0);
        SEQUENCE.put(&mut block, self.sequence.to_le_bytes());
        RUN_ID.put(&mut block, self.run_id.to_le_bytes());
        CEILING.put(&mut block, self.generation_ceiling.to_le_bytes());
        if let Some(global) = self.global {
            FLAGS.put(&mut block, HAS_GLOBAL.to_le_bytes());
            GLOBAL_RUN_ID.put(&mut block, global.run_id.to_le_bytes());
            GLOBAL_STEP.put(&mut block, global.step.to_le_bytes());
            GLOBAL_GENERATION.put(&mut block, global.generation.to_le_bytes());
        }
        let places = block[MARKS.offset..MARKS.end()].chunks_exact_mut(MARK_BYTES);
        for (mark, place) in self.marks.iter().zip(places) {
            MARK_SLOT.put(place, mark.slot.to_le_bytes());
            MARK_FLAGS.put(place, mark.flags.to_le_bytes());
            MARK_GENERATION.put(place, mark.generation.to_le_bytes());
        }
        seal(&mut block, CHECKSUM);
        Ok(block)
    }

    /// Reads one copy.
    ///
    /// # Errors
    ///
    /// `Corrupt`, with the reason, for anything but a whole control block of the region `uuid`.
    pub fn decode(block: &Block, uuid: &Uuid) -> Result<Control> {
        Control::decode_inner(block, uuid).map_err(|message| Error::new(ErrorKind::Corrupt, OP, message))
    }

    fn decode_inner(block: &Block, uuid: &Uuid) -> Result<Control, String> {
        let magic: [u8; 8] = MAGIC.array(block);
        if magic != CONTROL_MAGIC {
            return Err(format!(
                "expected the magic \"{}\", found \"{}\"",
                CONTROL_MAGIC.escape_ascii(),
                magic.escape_ascii()
            ));
        }
        check_seal(block, CHECKSUM)?;
        let version = VERSION.u32(block);
        if version != CONTROL_VERSION {
            return Err(format!("expected control version {CONTROL_VERSION}, found {version}"));
        }
        let found = Uuid(UUID.array(block));
        if found != *uuid {
            return Err(format!("belongs to another region: expected {uuid}, found {found}"));
        }
        let mark_count = MARK_COUNT.u32(block);
        if mark_count > MAX_SLOTS {
            return Err(format!("expected at most {MAX_SLOTS} marks, found {mark_count}"));
        }
        let marks = block[MARKS.offset..MARKS.end()]
            .chunks_exact(MARK_BYTES)
            .take(mark_count as usize)
            .map(|place| SlotMark {
                slot: MARK_SLOT.u32(place),
                generation: MARK_GENERATION.u64(place),
                flags: MARK_FLAGS.u32(place),
            })
            .collect();
        let global = (FLAGS.u32(block) & HAS_GLOBAL != 0).then(|| GlobalMark {
            run_id: GLOBAL_RUN_ID.u64(block),
            step: GLOBAL_STEP.u64(block),
            generation: GLOBAL_GENERATION.u64(block),
        });
        let control = Control {
            sequence: SEQUENCE.u64(block),
            run_id: RUN_ID.u64(block),
            generation_ceiling: CEILING.u64(block),
            global,
            marks,
        };
        control.check()?;
        Ok(control)
    }

    /// Whether the values are within their limits; if not, what is wrong.
    fn check(&self) -> Result<(), String> {
        if !(1..=MAX_GENERATION + 1).contains(&self.generation_ceiling) {
            return Err(format!(
                "generation ceiling must be 1 to {}, found {}",
                MAX_GENERATION + 1,
                self.generation_ceiling
            ));
        }
        if let Some(global) = self.global {
            if global.generation > MAX_GENERATION {
                return Err(format!("global mark names generation {}, above the highest", global.generation));
            }
        }
        let mut marked = [false; MAX_SLOTS as usize];
        for mark in &self.marks {
            if mark.generation > MAX_GENERATION {
                return Err(format!("mark of slot {} names generation {}", mark.slot, mark.generation));
            }
            match marked.get_mut(mark.slot as usize) {
                None => return Err(format!("mark of slot {}, above the highest", mark.slot)),
                Some(true) => return Err(format!("two marks of slot {}", mark.slot)),
                Some(seen) => *seen = true,
            }
        }
        Ok(())
    }

    /// The control block that counts and which copy (0 or 1) it is, with one note per damaged copy.
    ///
    /// A copy of zeros is not damaged when the other says that it is the first ever written.
    pub fn choose(a: &Block, b: &Block, uuid: &Uuid) -> (Option<(Control, usize)>, Vec<String>) {
        Control::choose_read([Ok(a), Ok(b)], uuid)
    }

    /// [`choose`](Control::choose) for copies of which one or both could perhaps not even be read.
    pub(crate) fn choose_read(
        copies: [Result<&Block>; 2],
        uuid: &Uuid,
    ) -> (Option<(Control, usize)>, Vec<String>) {
        let untouched = copies.each_ref().map(|copy| copy.as_ref().is_ok_and(|block| is_zero(*block)));
        let decoded = copies.map(|copy| copy.and_then(|block| Control::decode(block, uuid)));
        let newest = match &decoded {
            [Ok(a), Ok(b)] => Some(usize::from(b.sequence > a.sequence)),
            [Ok(_), Err(_)] => Some(0),
            [Err(_), Ok(_)] => Some(1),
            [Err(_), Err(_)] => None,
        };
        let first_ever =
            newest.is_some_and(|copy| decoded[copy].as_ref().is_ok_and(|control| control.sequence <= 1));
        let mut notes = Vec::new();
        for (copy, name) in ["A", "B"].into_iter().enumerate() {
            match &decoded[copy] {
                Err(_) if untouched[copy] && first_ever => {}
                Err(error) => {
                    notes.push(format!("control block copy {name} was not used: {}", error.message()))
                }
                Ok(_) => {}
            }
        }
        if let [Ok(a), Ok(b)] = &decoded {
            if a.sequence == b.sequence && a != b {
                notes.push("control block copies A and B differ under one sequence; A was used".to_owned());
            }
        }
        let chosen = decoded
            .into_iter()
            .enumerate()
            .find_map(|(copy, control)| (newest == Some(copy)).then(|| Some((control.ok()?, copy)))?);
        (chosen, notes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const UUID_A: Uuid = Uuid([1; 16]);

    fn sample(sequence: u64) -> Control {
        Control {
            sequence,
            run_id: 77,
            generation_ceiling: 1 << 20,
            global: Some(GlobalMark { run_id: 77, step: 900, generation: 41 }),
            marks: vec![
                SlotMark { slot: 3, generation: 41, flags: MARK_PINNED },
                SlotMark { slot: 0, generation: 44, flags: MARK_QUARANTINED | MARK_DISCARDED },
            ],
        }
    }

    #[test]
    fn every_single_bit_flip_is_detected_and_the_other_copy_used() {
        let older = sample(8).encode(&UUID_A).unwrap();
        let newer = sample(9).encode(&UUID_A).unwrap();
        assert_eq!(Control::choose(&older, &newer, &UUID_A), (Some((sample(9), 1)), vec![]));
        assert_eq!(Control::choose(&newer, &older, &UUID_A), (Some((sample(9), 0)), vec![]));
        for bit in 0..newer.len() * 8 {
            let mut flipped = newer;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                Control::decode(&flipped, &UUID_A).unwrap_err().kind(),
                ErrorKind::Corrupt,
                "bit {bit}"
            );
            let (chosen, notes) = Control::choose(&older, &flipped, &UUID_A);
            assert_eq!(chosen, Some((sample(8), 0)));
            assert_eq!(notes.len(), 1, "bit {bit}: {notes:?}");
        }
    }

    /// Any mixture of old and new sectors is one of the two, or damaged; never a third thing.
    #[test]
    fn every_torn_write_is_old_new_or_damaged() {
        let old = sample(8).encode(&UUID_A).unwrap();
        let mut control = sample(10);
        control.marks =
            (0..MAX_SLOTS).map(|slot| SlotMark { slot, generation: 5, flags: MARK_PINNED }).collect();
        let new = control.encode(&UUID_A).unwrap();
        for subset in 0u32..256 {
            let mut torn = old;
            for sector in (0..8).filter(|sector| subset & (1 << sector) != 0) {
                let bytes = sector * 512..(sector + 1) * 512;
                torn[bytes.clone()].copy_from_slice(&new[bytes]);
            }
            match Control::decode(&torn, &UUID_A) {
                Ok(found) => {
                    assert!((subset == 0 && found == sample(8)) || (subset == 255 && found == control))
                }
                Err(error) => assert_eq!(error.kind(), ErrorKind::Corrupt),
            }
        }
    }

    #[test]
    fn a_zero_copy_is_damage_only_after_the_first_write() {
        let zero = [0; 4096];
        let first = Control::initial();
        let (chosen, notes) = Control::choose(&first.encode(&UUID_A).unwrap(), &zero, &UUID_A);
        assert_eq!((chosen, notes), (Some((first, 0)), vec![]));
        let (chosen, notes) = Control::choose(&sample(2).encode(&UUID_A).unwrap(), &zero, &UUID_A);
        assert_eq!((chosen, notes.len()), (Some((sample(2), 0)), 1));
        let (chosen, notes) = Control::choose(&zero, &zero, &UUID_A);
        assert_eq!((chosen, notes.len()), (None, 2));
    }

    #[test]
    fn another_region_s_block_is_refused() {
        let block = sample(1).encode(&UUID_A).unwrap();
        let error = Control::decode(&block, &Uuid([2; 16])).unwrap_err();
        assert!(error.message().contains("another region"), "{error}");
    }

    #[test]
    fn impossible_values_are_neither_written_nor_read() {
        let changes: [fn(&mut Control); 6] = [
            |control| control.generation_ceiling = 0,
            |control| control.generation_ceiling = MAX_GENERATION + 2,
            |control| control.global.as_mut().unwrap().generation = MAX_GENERATION + 1,
            |control| control.marks[0].slot = MAX_SLOTS,
            |control| control.marks[0].slot = control.marks[1].slot,
            |control| control.marks[0].generation = u64::MAX,
        ];
        for change in changes {
            let mut control = sample(1);
            change(&mut control);
            assert_eq!(control.encode(&UUID_A).unwrap_err().kind(), ErrorKind::Internal);
        }
        let mut block = sample(1).encode(&UUID_A).unwrap();
        MARK_COUNT.put(&mut block, (MAX_SLOTS + 1).to_le_bytes());
        seal(&mut block, CHECKSUM);
        assert_eq!(Control::decode(&block, &UUID_A).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    proptest! {
        #[test]
        fn round_trip(sequence in any::<u64>(), run_id in any::<u64>(), ceiling in 1..=MAX_GENERATION + 1,
                      global in proptest::option::of((any::<u64>(), any::<u64>(), 0..=MAX_GENERATION)),
                      flags in proptest::collection::vec(any::<u32>(), 0..=MAX_SLOTS as usize)) {
            let control = Control {
                sequence,
                run_id,
                generation_ceiling: ceiling,
                global: global.map(|(run_id, step, generation)| GlobalMark { run_id, step, generation }),
                marks: flags.iter().enumerate().map(|(slot, &flags)| SlotMark {
                    slot: slot as u32, generation: ceiling - 1, flags,
                }).collect(),
            };
            prop_assert_eq!(Control::decode(&control.encode(&UUID_A).unwrap(), &UUID_A).unwrap(), control);
        }

        #[test]
        fn sealed_noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 4056)) {
            let mut block = [0; 4096];
            block[32..4088].copy_from_slice(&noise);
            MAGIC.put(&mut block, CONTROL_MAGIC);
            VERSION.put(&mut block, CONTROL_VERSION.to_le_bytes());
            MARK_COUNT.put(&mut block, u32::from(noise[0]).to_le_bytes());
            UUID.put(&mut block, UUID_A.0);
            seal(&mut block, CHECKSUM);
            if let Ok(control) = Control::decode(&block, &UUID_A) {
                prop_assert_eq!(Control::decode(&control.encode(&UUID_A).unwrap(), &UUID_A).unwrap(), control);
            }
        }
    }
}
