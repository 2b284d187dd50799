//! How a save moves on once its chunks are on their way: it is marked, confirmed, committed; and how it ends.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Instant;

use super::{internal, out_of_time, Durable, Mark, Parked, SaveCore};
use crate::error::{Error, Result};
use crate::format::encode_table;
use crate::sync::now;

impl SaveCore {
    /// False where the save failed before its mark was written: the marker must then leave the slot alone.
    pub fn wants_mark(&self) -> bool {
        let (wanted, parked) = {
            let mut state = self.state.lock();
            let mut parked = Vec::new();
            if state.failure.is_some() {
                state.mark = Mark::Abandoned;
                // Who recorded the failure may have left them.
                parked = std::mem::take(&mut state.parked);
                state.in_flight -= parked.len() as u32;
            }
            (state.mark == Mark::Pending, parked)
        };
        drop(parked);
        if !wanted {
            self.settle();
        }
        wanted
    }

    /// The marker is done: submit what was parked, or fail.
    pub fn marked(&self, result: Result<()>) {
        let parked = {
            let mut state = self.state.lock();
            state.mark = if result.is_ok() { Mark::Durable } else { Mark::Abandoned };
            if let Err(error) = result {
                state.failure.get_or_insert(error);
            }
            let parked = std::mem::take(&mut state.parked);
            if state.failure.is_some() {
                state.in_flight -= parked.len() as u32;
                Vec::new()
            } else {
                parked
            }
        };
        if let Ok(shared) = self.shared() {
            for parked in parked {
                match parked {
                    Parked::Write(write) => self.submit(&shared, write),
                    #[cfg(feature = "cuda")]
                    Parked::OnDevice(chunks) => self.give_back(&shared, chunks),
                }
            }
        }
        self.changed.notify_all();
        self.settle();
    }

    /// Records the first failure; the save ends once nothing is at work on it.
    pub fn fail(&self, error: Error) {
        {
            let mut state = self.state.lock();
            if state.outcome.is_some() || state.committing {
                return;
            }
            state.failure.get_or_insert(error);
            let parked = std::mem::take(&mut state.parked);
            state.in_flight -= parked.len() as u32;
        }
        self.changed.notify_all();
        self.settle();
    }

    /// Records the first failure and leaves the rest to who is at work on the save, for a thread that must not be held up. Until
    /// all is copied somebody is.
    #[cfg(feature = "cuda")]
    pub fn doom(&self, error: Error) {
        {
            let mut state = self.state.lock();
            // Nobody at work: what devices bring is here, and nobody would see to the rest.
            let is_done = state.copied_at.is_some() || state.copying == 0;
            if state.outcome.is_some() || state.committing || is_done {
                return;
            }
            state.failure.get_or_insert(error);
        }
        self.changed.notify_all();
    }

    /// Ends the save although something may be at work on it for ever, because a thread of the engine died. The store
    /// is poisoned by then. Whatever may still be written to or read from stays as it is: the slot remains this save's,
    /// buffers come back with their operations, and `wait_copied` waits for copiers that live.
    pub fn end_by_force(&self) {
        let (source, parked, error) = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            state.committing = true;
            let parked = std::mem::take(&mut state.parked);
            state.in_flight -= parked.len() as u32;
            let error =
                state.failure.get_or_insert_with(|| internal("a thread of the engine failed")).clone();
            (state.source.take(), parked, error)
        };
        drop((source, parked));
        if let Ok(shared) = self.shared() {
            shared.forget(self, |metrics| metrics.saves_failed());
        }
        self.end(Err(error));
    }

    /// Runs `work` on a thread that must outlive a defect: a panic poisons the store and ends this save alone.
    pub(super) fn contained(&self, work: impl FnOnce()) {
        let Err(panic) = catch_unwind(AssertUnwindSafe(work)) else { return };
        // Dropping what was thrown could panic again.
        std::mem::forget(panic);
        if let Ok(shared) = self.shared() {
            shared.region.poison();
        }
        self.end_by_force();
    }

    /// Moves the save on if nothing is at work on it: to the committer when complete, to its end when failed.
    pub(super) fn settle(&self) {
        enum Next {
            Commit,
            AwaitConfirmation,
            End(Error),
            Nothing,
        }
        let shared = self.shared();
        let failed;
        let (next, source) = {
            let mut state = self.state.lock();
            failed = state.failure.is_some();
            let early = state.last_chunk_written
                && state.table_queued
                && shared.as_ref().is_ok_and(|shared| shared.faults.commit_on_last_chunk());
            let hasty = state.failure.is_some()
                && shared.as_ref().is_ok_and(|shared| shared.faults.end_with_writes_under_way());
            let idle = state.idle() || (early || hasty) && state.unowned();
            match &state.failure {
                Some(error) if idle && state.mark != Mark::Pending => {
                    let error = error.clone();
                    state.committing = true;
                    (Next::End(error), state.source.take())
                }
                None if idle && state.table_queued && !state.held_open => match state.unconfirmed {
                    true => (Next::AwaitConfirmation, None),
                    false => {
                        state.committing = true;
                        (Next::Commit, None)
                    }
                },
                _ => (Next::Nothing, None),
            }
        };
        drop(source);
        if failed {
            // Waiters for `copied` on a failed save look at `copying`. On any other, nothing changed here that anybody waits
            // for, and waking the trainer for each chunk takes the processor from the copiers.
            self.changed.notify_all();
        }
        let Ok(shared) = shared else { return };
        match next {
            Next::Commit => shared.queue_commit(self.this.upgrade()),
            Next::AwaitConfirmation => shared.tell_unconfirmed(),
            Next::End(error) => {
                shared.end_failed(self, &error);
                self.end(Err(error));
            }
            Next::Nothing => {}
        }
    }

    /// XXH3-128 of the encoded chunk table. Meaningful once all chunks are copied.
    pub fn table_hash(&self) -> u128 {
        crate::format::table_hash(&encode_table(&self.state.lock().hashes))
    }

    /// A raw save has all its bytes and may commit.
    pub fn let_commit(&self) -> Result<()> {
        {
            let mut state = self.state.lock();
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.held_open = false;
        }
        self.settle();
        Ok(())
    }

    /// The caller lets the save commit; where it has ended or failed, says how. Changes nothing where it was not begun to
    /// be confirmed.
    pub fn confirm(&self) -> Result<()> {
        if !self.spec.confirm {
            return Ok(());
        }
        {
            let mut state = self.state.lock();
            if let Some(outcome) = &state.outcome {
                return outcome.clone().map(drop);
            }
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            state.unconfirmed = false;
        }
        self.settle();
        Ok(())
    }

    /// Waits until payload bytes may reach the medium.
    pub fn wait_marked(&self, deadline: Option<Instant>) -> Result<()> {
        let mut state = self.state.lock();
        let mut timed_out = false;
        loop {
            if let Some(failure) = &state.failure {
                return Err(failure.clone());
            }
            if state.mark == Mark::Durable {
                return Ok(());
            }
            if timed_out {
                return Err(out_of_time("raw write", "the slot's writing mark"));
            }
            (state, timed_out) = self.changed.wait_until(state, deadline);
        }
    }

    /// Sets the outcome, wakes every waiter. The one place where a save ends; the first outcome stays.
    pub fn end(&self, outcome: Result<(u32, Option<u64>)>) {
        if let (Some(raw), Err(_)) = (&self.raw, &outcome) {
            raw.clear();
        }
        #[cfg(feature = "cuda")]
        if let (Some(copies), Err(_)) = (&self.device, &outcome) {
            // Also where the pump never came to it.
            copies.failed();
        }
        let unread = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            let at = now();
            let copied_at = state.copied_at.unwrap_or(at);
            state.outcome = Some(outcome.map(|(slot, superseded_by)| Durable {
                generation: self.claim.generation,
                slot,
                superseded_by,
                copied_after: copied_at - self.begun,
                durable_after: at - self.begun,
            }));
            state.copying == 0
        };
        self.changed.notify_all();
        // Before the callback, which may wait until all saves have ended.
        if let Ok(shared) = self.shared() {
            shared.told(self);
        }
        if unread {
            // Else the last copier does it (after an end by force): a callback may free the save, which waits for them.
            self.run_on_end();
        }
    }

    /// Runs `callback` when the save ends, at once if it has.
    pub fn set_on_end(&self, callback: Box<dyn FnOnce() + Send>) {
        let replaced = self.on_end.lock().replace(callback);
        // The caller's code: not under the lock.
        drop(replaced);
        if self.ended() {
            self.run_on_end();
        }
    }

    /// Either `end` or `set_on_end` finds the callback, never both. Its panic must not end a thread of the engine.
    pub(super) fn run_on_end(&self) {
        let callback = self.on_end.lock().take();
        if let Some(callback) = callback {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(callback)) {
                // Dropping what was thrown could panic again.
                std::mem::forget(panic);
            }
        }
    }
}
