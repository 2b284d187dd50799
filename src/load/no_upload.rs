//! Stands for `upload` in builds without the feature `cuda`: destinations on GPUs are refused.

use crate::error::{Error, ErrorKind, Result};
use crate::staging::StagingBuffer;
use crate::store::Region;

pub(super) struct Targets;

impl Targets {
    pub fn open(_region: &Region, mut wanted: impl Iterator<Item = u32>) -> Result<Targets> {
        match wanted.next() {
            None => Ok(Targets),
            Some(ordinal) => Err(refusal(ordinal)),
        }
    }

    pub fn index_of(&mut self, ordinal: u32, _address: u64, _bytes: usize) -> Result<usize> {
        Err(refusal(ordinal))
    }
}

fn refusal(ordinal: u32) -> Error {
    let message = format!("the destination is on GPU {ordinal}, and this build of the library knows no GPUs");
    Error::new(ErrorKind::Unsupported, "read to GPU", message).advise("build it with the feature cuda")
}

pub(super) struct Uploads<'a>(std::marker::PhantomData<&'a Targets>);

impl<'a> Uploads<'a> {
    pub fn new(_targets: &'a Targets) -> Self {
        Uploads(std::marker::PhantomData)
    }

    pub fn add(&mut self, _device: usize, _part: usize, _to: *mut u8, _src: &[u8]) {}

    pub fn enqueue(&mut self) -> Result<()> {
        Ok(())
    }

    pub fn keep(&mut self, buffer: StagingBuffer) {
        drop(buffer);
    }

    pub fn late(&self) -> usize {
        0
    }

    pub fn settle(&mut self) -> Result<()> {
        Ok(())
    }
}
