//! Tells the trace oracle what the blocks of the real format mean.

use pccheck::format::{Layout, RecordState, SlotRecord, Uuid, BLOCK_BYTES, RECORDS_OFFSET};
use pccheck::medium::sim::{Classifier, RecordClass};

pub struct Format {
    pub layout: Layout,
    pub uuid: Uuid,
}

impl Format {
    fn slot_at(&self, offset: u64) -> Option<u32> {
        let slot = offset.checked_sub(RECORDS_OFFSET)? / BLOCK_BYTES;
        (slot < u64::from(self.layout.slot_count)).then_some(slot as u32)
    }
}

impl Classifier for Format {
    fn record(&self, offset: u64, block: &[u8]) -> Option<RecordClass> {
        let slot = self.slot_at(offset)?;
        let block = block.try_into().ok()?;
        let decoded = SlotRecord::decode(block, &self.uuid, slot, &self.layout);
        Some(match decoded {
            Ok(Some(record)) if record.state == RecordState::Writing => RecordClass::Writing,
            Ok(Some(record)) => {
                let at = self.layout.slot_offset(slot);
                let table = at + record.table_offset;
                let refers_to = vec![at..at + record.payload_bytes, table..table + record.table_bytes()];
                RecordClass::Commit { refers_to }
            }
            _ => RecordClass::Other,
        })
    }

    fn guard(&self, offset: u64) -> Option<u64> {
        let slot = offset.checked_sub(self.layout.payload_offset)? / self.layout.slot_bytes;
        (slot < u64::from(self.layout.slot_count)).then(|| self.layout.record_offset(slot as u32))
    }
}
