//! What can still be said of a file that does not open as a region.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pccheck::format::{BLOCK_BYTES, MAX_SLOTS, RECORDS_OFFSET};
use pccheck::{Error, Result};
use serde_json::json;

use super::superblock_copies;
use crate::table::Table;
use crate::{output, units};

/// Prints file size, the state of each superblock copy, and how many slot records are to be seen.
pub fn report(path: &Path, error: &Error, as_json: bool) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", &e).at_path(path))?;
    let file_bytes = file.metadata().map_err(|e| Error::io("open", &e).at_path(path))?.len();
    let copies = superblock_copies(path)?;
    let records = count_records(&file);
    if as_json {
        let copies: Vec<_> = copies
            .iter()
            .map(|(offset, copy)| {
                json!({
                    "offset": offset,
                    "uuid": copy.as_ref().ok().map(|superblock| superblock.uuid.to_string()),
                    "error": copy.as_ref().err().map(|error| error.message().to_string()),
                })
            })
            .collect();
        return output::print_json(&json!({
            "path": path,
            "error": error.to_string(),
            "file_bytes": file_bytes,
            "superblocks": copies,
            "slot_record_magics": records,
        }));
    }
    let mut rows = Table::new(&["<superblock", "offset", "<state"]);
    for ((offset, copy), name) in copies.iter().zip(["A", "B"]) {
        let state = match copy {
            Ok(superblock) => format!(
                "intact: region {}, {} slots of {}, needs {}",
                superblock.uuid,
                superblock.layout.slot_count,
                units::size(superblock.layout.slot_bytes),
                units::size(superblock.layout.region_bytes())
            ),
            Err(error) => error.message().to_string(),
        };
        rows.row(vec![name.to_string(), offset.to_string(), state]);
    }
    let hint = match records {
        0 => "no slot record is to be seen where a region has them".to_string(),
        n => format!(
            "{n} blocks from byte {RECORDS_OFFSET} on bear the mark of slot records: this was a region; restore its first {} from a copy, its checkpoints may be intact",
            units::size(RECORDS_OFFSET)
        ),
    };
    output::print(&format!("{}: {}\n{}{hint}\n", path.display(), units::size(file_bytes), rows.render()))
}

/// Blocks with a slot record's magic where slot records may stand.
fn count_records(file: &File) -> u32 {
    let has_magic = |slot: &u32| {
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, RECORDS_OFFSET + u64::from(*slot) * BLOCK_BYTES).is_ok()
            && magic == pccheck::format::record::RECORD_MAGIC
    };
    (0..MAX_SLOTS).filter(has_magic).count() as u32
}
