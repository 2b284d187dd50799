//! The protocol broken on purpose, for the checker's own sake: a medium that lacks one of its barriers, faults of the engine.

use std::sync::Arc;

use pccheck::medium::{Barrier, Io, Medium, MediumInfo, MediumMemory};
use pccheck::save::Faults;

/// How the protocol is to be broken.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Protocol {
    /// This barrier does nothing.
    pub removed: Option<Barrier>,
    pub faults: Faults,
}

/// A medium without one of its barriers.
struct Without {
    medium: Arc<dyn Medium>,
    removed: Barrier,
}

impl Protocol {
    /// The medium as this protocol has it.
    pub fn on(&self, medium: Arc<dyn Medium>) -> Arc<dyn Medium> {
        match self.removed {
            Some(removed) => Arc::new(Without { medium, removed }),
            None => medium,
        }
    }
}

impl Medium for Without {
    fn info(&self) -> MediumInfo {
        self.medium.info()
    }

    fn len_bytes(&self) -> u64 {
        self.medium.len_bytes()
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> pccheck::Result<()> {
        self.medium.read(offset, dst)
    }

    fn start(&self, io: Io) {
        self.medium.start(io);
    }

    fn copy(&self, offset: u64, src: &[u8]) -> pccheck::Result<()> {
        self.medium.copy(offset, src)
    }

    fn fence(&self, barrier: Barrier) -> pccheck::Result<()> {
        self.medium.fence(barrier)
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => Ok(()),
            false => self.medium.persist(offset, len, barrier),
        }
    }

    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => Ok(()),
            false => self.medium.persist_ranges(ranges, barrier),
        }
    }

    fn check_present(&self) -> pccheck::Result<()> {
        self.medium.check_present()
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.medium.memory()
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> pccheck::Result<()> {
        match barrier == self.removed {
            true => self.medium.copy(offset, block),
            false => self.medium.write_durable(offset, block, barrier),
        }
    }
}
