//! A process of its own to which the kernel refuses something, also for the tests of whole stores.

use std::process::Command;

/// Runs the test of this program, by its full name, alone in a process of its own, where `inside` is true.
pub fn alone(test: &str, inside: impl FnOnce()) {
    const VARIABLE: &str = "PCCHECK_TEST_ALONE";
    if std::env::var_os(VARIABLE).is_some() {
        return inside();
    }
    let program = std::env::current_exe().unwrap();
    let output =
        Command::new(program).args([test, "--exact", "--nocapture"]).env(VARIABLE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// More than a ring needs.
pub const LOCKABLE_BYTES: libc::rlim_t = 512 << 10;

/// Of the calling thread; and lowers the process's limit to [`LOCKABLE_BYTES`].
pub fn drop_capability_to_lock_memory() {
    const VERSION_3: u32 = 0x2008_0522;
    let limit = libc::rlimit { rlim_cur: LOCKABLE_BYTES, rlim_max: LOCKABLE_BYTES };
    // SAFETY: reads one struct.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
    let header = [VERSION_3, 0];
    let empty = [0u32; 6];
    // SAFETY: version 3 of the call reads 8 bytes of header and 24 bytes of capability sets.
    assert_eq!(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), empty.as_ptr()) }, 0);
}

/// A seccomp filter as container runtimes use it: io_uring_setup fails with EPERM.
pub fn refuse_io_uring() {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let skip_unless_setup =
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: libc::SYS_io_uring_setup as u32 };
    let fail =
        libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ERRNO | libc::EPERM as u32 };
    let allow = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW };
    let mut filter = [load_number, skip_unless_setup, fail, allow];
    let program = libc::sock_fprog { len: 4, filter: filter.as_mut_ptr() };
    // SAFETY: takes numbers only.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: reads the program of four instructions.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
    assert_eq!(set, 0);
}
