//! Creating a region, never over anything of value without force, and never half.
//!
//! One lock is held from the look at what is there until the region is complete: of two that format one path at once
//! the second finds the first's region, or is told of its lock.
//!
//! The superblocks are written last: a crash in the middle leaves something that is not a region. Where an old
//! region is overwritten by force, its superblocks and records go first, so that no mixture can be recovered.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{
    Control, Label, Layout, PreferredMedium, Superblock, Uuid, BLOCK_BYTES, CONTROL_OFFSETS, FORMAT_VERSION,
    MIN_CHUNK_BYTES, RECORDS_OFFSET, SUPERBLOCK_OFFSETS,
};
use crate::medium::{self, Barrier, Medium, MediumOptions, PreferredHint, Requested};
use crate::store::options::FormatOptions;
use crate::store::striped::format_striped;
use crate::store::DEFAULT_CHUNK_BYTES;

const OP: &str = "format";

/// Smallest chunk for which a slot is guaranteed to have room for the table of its largest payload.
const TABLE_CHUNK_BYTES: u64 = 64 << 10;
const _: () = assert!(TABLE_CHUNK_BYTES >= MIN_CHUNK_BYTES && TABLE_CHUNK_BYTES <= DEFAULT_CHUNK_BYTES);

/// Formats a file or block device.
pub(crate) fn format_path(
    path: &Path,
    options: &FormatOptions,
    progress: Option<&mut dyn FnMut(u64, u64)>,
) -> Result<()> {
    options.validate()?;
    if !options.stripe.is_empty() {
        return format_striped(path, options, progress);
    }
    let layout = layout_for(options)?;
    // Before the lock, which a live writer of the region there holds: what is there is the better reason to refuse.
    if let Some(found) = medium::Site::look(path)? {
        check_replaceable(&found, path, options.force)?;
    }
    // From here to the end one lock is held, so that nobody else can make a region here that this one would destroy.
    let mut site = medium::Site::take(path)?;
    check_replaceable(&site, path, options.force)?;
    let mut silent = |_, _| {};
    let progress: medium::Progress<'_> = match progress {
        Some(progress) => progress,
        None => &mut silent,
    };
    let progress = options.prewrite.then_some(progress);
    site.prepare(layout.region_bytes(), progress)?;
    let medium_options = MediumOptions {
        kind: options.medium,
        required: medium::Durability::Process,
        ..MediumOptions::default()
    };
    let (opened, completion) = site.into_medium(&medium_options)?;
    let clear = clear_metadata(&*opened, &layout);
    clear.map_err(|e| e.at_path(path))?;
    let preferred = preferred_on(path, options.medium, layout.payload_offset, layout.slot_bytes)?;
    write_metadata(&*opened, &layout, preferred).map_err(|e| e.at_path(path))?;
    medium::sync_parent(path)?;
    completion.keep();
    Ok(())
}

/// The hint for a superblock: measured over `len` bytes from `offset` of the file, where `Auto` was asked for.
pub(super) fn preferred_on(
    path: &Path,
    requested: Requested,
    offset: u64,
    len: u64,
) -> Result<PreferredMedium> {
    Ok(match requested {
        Requested::Auto => match medium::measure_preferred(path, offset, len)?.preferred {
            PreferredHint::Direct => PreferredMedium::Direct,
            PreferredHint::Mmap => PreferredMedium::Mmap,
        },
        Requested::Direct => PreferredMedium::Direct,
        Requested::Mmap => PreferredMedium::Mmap,
        Requested::Dax => PreferredMedium::Unknown,
    })
}

/// Formats an already open medium of sufficient size; what it held is gone.
pub fn format_medium(medium: &dyn Medium, options: &FormatOptions) -> Result<()> {
    options.validate()?;
    let layout = layout_for(options)?;
    if medium.len_bytes() < layout.region_bytes() {
        return Err(Error::new(
            ErrorKind::NoSpace,
            OP,
            format!(
                "the region needs {} bytes, the medium has {}",
                layout.region_bytes(),
                medium.len_bytes()
            ),
        ));
    }
    clear_metadata(medium, &layout)?;
    write_metadata(medium, &layout, PreferredMedium::Unknown)
}

/// Where everything goes in a region of these options.
pub(crate) fn layout_for(options: &FormatOptions) -> Result<Layout> {
    let slot_bytes = Layout::slot_bytes_for(options.payload_bytes, TABLE_CHUNK_BYTES)?;
    match options.stripe.is_empty() {
        true => Layout::new(options.slot_count, slot_bytes),
        false => Layout::in_units(options.slot_count, slot_bytes, options.stripe_unit_bytes),
    }
}

pub(super) fn check_replaceable(site: &medium::Site, path: &Path, force: bool) -> Result<()> {
    if force || !site.holds_data()? {
        return Ok(());
    }
    let head = site.head()?;
    let block = |offset: u64| -> [u8; BLOCK_BYTES as usize] {
        let mut block = [0; BLOCK_BYTES as usize];
        let bytes = head.get(offset as usize..).unwrap_or(&[]);
        let len = bytes.len().min(block.len());
        block[..len].copy_from_slice(&bytes[..len]);
        block
    };
    let copies = SUPERBLOCK_OFFSETS.map(block);
    let member = Label::choose(&copies[0], &copies[1]).ok().flatten().map(|found| found.label);
    let what = match (Superblock::choose(&copies[0], &copies[1]), member) {
        (_, Some(Label { index, set, .. })) => {
            format!("it is member {index} of the striped region of set {set}")
        }
        (Ok((superblock, _)), None) => format!("it holds region {}", superblock.uuid),
        (Err(_), None) if head.iter().all(|&byte| byte == 0) => {
            "it begins with zeros and is not a pccheck region: an interrupted format, or a file of another's"
                .to_string()
        }
        (Err(_), None) => "it holds data that is not a pccheck region".to_string(),
    };
    Err(Error::new(ErrorKind::AlreadyExists, OP, what)
        .at_path(path)
        .advise("choose another path, or give force to destroy what is there"))
}

pub(super) fn clear_metadata(medium: &dyn Medium, layout: &Layout) -> Result<()> {
    let zeros = [0u8; BLOCK_BYTES as usize];
    for offset in SUPERBLOCK_OFFSETS {
        medium.write_durable(offset, &zeros, Barrier::Control)?;
    }
    for offset in CONTROL_OFFSETS {
        medium.copy(offset, &zeros)?;
    }
    for slot in 0..layout.slot_count {
        medium.copy(layout.record_offset(slot), &zeros)?;
    }
    medium.fence(Barrier::Control)?;
    medium.persist(0, RECORDS_OFFSET + u64::from(layout.slot_count) * BLOCK_BYTES, Barrier::Control)
}

pub(super) fn write_metadata(
    medium: &dyn Medium,
    layout: &Layout,
    preferred_medium: PreferredMedium,
) -> Result<()> {
    let uuid = new_uuid()?;
    let control = Control::initial();
    medium.write_durable(CONTROL_OFFSETS[0], &control.encode(&uuid)?, Barrier::Control)?;
    let superblock = Superblock {
        format_version: FORMAT_VERSION,
        compat: 0,
        incompat: 0,
        uuid,
        layout: *layout,
        created_unix_ns: crate::store::unix_ns(),
        preferred_medium,
    };
    for offset in SUPERBLOCK_OFFSETS {
        medium.write_durable(offset, &superblock.encode(), Barrier::Control)?;
    }
    Ok(())
}

pub(super) fn new_uuid() -> Result<Uuid> {
    use std::io::Read;
    let mut bytes = [0u8; 16];
    let source = Path::new("/dev/urandom");
    std::fs::File::open(source)
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|e| Error::io(OP, &e).at_path(source))?;
    Ok(Uuid(bytes))
}
