//! How a store is: what it got, counted and recovered, what of it is damaged, and its repair.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use core::ffi::c_char;
use core::fmt::Write;

use super::codes::{durability_code, medium_code, wait_of};
use super::guard::{self, Caller, Outcome, Versioned};
use super::infos::{pcc_got_info, pcc_stats_info, pcc_verify_report};
use super::status::{pcc_status, PCC_CORRUPT};
use super::store::{pcc_store, StoreInner};
use super::text::Fault;
use crate::engine::{Select, Store};
use crate::error::{Error, ErrorKind};
use crate::format::SlotRecord;
use crate::recovery::Verdict;

/// Reads and verifies every byte of the checkpoint of `generation`, or of all checkpoints where it is 0. `report` (may
/// be NULL) receives the counts, `text` (`text_cap` bytes, may be NULL) one line per checkpoint, NUL-terminated UTF-8.
///
/// Durability: none; nothing is changed.
/// Threads: any number at once.
/// Ownership: `report` and `text` are the caller's.
/// Errors: PCC_CORRUPT where at least one checkpoint is damaged (report and text are filled all the same);
/// PCC_NOT_FOUND, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_verify(
    store: *const pcc_store,
    generation: u64,
    report: *mut pcc_verify_report,
    text: *mut c_char,
    text_cap: u64,
) -> pcc_status {
    let body = |caller: &Caller, inner: &StoreInner| {
        caller.check_fillable(report)?;
        let (mut found, lines, first) = verify(&inner.store, generation)?;
        found.text_bytes = caller.text_to(text, text_cap, &lines);
        caller.fill_optional(report, found)?;
        match first {
            Some(error) => Err(Fault { status: PCC_CORRUPT, error }),
            None => Ok(()),
        }
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_verify", store, body) }
}

fn verify(store: &Store, generation: u64) -> Outcome<(pcc_verify_report, String, Option<Error>)> {
    let wanted = |record: &SlotRecord| generation == 0 || record.generation == generation;
    let all = store.checkpoints()?.into_iter().map(|info| info.record);
    let records: Vec<SlotRecord> = all.filter(wanted).collect();
    if records.is_empty() && generation != 0 {
        let message = format!("no checkpoint has generation {generation}");
        let error = Error::new(ErrorKind::NotFound, "pcc_verify", message);
        return Err(error.at_path(store.region().path()).into());
    }
    let mut report = pcc_verify_report::initial();
    let (mut lines, mut first) = (String::new(), None);
    for record in records {
        let place = format!("generation {} step {} slot {}", record.generation, record.step, record.slot);
        let result = store.open_checkpoint(Select::Generation(record.generation), true);
        let verdict = match result {
            Ok(_) => {
                report.intact += 1;
                "intact".to_string()
            }
            Err(error) => match error.kind() {
                ErrorKind::Corrupt | ErrorKind::Io => {
                    report.damaged += 1;
                    let text = format!("damaged: {error}");
                    first.get_or_insert(error);
                    text
                }
                ErrorKind::Reclaimed | ErrorKind::NotFound => {
                    report.reclaimed += 1;
                    "reclaimed meanwhile".to_string()
                }
                _ => return Err(error.into()),
            },
        };
        // Writing to a String cannot fail.
        let _ = writeln!(lines, "{place}: {verdict}");
    }
    Ok((report, lines, first))
}

/// Rewrites every quarantined slot in full, flushes it, and takes it back into use. `repaired` (may be NULL) receives
/// how many.
///
/// Durability: the slots are durably empty on return.
/// Threads: any number at once.
/// Ownership: `repaired` is the caller's.
/// Errors: PCC_IO where the medium still fails; PCC_TIMED_OUT after `timeout_ms` (negative: never); PCC_READ_ONLY,
/// PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_repair(
    store: *const pcc_store,
    timeout_ms: i64,
    repaired: *mut u32,
) -> pcc_status {
    let body = |inner: &StoreInner| inner.store.repair(wait_of(timeout_ms));
    // SAFETY: the header binds the caller.
    unsafe { guard::optional_result_on("pcc_repair", store, "repaired", repaired, body) }
}

/// Counters since open, and gauges of this moment. Set `stats->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `stats` is the caller's.
/// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_stats(store: *const pcc_store, stats: *mut pcc_stats_info) -> pcc_status {
    let body = |caller: &Caller, inner: &StoreInner| {
        let now = inner.store.stats();
        let value = pcc_stats_info {
            struct_bytes: 0,
            saves_begun: now.saves_begun,
            saves_durable: now.saves_durable,
            saves_superseded: now.saves_superseded,
            saves_failed: now.saves_failed,
            saves_cancelled: now.saves_cancelled,
            durable_bytes: now.durable_bytes,
            busy_ns: now.busy_ns,
            copied_ns: now.copied_ns,
            durable_ns: now.durable_ns,
            newest_generation: now.newest_generation,
            in_flight: now.in_flight,
            quarantined_slots: now.quarantined_slots,
            claimable_slots: now.claimable_slots,
            reserved: 0,
            unchanged_bytes: now.unchanged_bytes,
            direct_bytes: now.direct_bytes,
        };
        caller.fill(stats, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_stats", store, body) }
}

/// What was got at open, as opposed to what was asked for. Set `got->struct_bytes` before.
///
/// Durability: `got->durability` says what a durable save survives.
/// Threads: any number at once.
/// Ownership: `got` is the caller's; the texts in it belong to the store and live until `pcc_close`.
/// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
#[no_mangle]
pub unsafe extern "C" fn pcc_got(store: *const pcc_store, got: *mut pcc_got_info) -> pcc_status {
    let body = |caller: &Caller, inner: &StoreInner| {
        let region = inner.store.region();
        let (info, options, pool) = (region.medium_info(), region.options(), region.pool());
        let value = pcc_got_info {
            struct_bytes: 0,
            path_text: inner.path_text.as_ptr(),
            notes_text: inner.notes_text.as_ptr(),
            region_uuid: region.superblock().uuid.0,
            slot_bytes: region.layout().slot_bytes,
            staging_bytes: pool.total_bytes(),
            staging_huge_bytes: pool.huge_page_bytes(),
            chunk_bytes: options.chunk_bytes,
            recovered_checkpoints: inner.store.recovered().newest_first.len() as u32,
            staging_locked: pool.locked().into(),
            medium: medium_code(info.kind),
            durability: durability_code(info.durability),
            slot_count: region.layout().slot_count,
            max_in_flight: options.max_in_flight,
            keep: options.keep,
            read_only: options.read_only.into(),
            stripe_unit_bytes: info.stripes.map_or(0, |stripes| stripes.unit_bytes),
            members: info.stripes.map_or(1, |stripes| stripes.members),
            reserved: 0,
        };
        caller.fill(got, value)
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::on("pcc_got", store, body) }
}

/// Copies what recovery found at open, one line per slot with the reason why it counts or not, then notes on damage
/// that was survived; UTF-8, NUL-terminated, cut at a character where `cap` is too small. Returns the bytes that the
/// whole text takes with its NUL, or 0 on failure.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
/// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
#[no_mangle]
pub unsafe extern "C" fn pcc_recovery_text(store: *const pcc_store, buf: *mut c_char, cap: u64) -> u64 {
    let body =
        |caller: &Caller, inner: &StoreInner| Ok(caller.text_to(buf, cap, &recovery_text(&inner.store)));
    // SAFETY: the header binds the caller.
    unsafe { guard::value_on("pcc_recovery_text", store, 0, body) }
}

fn recovery_text(store: &Store) -> String {
    let table = store.recovered();
    let mut text = String::new();
    for decision in &table.slots {
        let verdict = match &decision.verdict {
            Verdict::Checkpoint => "checkpoint",
            Verdict::Empty => "empty",
            Verdict::Writing => "not committed",
            Verdict::Rejected(_) => "rejected",
            Verdict::Quarantined => "quarantined",
            Verdict::Discarded => "discarded",
        };
        // Writing to a String cannot fail.
        let _ = write!(text, "slot {}: {verdict}", decision.slot);
        if let Some(record) = &decision.record {
            let _ = write!(text, ", generation {} step {}", record.generation, record.step);
        }
        let _ = writeln!(text, "{}: {}", if decision.pinned { ", pinned" } else { "" }, decision.reason);
    }
    for note in &table.notes {
        let _ = writeln!(text, "note: {note}");
    }
    text
}
