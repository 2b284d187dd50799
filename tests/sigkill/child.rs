//! The process that is killed: saves without pause and reports every step of it by `write(2)`.
//!
//! The reports, one line each: `@opening`, `@ready PATH`, `@begin STEP`, `@issued GENERATION STEP`,
//! `@durable GENERATION STEP`, `@error TEXT`.

use std::env;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::medium::{IoBackend, Requested};
use pccheck::save::Save;
use pccheck::store::OpenOptions;

use super::common::{save_bytes, WAIT};
use super::content;
use super::reports::Reports;

/// Set in the child: the region's path.
const ENV_REGION: &str = "PCC_SIGKILL_REGION";
const ENV_MEDIUM: &str = "PCC_SIGKILL_MEDIUM";
const ENV_IN_FLIGHT: &str = "PCC_SIGKILL_IN_FLIGHT";
const ENV_KEEP: &str = "PCC_SIGKILL_KEEP";
const ENV_STEP: &str = "PCC_SIGKILL_STEP";
const ENV_LIE: &str = "PCC_SIGKILL_LIE";

/// Which medium, by which way to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Uring,
    Threads,
    Mmap,
    /// Persistent memory: only where there is some.
    Dax,
}

impl Way {
    /// What works on any disk.
    pub const ALL: [Way; 3] = [Way::Uring, Way::Threads, Way::Mmap];

    fn name(self) -> &'static str {
        match self {
            Way::Uring => "uring",
            Way::Threads => "threads",
            Way::Mmap => "mmap",
            Way::Dax => "dax",
        }
    }

    /// Options small enough that one save takes a few milliseconds.
    pub fn options(self, in_flight: u32, keep: u32) -> OpenOptions {
        let (medium, backend) = match self {
            // By name: where the kernel refuses it, this is not silently threads again.
            Way::Uring => (Requested::Direct, IoBackend::Uring),
            Way::Threads => (Requested::Direct, IoBackend::Threads),
            Way::Mmap => (Requested::Mmap, IoBackend::Auto),
            Way::Dax => (Requested::Dax, IoBackend::Auto),
        };
        OpenOptions {
            medium,
            backend,
            max_in_flight: in_flight,
            keep,
            chunk_bytes: 32 << 10,
            staging_bytes: 512 << 10,
            ..OpenOptions::default()
        }
    }
}

/// What one child does.
#[derive(Debug, Clone)]
pub struct Orders {
    pub region: PathBuf,
    pub way: Way,
    pub in_flight: u32,
    pub keep: u32,
    pub first_step: u64,
    /// Planted fault: begins saves, writes nothing, and reports them as durable.
    pub lie: bool,
}

impl Orders {
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        vec![
            (ENV_REGION, self.region.display().to_string()),
            (ENV_MEDIUM, self.way.name().to_string()),
            (ENV_IN_FLIGHT, self.in_flight.to_string()),
            (ENV_KEEP, self.keep.to_string()),
            (ENV_STEP, self.first_step.to_string()),
            (ENV_LIE, self.lie.to_string()),
        ]
    }

    /// `None` in a process that is no child.
    pub fn from_env() -> Option<Orders> {
        let way = env::var(ENV_MEDIUM).ok()?;
        Some(Orders {
            region: env::var_os(ENV_REGION)?.into(),
            way: Way::ALL.into_iter().chain([Way::Dax]).find(|known| known.name() == way)?,
            in_flight: number(ENV_IN_FLIGHT)?,
            keep: number(ENV_KEEP)?,
            first_step: number(ENV_STEP)?,
            lie: number(ENV_LIE)?,
        })
    }
}

fn number<T: FromStr>(name: &str) -> Option<T> {
    env::var(name).ok()?.parse().ok()
}

/// Saves until it is killed, if this process is a child; returns at once if it is not.
pub fn run_if_child() {
    let Some(orders) = Orders::from_env() else { return };
    let reports = Arc::new(Reports::open());
    reports.say("opening");
    let store =
        match Store::open(Path::new(&orders.region), &orders.way.options(orders.in_flight, orders.keep)) {
            Ok(store) => store,
            Err(error) => return reports.say(&format!("error {error}")),
        };
    reports.say(&format!("ready {}", store.medium_info().path));
    let next_step = AtomicU64::new(orders.first_step);
    thread::scope(|scope| {
        for _ in 0..orders.in_flight.div_ceil(2) {
            scope.spawn(|| loop {
                let step = next_step.fetch_add(1, Ordering::Relaxed);
                if let Err(error) = save_one(&store, &reports, step, orders.lie) {
                    return reports.say(&format!("error {error}"));
                }
            });
        }
    });
}

fn save_one(store: &Store, reports: &Arc<Reports>, step: u64, lie: bool) -> pccheck::Result<()> {
    let tensors = content::tensors_of(step);
    reports.say(&format!("begin {step}"));
    if lie {
        // Not one that only began: where reports are slow, it would be durable before they are heard.
        let never = store.begin_raw(step, 1, &[], WAIT)?;
        reports.say(&format!("issued {} {step}", never.generation()));
        reports.say(&format!("durable {} {step}", never.generation()));
        return Ok(());
    }
    let save = Arc::new(match content::is_raw(step) {
        true => save_raw(store, step, &tensors[0].1)?,
        false => save_bytes(store, step, &tensors, &[("step", &step.to_string())])?,
    });
    let generation = save.generation();
    reports.say(&format!("issued {generation} {step}"));
    // Told on the thread that commits, as early as anybody can know.
    let (ended, reports) = (save.clone(), reports.clone());
    save.on_end(Box::new(move || match ended.wait_durable(Some(Duration::ZERO)) {
        Ok(durable) => reports.say(&format!("durable {} {step}", durable.generation)),
        Err(error) => reports.say(&format!("error {error}")),
    }));
    Ok(())
}

/// The second half first, so that chunks are half-filled when the kill comes.
fn save_raw(store: &Store, step: u64, data: &[u8]) -> pccheck::Result<Save> {
    let mut raw = store.begin_raw(step, data.len() as u64, &[("step", &step.to_string())], WAIT)?;
    let (first, second) = data.split_at(data.len() / 2);
    raw.write_at(first.len() as u64, second)?;
    raw.write_at(0, first)?;
    raw.commit()
}
