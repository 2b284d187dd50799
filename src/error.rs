//! The crate's one error type: what went wrong, in which operation, where, and what to do next.
//!
//! Knows nothing of C: `capi::status` maps each [`ErrorKind`] to its frozen number.

use std::fmt::{self, Write as _};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Result of every fallible operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of thing went wrong. Callers branch on this; people read the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// An argument breaks the documented contract of the call.
    InvalidArgument,
    /// The call is not allowed in the present state of the object (for example commit before all bytes).
    InvalidState,
    /// No checkpoint, tensor or file of that name, step or generation exists.
    NotFound,
    /// The path already holds a region (or other data) and force was not given.
    AlreadyExists,
    /// The file is not a pccheck region.
    NotARegion,
    /// The region was written by a newer, incompatible version of the format.
    UnsupportedVersion,
    /// The region uses a feature (incompat bit) that this build does not know.
    UnsupportedFeature,
    /// The medium, kernel or file system cannot do what was asked.
    Unsupported,
    /// The medium cannot give the durability that the caller requires.
    Durability,
    /// A member of a striped region is lost, foreign, in the wrong place, too short or damaged; or the path is that of
    /// a member by which the region is not opened.
    Member,
    /// Another writer holds the region's lock.
    InUse,
    /// The device or file system has no room.
    NoSpace,
    /// The state does not fit in a slot.
    TooLarge,
    /// No slot became claimable within the time given.
    NoSlot,
    /// The time given ran out; the operation goes on and can be waited for again (a raw write cannot: its save has failed).
    TimedOut,
    /// The save was cancelled before it became durable.
    Cancelled,
    /// The checkpoint was overwritten by its writer while it was being read.
    Reclaimed,
    /// Stored bytes do not match their checksum.
    Corrupt,
    /// The operating system reported an I/O error.
    Io,
    /// The driver of a GPU reported a failure.
    Device,
    /// A flush failed, so that the durability of what was written is unknown; the slot is quarantined.
    DurabilityUnknown,
    /// The store was opened read-only.
    ReadOnly,
    /// The store was opened in a parent process; it cannot be used after fork.
    Forked,
    /// Memory could not be allocated.
    OutOfMemory,
    /// A defect of the engine itself; the store refuses further saves.
    Internal,
}

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    op: &'static str,
    message: String,
    path: Option<PathBuf>,
    offset: Option<u64>,
    errno: Option<i32>,
    advice: Option<String>,
}

/// An error with its operation, path, offset, operating-system code and advice where known.
///
/// Cheap to clone: several waiters of one save receive the same error.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

impl Error {
    /// A new error of `kind` in operation `op`; `message` says what was expected and what was found.
    pub fn new(kind: ErrorKind, op: &'static str, message: impl Into<String>) -> Self {
        Error(Arc::new(Inner {
            kind,
            op,
            message: message.into(),
            path: None,
            offset: None,
            errno: None,
            advice: None,
        }))
    }

    /// Wraps an operating-system error; ENOSPC, EDQUOT and ENOMEM get their own kinds.
    pub fn io(op: &'static str, source: &io::Error) -> Self {
        let errno = source.raw_os_error();
        let kind = match errno {
            Some(libc::ENOSPC) | Some(libc::EDQUOT) => ErrorKind::NoSpace,
            Some(libc::ENOMEM) => ErrorKind::OutOfMemory,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        let mut error = Error::new(kind, op, source.to_string());
        error.edit(|inner| inner.errno = errno);
        error
    }

    /// The error that the last failed system call left in `errno`.
    pub fn last_os(op: &'static str) -> Self {
        Error::io(op, &io::Error::last_os_error())
    }

    fn edit(&mut self, change: impl FnOnce(&mut Inner)) {
        change(Arc::make_mut(&mut self.0));
    }

    /// Names the file or device concerned.
    #[must_use]
    pub fn at_path(mut self, path: &Path) -> Self {
        self.edit(|inner| inner.path = Some(path.to_path_buf()));
        self
    }

    /// Names the byte offset concerned.
    #[must_use]
    pub fn at_offset(mut self, offset: u64) -> Self {
        self.edit(|inner| inner.offset = Some(offset));
        self
    }

    /// Puts in front of the message what it is about, unless that stands there.
    #[must_use]
    pub fn within(mut self, what: &str) -> Self {
        if !self.0.message.starts_with(what) {
            self.edit(|inner| inner.message = format!("{what}: {}", inner.message));
        }
        self
    }

    /// Replaces the kind, keeping all else.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.edit(|inner| inner.kind = kind);
        self
    }

    /// Carries over the operating system's error number of the cause.
    #[must_use]
    pub fn with_errno(mut self, errno: Option<i32>) -> Self {
        self.edit(|inner| inner.errno = errno);
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.edit(|inner| inner.advice = Some(advice.into()));
        self
    }

    /// The class of the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The operation that failed.
    pub fn op(&self) -> &'static str {
        self.0.op
    }

    /// What was expected and what was found, without operation, path or advice.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The file or device, where known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The byte offset, where known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The operating system's error number, where there is one.
    pub fn errno(&self) -> Option<i32> {
        self.0.errno
    }

    /// What to do next, where there is something to do.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        let mut f = Harmless(f);
        write!(f, "{}", inner.op)?;
        if let Some(path) = &inner.path {
            write!(f, " {}", path.display())?;
        }
        if let Some(offset) = inner.offset {
            write!(f, " at byte {offset}")?;
        }
        write!(f, ": {}", inner.message)?;
        if let Some(advice) = &inner.advice {
            write!(f, " ({advice})")?;
        }
        Ok(())
    }
}

/// Writes text from anywhere, such as names and paths that an untrusted region holds, so that it is harmless on a terminal:
/// what would move the cursor, colour, ring, begin a line or turn the direction of writing is escaped.
pub struct Harmless<W>(pub W);

impl<W: fmt::Write> fmt::Write for Harmless<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const DIRECTIONS: [std::ops::RangeInclusive<char>; 3] =
            ['\u{200e}'..='\u{200f}', '\u{202a}'..='\u{202e}', '\u{2066}'..='\u{2069}'];
        let acts = |c: char| c.is_control() || DIRECTIONS.iter().any(|range| range.contains(&c));
        let mut rest = text;
        while let Some(at) = rest.find(acts) {
            self.0.write_str(&rest[..at])?;
            let mut chars = rest[at..].chars();
            if let Some(c) = chars.next() {
                write!(self.0, "{}", c.escape_default())?;
            }
            rest = chars.as_str();
        }
        self.0.write_str(rest)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?}: {self})", self.0.kind)
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_operation_path_offset_and_advice() {
        let error = Error::io("write chunk", &io::Error::from_raw_os_error(libc::ENOSPC))
            .at_path(Path::new("/x/region"))
            .at_offset(4096)
            .advise("free some space");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        let text = error.to_string();
        for part in ["write chunk", "/x/region", "4096", "free some space"] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
        assert_eq!(error.errno(), Some(libc::ENOSPC));
    }

    #[test]
    fn display_escapes_what_would_act_on_a_terminal() {
        let message = "gr\u{f6}\u{df}e\n\u{1b}]0;title\u{7} \u{9b}2J \u{202e}dlrow \"a\\b\"";
        let error = Error::new(ErrorKind::Member, "open", message).at_path(Path::new("/x\r/y"));
        let text = error.to_string();
        let plain = "gr\u{f6}\u{df}e\\n\\u{1b}]0;title\\u{7} \\u{9b}2J \\u{202e}dlrow \"a\\b\"";
        assert_eq!(text, format!("open /x\\r/y: {plain}"));
        assert_eq!(error.message(), message, "programs get it as it was");
    }
}
