//! Snapshots into spare memory.

use super::groups::{ENQUEUED_MAX, GROUP_COPIES};
use super::{Flight, Leaving, Mark, Pump};
use crate::error::Result;
use crate::save::device::spare::Spare;

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
        self.jobs[at].move_to_spares(spares, GROUP_COPIES)
    }

    /// Enqueues the copies of a job's snapshot, as many as the driver takes without waiting. True where something moved.
    pub(super) fn enqueue_snapshot(&mut self, at: usize) -> Result<bool> {
        let mut moved = false;
        loop {
            let has_room = self.operations(at) < ENQUEUED_MAX;
            let job = &mut self.jobs[at];
            let number = job.number();
            let Some(left) = &mut job.to_spares else { return Ok(moved) };
            if !left.pieces.is_empty() && !has_room {
                return Ok(moved);
            }
            moved = true;
            let mut flight = Flight::new(number, Vec::new(), Vec::new(), Leaving::default());
            let enqueued = match left.pieces.pop_front() {
                Some((nth, copies)) => {
                    let lane = job.lanes[nth];
                    flight.on.push((lane, copies.len()));
                    let event = self.lanes[lane].snapshot(&copies);
                    event.map(|event| flight.marks.push(Mark::Event(event)))
                }
                None => {
                    flight.leaving = left.leaving;
                    job.to_spares = None;
                    self.end_snapshot(at, &mut flight)
                }
            };
            let job = &mut self.jobs[at];
            if enqueued.is_err() {
                // Some of it may run all the same: until that is done the spare is no other save's.
                flight.marks.extend(job.lanes.iter().flat_map(|&lane| self.lanes[lane].when_idle()));
            }
            job.flights += 1;
            self.flights.push_back(flight);
            enqueued?;
        }
    }

    /// All copies of a job's snapshot are enqueued, and done with this flight: whatever comes later comes behind them.
    fn end_snapshot(&mut self, at: usize, flight: &mut Flight) -> Result<()> {
        let mut for_streams = Vec::new();
        for &lane in &self.jobs[at].lanes {
            flight.marks.extend(self.lanes[lane].join()?.into_iter().map(Mark::Event));
            for_streams.extend(self.lanes[lane].mark_all()?);
        }
        if self.shared.faults.stream_waits_for_nothing() {
            for_streams.clear();
        }
        self.jobs[at].copies.all_enqueued(for_streams);
        Ok(())
    }
}
