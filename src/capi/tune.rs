//! `pcc_tune`: how often to save.
#![expect(unsafe_code, reason = "exported functions")]
#![expect(clippy::missing_safety_doc, reason = "the contract of exported functions is the header")]

use std::time::Duration;

use super::guard::{self, Caller};
use super::infos::pcc_tuning;
use super::options::pcc_tune_options;
use super::save::ns;
use super::status::pcc_status;
use super::store::{pcc_store, StoreInner};
use crate::tune::{measured_bandwidth, measured_stall, tune, Workload};

/// Advises how often to save: the smallest interval at which N saves in flight keep up and the run is not slowed down
/// by more than the caller accepts, and the work that a crash then loses. With t the time of an iteration, N * bytes /
/// bandwidth the time Tw to durable of one save among N, s the stall of one save and q the slowdown, the interval is
/// the larger of Tw / (N * q * t) and s / ((q - 1) * t), rounded up; a crash loses Tw and up to one interval. `store`
/// may be NULL where bandwidth, stall and N are given. Set `tuning->struct_bytes` before.
///
/// Durability: none.
/// Threads: any number at once.
/// Ownership: `options` and `tuning` are the caller's.
/// Errors: PCC_INVALID_STATE where the bandwidth shall be measured and no save of the store is durable yet;
/// PCC_INVALID_ARGUMENT, PCC_FORKED, PCC_BAD_POINTER.
#[no_mangle]
pub unsafe extern "C" fn pcc_tune(
    store: *const pcc_store,
    options: *const pcc_tune_options,
    tuning: *mut pcc_tuning,
) -> pcc_status {
    let body = |caller: &Caller| {
        let options = caller.tune_options(options)?;
        caller.check_fillable(tuning)?;
        let inner: Option<&StoreInner> = match store.is_null() {
            true => None,
            false => Some(caller.handle(store)?),
        };
        let stats = inner.map(|inner| inner.store.stats());
        let needs = |what: &str| caller.bad_pointer(format!("pcc_store is NULL and {what} is not given"));
        let durable_bytes_per_s = match (options.durable_bytes_per_s, &stats) {
            (0, None) => return Err(needs("durable_bytes_per_s")),
            (0, Some(stats)) => measured_bandwidth(stats)?,
            (given, _) => given,
        };
        let stall = match (options.stall_ns, &stats) {
            (u64::MAX, None) => return Err(needs("stall_ns")),
            (u64::MAX, Some(stats)) => measured_stall(stats),
            (given, _) => Duration::from_nanos(given),
        };
        let max_in_flight = match (options.max_in_flight, inner) {
            (0, None) => return Err(needs("max_in_flight")),
            (0, Some(inner)) => inner.store.region().options().max_in_flight,
            (given, _) => given,
        };
        let found = tune(&Workload {
            state_bytes: options.state_bytes,
            iteration: Duration::from_nanos(options.iteration_ns),
            durable_bytes_per_s,
            stall,
            max_in_flight,
            max_slowdown_ppm: options.max_slowdown_ppm,
        })?;
        caller.fill(
            tuning,
            pcc_tuning {
                struct_bytes: 0,
                interval_iterations: found.interval_iterations,
                durable_ns: ns(found.durable),
                slowdown_ppm: found.slowdown_ppm,
                expected_lost_ns: ns(found.expected_lost),
                worst_lost_ns: ns(found.worst_lost),
            },
        )
    };
    // SAFETY: the header binds the caller.
    unsafe { guard::call("pcc_tune", body) }
}
