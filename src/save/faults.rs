//! Faults planted in the protocol, which the crash checker must catch. Without the `sim` feature there are none.

/// Which steps of the protocol to get wrong.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Faults {
    /// Claim a slot without a durable `writing` mark.
    #[cfg(feature = "sim")]
    pub skip_writing_mark: bool,
    /// Write the commit record before payload and table are flushed.
    #[cfg(feature = "sim")]
    pub commit_before_payload: bool,
    /// Publish a save (freeing the older slot) before its commit record is durable.
    #[cfg(feature = "sim")]
    pub free_before_commit: bool,
    /// Let the last chunk's completion commit the save although earlier chunks may be unwritten.
    #[cfg(feature = "sim")]
    pub commit_on_last_chunk: bool,
    /// Write the pin of a save that is to be pinned only after its commit record.
    #[cfg(feature = "sim")]
    pub pin_after_commit: bool,
    /// Still believe a chunk to be in its place after something else was written there.
    #[cfg(feature = "sim")]
    pub remember_overwritten: bool,
    /// Believe that what a cancelled save was to write is in its place.
    #[cfg(feature = "sim")]
    pub know_uncommitted: bool,
    /// Commit, with a batch, saves that became complete only while its payloads were being flushed.
    #[cfg(feature = "sim")]
    pub join_after_flush: bool,
    /// Wake those who wait for a slot only before a save that has ended is no longer counted as in flight.
    #[cfg(feature = "sim")]
    pub wake_before_forgetting: bool,
    /// Give the slot of a failed save back while writes into it are under way.
    #[cfg(feature = "sim")]
    pub end_with_writes_under_way: bool,
    /// Copy a GPU's memory without waiting for what the caller's stream had to do before.
    #[cfg(feature = "sim")]
    pub copy_before_the_event: bool,
    /// Take copies of a GPU's memory for done as soon as they are enqueued.
    #[cfg(feature = "sim")]
    pub land_early: bool,
    /// Have the thread that copies a GPU's memory die when a copy has arrived while another save's wait for buffers.
    #[cfg(feature = "sim")]
    pub die_at_arrival: bool,
    /// Have the thread die that takes what arrives in rings of buffers.
    #[cfg(feature = "sim")]
    pub die_at_landing: bool,
    /// Let copies go to buffers that copiers still read.
    #[cfg(feature = "sim")]
    pub free_places_early: bool,
    /// Let the caller's stream go on without waiting for the copies.
    #[cfg(feature = "sim")]
    pub stream_waits_for_nothing: bool,
}

macro_rules! fault {
    ($($name:ident)*) => {
        impl Faults {
            $(pub(crate) fn $name(&self) -> bool {
                #[cfg(feature = "sim")]
                return self.$name;
                #[cfg(not(feature = "sim"))]
                return false;
            })*
        }
    };
}

fault! { skip_writing_mark commit_before_payload free_before_commit commit_on_last_chunk pin_after_commit }
fault! { remember_overwritten know_uncommitted join_after_flush wake_before_forgetting end_with_writes_under_way }
#[cfg(feature = "cuda")]
fault! { copy_before_the_event land_early stream_waits_for_nothing }
#[cfg(feature = "cuda")]
fault! { die_at_arrival die_at_landing free_places_early }
