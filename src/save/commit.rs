//! The committer: one thread that makes complete saves durable, oldest first, several per flush.

use crate::error::{Error, Result};
use crate::format::{RecordState, SlotRecord};
use crate::save::core::SaveCore;
use crate::save::saver::Shared;
use crate::sync::Arc;

pub(super) fn run_committer(shared: &Shared) {
    while let Some(saves) = shared.next_commits() {
        commit_all(shared, saves);
    }
}

/// One flush covers the payloads of all the saves: each had completed its writes before it was queued.
fn commit_all(shared: &Shared, mut saves: Vec<Arc<SaveCore>>) {
    let ranges: Vec<(u64, u64)> = saves
        .iter()
        .map(|save| (shared.region.layout().slot_offset(save.claim.slot), save.used_bytes()))
        .collect();
    let flushed = match shared.faults.commit_before_payload() {
        true => Ok(()),
        false => shared.region.persist_payloads(&ranges),
    };
    if shared.faults.join_after_flush() {
        saves.extend(shared.take_commits());
    }
    for save in &saves {
        let result = flushed.clone().and_then(|()| commit_one(shared, save));
        if let Err(error) = result {
            shared.end_failed(save, &error);
            save.end(Err(error));
        }
    }
    if shared.faults.commit_before_payload() {
        let _ = shared.region.persist_payloads(&ranges);
    }
}

fn commit_one(shared: &Shared, save: &SaveCore) -> Result<()> {
    if save.ended() {
        // By force: its caller was told that it failed.
        return Ok(());
    }
    check_flushes(shared, save)?;
    shared.region.medium().check_present()?;
    if save.spec.pin && !shared.faults.pin_after_commit() {
        // Durable before the record: a crash finds the checkpoint pinned, or a pin that no checkpoint answers to.
        shared.region.pin_before_commit(save.claim)?;
    }
    let record = committed_record(shared, save);
    let superseded_by = if shared.faults.free_before_commit() {
        let superseded_by = shared.region.publish(record.clone(), save.committed_content());
        shared.region.write_commit(&record)?;
        superseded_by
    } else {
        shared.region.write_commit(&record)?;
        // A barrier of another thread may have failed while this one succeeded, and have taken this save's error.
        check_flushes(shared, save)?;
        if save.spec.pin && shared.faults.pin_after_commit() {
            shared.region.pin_before_commit(save.claim)?;
        }
        shared.region.publish(record, save.committed_content())
    };
    let (copied, durable) = save.ages();
    shared.forget(save, |metrics| {
        metrics.saves_durable(save.bytes(), superseded_by.is_some(), copied, durable);
    });
    save.end(Ok((save.claim.slot, superseded_by)));
    Ok(())
}

fn check_flushes(shared: &Shared, save: &SaveCore) -> Result<(), Error> {
    match shared.region.flush_failures() == save.flush_failures {
        true => Ok(()),
        false => Err(shared.region.last_flush_error()),
    }
}

pub(super) fn writing_record(shared: &Shared, save: &SaveCore) -> SlotRecord {
    let region = &shared.region;
    save.record(RecordState::Writing, region.options().run_id, 0, region.superblock().uuid)
}

fn committed_record(shared: &Shared, save: &SaveCore) -> SlotRecord {
    let region = &shared.region;
    save.record(RecordState::Committed, region.options().run_id, save.table_hash(), region.superblock().uuid)
}
