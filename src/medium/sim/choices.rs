//! What each unit of one block may hold after a crash.

use std::ops::Range;

use super::content::{mix, BlockBytes, BLOCK};
use super::trace::SimModel;

/// Half old, half new: a sector torn in the middle.
const TORN_HALF: u16 = u16::MAX - 1;
/// A sector that holds neither.
const TORN_NOISE: u16 = u16::MAX;

/// One unit with more than one possible content.
struct FreeUnit {
    unit: u16,
    /// Which of its options a crash that loses nothing leaves.
    newest: u16,
    /// Its options in `options`; the first is the durable content.
    first: u32,
    end: u32,
}

/// The units of a block whose content is undecided, and their options. Equal contents are one option.
pub(super) struct BlockChoices {
    unit_bytes: usize,
    /// The durable content, then the pending versions, oldest first.
    versions: Vec<BlockBytes>,
    units: Vec<FreeUnit>,
    options: Vec<u16>,
    /// Number of distinct contents of the whole block, saturating.
    product: u64,
}

impl BlockChoices {
    /// Works out the options from the durable content and the pending versions, oldest first.
    pub(super) fn new(
        model: SimModel,
        tear_unchanged: bool,
        durable: BlockBytes,
        pending: impl Iterator<Item = BlockBytes>,
    ) -> Self {
        let unit_bytes = model.unit_bytes();
        let tears = model == (SimModel::Ssd { torn: true });
        let versions: Vec<BlockBytes> = std::iter::once(durable).chain(pending).collect();
        let mut choices =
            BlockChoices { unit_bytes, versions, units: Vec::new(), options: Vec::new(), product: 1 };
        for unit in 0..(BLOCK / unit_bytes) as u16 {
            choices.add_unit(unit, tears, tear_unchanged);
        }
        choices
    }

    fn add_unit(&mut self, unit: u16, tears: bool, tear_unchanged: bool) {
        let first = self.options.len();
        let range = self.range_of(unit);
        let mut newest = 0;
        for version in 0..self.versions.len() {
            let bytes = &self.versions[version].bytes()[range.clone()];
            let same = |option: &u16| self.versions[usize::from(*option)].bytes()[range.clone()] == *bytes;
            newest = match self.options[first..].iter().position(same) {
                Some(at) => at,
                None => {
                    self.options.push(version as u16);
                    self.options.len() - first - 1
                }
            };
        }
        let differs = self.options.len() - first > 1;
        if tears && differs && self.tears_visibly(&range) {
            self.options.push(TORN_HALF);
        }
        if tears && (differs || tear_unchanged) {
            self.options.push(TORN_NOISE);
        }
        let count = self.options.len() - first;
        if count < 2 {
            self.options.truncate(first);
            return;
        }
        self.product = self.product.saturating_mul(count as u64);
        let end = self.options.len() as u32;
        self.units.push(FreeUnit { unit, newest: newest as u16, first: first as u32, end });
    }

    /// Whether the front half of the newest bytes and the back half of the durable ones make a third content.
    fn tears_visibly(&self, range: &Range<usize>) -> bool {
        let middle = range.start + range.len() / 2;
        let (old, new) = (self.versions[0].bytes(), self.versions[self.versions.len() - 1].bytes());
        old[range.start..middle] != new[range.start..middle]
            && old[middle..range.end] != new[middle..range.end]
    }

    fn range_of(&self, unit: u16) -> Range<usize> {
        let from = usize::from(unit) * self.unit_bytes;
        from..from + self.unit_bytes
    }

    /// How many units are undecided.
    pub(super) fn unit_count(&self) -> usize {
        self.units.len()
    }

    /// The undecided units, by position in the block.
    pub(super) fn units(&self) -> impl Iterator<Item = u16> + '_ {
        self.units.iter().map(|unit| unit.unit)
    }

    /// How many options undecided unit `at` has.
    pub(super) fn option_count(&self, at: usize) -> u64 {
        u64::from(self.units[at].end - self.units[at].first)
    }

    /// Which option of undecided unit `at` a crash that loses nothing leaves.
    pub(super) fn newest(&self, at: usize) -> u64 {
        u64::from(self.units[at].newest)
    }

    /// Number of distinct contents of the block, saturating.
    pub(super) fn product(&self) -> u64 {
        self.product
    }

    /// Binary logarithm of the number of distinct contents.
    pub(super) fn log2(&self) -> f64 {
        (0..self.units.len()).map(|at| (self.option_count(at) as f64).log2()).sum()
    }

    /// The durable content.
    pub(super) fn durable(&self) -> &BlockBytes {
        &self.versions[0]
    }

    /// The block with option `pick(at)` for each undecided unit `at`. `noise_seed` makes the garbage.
    pub(super) fn build(&self, noise_seed: u64, mut pick: impl FnMut(usize) -> u64) -> BlockBytes {
        let mut block: Option<[u8; BLOCK]> = None;
        for (at, unit) in self.units.iter().enumerate() {
            let option = pick(at);
            if option == 0 {
                continue;
            }
            let target =
                &mut block.get_or_insert_with(|| self.versions[0].to_array())[self.range_of(unit.unit)];
            match self.options[unit.first as usize + option as usize] {
                TORN_HALF => {
                    let newest = &self.versions[self.versions.len() - 1].bytes()[self.range_of(unit.unit)];
                    let half = newest.len() / 2;
                    target[..half].copy_from_slice(&newest[..half]);
                }
                TORN_NOISE => {
                    for (word, bytes) in target.chunks_exact_mut(8).enumerate() {
                        let noise = mix(noise_seed, u64::from(unit.unit) << 8 | word as u64);
                        bytes.copy_from_slice(&noise.to_le_bytes());
                    }
                }
                version => {
                    let version = &self.versions[usize::from(version)];
                    target.copy_from_slice(&version.bytes()[self.range_of(unit.unit)]);
                }
            }
        }
        block.map_or_else(|| self.versions[0].clone(), BlockBytes::owned)
    }
}
