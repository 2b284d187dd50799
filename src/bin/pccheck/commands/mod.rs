//! The commands that look into a region or change it, and what they share.

pub mod export;
pub mod format;
pub mod grow;
pub mod import;
pub mod inspect;
pub mod pin;
pub mod relocate;
pub mod rescue;
pub mod verify;

use std::path::Path;
use std::time::Duration;

use pccheck::engine::{Select, Store};
use pccheck::format::{Block, SlotRecord, Superblock, BLOCK_BYTES, SUPERBLOCK_OFFSETS};
use pccheck::medium::{read_head, Durability, MediumKind, Requested, Stripes};
use pccheck::recovery::{SlotDecision, Verdict};
use pccheck::store::{OpenOptions, DEFAULT_CHUNK_BYTES};
use pccheck::Result;

use crate::units;

/// Buffers of the staging pool of a store that is opened for reading.
const READ_BUFFERS: u64 = 16;

/// A medium by name, as a command-line value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Medium {
    /// Persistent memory where there is some, otherwise what is measured to be faster.
    Auto,
    /// Persistent memory mapped with MAP_SYNC.
    Dax,
    /// A shared mapping.
    Mmap,
    /// O_DIRECT, by io_uring where the kernel allows it.
    Direct,
}

impl From<Medium> for Requested {
    fn from(medium: Medium) -> Requested {
        match medium {
            Medium::Auto => Requested::Auto,
            Medium::Dax => Requested::Dax,
            Medium::Mmap => Requested::Mmap,
            Medium::Direct => Requested::Direct,
        }
    }
}

/// Name of a medium, as `--medium` takes it.
pub fn medium_name(kind: MediumKind) -> &'static str {
    match kind {
        MediumKind::Dax => "dax",
        MediumKind::Mmap => "mmap",
        MediumKind::Direct => "direct",
        MediumKind::Sim => "sim",
    }
}

/// What a durable save survives, in words.
pub fn survives(durability: Durability) -> &'static str {
    match durability {
        Durability::Process => "the death of the process, not power loss",
        Durability::Power => "power loss",
    }
}

/// How a region is striped, if it is, as a line of a table.
pub fn stripes_line(stripes: Option<Stripes>) -> Option<(&'static str, String)> {
    stripes.map(|Stripes { members, unit_bytes }| {
        ("stripes", format!("{members} members, units of {}", units::size(unit_bytes)))
    })
}

/// Which checkpoint a command is about; the newest unless told otherwise.
#[derive(Debug, Clone, clap::Args)]
pub struct Which {
    /// The checkpoint of this generation.
    #[arg(long, value_name = "N", conflicts_with = "step")]
    pub generation: Option<u64>,
    /// The newest checkpoint of this step.
    #[arg(long, value_name = "N")]
    pub step: Option<u64>,
}

impl Which {
    /// As the engine takes it.
    pub fn select(&self) -> Select {
        match (self.generation, self.step) {
            (Some(generation), _) => Select::Generation(generation),
            (None, Some(step)) => Select::Step(step),
            (None, None) => Select::Newest,
        }
    }
}

/// Opens a region beside whoever writes it, with buffers as large as the chunks of its checkpoints.
pub fn open_to_read(path: &Path) -> Result<Store> {
    let options = |chunk_bytes: u64| OpenOptions {
        read_only: true,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes,
        staging_bytes: READ_BUFFERS * chunk_bytes,
        ..OpenOptions::default()
    };
    let store = Store::open(path, &options(DEFAULT_CHUNK_BYTES))?;
    // Chunks as they are, not as a crafted record may call them: buffers are taken for them.
    let chunk =
        |record: &SlotRecord| record.chunk_bytes.min(record.payload_bytes.next_multiple_of(BLOCK_BYTES));
    let largest = store.recovered().checkpoints().map(chunk).max();
    match largest {
        Some(largest) if largest > DEFAULT_CHUNK_BYTES => Store::open(path, &options(largest)),
        _ => Ok(store),
    }
}

/// Options to open a region for a single change that costs as few of its checkpoints as can be.
pub fn careful_writer(path: &Path, lock_wait: Duration) -> Result<OpenOptions> {
    let mut options = OpenOptions {
        required: Durability::Process,
        max_in_flight: 1,
        staging_bytes: READ_BUFFERS * DEFAULT_CHUNK_BYTES,
        lock_wait: Some(lock_wait),
        ..OpenOptions::default()
    };
    let store = Store::open(path, &OpenOptions { read_only: true, ..options.clone() })?;
    if let Some(stripes) = store.medium_info().stripes {
        // Chunks must divide the unit.
        options.chunk_bytes = options.chunk_bytes.min(stripes.unit_bytes);
    }
    let table = store.recovered();
    let taken = |slot: &&SlotDecision| slot.pinned || slot.verdict == Verdict::Quarantined;
    let unusable = table.slots.iter().filter(taken).count() as u32;
    // The region goes on being that of its group run.
    options.run_id = table.control.as_ref().map_or(0, |control| control.run_id);
    // One slot to write; all others keep what they hold.
    options.keep = table.superblock.layout.slot_count.saturating_sub(1 + unusable).max(1);
    Ok(options)
}

/// The two superblocks of a file, as far as it has them.
pub fn superblock_copies(path: &Path) -> Result<Vec<(u64, Result<Superblock>)>> {
    let head = read_head(path)?.unwrap_or_default();
    let copies = SUPERBLOCK_OFFSETS.iter().filter_map(|&offset| {
        let block: &Block = head.get(offset as usize..)?.first_chunk()?;
        Some((offset, Superblock::decode(block)))
    });
    Ok(copies.collect())
}
