//! Finding and opening the members of a striped region, each under its lock.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use super::label::label_of;
use super::Striped;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Label;
use crate::medium::direct::Direct;
use crate::medium::file::RegionFile;
use crate::medium::mapped::Mapped;
use crate::medium::open::{check_file, direct_on};
use crate::medium::{Medium, MediumOptions, PreferredHint, Requested};
use crate::staging::StagingPool;
use crate::sync::Arc;

/// Opens the region of which `first`, opened as `given`, is member 0.
pub(in crate::medium) fn open_striped(
    mut first: RegionFile,
    label: &Label,
    given: &Path,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Arc<dyn Medium>> {
    let deadline = Instant::now().checked_add(options.lock_wait);
    check_length(&first, 0, label)?;
    first.as_member(0);
    let mut files = vec![first];
    for index in 1..label.stripe.members {
        let path = find(index, label, given)?;
        let left = match deadline {
            Some(deadline) => deadline.saturating_duration_since(Instant::now()),
            None => Duration::MAX,
        };
        let opened = RegionFile::open(&path, options.writable, left);
        let mut file = opened.map_err(|error| error.within(&format!("member {index}")))?;
        // Again, now that nobody can change it.
        check_member(&file, index, label)?;
        file.as_member(index);
        files.push(file);
    }
    let members = media_on(files, options, pool)?;
    let striped = Striped::new(label.stripe, label.data_offset, members, options.writable);
    Ok(Arc::new(striped.map_err(|error| error.at_path(given))?))
}

/// The path of a member as a label has it.
pub(super) fn path_of(label: &Label, index: u32) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(&label.paths[index as usize]))
}

/// Where member `index` is: seen from member 0 as it was at format, so that all of them can be moved or copied
/// together, or else where the label says.
fn find(index: u32, label: &Label, given: &Path) -> Result<PathBuf> {
    let noted = path_of(label, index);
    let mut candidates: Vec<PathBuf> = moved_along(&path_of(label, 0), &noted, given).into_iter().collect();
    if !candidates.contains(&noted) {
        candidates.push(noted.clone());
    }
    let mut found = None;
    for path in &candidates {
        match RegionFile::open(path, false, Duration::ZERO).and_then(|file| check_member(&file, index, label))
        {
            Ok(()) => return Ok(path.clone()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => drop(found.get_or_insert(error.within(&format!("member {index}")))),
        }
    }
    let members = label.stripe.members;
    let error = found.unwrap_or_else(|| {
        let places: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
        let message = format!("member {index} of {members} is lost: nothing is at {}", places.join(" or "));
        Error::new(ErrorKind::Member, "open", message).at_path(&noted)
    });
    if error.kind() != ErrorKind::Member {
        return Err(error);
    }
    let advice = format!(
        "bring member {index} back, or say where it is now: `pccheck relocate {} {index} PATH`",
        given.display()
    );
    Err(error.advise(advice))
}

/// `noted`, which was beside or below or near `first`, seen from where `first` is now. None where it has not moved, or
/// the two had no folder in common.
fn moved_along(first: &Path, noted: &Path, given: &Path) -> Option<PathBuf> {
    let given = std::path::absolute(given).ok()?;
    if given == first {
        return None;
    }
    let (home, now) = (first.parent()?, given.parent()?);
    let common = home.components().zip(noted.components()).take_while(|(a, b)| a == b).count();
    let shared = home.components().take(common).any(|part| matches!(part, Component::Normal(_)));
    if !shared {
        return None;
    }
    let mut path = now.to_path_buf();
    for _ in home.components().skip(common) {
        if !path.pop() {
            return None;
        }
    }
    path.extend(noted.components().skip(common));
    Some(path)
}

fn wrong(file: &RegionFile, message: String) -> Error {
    Error::new(ErrorKind::Member, "open", message).at_path(file.path())
}

/// Whether `file` is member `index` of the set of `expected`, and whole.
pub(super) fn check_member(file: &RegionFile, index: u32, expected: &Label) -> Result<()> {
    check_length(file, index, expected)?;
    let found = match label_of(file) {
        Ok(Some(found)) => found.label,
        Ok(None) => {
            let message = format!("expected member {index} of set {}, found no member's label", expected.set);
            return Err(wrong(file, message));
        }
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            let message =
                format!("both copies of the label of member {index} are damaged: {}", error.message());
            return Err(wrong(file, message));
        }
        Err(error) => return Err(error),
    };
    if found.set != expected.set {
        let message = format!(
            "a foreign file: expected member {index} of set {}, found member {} of set {}",
            expected.set, found.index, found.set
        );
        return Err(wrong(file, message));
    }
    if found.index != index {
        return Err(wrong(
            file,
            format!("expected member {index}, found member {} of the same set", found.index),
        ));
    }
    if (found.stripe, found.data_offset) != (expected.stripe, expected.data_offset) {
        let message = format!(
            "its label disagrees with member 0's: expected {:?} from byte {}, found {:?} from byte {}",
            expected.stripe, expected.data_offset, found.stripe, found.data_offset
        );
        return Err(wrong(file, message));
    }
    Ok(())
}

fn check_length(file: &RegionFile, index: u32, label: &Label) -> Result<()> {
    let needed = label.data_offset + label.stripe.member_bytes;
    if file.len_bytes() >= needed {
        return Ok(());
    }
    let message = format!("member {index} is too short: expected {needed} bytes, found {}", file.len_bytes());
    Err(wrong(file, message))
}

/// A medium of one kind on each file. For `Auto`, the kind that all of them can be.
pub(in crate::medium) fn media_on(
    mut files: Vec<RegionFile>,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Vec<Arc<dyn Medium>>> {
    for file in &files {
        check_file(file, options)?;
    }
    let mut media: Vec<Arc<dyn Medium>> = Vec::new();
    let mut kind = options.kind;
    if kind == Requested::Auto {
        let first = files.remove(0);
        match Mapped::dax(first) {
            Ok(medium) => {
                media.push(Arc::new(medium));
                kind = Requested::Dax;
            }
            Err(refused) => {
                files.insert(0, refused.file);
                let buffered = |file: &RegionFile| file.is_in_memory() || file.use_direct().is_err();
                let prefers_mmap = options.preferred == Some(PreferredHint::Mmap);
                let any = prefers_mmap || files.iter().any(buffered);
                kind = if any { Requested::Mmap } else { Requested::Direct };
            }
        }
    }
    for file in files {
        media.push(match kind {
            Requested::Dax => Arc::new(Mapped::dax(file).map_err(|refused| {
                refused
                    .error
                    .advise("all members must be of one medium: ask for mmap, or use members on DAX only")
            })?),
            Requested::Mmap => Arc::new(Mapped::mmap(file)?),
            Requested::Direct | Requested::Auto => Arc::<Direct>::new(direct_on(file, options, pool)?),
        });
    }
    Ok(media)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_that_were_moved_together_are_found_again() {
        let moved = |first: &str, noted: &str, given: &str| {
            moved_along(Path::new(first), Path::new(noted), Path::new(given))
        };
        assert_eq!(moved("/a/run/r0", "/a/run/r1", "/b/r0"), Some("/b/r1".into()));
        assert_eq!(moved("/a/run/r0", "/a/other/r1", "/b/c/r0"), Some("/b/other/r1".into()));
        assert_eq!(moved("/a/r0", "/a/deep/r1", "/b/r0"), Some("/b/deep/r1".into()));
        assert_eq!(moved("/a/r0", "/a/r1", "/a/r0"), None, "it has not moved");
        assert_eq!(moved("/a/r0", "/dev/sdb", "/b/r0"), None, "they had nothing in common");
        assert_eq!(moved("/a/b/c/r0", "/a/r1", "/r0"), None, "there is no such place");
    }
}
