//! Prevents: a striped region whose members, each by itself sound, disagree after a crash: a commit on one of them for a
//! payload that another has lost, half a set that passes for a region, a member that cannot be found any more.

use std::path::PathBuf;
use std::sync::Arc;

use pccheck::engine::Store;
use pccheck::format::{ChosenLabel, StripeLayout, LABEL_AREA_BYTES};
use pccheck::medium::sim::{
    for_each_crash_image, for_each_kill, EnumerateOptions, Image, Note, SimMedium, SimModel, SimSchedule,
};
use pccheck::medium::{read_label, rewrite_label, Barrier, Medium};
use pccheck::recovery::read_region;
use pccheck::save::Faults;
use pccheck::store::{format_members, FormatOptions, OpenOptions};
use pccheck::Result;

use crate::explore::Protocol;
use crate::explore::{scale, Effort, MODELS};
use crate::histories::{History, STRIPED, STRIPED_FAILING};
use crate::kills::{kill_all, kill_on_failing_medium, kill_the_formatter};
use crate::laws::hold_to_laws;
use crate::mutations::{must_be_caught, without};
use crate::power::{explore_all, reordered};
use crate::stripes::Stripes;
use crate::world::{final_image, Setup};

const PMEM: SimModel = SimModel::Pmem;
const SSD: SimModel = SimModel::Ssd { torn: true };
const CACHE: SimModel = SimModel::PageCache;

/// One save at a time, and several.
const SAVES: [&History; 2] = [&STRIPED[0], &STRIPED[1]];

#[test]
fn power_lost_on_all_members_at_once() {
    explore_all("striped", &STRIPED, &[SimSchedule::Inline, reordered(8)]);
}

#[test]
fn killed_reopened_saved_then_power_lost_on_members() {
    kill_all("striped kills", &STRIPED[..4], SimSchedule::Inline, (12 / scale().min(12), Effort::small()));
    kill_all("striped kills after failures", &STRIPED_FAILING, SimSchedule::Inline, (1, Effort::thorough()));
}

#[test]
fn no_striped_history_breaks_a_law() {
    for history in STRIPED.iter().chain(&STRIPED_FAILING) {
        for model in MODELS {
            for schedule in [SimSchedule::Inline, reordered(9)] {
                let report = hold_to_laws(history, model, schedule, Protocol::default());
                assert_eq!(report.violations, [], "{}, {model:?}, {schedule:?}", history.name);
            }
        }
    }
}

/// The table of the argument, for members.
#[test]
fn each_barrier_that_is_removed_on_members_is_missed() {
    must_be_caught("striped, no WritingMark", &SAVES, without(Barrier::WritingMark), &MODELS);
    must_be_caught("striped, no Chunk", &SAVES, without(Barrier::Chunk), &[PMEM]);
    must_be_caught("striped, no Payload", &SAVES, without(Barrier::Payload), &[SSD, CACHE]);
    must_be_caught("striped, no Commit", &SAVES, without(Barrier::Commit), &MODELS);
    must_be_caught("striped, no Control", &[&STRIPED[3]], without(Barrier::Control), &MODELS);
    for model in MODELS {
        let formatter = kill_the_formatter(&Setup::tight(1, 1).over(2, 4096), model, &[Barrier::Open]);
        println!("striped, no Open, {model:?}: {formatter:?}");
        assert!(formatter.is_err(), "{model:?}: a superblock that only the cache holds was trusted");
        for history in &STRIPED_FAILING {
            let adopted = kill_on_failing_medium(history, model, &[Barrier::Adopt]);
            println!("striped, no Adopt, {}, {model:?}: {adopted:?}", history.name);
            assert_eq!(adopted.is_err(), model != PMEM, "{}, {model:?}: {adopted:?}", history.name);
        }
    }
}

/// The fault that only striping can have: the payload is flushed where its record lies, and nowhere else.
#[test]
fn payload_that_is_flushed_on_member_0_only_is_missed() {
    for History { name, setup, script } in SAVES {
        let stripes = setup.stripes.map(|stripes| Stripes { deaf: true, ..stripes });
        let deaf = History { name, setup: Setup { stripes, ..*setup }, script: *script };
        must_be_caught("flushed on member 0 only", &[&deaf], Protocol::default(), &[SSD, CACHE]);
    }
}

fn moved(name: &str) -> Vec<Vec<u8>> {
    [b"/a".to_vec(), name.as_bytes().to_vec(), b"/c".to_vec()].to_vec()
}

/// Notes in member 0 that member 1 is at `name`, as the command does.
fn relocate(sim: &Arc<SimMedium>, name: &str) -> std::result::Result<(), String> {
    let member = &FORMAT.windows(sim, region_bytes())[0];
    let chosen = read_label(|offset, dst| member.read(offset, dst), member.len_bytes());
    let chosen = chosen.map_err(|e| e.to_string())?.ok_or("no label is left")?;
    rewrite_label(&**member, &chosen, moved(name)).map_err(|e| e.to_string())
}

const FORMAT: Stripes = Stripes { members: 3, unit_bytes: 2 << 20, deaf: false };

fn format_options() -> FormatOptions {
    FormatOptions { stripe_unit_bytes: FORMAT.unit_bytes, ..FormatOptions::new(3, 64 << 10) }
}

fn region_bytes() -> u64 {
    4 * FORMAT.unit_bytes
}

fn format_again(sim: &Arc<SimMedium>, names: [&str; 3]) {
    let paths = names.map(PathBuf::from);
    format_members(&FORMAT.windows(sim, region_bytes()), &paths, &format_options()).expect("format");
}

/// The label of member `index` in an image.
fn label_in(image: &Image, index: u64) -> Option<ChosenLabel> {
    let layout = StripeLayout::new(FORMAT.members, FORMAT.unit_bytes, region_bytes()).expect("layout");
    let len = LABEL_AREA_BYTES + layout.member_bytes;
    let read = |offset: u64, dst: &mut [u8]| -> Result<()> {
        image.read(index * len + offset, dst);
        Ok(())
    };
    // A label of which nothing is left but damage is none.
    read_label(read, len).ok().flatten()
}

/// Whether the image opens as a region: then every member is labelled, and the region is empty and whole.
fn opens(image: &Image) -> std::result::Result<Option<Vec<Vec<u8>>>, String> {
    let Some(first) = label_in(image, 0) else { return Ok(None) };
    for index in 1..3 {
        let found = label_in(image, index).ok_or(format!("member 0 is labelled, member {index} is not"))?;
        if (found.label.set, u64::from(found.label.index)) != (first.label.set, index) {
            return Err(format!("member {index} is of another set than member 0"));
        }
    }
    let read = |offset: u64, dst: &mut [u8]| {
        FORMAT.read(region_bytes(), (offset, dst), |at, part| {
            image.read(at, part);
            Ok(())
        })
    };
    let table = read_region(read, region_bytes()).map_err(|e| format!("labelled, and no region: {e}"))?;
    match table.newest_first.is_empty() && table.control.is_some() {
        true => Ok(Some(first.label.paths)),
        false => Err(format!("half a region: {:?}", table.notes)),
    }
}

#[test]
fn a_crash_in_formatting_members_leaves_a_whole_region_or_none() {
    for model in MODELS {
        let sim = Arc::new(SimMedium::new(FORMAT.sim_bytes(region_bytes()), model));
        format_again(&sim, ["/a", "/b", "/c"]);
        // Over a set that is there: its labels go first.
        let sim = Arc::new(final_image(&sim).to_medium());
        format_again(&sim, ["/d", "/e", "/f"]);
        sim.note(Note::Acknowledged { generation: 0 });
        let (mut old, mut none, mut new) = (0, 0, 0);
        for_each_crash_image(&sim.trace(), &EnumerateOptions::default(), |_, image| {
            match opens(image)?.map(|paths| paths[1] == b"/b") {
                None if image.notes().is_empty() => none += 1,
                None => return Err("formatted, and not to be found".into()),
                Some(true) => old += 1,
                Some(false) => new += 1,
            }
            Ok(())
        })
        .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        println!("{model:?}: {old} old regions, {none} without, {new} new");
        assert!(old > 0 && none > 1 && new > 1, "{model:?}: {old} old, {none} without, {new} new");
    }
}

/// What a killed process left visible is not durable, labels included: opening for writing must make it so before
/// anything is promised. Otherwise the region cannot be found any more once the power is lost.
#[test]
fn labels_that_a_killed_process_wrote_are_durable_once_the_region_was_opened() {
    for model in MODELS {
        let sim = Arc::new(SimMedium::new(FORMAT.sim_bytes(region_bytes()), model));
        format_again(&sim, ["/a", "/b", "/c"]);
        relocate(&sim, "/moved").expect("relocate");
        let (mut opened, mut images) = (0, 0);
        for_each_kill(&sim.trace(), &EnumerateOptions::default(), |_, next| {
            let next = Arc::new(next);
            let member = &FORMAT.windows(&next, region_bytes())[0];
            let found = read_label(|offset, dst| member.read(offset, dst), member.len_bytes());
            let Ok(Some(_)) = found else { return Ok(()) };
            opened += 1;
            let region = FORMAT.medium(&next, region_bytes());
            let options =
                OpenOptions { chunk_bytes: 4096, staging_bytes: 16 * 4096, ..OpenOptions::default() };
            let store = Store::open_on(region, &options, Faults::default());
            store.map_err(|e| format!("labelled, and does not open: {e}"))?;
            next.note(Note::Acknowledged { generation: 0 });
            for_each_crash_image(&next.trace(), &EnumerateOptions::default(), |_, image| {
                let promised = image.notes().contains(&Note::Acknowledged { generation: 0 });
                images += u64::from(promised);
                match opens(image) {
                    Ok(Some(_)) => Ok(()),
                    _ if !promised => Ok(()),
                    found => Err(format!("opened, and after power loss: {found:?}")),
                }
            })
            .map(drop)
            .map_err(|finding| finding.to_string())
        })
        .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        println!("{model:?}: {opened} opened, {images} images after that");
        assert!(opened > 2 && images > 2, "{model:?}: {opened} opened, {images} images after that");
    }
}

#[test]
fn a_crash_in_relocating_leaves_the_old_place_or_the_new_one() {
    for model in MODELS {
        let sim = Arc::new(SimMedium::new(FORMAT.sim_bytes(region_bytes()), model));
        format_again(&sim, ["/a", "/b", "/c"]);
        // Twice, and over a damaged copy of either kind: whichever copy counts is the last to be overwritten.
        for damaged in [None, Some(0u64), Some(1)] {
            let sim = Arc::new(final_image(&sim).to_medium());
            if let Some(copy) = damaged {
                sim.write_durable(copy * 4096, &[7; 4096], Barrier::Control).expect("damage");
            }
            let sim = Arc::new(final_image(&sim).to_medium());
            relocate(&sim, "/somewhere/else").expect("relocate");
            sim.note(Note::Acknowledged { generation: 0 });
            let (mut before, mut after) = (0, 0);
            for_each_crash_image(&sim.trace(), &EnumerateOptions::default(), |_, image| {
                match opens(image)?.ok_or("no label is left")? {
                    paths if paths == moved("/somewhere/else") => after += 1,
                    paths if paths == moved("/b") && image.notes().is_empty() => before += 1,
                    paths => return Err(format!("found {paths:?}")),
                }
                Ok(())
            })
            .unwrap_or_else(|finding| panic!("{model:?}, damaged {damaged:?}: {finding}"));
            assert!(
                before > 0 && after > 1,
                "{model:?}, damaged {damaged:?}: {before} before, {after} after"
            );
        }
    }
}

/// Killed in relocating, relocated again by the next process, and then the power is lost.
#[test]
fn relocating_again_after_a_kill_never_loses_both_copies() {
    for model in MODELS {
        let sim = Arc::new(SimMedium::new(FORMAT.sim_bytes(region_bytes()), model));
        format_again(&sim, ["/a", "/b", "/c"]);
        let sim = Arc::new(final_image(&sim).to_medium());
        relocate(&sim, "/first").expect("relocate");
        let mut images = 0;
        for_each_kill(&sim.trace(), &EnumerateOptions::default(), |_, next| {
            let next = Arc::new(next);
            relocate(&next, "/second")?;
            for_each_crash_image(&next.trace(), &EnumerateOptions::default(), |_, image| {
                images += 1;
                opens(image)?.map(drop).ok_or("no label is left".to_owned())
            })
            .map(drop)
            .map_err(|finding| finding.to_string())
        })
        .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        assert!(images > 20, "{model:?}: {images} images");
    }
}
