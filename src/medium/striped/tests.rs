//! Prevents: a barrier that returns before all members are durable, that hides the failure of one, asks again after it,
//! flushes members one after another, or touches members that it has no business with.

use std::time::Duration;

use super::*;
use crate::medium::sim::{Attempt, AttemptKind, SimMedium, SimModel};
use crate::medium::IoSink;
use crate::staging::{StagingBuffer, StagingPool};
use crate::sync::{thread, Mutex};

const UNIT: u64 = 8192;
const DATA: u64 = 4096;
const PATIENCE: Duration = Duration::from_secs(30);
const SSD: SimModel = SimModel::Ssd { torn: false };

/// Three members of four units each.
fn bed() -> (Vec<Arc<SimMedium>>, Arc<Striped>) {
    let sims: Vec<Arc<SimMedium>> = (0..3).map(|_| Arc::new(SimMedium::new(DATA + 4 * UNIT, SSD))).collect();
    let mut members: Vec<Arc<dyn Medium>> = Vec::new();
    for sim in &sims {
        members.push(sim.clone());
    }
    let layout = StripeLayout::new(3, UNIT, 12 * UNIT).unwrap();
    (sims, Arc::new(Striped::new(layout, DATA, members, true).unwrap()))
}

fn counts(sims: &[Arc<SimMedium>], barrier: Barrier) -> Vec<u64> {
    sims.iter().map(|sim| sim.barrier_counts().get(&barrier).copied().unwrap_or(0)).collect()
}

fn is_persist(attempt: &Attempt) -> bool {
    attempt.kind == AttemptKind::Persist
}

#[test]
fn a_barrier_reaches_the_members_of_its_ranges_and_no_others() {
    let (sims, striped) = bed();
    let unit = |index: u64| (index * UNIT, UNIT);
    striped.persist_ranges(&[unit(1), unit(4)], Barrier::Payload).unwrap();
    assert_eq!(counts(&sims, Barrier::Payload), [0, 2, 0], "both units are member 1's");
    striped.persist_ranges(&[(UNIT - 1, 2)], Barrier::Commit).unwrap();
    assert_eq!(counts(&sims, Barrier::Commit), [1, 1, 0]);
    striped.persist(0, striped.len_bytes(), Barrier::Open).unwrap();
    assert_eq!(counts(&sims, Barrier::Open), [1, 1, 1]);
    striped.persist_ranges(&[], Barrier::Adopt).unwrap();
    assert_eq!(counts(&sims, Barrier::Adopt), [0, 0, 0]);
    striped.write_durable(2 * UNIT + 4096, &[3; 4096], Barrier::Control).unwrap();
    assert_eq!(counts(&sims, Barrier::Control)[..2], [0, 0]);
    let error = striped.write_durable(UNIT - 4096, &[3; 8192], Barrier::Control).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "one block is on one member");
}

/// Each is held until all have begun: one after another would never end.
#[test]
fn members_are_flushed_at_once_and_a_barrier_waits_for_the_last() {
    let (sims, striped) = bed();
    let holds: Vec<_> = sims.iter().map(|sim| sim.hold(is_persist)).collect();
    let flushing = {
        let striped = striped.clone();
        thread::spawn(move || striped.persist(0, striped.len_bytes(), Barrier::Payload))
    };
    for (index, (sim, hold)) in sims.iter().zip(&holds).enumerate() {
        assert!(sim.wait_held(*hold, 1, PATIENCE), "member {index} is not flushed while the others are");
    }
    for (sim, hold) in sims.iter().zip(holds) {
        assert!(!flushing.is_finished(), "the barrier returned before all members were durable");
        sim.release(hold);
    }
    flushing.join().unwrap().unwrap();
}

#[test]
fn the_failure_of_any_member_fails_the_barrier_and_is_not_asked_again() {
    for failing in 0..3 {
        let (sims, striped) = bed();
        sims[failing].fail(|attempt| is_persist(attempt).then_some(libc::EIO));
        let error = striped.persist(0, striped.len_bytes(), Barrier::Payload).unwrap_err();
        assert_eq!(error.errno(), Some(libc::EIO), "member {failing}");
        assert_eq!(counts(&sims, Barrier::Payload), [1, 1, 1], "once each, the others to their end");
        sims[failing].stop_failing();
        striped.persist(0, striped.len_bytes(), Barrier::Commit).unwrap();
    }
}

#[test]
fn barriers_of_several_threads_do_not_mix_up_their_outcomes() {
    let (sims, striped) = bed();
    sims[1].fail(|attempt| {
        (is_persist(attempt) && attempt.barrier == Some(Barrier::Control)).then_some(libc::EIO)
    });
    let run = |barrier| {
        let striped = striped.clone();
        thread::spawn(move || {
            (0..200).map(|_| striped.persist(0, striped.len_bytes(), barrier).is_err()).collect::<Vec<_>>()
        })
    };
    let (failing, sound) = (run(Barrier::Control), run(Barrier::Payload));
    assert!(failing.join().unwrap().iter().all(|failed| *failed), "a failure went to another caller");
    assert!(sound.join().unwrap().iter().all(|failed| !failed), "another caller's failure");
}

/// A completion: its token, its result, and the bytes of its buffer.
type Completed = (u64, Result<()>, Vec<u8>);

#[derive(Default)]
struct Ended(Mutex<Vec<Completed>>);

impl IoSink for Ended {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        self.0.lock().push((token, result, buffer.to_vec()));
    }
}

#[test]
fn transfers_go_to_their_member_and_those_that_straddle_are_split() {
    let (sims, striped) = bed();
    let pool = StagingPool::new(4 * 3 * UNIT, 3 * UNIT as usize, &Default::default()).unwrap();
    let sink = Arc::new(Ended::default());
    let start = |op, offset, len: u64, fill: u8| {
        let mut buffer = pool.acquire(None).unwrap();
        buffer.iter_mut().zip(0..).for_each(|(byte, at)| *byte = (at / 4096) as u8 + fill);
        let io = Io { op, offset, len: len as usize, buffer, token: u64::from(fill), sink: sink.clone() };
        striped.start(io);
        sink.0.lock().pop().unwrap()
    };
    // Within unit 4, which is member 1's second; then from the middle of unit 1 to the middle of unit 3.
    start(IoOp::Copy, 4 * UNIT, UNIT, 10).1.unwrap();
    start(IoOp::Copy, UNIT + 4096, 2 * UNIT, 20).1.unwrap();
    let block = |member: usize, at: u64| {
        let mut byte = [0];
        sims[member].read(DATA + at, &mut byte).unwrap();
        byte[0]
    };
    assert_eq!([block(1, UNIT), block(1, UNIT + 4096)], [10, 11]);
    assert_eq!([block(1, 4096), block(2, 0), block(2, 4096), block(0, UNIT)], [20, 21, 22, 23]);
    let (token, result, read) = start(IoOp::Read, UNIT + 4096, 2 * UNIT, 30);
    result.unwrap();
    assert_eq!((token, [read[0], read[4096], read[8192], read[12288]]), (30, [20, 21, 22, 23]));
    let mut bytes = vec![0; 8192];
    striped.read(2 * UNIT - 3, &mut bytes).unwrap();
    assert_eq!([bytes[0], bytes[3], bytes[3 + 4096]], [20, 21, 22]);
    for (offset, len) in [(12 * UNIT, UNIT), (11 * UNIT, 2 * UNIT), (u64::MAX - 4095, 4096)] {
        let (_, result, _) = start(IoOp::Copy, offset, len, 40);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidArgument, "{offset}+{len}");
    }
}

#[test]
fn chunks_are_made_in_their_place_where_all_members_are_memory() {
    let set = |models: [SimModel; 2]| {
        let sims = models.map(|model| Arc::new(SimMedium::new(DATA + 4 * UNIT, model)));
        let members: Vec<Arc<dyn Medium>> = vec![sims[0].clone(), sims[1].clone()];
        let layout = StripeLayout::new(2, UNIT, 8 * UNIT).unwrap();
        (sims, Striped::new(layout, DATA, members, true).unwrap())
    };
    assert!(set([SimModel::Pmem, SSD]).1.memory().is_none(), "one of them is a disk");
    let (sims, striped) = set([SimModel::Pmem; 2]);
    let memory = striped.memory().unwrap();
    let mut fill = |place: &mut [u8], _: bool| {
        place.fill(9);
        Ok(())
    };
    memory.fill(3 * UNIT + 4096, 100, &mut fill).unwrap();
    let block = |member: usize, offset: u64| {
        let mut found = [1; 4096];
        sims[member].read(DATA + offset, &mut found).unwrap();
        assert!(found[100..].iter().all(|&byte| byte == 0) || found == [9; 4096]);
        found[0]
    };
    assert_eq!(block(1, UNIT + 4096), 9);
    // From the middle of unit 0, of member 0, into unit 1, of member 1.
    memory.fill(4096, 4096 + 100, &mut fill).unwrap();
    assert_eq!([block(0, 4096), block(1, 0), block(1, 4096)], [9, 9, 0]);
    let error = memory.fill(8 * UNIT, 1, &mut fill).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
}

#[test]
fn members_that_do_not_fit_the_layout_are_refused() {
    let sim = |bytes| -> Arc<dyn Medium> { Arc::new(SimMedium::new(bytes, SSD)) };
    let layout = StripeLayout::new(2, UNIT, 8 * UNIT).unwrap();
    let full = DATA + 4 * UNIT;
    let refused = |members| Striped::new(layout, DATA, members, true).err().map(|error| error.kind());
    assert_eq!(refused(vec![sim(full)]), Some(ErrorKind::InvalidArgument));
    assert_eq!(refused(vec![sim(full), sim(full - 4096)]), Some(ErrorKind::InvalidArgument));
    assert_eq!(refused(vec![sim(full), sim(full)]), None);
}
