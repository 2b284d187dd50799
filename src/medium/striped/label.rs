//! Reading and writing the label of a member.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Block, ChosenLabel, Label, BLOCK_BYTES, LABEL_OFFSETS};
use crate::medium::file::RegionFile;
use crate::medium::{Barrier, Medium};
use crate::sync::Arc;

/// The label of a member of `len_bytes` that `read` reads; none where there is no label.
///
/// # Errors
///
/// `Corrupt` where there was one, and both copies are damaged; the versions and features that this build does not know.
/// A copy that cannot be read counts as damaged.
pub fn read_label(
    read: impl Fn(u64, &mut [u8]) -> Result<()>,
    len_bytes: u64,
) -> Result<Option<ChosenLabel>> {
    if len_bytes < LABEL_OFFSETS[1] + BLOCK_BYTES {
        return Ok(None);
    }
    let mut copies: [Block; 2] = [[0; BLOCK_BYTES as usize]; 2];
    let mut unreadable = None;
    for (copy, offset) in copies.iter_mut().zip(LABEL_OFFSETS) {
        if let Err(error) = read(offset, copy) {
            unreadable.get_or_insert(error);
        }
    }
    match (Label::choose(&copies[0], &copies[1])?, unreadable) {
        // A region without stripes has a way of its own to live with a superblock that cannot be read.
        (found, _) if found.is_some() => Ok(found),
        (_, Some(error)) if error.kind() != ErrorKind::Io => Err(error),
        _ => Ok(None),
    }
}

/// The label of an open file.
pub(in crate::medium) fn label_of(file: &RegionFile) -> Result<Option<ChosenLabel>> {
    let found = read_label(|offset, dst| file.read(offset, dst), file.len_bytes());
    found.map_err(|error| file.about(error))
}

/// Writes both copies of a label that has none in force, one after the other, each durable.
pub fn write_label(member: &dyn Medium, label: &Label) -> Result<()> {
    let block = label.encode()?;
    LABEL_OFFSETS.iter().try_for_each(|&offset| member.write_durable(offset, &block, Barrier::Control))
}

/// Writes the labels of a set whose data is durable. Member 0's, by which the region is opened, comes last: a crash
/// leaves no region or a whole one.
pub fn write_labels(members: &[Arc<dyn Medium>], labels: &[Label]) -> Result<()> {
    members.iter().zip(labels).rev().try_for_each(|(member, label)| write_label(&**member, label))
}

/// Durably erases whatever label or superblock the members have, before anything else of them is overwritten.
/// Member 0's goes first, and with it the region that was there.
pub fn erase_labels(members: &[Arc<dyn Medium>]) -> Result<()> {
    let zeros = [0; BLOCK_BYTES as usize];
    members.iter().try_for_each(|member| {
        LABEL_OFFSETS.iter().try_for_each(|&offset| member.write_durable(offset, &zeros, Barrier::Control))
    })
}

/// The error of a path that was given as a region and is another member than the first.
pub(in crate::medium) fn not_the_first(label: &Label, path: &Path) -> Error {
    let first = super::open::path_of(label, 0);
    let message = format!(
        "this is member {} of a striped region of {} members, which is opened by its member 0",
        label.index, label.stripe.members
    );
    Error::new(ErrorKind::Member, "open", message)
        .at_path(path)
        .advise(format!("open member 0 instead: it was formatted as {}", first.display()))
}
