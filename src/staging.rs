//! The bounded pool of chunk buffers (placeholder until the pool lands in the next commit).

/// One chunk buffer, owned until dropped.
pub struct StagingBuffer;
