//! Laws of places that a device fills and copiers empty, under every schedule: what is read is what was written for it.
//!
//! The device is a thread that waits for words and writes them as a stream does. A place's bytes are a cell whose accesses loom checks.

use super::{Turn, Turns, Words};
use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::model::{explore, UnsafeCell};
use crate::sync::{thread, Arc, Mutex};

const PREEMPTIONS: usize = 2;
const GROUPS: usize = 3;
const DEVICE: usize = 0;

struct OnePlace {
    passed: AtomicU32,
    arrived: AtomicU32,
}

impl Words for OnePlace {
    fn passed(&self, _place: usize) -> &AtomicU32 {
        &self.passed
    }
    fn arrived(&self, _place: usize, _device: usize) -> &AtomicU32 {
        &self.arrived
    }
}

/// The host's part: the shipped code or a broken variant.
trait Host: Send + 'static {
    fn lands(&mut self, words: &OnePlace, turn: Turn) -> bool;
    fn back(&mut self, words: &OnePlace) -> bool;
}

impl Host for Turns {
    fn lands(&mut self, words: &OnePlace, turn: Turn) -> bool {
        let lands = Turns::lands(self, words, turn, std::iter::once(DEVICE), false);
        if lands {
            self.take(turn.place, 1);
        }
        lands
    }
    fn back(&mut self, words: &OnePlace) -> bool {
        Turns::back(self, words, 0)
    }
}

/// What a participant leaves out.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    DeviceDoesNotWait,
    DeviceTellsFirst,
    CopierLetsGoFirst,
}

/// A device brings groups to one place, one thread lands them, and for each a copier reads it.
fn through_one_place<H: Host>(make: fn(Turns) -> H, fault: Fault) {
    explore(PREEMPTIONS, move || {
        let mut turns = Turns::new(1);
        let given: Vec<Turn> = (0..GROUPS).map(|_| turns.give()).collect();
        let words = OnePlace { passed: AtomicU32::new(0), arrived: AtomicU32::new(0) };
        assert!(turns.seal(&words).is_empty(), "law: a place that groups are to come to is used");
        let shared = Arc::new((words, Mutex::new(make(turns)), UnsafeCell::new(())));
        let device = {
            let (shared, given) = (shared.clone(), given.clone());
            thread::spawn(move || {
                let (words, _, bytes) = &*shared;
                for turn in given {
                    while fault != Fault::DeviceDoesNotWait
                        && words.passed.load(Ordering::Acquire) < turn.before
                    {
                        thread::yield_now();
                    }
                    if fault == Fault::DeviceTellsFirst {
                        words.arrived.store(turn.before + 1, Ordering::Release);
                    }
                    bytes.with_mut(|_| ());
                    words.arrived.store(turn.before + 1, Ordering::Release);
                }
            })
        };
        let mut unused = 0;
        for &turn in &given {
            while !shared.1.lock().lands(&shared.0, turn) {
                thread::yield_now();
            }
            let shared = shared.clone();
            let copier = thread::spawn(move || {
                let (words, host, bytes) = &*shared;
                let mut unused = false;
                if fault == Fault::CopierLetsGoFirst {
                    unused = host.lock().back(words);
                }
                bytes.with(|_| ());
                if fault != Fault::CopierLetsGoFirst {
                    unused = host.lock().back(words);
                }
                unused
            });
            unused += usize::from(copier.join().expect("copier"));
        }
        device.join().expect("device");
        assert_eq!(unused, 1, "law: a place is given back once, after its last group");
    });
}

#[test]
fn what_is_read_is_what_was_written_for_it() {
    through_one_place(|turns| turns, Fault::None);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_device_that_does_not_wait_is_caught() {
    through_one_place(|turns| turns, Fault::DeviceDoesNotWait);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_device_that_tells_before_it_has_copied_is_caught() {
    through_one_place(|turns| turns, Fault::DeviceTellsFirst);
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_copier_that_lets_go_before_it_has_read_is_caught() {
    through_one_place(|turns| turns, Fault::CopierLetsGoFirst);
}

/// Looks at the device's word without ordering.
struct UnorderedLook(Turns);

impl Host for UnorderedLook {
    fn lands(&mut self, words: &OnePlace, turn: Turn) -> bool {
        if words.arrived.load(Ordering::Relaxed) <= turn.before {
            return false;
        }
        assert!(Turns::lands(&mut self.0, words, turn, std::iter::empty(), true), "it is there");
        self.0.take(turn.place, 1);
        true
    }
    fn back(&mut self, words: &OnePlace) -> bool {
        Turns::back(&mut self.0, words, 0)
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_look_without_acquire_is_caught() {
    through_one_place(UnorderedLook, Fault::None);
}

/// Lets the next group come without ordering.
struct UnorderedPass {
    landed: u32,
}

impl Host for UnorderedPass {
    fn lands(&mut self, words: &OnePlace, turn: Turn) -> bool {
        let lands = words.arrived.load(Ordering::Acquire) > turn.before;
        self.landed += u32::from(lands);
        lands
    }
    fn back(&mut self, words: &OnePlace) -> bool {
        words.passed.store(self.landed, Ordering::Relaxed);
        self.landed as usize == GROUPS
    }
}

#[test]
#[should_panic(expected = "Causality violation")]
fn a_pass_without_release_is_caught() {
    through_one_place(|_| UnorderedPass { landed: 0 }, Fault::None);
}
