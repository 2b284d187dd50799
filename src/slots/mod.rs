//! Who owns which slot: packed words in DRAM, and the lock-free allocator over them.
