//! Tells the trace oracle what the blocks of the real format mean.

use std::ops::Range;

use pccheck::format::{Layout, RecordState, SlotRecord, Uuid, BLOCK_BYTES, RECORDS_OFFSET};
use pccheck::medium::sim::{Classifier, RecordClass};

use crate::world::Setup;

pub struct Format {
    pub setup: Setup,
    pub layout: Layout,
    pub uuid: Uuid,
}

impl Format {
    /// The byte of the region at a byte of the simulated medium; none in a member's label area.
    fn offset_of(&self, place: u64) -> Option<u64> {
        match self.setup.stripes {
            Some(stripes) => stripes.offset_of(self.layout.region_bytes(), place),
            None => Some(place),
        }
    }

    /// Where bytes of the region lie on the simulated medium.
    fn places(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let unit_bytes = self.setup.stripes.map_or(u64::MAX, |stripes| stripes.unit_bytes);
        let mut places = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let len = (unit_bytes - at % unit_bytes).min(range.end - at);
            let place = self.setup.place(at);
            places.push(place..place + len);
            at += len;
        }
        places
    }

    fn slot_at(&self, offset: u64) -> Option<u32> {
        let slot = offset.checked_sub(RECORDS_OFFSET)? / BLOCK_BYTES;
        (slot < u64::from(self.layout.slot_count)).then_some(slot as u32)
    }
}

impl Classifier for Format {
    fn record(&self, place: u64, block: &[u8]) -> Option<RecordClass> {
        let slot = self.slot_at(self.offset_of(place)?)?;
        let block = block.try_into().ok()?;
        let decoded = SlotRecord::decode(block, &self.uuid, slot, &self.layout);
        Some(match decoded {
            Ok(Some(record)) if record.state == RecordState::Writing => RecordClass::Writing,
            Ok(Some(record)) => {
                let at = self.layout.slot_offset(slot);
                let table = at + record.table_offset;
                let parts = [at..at + record.payload_bytes, table..table + record.table_bytes()];
                let refers_to = parts.into_iter().flat_map(|part| self.places(part)).collect();
                RecordClass::Commit { refers_to }
            }
            _ => RecordClass::Other,
        })
    }

    fn guard(&self, place: u64) -> Option<u64> {
        let slot = self.offset_of(place)?.checked_sub(self.layout.payload_offset)? / self.layout.slot_bytes;
        (slot < u64::from(self.layout.slot_count))
            .then(|| self.setup.place(self.layout.record_offset(slot as u32)))
    }
}
