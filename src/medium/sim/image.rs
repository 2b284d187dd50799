//! One state that a crash may leave: a choice for every undecided unit, worked out only where it is read.

use std::fmt;

use super::choices::BlockChoices;
use super::content::{mix, read_blocks, BlockBytes, Content};
use super::trace::{Note, SimModel, Start};
use super::SimMedium;
use crate::format::BLOCK_BYTES;
use crate::sync::Arc;

/// A block with undecided units, and its place among all of a crash point.
pub(super) struct OpenBlock {
    index: u64,
    choices: Arc<BlockChoices>,
    /// Undecided units in the blocks before it.
    first_unit: u64,
    /// Product of the options of the blocks before it, saturating.
    stride: u64,
}

/// Everything that the images of one crash point share.
pub(super) struct PointState {
    pub(super) len_bytes: u64,
    pub(super) model: SimModel,
    pub(super) durable: Content,
    pub(super) open: Vec<OpenBlock>,
    pub(super) notes: Vec<Note>,
    /// Makes the garbage of torn sectors.
    pub(super) seed: u64,
    /// Undecided units in all.
    pub(super) units: u64,
    /// Number of distinct images, saturating.
    pub(super) product: u64,
    /// Its binary logarithm.
    pub(super) log2: f64,
}

impl PointState {
    /// Numbers the undecided units of `open`.
    pub(super) fn new(
        (len_bytes, model): (u64, SimModel),
        durable: Content,
        open: Vec<(u64, Arc<BlockChoices>)>,
        notes: Vec<Note>,
        seed: u64,
    ) -> Self {
        let (mut units, mut product, mut log2) = (0, 1_u64, 0.0);
        let number = |(index, choices): (u64, Arc<BlockChoices>)| {
            let numbered = OpenBlock { index, first_unit: units, stride: product, choices };
            units += numbered.choices.unit_count() as u64;
            product = product.saturating_mul(numbered.choices.product());
            log2 += numbered.choices.log2();
            numbered
        };
        let open = open.into_iter().map(number).collect();
        PointState { len_bytes, model, durable, open, notes, seed, units, product, log2 }
    }
}

/// Which option every undecided unit takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pick {
    /// Nothing pending persisted.
    None,
    /// Everything pending persisted.
    All,
    /// Only this unit persisted.
    OnlyUnit(u64),
    /// Only this block (of the undecided ones) persisted.
    OnlyBlock(usize),
    /// All but this unit.
    AllButUnit(u64),
    /// All but this block.
    AllButBlock(usize),
    /// One combination of an exhaustive enumeration.
    Combination(u64),
    /// A seeded random combination.
    Random(u64),
}

/// How a random combination is drawn; some ways are likelier than others to hit what real devices do.
#[derive(Clone, Copy)]
enum Style {
    /// Every unit by itself, an even chance for each of its options.
    Even,
    /// Every unit by itself, seven of eight persisted.
    Dense,
    /// Every unit by itself, one of eight persisted.
    Sparse,
    /// Blocks wholly lost or wholly persisted.
    Blocks,
    /// Blocks lost, persisted, even, or persisted from the front up to some unit.
    Mixed,
}

impl Style {
    fn of(seed: u64) -> Self {
        match mix(seed, 0) % 5 {
            0 => Style::Even,
            1 => Style::Dense,
            2 => Style::Sparse,
            3 => Style::Blocks,
            _ => Style::Mixed,
        }
    }
}

/// A state that a crash may leave. Cheap to make: it is computed block by block as it is read.
pub struct Image {
    pub(super) point: Arc<PointState>,
    pub(super) pick: Pick,
}

impl Image {
    /// Size of the region in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.point.len_bytes
    }

    /// What had been said when the crash came, earlier lives of the region included.
    pub fn notes(&self) -> &[Note] {
        &self.point.notes
    }

    /// Fills `dst` from `offset`; bytes past the end of the region are zeros.
    pub fn read(&self, offset: u64, dst: &mut [u8]) {
        read_blocks(offset, dst, |index| self.block(index));
    }

    /// Equal for images with equal bytes, at whatever point of whatever trace of the same region.
    pub fn fingerprint(&self) -> u64 {
        let changed = |open: &OpenBlock| {
            self.build(open).digest(open.index) ^ open.choices.durable().digest(open.index)
        };
        self.point.open.iter().map(changed).fold(self.point.durable.digest(), |all, one| all ^ one)
    }

    /// A medium that holds this image, after power came back: all of it durable. For recovery, further saves
    /// and further crashes.
    pub fn to_medium(self: &Arc<Self>) -> SimMedium {
        let start = Start {
            durable: Content::over(Arc::clone(self)),
            pending: Vec::new(),
            notes: self.point.notes.clone(),
        };
        SimMedium::begin(self.point.len_bytes, self.point.model, start)
    }

    pub(super) fn block(&self, index: u64) -> BlockBytes {
        match self.point.open.binary_search_by_key(&index, |open| open.index) {
            Ok(at) => self.build(&self.point.open[at]),
            Err(_) => self.point.durable.get(index),
        }
    }

    fn build(&self, open: &OpenBlock) -> BlockBytes {
        let choices = &open.choices;
        let noise_seed = mix(self.point.seed, open.index);
        let newest = |at: usize| choices.newest(at);
        // A unit whose newest content is its durable one has yet another option: take that instead.
        let changed = |at: usize| if newest(at) == 0 { 1 } else { newest(at) };
        let kept = |at: usize| u64::from(newest(at) == 0);
        let unit = |at: usize| open.first_unit + at as u64;
        let is_block = |position: usize| self.point.open[position].index == open.index;
        match self.pick {
            Pick::None => choices.durable().clone(),
            Pick::All => choices.build(noise_seed, newest),
            Pick::OnlyUnit(only) => {
                choices.build(noise_seed, |at| if unit(at) == only { changed(at) } else { 0 })
            }
            Pick::OnlyBlock(only) if is_block(only) => choices.build(noise_seed, newest),
            Pick::OnlyBlock(_) => choices.durable().clone(),
            Pick::AllButUnit(but) => {
                choices.build(noise_seed, |at| if unit(at) == but { kept(at) } else { newest(at) })
            }
            Pick::AllButBlock(but) if is_block(but) => choices.durable().clone(),
            Pick::AllButBlock(_) => choices.build(noise_seed, newest),
            Pick::Combination(number) => {
                let mut rest = number / open.stride;
                choices.build(noise_seed, |at| {
                    let digit = rest % choices.option_count(at);
                    rest /= choices.option_count(at);
                    digit
                })
            }
            Pick::Random(seed) => self.build_random(open, noise_seed, seed),
        }
    }

    fn build_random(&self, open: &OpenBlock, noise_seed: u64, seed: u64) -> BlockBytes {
        let choices = &open.choices;
        let chance = |at: usize| mix(seed, (open.first_unit + at as u64) << 1 | 1);
        let even = |at: usize| chance(at) % choices.option_count(at);
        let persisted = |at: usize, yes: bool| if yes { choices.newest(at) } else { 0 };
        let block_chance = mix(seed, open.index << 1);
        match Style::of(seed) {
            Style::Even => choices.build(noise_seed, even),
            Style::Dense => choices.build(noise_seed, |at| persisted(at, chance(at) % 8 != 0)),
            Style::Sparse => choices.build(noise_seed, |at| persisted(at, chance(at) % 8 == 0)),
            Style::Blocks => choices.build(noise_seed, |at| persisted(at, block_chance.is_multiple_of(2))),
            Style::Mixed => match block_chance % 4 {
                0 => choices.durable().clone(),
                1 => choices.build(noise_seed, |at| choices.newest(at)),
                2 => choices.build(noise_seed, even),
                _ => {
                    let front = (block_chance >> 8) % (choices.unit_count() as u64 + 1);
                    choices.build(noise_seed, |at| persisted(at, (at as u64) < front))
                }
            },
        }
    }

    /// Byte offset of undecided unit number `unit`.
    fn offset_of_unit(&self, unit: u64) -> u64 {
        let at = self.point.open.partition_point(|open| open.first_unit <= unit).saturating_sub(1);
        let open = &self.point.open[at];
        let within = open.choices.units().nth((unit - open.first_unit) as usize).unwrap_or(0);
        open.index * BLOCK_BYTES + u64::from(within) * self.point.model.unit_bytes() as u64
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let block = |at: usize| self.point.open[at].index * BLOCK_BYTES;
        match self.pick {
            Pick::None => write!(f, "nothing pending persisted"),
            Pick::All => write!(f, "all pending persisted"),
            Pick::OnlyUnit(unit) => {
                write!(f, "of the pending only the unit at byte {} persisted", self.offset_of_unit(unit))
            }
            Pick::OnlyBlock(at) => write!(f, "of the pending only the block at byte {} persisted", block(at)),
            Pick::AllButUnit(unit) => {
                write!(f, "all pending persisted but the unit at byte {}", self.offset_of_unit(unit))
            }
            Pick::AllButBlock(at) => write!(f, "all pending persisted but the block at byte {}", block(at)),
            Pick::Combination(number) => write!(f, "combination {number} of {}", self.point.product),
            Pick::Random(seed) => write!(f, "random combination, seed {seed:#x}"),
        }
    }
}
