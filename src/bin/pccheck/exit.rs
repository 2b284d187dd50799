//! Exit codes: one per class of trouble, so that scripts can branch.

use std::process::ExitCode;

use pccheck::ErrorKind;

/// Part of every `--help` that lists the codes.
pub const HELP: &str = "\
Sizes: 4096, 64K, 10M, 1.5GiB (K, M, G, T and KiB.. are powers of 1024; KB, MB, GB, TB of 1000).
Errors go to stderr; results, with --json too, to stdout.

Exit codes:
  0  done
  1  failed for another reason (I/O error, a demo or bench that did not hold, ...)
  2  wrong usage or argument
  3  no such file, checkpoint or tensor
  4  damaged: not a region, a member lost or foreign, corrupt metadata or payload
  5  in use by another writer, or overwritten while it was read
  6  no space: on the disk, in the region, or in a slot
  7  not supported here: format version, feature, medium or durability
  8  exists already: give --force to replace it";

/// The exit codes. Frozen: numbers are never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// I/O errors and whatever has no code of its own.
    Other = 1,
    /// Wrong usage; clap exits with the same number.
    Usage = 2,
    /// No such file, checkpoint or tensor.
    NotFound = 3,
    /// Not a region, or damaged.
    Damaged = 4,
    /// Held by another writer, or overtaken by it.
    InUse = 5,
    /// No room on the disk, in the region or in a slot.
    NoSpace = 6,
    /// Version, feature, medium or durability that cannot be had.
    Unsupported = 7,
    /// Would overwrite something.
    Exists = 8,
}

impl Status {
    /// The code for a class of errors.
    pub fn of(kind: ErrorKind) -> Status {
        match kind {
            ErrorKind::InvalidArgument => Status::Usage,
            ErrorKind::NotFound => Status::NotFound,
            ErrorKind::Corrupt | ErrorKind::NotARegion | ErrorKind::Member => Status::Damaged,
            ErrorKind::InUse | ErrorKind::Reclaimed => Status::InUse,
            ErrorKind::NoSpace | ErrorKind::TooLarge | ErrorKind::NoSlot => Status::NoSpace,
            ErrorKind::Unsupported
            | ErrorKind::UnsupportedVersion
            | ErrorKind::UnsupportedFeature
            | ErrorKind::Durability => Status::Unsupported,
            ErrorKind::AlreadyExists => Status::Exists,
            _ => Status::Other,
        }
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> ExitCode {
        ExitCode::from(status as u8)
    }
}
