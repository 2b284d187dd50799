//! Loop devices and file systems on disks, by the system's own tools. Everything is undone when dropped.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// An unmount may find the file system busy just after an io_uring was closed.
const BUSY_TRIES: u32 = 200;
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// What lies on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The region is the device.
    Bare,
    Ext4,
    Xfs,
    Btrfs,
}

impl Format {
    pub const ALL: [Format; 4] = [Format::Bare, Format::Ext4, Format::Xfs, Format::Btrfs];

    /// As small as the tools allow.
    pub fn disk_bytes(self) -> usize {
        match self {
            Format::Bare => 24 << 20,
            Format::Ext4 => 48 << 20,
            Format::Xfs => 320 << 20,
            Format::Btrfs => 160 << 20,
        }
    }

    /// Where the disk must not tear a write: the superblock, whose checksum spans several sectors, and without which no mount
    /// begins. These file systems ask that of a disk.
    pub fn never_torn(self) -> Range<u64> {
        match self {
            Format::Bare | Format::Xfs => 0..0,
            Format::Ext4 => 1024..2048,
            Format::Btrfs => (64 << 10)..(68 << 10),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Format::Bare => "bare",
            Format::Ext4 => "ext4",
            Format::Xfs => "xfs",
            Format::Btrfs => "btrfs",
        }
    }

    fn make(self, device: &Path) {
        let program = format!("mkfs.{}", self.name());
        let options: &[&str] = match self {
            Format::Bare => return,
            Format::Ext4 => &["-q", "-b", "4096"],
            Format::Xfs => &["-q"],
            Format::Btrfs => &["-q", "-M"],
        };
        run(Command::new(program).args(options).arg(device)).expect("make a file system");
    }
}

/// Runs a tool to its end; what it printed.
pub fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_string()),
        false => Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Patient with what is busy for a moment.
fn persist(mut run: impl FnMut() -> Result<String, String>) -> Result<(), String> {
    let mut last = String::new();
    for _ in 0..BUSY_TRIES {
        match run() {
            Ok(_) => return Ok(()),
            Err(what) => last = what,
        }
        thread::sleep(BUSY_PAUSE);
    }
    Err(last)
}

/// A loop device on a file.
struct Loop {
    device: PathBuf,
}

impl Loop {
    fn attach(file: &Path) -> Result<Loop, String> {
        let device = run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file))?;
        Ok(Loop { device: device.into() })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(what) = persist(|| run(Command::new("losetup").arg("--detach").arg(&self.device))) {
            eprintln!("{what}");
        }
    }
}

/// A file system that is mounted, or a bare device.
pub struct Volume {
    mounted: Option<tempfile::TempDir>,
    device: Loop,
}

impl Volume {
    /// Makes a file system on the disk's file and mounts it.
    pub fn make(format: Format, file: &Path) -> Volume {
        let device = Loop::attach(file).expect("a loop device: needs root");
        format.make(&device.device);
        Volume::on(format, device).expect("mount")
    }

    /// Mounts what is on the disk's file: then the file system recovers.
    pub fn open(format: Format, file: &Path) -> Result<Volume, String> {
        Volume::on(format, Loop::attach(file)?)
    }

    fn on(format: Format, device: Loop) -> Result<Volume, String> {
        if format == Format::Bare {
            return Ok(Volume { mounted: None, device });
        }
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        run(Command::new("mount").args(["-t", format.name()]).arg(&device.device).arg(folder.path()))?;
        Ok(Volume { mounted: Some(folder), device })
    }

    /// Where a region goes.
    pub fn region(&self) -> PathBuf {
        match &self.mounted {
            Some(folder) => folder.path().join("region"),
            None => self.device.device.clone(),
        }
    }

    /// Everything that was written reaches the disk.
    pub fn sync(&self) {
        if let Some(folder) = &self.mounted {
            run(Command::new("sync").arg("--file-system").arg(folder.path())).expect("sync");
        }
        run(Command::new("blockdev").arg("--flushbufs").arg(&self.device.device)).expect("flush");
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let Some(folder) = self.mounted.take() else { return };
        match persist(|| run(Command::new("umount").arg(folder.path()))) {
            Ok(()) => {}
            Err(what) => {
                eprintln!("{what}");
                // Not removed: something is still mounted there.
                let _ = folder.keep();
            }
        }
    }
}
