//! Prevents: a promise written before what it promises, even where no crash image happens to show it; and barriers
//! that cost time and order nothing.

use std::collections::BTreeMap;

use pccheck::medium::sim::{check_trace, Law, OracleReport, SimModel, SimSchedule, Verb};
use pccheck::medium::Barrier;
use pccheck::store::read_table;

use crate::classify::Format;
use crate::explore::{run, Protocol, MODELS};
use crate::histories::{History, FAILING, FORCED, STEADY, USES, WRAPPING};
use crate::power::reordered;

pub fn hold_to_laws(
    history: &History,
    model: SimModel,
    schedule: SimSchedule,
    protocol: Protocol,
) -> OracleReport {
    let sim = run(&history.setup, model, schedule, history.script, protocol);
    let medium = history.setup.medium(&sim);
    let uuid = read_table(&*medium).expect("a region").superblock.uuid;
    drop(medium);
    check_trace(&sim.trace(), &Format { setup: history.setup, layout: history.setup.layout(), uuid })
}

#[test]
fn no_history_breaks_a_law() {
    let all = WRAPPING.iter().chain(&USES).chain(&STEADY).chain(&FORCED).chain(&FAILING);
    let mut used: BTreeMap<(String, Verb, Barrier), (u64, u64)> = BTreeMap::new();
    for history in all {
        for model in MODELS {
            for schedule in [SimSchedule::Inline, reordered(6), reordered(7)] {
                let report = hold_to_laws(history, model, schedule, Protocol::default());
                assert_eq!(report.violations, [], "{}, {model:?}, {schedule:?}", history.name);
                for ((verb, barrier), uses) in report.barriers {
                    let sum = used.entry((format!("{model:?}"), verb, barrier)).or_default();
                    *sum = (sum.0 + uses.total, sum.1 + uses.idle);
                }
            }
        }
    }
    let mut never: Vec<String> = Vec::new();
    for ((model, verb, barrier), (total, idle)) in used {
        println!("{model}: {verb:?} {barrier:?}: {total} times, {idle} of them ordered nothing");
        if total == idle {
            never.push(format!("{model} {verb:?} {barrier:?}"));
        }
    }
    // The open of these histories follows a clean end; the kills show what its flush is for. On pmem the storing
    // threads' fences leave nothing to the flush of the payload.
    let expected = [
        "PageCache Persist Open",
        "Pmem Persist Payload",
        "Pmem Persist Open",
        "Ssd { torn: true } Persist Open",
    ];
    never.sort();
    let mut expected = expected.map(String::from).to_vec();
    expected.sort();
    assert_eq!(never, expected, "barriers that order nothing");
}

#[test]
fn the_laws_are_broken_where_a_barrier_is_removed() {
    let cases = [
        (Barrier::WritingMark, SimModel::PageCache, Law::PayloadUnderWriting),
        (Barrier::Payload, SimModel::PageCache, Law::CommitAfterPayload),
        (Barrier::Chunk, SimModel::Pmem, Law::CommitAfterPayload),
    ];
    for (barrier, model, law) in cases {
        let protocol = Protocol { removed: Some(barrier), ..Protocol::default() };
        let report = hold_to_laws(&WRAPPING[0], model, SimSchedule::Inline, protocol);
        assert!(report.violations.iter().any(|v| v.law == law), "{barrier:?}: {:?}", report.violations);
    }
}
