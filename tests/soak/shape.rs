//! What a region and its savers are like, drawn at random; handed to saver processes in the environment.

use std::env;
use std::path::{Path, PathBuf};

use pccheck::medium::{Durability, IoBackend, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use serde::{Deserialize, Serialize};

use super::content::{self, Random};

const ENV_SHAPE: &str = "PCC_SOAK_SHAPE";
const ENV_REGION: &str = "PCC_SOAK_REGION";
const ENV_FIRST_STEP: &str = "PCC_SOAK_FIRST_STEP";

/// The ways from the engine to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    Auto,
    Threads,
    Mmap,
    /// The mapping of a file in memory.
    Memory,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shape {
    pub way: Way,
    pub in_flight: u32,
    pub keep: u32,
    /// More than these: slots for pins.
    pub spare_slots: u32,
    pub members: u32,
    pub chunk_bytes: u64,
    pub pool_chunks: u64,
    pub rewrite_every: u32,
    /// The region is on a disk that fails now and then.
    pub fails: bool,
    pub planted: Option<Planted>,
}

/// What a saver does that the soak must not let pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Planted {
    /// It reports what it does not write.
    Lies,
    /// Its saves fail, on a disk that does not.
    Fails,
    /// It ends before it is killed.
    Quits,
    /// It does not open the region.
    NeverOpens,
}

impl Shape {
    pub fn random(random: &mut Random) -> Shape {
        let fails = random.below(3) == 0;
        let way = match random.below(4) {
            0 => Way::Auto,
            1 => Way::Threads,
            2 if !fails => Way::Memory,
            _ => Way::Mmap,
        };
        let in_flight = 1 + random.below(4) as u32;
        Shape {
            way,
            in_flight,
            keep: 1 + random.below(3) as u32,
            spare_slots: random.below(3) as u32,
            members: if fails { 1 } else { 1 + random.below(3) as u32 },
            chunk_bytes: 4096 << random.below(5),
            pool_chunks: u64::from(in_flight) + 1 + random.below(16),
            rewrite_every: 1 + random.below(8) as u32,
            fails,
            planted: None,
        }
    }

    pub fn format(&self, path: &Path) -> FormatOptions {
        let member = |index: u32| path.with_extension(format!("member{index}"));
        FormatOptions {
            stripe: (1..self.members).map(member).collect(),
            stripe_unit_bytes: 2 << 20,
            ..FormatOptions::new(self.in_flight + self.keep + self.spare_slots, content::PAYLOAD_BYTES)
        }
    }

    pub fn options(&self) -> OpenOptions {
        let (medium, backend) = match self.way {
            Way::Auto => (Requested::Direct, IoBackend::Auto),
            Way::Threads => (Requested::Direct, IoBackend::Threads),
            Way::Mmap | Way::Memory => (Requested::Mmap, IoBackend::Auto),
        };
        OpenOptions {
            medium,
            backend,
            required: Durability::Process,
            max_in_flight: self.in_flight,
            keep: self.keep,
            chunk_bytes: self.chunk_bytes,
            staging_bytes: self.pool_chunks * self.chunk_bytes.max(64 << 10),
            rewrite_every: self.rewrite_every,
            writers: 2,
            ..OpenOptions::default()
        }
    }
}

/// What a saver process is to do.
pub struct Orders {
    pub region: PathBuf,
    pub shape: Shape,
    pub first_step: u64,
}

impl Orders {
    pub fn to_env(&self) -> [(&'static str, String); 3] {
        [
            (ENV_REGION, self.region.display().to_string()),
            (ENV_SHAPE, serde_json::to_string(&self.shape).expect("JSON")),
            (ENV_FIRST_STEP, self.first_step.to_string()),
        ]
    }

    /// None in a process that is no saver.
    pub fn from_env() -> Option<Orders> {
        Some(Orders {
            region: env::var_os(ENV_REGION)?.into(),
            shape: serde_json::from_str(&env::var(ENV_SHAPE).ok()?).ok()?,
            first_step: env::var(ENV_FIRST_STEP).ok()?.parse().ok()?,
        })
    }
}
