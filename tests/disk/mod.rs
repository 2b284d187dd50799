//! A disk in memory, served as a file by FUSE, that remembers every write and flush in the order in which they came, and
//! fails when it is told to.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use super::content::Random;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};

const BLOCK_BYTES: usize = 4096;
const DISK: INodeNo = INodeNo(2);
const NAME: &str = "disk";
/// Nothing about the file ever changes.
const ATTRIBUTES_LAST: Duration = Duration::from_secs(3600);
/// So many writes are under way at once, each for some time: a flush can come before their end, and they end in any order.
const LANES: u64 = 4;
const WRITE_TAKES_AT_MOST_US: u64 = 150;

/// The bytes of a disk. A copy shares what neither has changed.
#[derive(Clone)]
pub struct Image {
    /// Blocks that were never written are zero.
    blocks: Vec<Option<Arc<[u8; BLOCK_BYTES]>>>,
}

impl Image {
    pub fn new(bytes: usize) -> Image {
        assert!(bytes.is_multiple_of(BLOCK_BYTES));
        Image { blocks: vec![None; bytes / BLOCK_BYTES] }
    }

    fn len(&self) -> usize {
        self.blocks.len() * BLOCK_BYTES
    }

    pub fn write(&mut self, offset: u64, mut bytes: &[u8]) {
        let mut at = offset as usize;
        while !bytes.is_empty() {
            let within = at % BLOCK_BYTES;
            let now = bytes.len().min(BLOCK_BYTES - within);
            let block = self.blocks[at / BLOCK_BYTES].get_or_insert_with(|| Arc::new([0; BLOCK_BYTES]));
            Arc::make_mut(block)[within..within + now].copy_from_slice(&bytes[..now]);
            (at, bytes) = (at + now, &bytes[now..]);
        }
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let end = (offset as usize + len).min(self.len());
        let mut bytes = Vec::with_capacity(len);
        let mut at = offset as usize;
        while at < end {
            let within = at % BLOCK_BYTES;
            let now = (end - at).min(BLOCK_BYTES - within);
            match &self.blocks[at / BLOCK_BYTES] {
                Some(block) => bytes.extend_from_slice(&block[within..within + now]),
                None => bytes.resize(bytes.len() + now, 0),
            }
            at += now;
        }
        bytes
    }
}

/// What came to the disk.
pub enum Event {
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// The write that is this event was reported complete.
    Done(usize),
    /// Makes durable what had been reported complete.
    Flush,
}

/// What is asked of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Read,
    Write,
    Flush,
}

/// How it answers instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// By an error number; nothing was done.
    Errno(i32),
    /// It moves so many bytes and no more.
    Short(usize),
}

/// Decides about each call, of so many bytes.
type Troubles = Box<dyn FnMut(Call, usize) -> Option<Trouble> + Send>;

struct State {
    image: Image,
    troubles: Option<Troubles>,
    /// While it records.
    events: Option<Vec<Event>>,
}

impl State {
    fn trouble(&mut self, call: Call, bytes: usize) -> Option<Trouble> {
        self.troubles.as_mut().and_then(|troubles| troubles(call, bytes))
    }
}

/// A disk that is mounted as long as this lives.
pub struct Disk {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    session: Option<BackgroundSession>,
    _folder: tempfile::TempDir,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk {
    pub fn new(bytes: usize) -> Disk {
        // Every write comes here, and every image is seen. And not one write after the other.
        Disk::with(bytes, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, true)
    }

    /// One whose short answers reach the caller as such: the kernel makes errors of those to asynchronous calls.
    pub fn synchronous(bytes: usize) -> Disk {
        Disk::with(bytes, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES, false)
    }

    /// One that can be mapped: behind the page cache.
    pub fn behind_cache(bytes: usize) -> Disk {
        Disk::with(bytes, FopenFlags::empty(), false)
    }

    /// A disk of the kind that `make` makes, which holds what the file does.
    pub fn of_file(make: fn(usize) -> Disk, file: &Path) -> Disk {
        let bytes = std::fs::read(file).expect("read");
        let mut image = Image::new(bytes.len());
        image.write(0, &bytes);
        let disk = make(bytes.len());
        disk.put(image);
        disk
    }

    fn with(bytes: usize, flags: FopenFlags, asynchronous: bool) -> Disk {
        let folder = tempfile::tempdir().expect("a folder to mount on");
        let state = Arc::new(Mutex::new(State { image: Image::new(bytes), troubles: None, events: None }));
        let (completions, pending) = channel();
        let pending = Arc::new(Mutex::new(pending));
        for lane in 0..LANES {
            let (state, pending) = (state.clone(), pending.clone());
            thread::spawn(move || complete(&state, &pending, Random(lane)));
        }
        let served = Served {
            state: state.clone(),
            bytes: bytes as u64,
            flags,
            asynchronous,
            completions: Mutex::new(completions),
        };
        let session = fuser::spawn_mount(served, folder.path(), &Config::default())
            .expect("mount by FUSE: needs /dev/fuse and root");
        Disk { state, path: folder.path().join(NAME), session: Some(session), _folder: folder }
    }

    /// The file to put a loop device on.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Other bytes; nobody may have the file open.
    pub fn put(&self, image: Image) {
        lock(&self.state).image = image;
    }

    /// From here on `troubles` decides about each call.
    pub fn fail(&self, troubles: impl FnMut(Call, usize) -> Option<Trouble> + Send + 'static) {
        lock(&self.state).troubles = Some(Box::new(troubles));
    }

    pub fn stop_failing(&self) {
        lock(&self.state).troubles = None;
    }

    /// From here on everything is remembered; what is there now counts as durable.
    pub fn record(&self) -> Image {
        let mut state = lock(&self.state);
        state.events = Some(Vec::new());
        state.image.clone()
    }

    /// Events so far.
    pub fn position(&self) -> usize {
        lock(&self.state).events.as_ref().map_or(0, Vec::len)
    }

    /// Ends the recording.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.state).events.take().unwrap_or_default()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = session.umount_and_join();
        }
    }
}

/// A write that is to be reported complete, and which event it is.
type Completion = (Option<usize>, ReplyWrite, u32);

fn complete(state: &Mutex<State>, pending: &Mutex<Receiver<Completion>>, mut random: Random) {
    loop {
        let next = pending.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((event, reply, bytes)) = next else { return };
        if let Some(event) = event {
            thread::sleep(Duration::from_micros(random.below(WRITE_TAKES_AT_MOST_US)));
            if let Some(events) = lock(state).events.as_mut() {
                events.push(Event::Done(event));
            }
        }
        reply.written(bytes);
    }
}

struct Served {
    state: Arc<Mutex<State>>,
    bytes: u64,
    flags: FopenFlags,
    asynchronous: bool,
    completions: Mutex<Sender<Completion>>,
}

impl Served {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let (kind, size) = match inode {
            DISK => (FileType::RegularFile, self.bytes),
            _ => (FileType::Directory, 0),
        };
        FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            // As some served file systems do, which count no names: nothing is to take the file for a deleted one.
            nlink: 0,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        }
    }
}

impl Filesystem for Served {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        if self.asynchronous {
            // Kernels that cannot give one write after the other.
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name == NAME {
            true => reply.entry(&ATTRIBUTES_LAST, &self.attributes(DISK), fuser::Generation(0)),
            false => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTES_LAST, &self.attributes(inode));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), self.flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut state = lock(&self.state);
        let bytes = match state.trouble(Call::Read, size as usize) {
            Some(Trouble::Errno(errno)) => return reply.error(Errno::from_i32(errno)),
            Some(Trouble::Short(bytes)) => bytes.min(size as usize),
            None => size as usize,
        };
        reply.data(&state.image.read(offset, bytes));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let mut state = lock(&self.state);
        let data = match state.trouble(Call::Write, data.len()) {
            Some(Trouble::Errno(errno)) => return reply.error(Errno::from_i32(errno)),
            Some(Trouble::Short(bytes)) => &data[..bytes.min(data.len())],
            None => data,
        };
        state.image.write(offset, data);
        let event = state.events.as_mut().map(|events| {
            events.push(Event::Write { offset, data: data.to_vec() });
            events.len() - 1
        });
        drop(state);
        let completions = self.completions.lock().unwrap_or_else(PoisonError::into_inner);
        // The other end lives as long as this.
        let _ = completions.send((event, reply, data.len() as u32));
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let mut state = lock(&self.state);
        if let Some(Trouble::Errno(errno)) = state.trouble(Call::Flush, 0) {
            return reply.error(Errno::from_i32(errno));
        }
        if let Some(events) = state.events.as_mut() {
            events.push(Event::Flush);
        }
        reply.ok();
    }
}
