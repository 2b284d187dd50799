//! Telling a striped region where a member is now.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use super::label::label_of;
use super::open::check_member;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{ChosenLabel, Label, LABEL_AREA_BYTES, LABEL_OFFSETS};
use crate::medium::file::RegionFile;
use crate::medium::open::medium_on;
use crate::medium::{Barrier, Durability, Medium, MediumOptions};

const OP: &str = "relocate";

/// Notes in member 0, at `path`, that member `index` is at `to` from now on; durable on return. A crash leaves the old
/// place or the new one.
///
/// # Errors
///
/// [`ErrorKind::Member`] when the file at `to` is not that member; [`ErrorKind::InUse`] while a writer has the region
/// open; [`ErrorKind::InvalidArgument`] for an index that is not one of the other members.
pub fn relocate_member(path: &Path, index: u32, to: &Path, lock_wait: Duration) -> Result<()> {
    let first = RegionFile::open(path, true, lock_wait)?;
    let Some(chosen) = label_of(&first)? else {
        return Err(Error::new(ErrorKind::InvalidArgument, OP, "the region is not striped").at_path(path));
    };
    let label = &chosen.label;
    if label.index != 0 {
        return Err(super::not_the_first(label, path));
    }
    if !(1..label.stripe.members).contains(&index) {
        let message = format!(
            "expected a member from 1 to {}, found {index}: member 0 is where the region is opened",
            label.stripe.members - 1
        );
        return Err(Error::new(ErrorKind::InvalidArgument, OP, message).at_path(path));
    }
    let given = std::path::absolute(to).map_err(|error| Error::io(OP, &error).at_path(to))?;
    let member = RegionFile::open(&given, false, Duration::ZERO)?;
    check_member(&member, index, label)?;
    let mut paths = label.paths.clone();
    paths[index as usize] = given.as_os_str().as_bytes().to_vec();
    let options = MediumOptions { required: Durability::Process, ..MediumOptions::default() };
    let medium = medium_on(first, &options, None)?;
    rewrite_label(&*medium, &chosen, paths).map_err(|error| error.at_path(path))
}

/// Replaces the paths in a label: first over the copy that does not count, durable, then over the other. What is found is
/// made durable before: a killed process may have left the copy that counts visible only.
pub fn rewrite_label(member: &dyn Medium, chosen: &ChosenLabel, paths: Vec<Vec<u8>>) -> Result<()> {
    let sequence = chosen.label.sequence.checked_add(1).ok_or_else(|| {
        Error::new(ErrorKind::Corrupt, OP, "the label's sequence number cannot be raised any more")
    })?;
    let block = Label { sequence, paths, ..chosen.label.clone() }.encode()?;
    member.persist(0, LABEL_AREA_BYTES, Barrier::Open)?;
    for copy in [1 - chosen.copy, chosen.copy] {
        member.write_durable(LABEL_OFFSETS[copy], &block, Barrier::Control)?;
    }
    Ok(())
}
