//! Creating a striped region: all members are held locked from the look at what they hold until the region is complete.
//!
//! Whatever labels and superblocks the members had go first, member 0's before the others; their new labels come last,
//! member 0's after the others. A crash in between leaves no region, never half of one or parts of two.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Label, Layout, PreferredMedium, StripeLayout, LABEL_AREA_BYTES};
use crate::medium::{self, Medium, MediumOptions, Progress, Striped};
use crate::store::format::{
    check_replaceable, clear_metadata, layout_for, new_uuid, preferred_on, write_metadata,
};
use crate::store::options::FormatOptions;
use crate::sync::Arc;

const OP: &str = "format";

/// Formats the files or devices of `options.stripe`, with `path` as member 0.
pub(super) fn format_striped(
    path: &Path,
    options: &FormatOptions,
    progress: Option<Progress<'_>>,
) -> Result<()> {
    let paths = member_paths(path, options)?;
    let layout = layout_for(options)?;
    let stripe = StripeLayout::new(paths.len() as u32, options.stripe_unit_bytes, layout.region_bytes())?;
    let labels = labels(stripe, &paths)?;
    // Before the locks, and for all members before anything is touched.
    for path in &paths {
        if let Some(found) = medium::Site::look(path)? {
            check_replaceable(&found, path, options.force)?;
        }
    }
    let mut sites = Vec::new();
    for path in &paths {
        let mut site = medium::Site::take(path)?;
        check_replaceable(&site, path, options.force)?;
        site.claim();
        sites.push(site);
    }
    prepare(&mut sites, LABEL_AREA_BYTES + stripe.member_bytes, progress.filter(|_| options.prewrite))?;
    // A label must not name what a crash takes away.
    paths.iter().try_for_each(|path| medium::sync_parent(path))?;
    let medium_options = MediumOptions {
        kind: options.medium,
        required: medium::Durability::Process,
        ..MediumOptions::default()
    };
    let (members, completion) = medium::into_media(sites, &medium_options)?;
    // All data of member 1 is payload: what is before the slots lies in the region's first unit, on member 0.
    let measure = || preferred_on(&paths[1], options.medium, LABEL_AREA_BYTES, stripe.member_bytes);
    write(&members, &labels, &layout, measure)?;
    completion.keep();
    Ok(())
}

/// Formats already open members of sufficient size, found at `paths` from then on; what they held is gone. For the crash
/// checker.
pub fn format_members(members: &[Arc<dyn Medium>], paths: &[PathBuf], options: &FormatOptions) -> Result<()> {
    let layout = layout_for(options)?;
    let stripe = StripeLayout::new(members.len() as u32, options.stripe_unit_bytes, layout.region_bytes())?;
    write(members, &labels(stripe, paths)?, &layout, || Ok(PreferredMedium::Unknown))
}

fn member_paths(path: &Path, options: &FormatOptions) -> Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for path in std::iter::once(path).chain(options.stripe.iter().map(PathBuf::as_path)) {
        let absolute = std::path::absolute(path).map_err(|error| Error::io(OP, &error).at_path(path))?;
        if let Some(twice) = paths.iter().position(|other| medium::is_same_place(other, &absolute)) {
            let message = format!("members {twice} and {} are one file or device", paths.len());
            return Err(Error::new(ErrorKind::InvalidArgument, OP, message).at_path(path));
        }
        paths.push(absolute);
    }
    Ok(paths)
}

fn labels(stripe: StripeLayout, paths: &[PathBuf]) -> Result<Vec<Label>> {
    let first = Label {
        set: new_uuid()?,
        index: 0,
        sequence: 1,
        stripe,
        data_offset: LABEL_AREA_BYTES,
        created_unix_ns: crate::store::unix_ns(),
        paths: paths.iter().map(|path| path.as_os_str().as_bytes().to_vec()).collect(),
    };
    // Paths that have no room are found before anything is touched.
    first.encode()?;
    Ok((0..stripe.members).map(|index| Label { index, ..first.clone() }).collect())
}

/// Gives every member its space, and tells of the progress of all together.
fn prepare(sites: &mut [medium::Site], bytes: u64, mut progress: Option<Progress<'_>>) -> Result<()> {
    let total = bytes * sites.len() as u64;
    for (index, site) in sites.iter_mut().enumerate() {
        let before = bytes * index as u64;
        match &mut progress {
            Some(told) => site.prepare(bytes, Some(&mut |done, _| told(before + done, total)))?,
            None => site.prepare(bytes, None)?,
        }
    }
    Ok(())
}

fn write(
    members: &[Arc<dyn Medium>],
    labels: &[Label],
    layout: &Layout,
    measure: impl FnOnce() -> Result<PreferredMedium>,
) -> Result<()> {
    medium::erase_labels(members)?;
    let (stripe, data_offset) = (labels[0].stripe, labels[0].data_offset);
    let region = Striped::new(stripe, data_offset, members.to_vec(), true)?;
    clear_metadata(&region, layout)?;
    let preferred = measure()?;
    write_metadata(&region, layout, preferred)?;
    medium::write_labels(members, labels)
}
