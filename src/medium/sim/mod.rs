//! A medium in memory that records everything, and the tools that judge the record: the crash checker.
//!
//! For tests only (cargo feature `sim`). The parts:
//!
//! - [`SimMedium`] implements [`Medium`] under a [`SimModel`], sparsely, and keeps a linear [`Trace`]. It can
//!   complete operations late and out of order, hold chosen ones back, fail chosen ones, and ignore every
//!   call that carries a given [`Barrier`].
//! - [`for_each_crash_image`] stops a trace at every barrier and makes the images that power loss may leave;
//!   [`for_each_kill`] does so for the death of the process alone.
//! - [`check_trace`] holds a trace against the laws of the protocol without any crash.
//!
//! # Fault model
//!
//! That of [`crate::medium`], and never kinder than the trait's contract: a persist covers only its range, and
//! [`Medium::write_durable`] only its block, though real media often do more.
//!
//! Per block the durable content and the later versions are kept in the order of their completion. A crash
//! keeps for each unit independently any version that is not older than the durable one. A write that was
//! submitted and has not completed may land at any moment. After a failed persist nothing that was pending
//! then can become durable any more, except by being written again; the death of the process does not change
//! that (the kernel has dropped the dirty state, and goes on showing the bytes).
//!
//! The death of a process alone loses nothing that had completed. On disks and in the page cache it makes
//! nothing durable either. On persistent memory it does: a completed copy has left the write-combining buffers
//! or has its write-backs under way, and the switch away from a dying thread serialises the processor. Only of a
//! copy that was cut short may lines stay in the caches, visible and not durable, until they are flushed.

mod choices;
mod content;
mod enumerate;
mod gates;
mod image;
mod medium;
mod oracle;
mod replay;
mod trace;

pub use enumerate::{for_each_crash_image, for_each_kill, EnumerateOptions, Finding, Point, Summary};
pub use gates::{Attempt, AttemptKind, HoldId};
pub use image::Image;
pub use medium::{SimMedium, SimSchedule};
pub use oracle::{check_trace, BarrierUse, Classifier, Law, OracleReport, RecordClass, Verb, Violation};
pub use trace::{Event, Note, OpId, SimModel, ThreadTag, Trace};

#[cfg(doc)]
use super::{Barrier, Medium};
