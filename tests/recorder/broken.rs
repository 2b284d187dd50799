//! The protocol broken on purpose, for the checker's own sake: a medium that lacks one of its barriers, faults of the engine,
//! and gates that bring about orders of events that are rare.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use pccheck::medium::{Barrier, Io, Medium, MediumInfo, MediumMemory};
use pccheck::save::Faults;
use pccheck::Error;

use super::common::WAIT;

/// How the protocol is to be broken.
#[derive(Clone, Copy, Default, PartialEq)]
pub struct Protocol {
    /// This barrier does nothing.
    pub removed: Option<Barrier>,
    pub faults: Faults,
}

impl Protocol {
    pub fn without(barrier: Barrier) -> Protocol {
        Protocol { removed: Some(barrier), ..Protocol::default() }
    }

    pub fn with(plant: fn(&mut Faults)) -> Protocol {
        let mut protocol = Protocol::default();
        plant(&mut protocol.faults);
        protocol
    }
}

/// Holds commit records back, or what comes after the flush of a payload; fails writing marks and refuses control blocks. All when
/// told to.
#[derive(Default)]
pub struct Gate {
    state: Mutex<Gated>,
    changed: Condvar,
}

#[derive(Default)]
struct Gated {
    /// What waits: a commit record, or the committer just after the flush of payloads.
    hold: Option<Barrier>,
    held: bool,
    fail_next_mark: bool,
    refuse_controls: bool,
    /// Writing marks that became durable.
    marks: usize,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, Gated> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Gated)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    fn wait(&self, met: impl Fn(&Gated) -> bool) {
        let limit = WAIT.expect("a time");
        let waited = self.changed.wait_timeout_while(self.state(), limit, |state| !met(state));
        assert!(!waited.unwrap_or_else(PoisonError::into_inner).1.timed_out(), "the gate saw nothing");
    }

    pub fn hold(&self, barrier: Barrier) {
        self.change(|state| *state = Gated { hold: Some(barrier), held: false, ..*state });
    }

    pub fn wait_held(&self) {
        self.wait(|state| state.held);
    }

    pub fn release(&self) {
        self.change(|state| state.hold = None);
    }

    pub fn fail_next_mark(&self) {
        self.change(|state| state.fail_next_mark = true);
    }

    pub fn refuse_controls(&self, refuse: bool) {
        self.change(|state| state.refuse_controls = refuse);
    }

    pub fn marks(&self) -> usize {
        self.state().marks
    }

    pub fn wait_for_marks(&self, marks: usize) {
        self.wait(|state| state.marks >= marks);
    }

    fn wait_at(&self, barrier: Barrier) {
        if self.state().hold == Some(barrier) {
            self.change(|state| state.held = true);
            self.wait(|state| state.hold != Some(barrier));
        }
    }

    fn write(&self, barrier: Barrier, write: impl FnOnce() -> pccheck::Result<()>) -> pccheck::Result<()> {
        match barrier {
            Barrier::Commit => self.wait_at(barrier),
            Barrier::WritingMark if std::mem::take(&mut self.state().fail_next_mark) => return Err(planted()),
            Barrier::Control if self.state().refuse_controls => return Err(planted()),
            _ => {}
        }
        write()?;
        self.change(|state| state.marks += usize::from(barrier == Barrier::WritingMark));
        Ok(())
    }
}

fn planted() -> Error {
    Error::io("a planted failure", &io::Error::from_raw_os_error(libc::EIO))
}

/// A medium that lacks a barrier, or has a gate.
pub struct Broken {
    pub medium: Arc<dyn Medium>,
    pub removed: Option<Barrier>,
    pub gate: Arc<Gate>,
}

impl Medium for Broken {
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
        match Some(barrier) == self.removed {
            true => Ok(()),
            false => self.medium.persist(offset, len, barrier),
        }
    }

    fn persist_ranges(&self, ranges: &[(u64, u64)], barrier: Barrier) -> pccheck::Result<()> {
        match Some(barrier) == self.removed {
            true => Ok(()),
            false => self.medium.persist_ranges(ranges, barrier),
        }?;
        self.gate.wait_at(barrier);
        Ok(())
    }

    fn check_present(&self) -> pccheck::Result<()> {
        self.medium.check_present()
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.medium.memory()
    }

    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> pccheck::Result<()> {
        self.gate.write(barrier, || match Some(barrier) == self.removed {
            true => self.medium.copy(offset, block),
            false => self.medium.write_durable(offset, block, barrier),
        })
    }
}
