//! The region striped over members, which are windows of one simulated medium: what a crash leaves on one of them is
//! independent of what it leaves on the others, and every combination is an image of the whole.

use std::sync::Arc;

use pccheck::format::{StripeLayout, LABEL_AREA_BYTES};
use pccheck::medium::sim::SimMedium;
use pccheck::medium::{Barrier, Io, Medium, MediumInfo, MediumMemory, Striped};
use pccheck::Result;

/// How a region is striped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stripes {
    pub members: u32,
    /// Chunks are a block: a unit of one block puts every chunk of a payload on another member than the one before.
    pub unit_bytes: u64,
    /// Planted fault of striping: flushes of payload reach member 0 only.
    pub deaf: bool,
}

impl Stripes {
    fn layout(&self, region_bytes: u64) -> StripeLayout {
        StripeLayout::new(self.members, self.unit_bytes, region_bytes).expect("layout")
    }

    fn window_bytes(layout: &StripeLayout) -> u64 {
        LABEL_AREA_BYTES + layout.member_bytes
    }

    /// Bytes of the simulated medium that holds all members.
    pub fn sim_bytes(&self, region_bytes: u64) -> u64 {
        let layout = self.layout(region_bytes);
        u64::from(self.members) * Stripes::window_bytes(&layout)
    }

    /// The members, one behind the other.
    pub fn windows(&self, sim: &Arc<SimMedium>, region_bytes: u64) -> Vec<Arc<dyn Medium>> {
        let layout = self.layout(region_bytes);
        let len = Stripes::window_bytes(&layout);
        let window = |index: u64| -> Arc<dyn Medium> {
            Arc::new(Window { sim: sim.clone(), start: index * len, len, deaf: self.deaf && index > 0 })
        };
        (0..u64::from(self.members)).map(window).collect()
    }

    /// The region on them.
    pub fn medium(&self, sim: &Arc<SimMedium>, region_bytes: u64) -> Arc<dyn Medium> {
        let layout = self.layout(region_bytes);
        let members = self.windows(sim, region_bytes);
        Arc::new(Striped::new(layout, LABEL_AREA_BYTES, members, true).expect("striped"))
    }

    /// Where a byte of the region lies on the simulated medium.
    pub fn place(&self, region_bytes: u64, offset: u64) -> u64 {
        let layout = self.layout(region_bytes);
        let (member, at) = layout.locate(offset);
        member as u64 * Stripes::window_bytes(&layout) + LABEL_AREA_BYTES + at
    }

    /// The byte of the region that lies there; none in a label area.
    pub fn offset_of(&self, region_bytes: u64, place: u64) -> Option<u64> {
        let layout = self.layout(region_bytes);
        let (member, at) = (place / Stripes::window_bytes(&layout), place % Stripes::window_bytes(&layout));
        Some(layout.region_offset(member as usize, at.checked_sub(LABEL_AREA_BYTES)?))
    }

    /// Reads the region by a function that reads the simulated medium.
    pub fn read(
        &self,
        region_bytes: u64,
        (offset, dst): (u64, &mut [u8]),
        read: impl Fn(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let layout = self.layout(region_bytes);
        layout.pieces(offset, dst.len()).try_for_each(|piece| {
            let at = self.place(region_bytes, offset + piece.start as u64);
            read(at, &mut dst[piece.start..piece.start + piece.len])
        })
    }
}

/// A part of a simulated medium, as a medium.
struct Window {
    sim: Arc<SimMedium>,
    start: u64,
    len: u64,
    deaf: bool,
}

impl Window {
    fn at(&self, offset: u64, len: u64) -> u64 {
        assert!(offset + len <= self.len, "{len} bytes from {offset} leave a member of {} bytes", self.len);
        self.start + offset
    }
}

impl Medium for Window {
    fn info(&self) -> MediumInfo {
        self.sim.info()
    }

    fn len_bytes(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.sim.read(self.at(offset, dst.len() as u64), dst)
    }

    fn start(&self, io: Io) {
        let offset = self.at(io.offset, io.len as u64);
        self.sim.start(Io { offset, ..io });
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        self.sim.copy(self.at(offset, src.len() as u64), src)
    }

    fn fence(&self, barrier: Barrier) -> Result<()> {
        self.sim.fence(barrier)
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        match self.deaf && barrier == Barrier::Payload {
            true => Ok(()),
            false => self.sim.persist(self.at(offset, len), len, barrier),
        }
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.sim.memory().map(|_| self as &dyn MediumMemory)
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        self.sim.write_durable(self.at(offset, block.len() as u64), block, barrier)
    }
}

impl MediumMemory for Window {
    fn fill(
        &self,
        offset: u64,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        let memory = self.sim.memory().expect("asked for only where there is memory");
        memory.fill(self.at(offset, len as u64), len, fill)
    }
}
