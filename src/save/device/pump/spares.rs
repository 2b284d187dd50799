//! Spare memory, and snapshots into it.

use super::{Flight, Pump};
use crate::error::Result;
use crate::save::device::batch::{Batch, To};
use crate::save::device::lane::Between;
use crate::save::device::spare::Spare;
use crate::sync::Arc;

impl Pump<'_> {
    /// Spare memory for a job, of each of its devices.
    pub(super) fn take_spares(&mut self, at: usize, modest: bool) -> Result<Vec<(usize, Spare)>> {
        let bytes = self.jobs[at].spare_bytes()?;
        let mut spares = Vec::with_capacity(bytes.len());
        for (&lane, &bytes) in self.jobs[at].lanes.iter().zip(&bytes) {
            match self.lanes[lane].take_spare(bytes, modest) {
                Ok(spare) => spares.push((lane, spare)),
                Err(error) => {
                    spares.into_iter().for_each(|(lane, spare)| self.lanes[lane].return_spare(spare));
                    return Err(error);
                }
            }
        }
        Ok(spares)
    }

    /// A job's snapshot goes to these.
    pub(super) fn snapshot(&mut self, at: usize, spares: Vec<(usize, Spare)>) -> Result<()> {
        let spares = self.register(at, spares)?;
        let job = &mut self.jobs[at];
        let (lists, leaving) = job.move_to_spares(spares)?;
        let flight = Flight::new(job.number(), Vec::new(), Vec::new(), leaving);
        job.batch = Some(Batch::new(To::Spare(flight), &lists, |_| Between::default()));
        Ok(())
    }

    /// Spare memory that nobody writes from any more is there for other saves.
    pub(super) fn take_back(&mut self) {
        for (lane, spare) in std::mem::take(&mut self.lent) {
            match Arc::try_unwrap(spare) {
                Ok(spare) => self.lanes[lane].return_spare(spare),
                Err(spare) => self.lent.push((lane, spare)),
            }
        }
    }
}
