//! Prevents: a lock that a second writer, a forked child or a dead handle gets around; and a refusal by the kernel
//! (locked memory, io_uring) that stops the engine instead of being noted.
#![expect(unsafe_code, reason = "fork is a system call")]

use super::refusals::{alone, drop_capability_to_lock_memory, refuse_io_uring};
use super::*;

#[test]
fn a_second_writer_is_told_who_holds_the_region_and_a_reader_is_not_stopped() {
    let directory = on_disk();
    let path = region(&directory);
    for kind in [Requested::Mmap, Requested::Direct] {
        let writer = open_medium(&path, &options(kind, IoBackend::Auto), Some(&pool())).unwrap();
        writer.copy(0, &pattern(5, BLOCK)).unwrap();
        let began = Instant::now();
        let wait = MediumOptions { lock_wait: Duration::from_millis(60), ..options(kind, IoBackend::Auto) };
        let error = open_medium(&path, &wait, None).err().expect("two writers at once");
        assert!(began.elapsed() >= Duration::from_millis(60), "gave up early");
        assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
        let text = error.to_string();
        let comm = fs::read_to_string("/proc/self/comm").unwrap();
        assert!(text.contains(&std::process::id().to_string()) && text.contains(comm.trim()), "{text}");

        let reader =
            open_medium(&path, &MediumOptions { writable: false, ..options(kind, IoBackend::Auto) }, None)
                .unwrap();
        let mut got = vec![0; BLOCK];
        reader.read(0, &mut got).unwrap();
        assert_eq!(got, pattern(5, BLOCK));
        assert_eq!(reader.copy(0, &got).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(reader.persist(0, 1, Barrier::Open).unwrap_err().kind(), ErrorKind::ReadOnly);
        assert_eq!(reader.write_durable(0, &got, Barrier::Commit).unwrap_err().kind(), ErrorKind::ReadOnly);

        let waiting = thread::spawn({
            let path = path.clone();
            move || {
                let wait = MediumOptions { lock_wait: PATIENCE, ..options(kind, IoBackend::Auto) };
                open_medium(&path, &wait, None).map(|_| ())
            }
        });
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished(), "a waiter got the lock of a live writer");
        drop(writer);
        waiting.join().unwrap().unwrap();
        open_medium(&path, &options(kind, IoBackend::Auto), None).expect("free again at once");
    }
}

#[test]
fn a_writer_that_waited_for_a_replaced_file_gets_the_new_one() {
    let directory = on_disk();
    let path = region(&directory);
    let old = RegionFile::open(&path, true, Duration::ZERO).unwrap();
    let waiting = thread::spawn({
        let path = path.clone();
        move || RegionFile::open(&path, true, PATIENCE)
    });
    thread::sleep(Duration::from_millis(30));
    let grown = directory.path().join("grown");
    create_file(&grown, 2 * REGION, None).unwrap();
    fs::rename(&grown, &path).unwrap();
    drop(old);
    assert_eq!(waiting.join().unwrap().unwrap().len_bytes(), 2 * REGION);
}

/// Forks; `child` must not return and must use only what is allowed after a fork.
fn fork(child: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child only does what `child` does and leaves by _exit.
    match unsafe { libc::fork() } {
        0 => {
            let code = child();
            // SAFETY: ends the child without running destructors of the parent's objects.
            unsafe { libc::_exit(code) }
        }
        pid => {
            assert!(pid > 0, "fork failed");
            pid
        }
    }
}

fn wait(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: writes one int.
    let got = unsafe { libc::waitpid(pid, &mut status, 0) };
    assert_eq!(got, pid);
    status
}

/// Whether this process has the region open or mapped, or any ring: each would keep the lock of a parent that was
/// killed.
fn inherits(path: &Path) -> bool {
    let links =
        fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let open = links.into_iter().any(|link| link == path || link.to_string_lossy().contains("io_uring"));
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    open || maps.contains(path.to_str().unwrap()) || maps.contains("io_uring")
}

#[test]
fn a_forked_child_holds_no_lock_and_is_refused() {
    for_each_medium(2, |what, medium, pool| {
        let path = PathBuf::from(what.split(' ').next().unwrap());
        let sink = Arc::new(Tally::default());
        let buffer = pool.acquire(None).unwrap();
        let refused = fork(|| {
            let forked = |result: Result<()>| result.is_err_and(|error| error.kind() == ErrorKind::Forked);
            let verbs = forked(medium.read(0, &mut [0]))
                && forked(medium.copy(0, &[]))
                && forked(medium.fence(Barrier::Chunk))
                && forked(medium.persist(0, 0, Barrier::Payload))
                && forked(medium.write_durable(0, &[], Barrier::Commit));
            medium.start(io(IoOp::Copy, 0, BLOCK, buffer, 0, &sink));
            let told = sink.finished.lock().pop().is_some_and(|(.., result)| forked(result));
            let inherits = inherits(&path);
            // Dropping the parent's objects in the child must neither hang nor crash nor free the parent's lock.
            drop(medium.clone());
            i32::from(!verbs) + 2 * i32::from(!told) + 4 * i32::from(inherits)
        });
        assert_eq!(wait(refused), 0, "{what}");
        assert!(
            open_medium(&path, &options(Requested::Mmap, IoBackend::Auto), None).is_err(),
            "{what}: lock lost"
        );

        let idle = fork(|| loop {
            // SAFETY: waits for a signal.
            unsafe { libc::pause() };
        });
        drop(medium);
        let reopened = open_medium(&path, &options(Requested::Mmap, IoBackend::Auto), None);
        // SAFETY: the child that was just made.
        unsafe { libc::kill(idle, libc::SIGKILL) };
        wait(idle);
        reopened.map(|_| ()).unwrap_or_else(|error| panic!("{what}: the idle child keeps the lock: {error}"));
    });
}

#[test]
fn a_child_that_drops_the_medium_leaves_the_parent_working() {
    for_each_medium(2, |what, medium, pool| {
        let mut slot = Some(medium);
        let child = fork(|| {
            drop(slot.take());
            0
        });
        assert_eq!(wait(child), 0, "{what}");
        let medium = slot.unwrap();
        let sink = Arc::new(Tally::default());
        medium.start(io(IoOp::Copy, 0, BLOCK, pool.acquire(None).unwrap(), 1, &sink));
        sink.take(1).pop().unwrap().2.unwrap();
    });
}

fn works(medium: &Arc<dyn Medium>, pool: &Arc<StagingPool>) {
    let sink = Arc::new(Tally::default());
    let mut buffer = pool.acquire(None).unwrap();
    buffer.copy_from_slice(&pattern(4, BUFFER));
    medium.start(io(IoOp::Copy, 0, BUFFER, buffer, 1, &sink));
    sink.take(1).pop().unwrap().2.unwrap();
    let mut got = vec![0; BUFFER];
    medium.read(0, &mut got).unwrap();
    assert!(got == pattern(4, BUFFER));
}

#[test]
fn without_lockable_memory_buffers_go_unregistered() {
    alone("medium::tests::process::without_lockable_memory_buffers_go_unregistered", || {
        let directory = on_disk();
        let path = region(&directory);
        let pool = pool();
        drop_capability_to_lock_memory();
        let medium = open_medium(&path, &options(Requested::Direct, IoBackend::Uring), Some(&pool)).unwrap();
        assert_eq!(medium.info().path, "io_uring");
        assert!(medium.info().notes.iter().any(|note| note.contains("locked memory")), "{:?}", medium.info());
        works(&medium, &pool);
    });
}

#[test]
fn where_io_uring_is_refused_threads_take_over() {
    alone("medium::tests::process::where_io_uring_is_refused_threads_take_over", || {
        let directory = on_disk();
        let path = region(&directory);
        let pool = pool();
        refuse_io_uring();
        let medium = open_medium(&path, &options(Requested::Direct, IoBackend::Auto), Some(&pool)).unwrap();
        assert_eq!(medium.info().path, "pwrite");
        assert!(medium.info().notes.iter().any(|note| note.contains("io_uring")), "{:?}", medium.info());
        works(&medium, &pool);
        drop(medium);
        let refused = open_medium(&path, &options(Requested::Direct, IoBackend::Uring), None).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
    });
}
