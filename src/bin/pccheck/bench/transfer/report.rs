//! Ratios of what was measured; tables and JSON.

use std::time::Duration;

use pccheck::medium::MediumKind;
use serde_json::{json, Value};

use super::super::ceiling::{Mode, Way};
use super::super::figures::{ms, over, us, Spread};
use super::{Measurement, Round};
use crate::commands::medium_name;
use crate::table::Table;
use crate::units;

/// The figures of one setting that people ask for. Rates in 10^9 bytes per second, times in milliseconds.
struct Figures {
    durable: Spread,
    plain_write: Spread,
    durable_ratio: Spread,
    copied_ms: Spread,
    plain_copy_ms: Spread,
    copied_ratio: Spread,
    restore: Spread,
    plain_read: Spread,
    restore_ratio: Spread,
    /// Processor seconds for 10^9 bytes.
    cpu: Spread,
    plain_cpu: Spread,
    cpu_ratio: Spread,
    /// Peak memory beyond the staging pool.
    beyond_pool_bytes: Option<i64>,
}

impl Figures {
    fn of(measured: &Measurement) -> Figures {
        let bytes = measured.state_bytes;
        let saved = bytes * u64::from(measured.setting.in_flight);
        let spread = |figure: &dyn Fn(&Round) -> f64| Spread::of(measured.rounds.iter().map(figure));
        let rate = |bytes: u64, time: Duration| units::gb_per_s(bytes, time.as_secs_f64());
        let per_gb = |time: Duration, bytes: u64| over(time.as_secs_f64() * 1e9, bytes as f64);
        Figures {
            durable: spread(&|r| rate(saved, r.durable)),
            plain_write: spread(&|r| rate(saved, r.plain_write)),
            durable_ratio: spread(&|r| over(rate(saved, r.durable), rate(saved, r.plain_write))),
            copied_ms: spread(&|r| ms(r.copied)),
            plain_copy_ms: spread(&|r| ms(r.plain_copy)),
            copied_ratio: spread(&|r| over(ms(r.copied), ms(r.plain_copy))),
            restore: spread(&|r| rate(bytes, r.restore)),
            plain_read: spread(&|r| rate(bytes, r.plain_read)),
            restore_ratio: spread(&|r| over(rate(bytes, r.restore), rate(bytes, r.plain_read))),
            cpu: spread(&|r| per_gb(r.cpu, saved)),
            plain_cpu: spread(&|r| per_gb(r.plain_cpu, bytes)),
            cpu_ratio: spread(&|r| over(per_gb(r.cpu, saved), per_gb(r.plain_cpu, bytes))),
            beyond_pool_bytes: measured
                .extra_bytes
                .map(|extra| extra as i64 - measured.setting.staging_bytes as i64),
        }
    }
}

/// All tables.
pub fn tables(results: &[Measurement]) -> String {
    let figures: Vec<Figures> = results.iter().map(Figures::of).collect();
    let mut text = String::from("Settings\n");
    text += &settings_table(results);
    text += "\nSaving: from begin to durable, GB/s: median (least-greatest); ratio to plain writing\n";
    let mut rows =
        Table::new(&["#", "first save", "durable GB/s", "plain GB/s", "ratio [95%]", "<plain writing by"]);
    for (number, (m, f)) in results.iter().zip(&figures).enumerate() {
        rows.row(vec![
            (number + 1).to_string(),
            format!("{:.2}", units::gb_per_s(m.state_bytes, m.first.1.as_secs_f64())),
            f.durable.text(2),
            f.plain_write.text(2),
            f.durable_ratio.interval_text(),
            mode_text(m.write_mode, m.plain_direct),
        ]);
    }
    text += &rows.render();
    text += "\nCopying: from begin to copied, when the trainer may go on; ratio to plain copying (less is better)\n";
    let mut rows = Table::new(&["#", "first save", "copied ms", "plain ms", "ratio", "<"]);
    for (number, (m, f)) in results.iter().zip(&figures).enumerate() {
        let holds = m.setting.staging_bytes >= m.state_bytes * u64::from(m.setting.in_flight);
        rows.row(vec![
            (number + 1).to_string(),
            format!("{:.1}", m.first.0.as_secs_f64() * 1e3),
            f.copied_ms.text(1),
            f.plain_copy_ms.text(1),
            format!("{:.2}", f.copied_ratio.median),
            match (m.medium.kind, holds) {
                (MediumKind::Direct, true) => "the pool holds the state",
                (MediumKind::Direct, false) => "waits for the disk: the pool is smaller",
                _ => "stored in place",
            }
            .to_string(),
        ]);
    }
    text += &rows.render();
    text += "\nRestoring with verification, GB/s; ratio to plain reading\n";
    let mut rows = Table::new(&["#", "restore GB/s", "plain GB/s", "ratio [95%]", "<plain reading by"]);
    for (number, (m, f)) in results.iter().zip(&figures).enumerate() {
        rows.row(vec![
            (number + 1).to_string(),
            f.restore.text(2),
            f.plain_read.text(2),
            f.restore_ratio.interval_text(),
            mode_text(m.read_mode, m.plain_direct),
        ]);
    }
    text += &rows.render();
    text += "\nProcessor seconds for 10^9 bytes until durable, all threads and the kernel's work for them; beside\n\
             hashing and one copy alone\n";
    let mut rows = Table::new(&["#", "save s/GB", "hash and copy s/GB", "ratio [95%]"]);
    for (number, f) in figures.iter().enumerate() {
        rows.row(vec![
            (number + 1).to_string(),
            f.cpu.text(3),
            f.plain_cpu.text(3),
            f.cpu_ratio.interval_text(),
        ]);
    }
    text += &rows.render();
    text += "\nMemory: peak beyond what was resident before the store was opened\n";
    let mut rows = Table::new(&["#", "pool", "peak", "beyond the pool", "opening"]);
    for (number, (m, f)) in results.iter().zip(&figures).enumerate() {
        rows.row(vec![
            (number + 1).to_string(),
            units::size(m.setting.staging_bytes),
            m.extra_bytes.map_or("unknown".to_string(), units::size),
            f.beyond_pool_bytes.map_or("unknown".to_string(), |bytes| {
                format!("{}{}", if bytes < 0 { "-" } else { "" }, units::size(bytes.unsigned_abs()))
            }),
            units::time(m.open),
        ]);
    }
    text += &rows.render();
    text
}

fn settings_table(results: &[Measurement]) -> String {
    let mut rows =
        Table::new(&["#", "state", "in flight", "writers", "chunk", "pool", "<medium", "<reached by"]);
    for (number, m) in results.iter().enumerate() {
        rows.row(vec![
            (number + 1).to_string(),
            units::size(m.state_bytes),
            m.setting.in_flight.to_string(),
            m.setting.writers.to_string(),
            units::size(m.setting.chunk_bytes),
            units::size(m.setting.staging_bytes),
            medium_name(m.medium.kind).to_string(),
            m.medium.path.to_string(),
        ]);
    }
    rows.render()
}

fn mode_text(mode: Mode, direct: bool) -> String {
    let by = match mode.way {
        Way::Ring => "io_uring",
        Way::Threads => "threads",
        Way::Mapping => return format!("copying, {} threads, mapped file", mode.depth),
        Way::Streaming => return format!("copying around the caches, {} threads, mapped file", mode.depth),
    };
    let cached = if direct { "" } else { ", page cache" };
    format!("{by}, {} x {}{cached}", mode.depth, units::size(mode.bytes as u64))
}

/// One setting, with every repetition.
pub fn json(m: &Measurement) -> Value {
    let f = Figures::of(m);
    let rounds: Vec<Value> = m
        .rounds
        .iter()
        .map(|round| {
            json!({
                "copied_us": us(round.copied),
                "durable_us": us(round.durable),
                "plain_write_us": us(round.plain_write),
                "plain_copy_us": us(round.plain_copy),
                "restore_us": us(round.restore),
                "plain_read_us": us(round.plain_read),
                "cpu_us": us(round.cpu),
                "hash_and_copy_cpu_us": us(round.plain_cpu),
            })
        })
        .collect();
    json!({
        "state_bytes": m.state_bytes,
        "in_flight": m.setting.in_flight,
        "writers": m.setting.writers,
        "chunk_bytes": m.setting.chunk_bytes,
        "queue_depth": m.setting.queue_depth,
        "staging_bytes": m.setting.staging_bytes,
        "medium": medium_name(m.medium.kind),
        "medium_path": m.medium.path,
        "medium_notes": m.medium.notes,
        "plain_direct": m.plain_direct,
        "plain_write_mode": mode_text(m.write_mode, m.plain_direct),
        "plain_read_mode": mode_text(m.read_mode, m.plain_direct),
        "open_us": us(m.open),
        "first_save": { "copied_us": us(m.first.0), "durable_us": us(m.first.1) },
        "durable_gb_per_s": f.durable.json(),
        "plain_write_gb_per_s": f.plain_write.json(),
        "durable_ratio": f.durable_ratio.json(),
        "copied_ms": f.copied_ms.json(),
        "plain_copy_ms": f.plain_copy_ms.json(),
        "copied_ratio": f.copied_ratio.json(),
        "restore_gb_per_s": f.restore.json(),
        "plain_read_gb_per_s": f.plain_read.json(),
        "restore_ratio": f.restore_ratio.json(),
        "cpu_s_per_gb": f.cpu.json(),
        "hash_and_copy_cpu_s_per_gb": f.plain_cpu.json(),
        "cpu_ratio": f.cpu_ratio.json(),
        "extra_bytes": m.extra_bytes,
        "beyond_pool_bytes": f.beyond_pool_bytes,
        "rounds": rounds,
    })
}
