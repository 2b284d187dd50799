//! States on GPUs, against a stand-in for NVIDIA's driver that the test builds (tests/standin): copies that run before the
//! caller's stream has made the state, a step that overwrites what is still being copied, a driver that fails at any call,
//! a GPU that hangs.
#![cfg(all(feature = "sim", feature = "cuda"))]

mod bed;
mod courtesy;
mod cufile;
mod direct;
mod failures;
mod faults;
mod gds;
mod kernels;
mod marks;
mod owners;
mod queues;
mod restores;
mod rings;
mod saves;
mod spares;
mod standin;

use std::process::Command;

#[test]
fn the_stand_in_does_what_the_driver_does() {
    let library = standin::build("whole", &[]);
    let program = standin::compile("selftest", "selftest", &[]);
    let tested = Command::new(program).arg(library).output().expect("run");
    let said = String::from_utf8_lossy(&tested.stdout);
    assert!(tested.status.success(), "{said}{}", String::from_utf8_lossy(&tested.stderr));
    assert!(said.lines().filter(|line| line.starts_with("ok ")).count() > 20, "{said}");
}

/// Drivers before CUDA 12.8 lack the call for many copies. What needs no kernels does without the calls for those.
#[test]
fn all_is_the_same_with_a_driver_that_copies_one_by_one() {
    if std::env::var_os(standin::LACKING).is_some() {
        return;
    }
    let mut again = Command::new(std::env::current_exe().expect("this test"));
    again.args(["saves::", "restores::what", "faults::", "kernels::a_driver", "--skip", "few_calls"]);
    let again = again.env(standin::LACKING, "1").output().expect("run");
    let said = String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success(), "{said}{}", String::from_utf8_lossy(&again.stderr));
    assert!(!said.contains("running 0 tests"), "{said}");
}
