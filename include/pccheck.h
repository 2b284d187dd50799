/*
 * pccheck: persistent concurrent checkpointing for ML training.
 *
 * Up to N checkpoints of one training run are in flight at once. State goes from the caller's memory through a
 * bounded staging pool to persistent memory or an SSD; the trainer goes on as soon as its memory is copied. Storage
 * keeps enough slots that at least one complete checkpoint survives any crash. This text is all that is needed to
 * use the library, by linking (-lpccheck) or by dlopen("libpccheck.so.1").
 *
 * WORDS
 *   region      the file, block device or DAX device that holds checkpoints; one per training rank
 *   slot        one place for a checkpoint in a region: N in flight + K kept + pinned
 *   save        one checkpoint being made: begun -> copied -> durable (or failed, or cancelled)
 *   copied      every byte has left the caller's memory, which may then change again
 *   durable     the checkpoint will be found after a crash of the kind that the store's durability names
 *   step        the trainer's iteration number; need not be unique
 *   generation  the library's number of a save: strictly increasing over the region's whole life
 *
 * EXAMPLE (errors handled by the program's own die(), which prints pcc_last_error)
 *
 *   uint64_t shape[1] = {1000};  static float weights[1000];
 *   pcc_tensor t = {.struct_bytes = sizeof t, .name = "weights", .shape = shape, .rank = 1,
 *                   .dtype = PCC_DTYPE_F32, .data = weights, .bytes = sizeof weights};
 *   uint64_t payload_bytes;
 *   if (pcc_payload_bytes(&t, 1, NULL, 0, &payload_bytes)) die();
 *   int status = pcc_format("region.pcc", 4, payload_bytes, NULL);
 *   if (status != PCC_OK && status != PCC_ALREADY_EXISTS) die();
 *   pcc_store *store;
 *   if (pcc_open("region.pcc", NULL, &store)) die();
 *   uint64_t step = 0;
 *   pcc_checkpoint *found;
 *   status = pcc_restore(store, NULL, &t, 1, &found);
 *   if (status == PCC_OK) {
 *       pcc_checkpoint_info info = {.struct_bytes = sizeof info};
 *       pcc_checkpoint_get_info(found, &info);
 *       step = info.step + 1;
 *       pcc_checkpoint_close(found);
 *   } else if (status != PCC_NOT_FOUND) die();
 *   for (; step < 100; step++) {
 *       train(weights);
 *       pcc_save *save;
 *       if (pcc_save_begin(store, step, &t, 1, NULL, 0, NULL, &save)) die();
 *       if (pcc_save_wait_copied(save, -1)) die();    // from here on weights may change
 *       pcc_save_free(save);                          // it goes on to durable by itself
 *   }
 *   if (pcc_drain(store, -1)) die();
 *   pcc_close(store);
 *
 * CONVENTIONS
 *   Status      Calls that can fail return a pcc_status: 0 is success, failures are negative and their numbers never
 *               change. pcc_last_error says more of this thread's last failure; a save keeps its own error.
 *   Results     Results go to pointers, which come last. A handle is NULL and a number 0 (a descriptor -1, an index
 *               all bits set) after a failure.
 *   Structs     Begin with struct_bytes, the size as the program knows it; sizes are multiples of 8. Option structs are
 *               set by their ..._init function or zeroed but for struct_bytes where the comment says that 0 is the
 *               default; structs that the library fills need only struct_bytes. An older, smaller struct means defaults
 *               for what is missing. A newer, larger one is accepted if all that this library does not know is zero.
 *               In arrays of structs struct_bytes is also the distance from one element to the next.
 *   Booleans    uint32_t, 0 or 1. Fields called reserved are 0.
 *   Text        UTF-8 with a final NUL, in and out, unless a length is named. Paths are the file system's bytes with a
 *               final NUL. Functions that copy text to (buf, cap) return the bytes that all of it takes with its NUL,
 *               and cut it at a character where cap is smaller.
 *   Waits       Every wait takes milliseconds: negative waits for ever, 0 only looks.
 *   Alignment   Structs are aligned to 8 as the compiler does by itself. Tensor memory may have any alignment.
 *   Memory      The library reads a tensor's memory from pcc_save_begin until the save is copied; until then the
 *               memory must stay valid and must not change. Everything else that is passed to a call is copied before
 *               the call returns. Sizes that pass the end of memory are refused.
 *   Comments    Durability: what is durable on return. Threads: what may run at once. Ownership: who frees what.
 *               Errors: the statuses to expect beyond PCC_INTERNAL and PCC_OUT_OF_MEMORY, which any call may return.
 *
 * THREADS   A call whose first parameter is a pointer to const may run on any number of threads at once, with the same
 *   handle. Calls that free a handle must be the last on it. Handles may move between threads.
 *
 * FORK   A forked child inherits no descriptor, mapping or lock of an open store. In the child, calls on inherited
 *   handles give PCC_FORKED, freeing them releases nothing but the handle, and new stores may be opened. A child
 *   made by a raw clone system call, without the C library's fork, must not use the library before it execs.
 *
 * DLCLOSE   dlclose does not unload the library: its fork handler stays. Close all stores first all the same.
 *
 * SIGNALS   The library installs no signal handler, never exits and prints nothing. Do not call it from a signal
 *   handler. One limit: with the media dax and mmap, writing to a region file that another program truncates, or
 *   to memory that the hardware has found bad, raises SIGBUS. Recovery and reading do not touch mappings.
 *
 * CRASHES   After the first durable save there is at every instant a readable checkpoint at least as new as every
 *   save that was reported durable, unless the medium itself destroyed it, which opening and restoring report. What is
 *   restored is byte for byte what was saved: anything torn, stale or damaged is detected, skipped and named.
 */


#ifndef PCCHECK_H
#define PCCHECK_H

#include <stdint.h>

// Success.
#define PCC_OK 0

// An argument breaks the documented contract of the call.
#define PCC_INVALID_ARGUMENT -1

// The call is not allowed in the present state of the object (for example commit before all bytes).
#define PCC_INVALID_STATE -2

// No checkpoint, tensor, metadata entry or file of that name, index, step or generation exists.
#define PCC_NOT_FOUND -3

// The path already holds a region (or other data) and force was not given.
#define PCC_ALREADY_EXISTS -4

// The file is not a region: neither of its superblocks bears the magic number. Where one does, but both are
// damaged, it is PCC_CORRUPT.
#define PCC_NOT_A_REGION -5

// The region was written by a newer, incompatible version of the format.
#define PCC_UNSUPPORTED_VERSION -6

// The region uses a feature that this library does not know.
#define PCC_UNSUPPORTED_FEATURE -7

// The medium, kernel, file system or this build cannot do what was asked.
#define PCC_UNSUPPORTED -8

// The medium cannot give the durability that the caller requires.
#define PCC_DURABILITY -9

// Another writer holds the region's lock.
#define PCC_IN_USE -10

// The device or file system has no room.
#define PCC_NO_SPACE -11

// The state does not fit in a slot, or a documented limit is passed.
#define PCC_TOO_LARGE -12

// No slot became claimable in the time given.
#define PCC_NO_SLOT -13

// The time given ran out; the operation goes on and can be waited for again.
#define PCC_TIMED_OUT -14

// The save was cancelled before it became durable.
#define PCC_CANCELLED -15

// The checkpoint was overwritten by its writer (another process) while it was being read.
#define PCC_RECLAIMED -16

// Stored bytes do not match their checksum.
#define PCC_CORRUPT -17

// The operating system reported an I/O error.
#define PCC_IO -18

// A flush failed: the durability of what was written is unknown, and the slot is quarantined.
#define PCC_DURABILITY_UNKNOWN -19

// The store was opened read-only.
#define PCC_READ_ONLY -20

// The handle was made before this process was forked, and cannot be used here.
#define PCC_FORKED -21

// Memory could not be allocated.
#define PCC_OUT_OF_MEMORY -22

// A defect of the library itself; the store refuses further saves, its durable checkpoints are intact.
#define PCC_INTERNAL -23

// A pointer is NULL where it may not be, misaligned, passes the end of memory, or is not a handle of the
// expected kind.
#define PCC_BAD_POINTER -24

// A member of a striped region is lost, foreign, in the wrong place, too short or damaged, or the path is that of a
// member other than the first. The text names the member.
#define PCC_MEMBER -25

// The driver of a GPU reported a failure.
#define PCC_DEVICE -26

// Version of the C ABI: the number in the SONAME. A library of another major is another library.
#define PCC_ABI_MAJOR 1

// Raised with every addition to the ABI; additions never change what was there.
#define PCC_ABI_MINOR 2

// `offset` of an error that concerns no byte offset: all bits set.
#define PCC_NO_OFFSET UINT64_MAX

// Boolean, one byte each.
#define PCC_DTYPE_BOOL 1

// Unsigned 8-bit integer.
#define PCC_DTYPE_U8 2

// Signed 8-bit integer.
#define PCC_DTYPE_I8 3

// Unsigned 16-bit integer.
#define PCC_DTYPE_U16 4

// Signed 16-bit integer.
#define PCC_DTYPE_I16 5

// Unsigned 32-bit integer.
#define PCC_DTYPE_U32 6

// Signed 32-bit integer.
#define PCC_DTYPE_I32 7

// Unsigned 64-bit integer.
#define PCC_DTYPE_U64 8

// Signed 64-bit integer.
#define PCC_DTYPE_I64 9

// IEEE half precision.
#define PCC_DTYPE_F16 10

// bfloat16.
#define PCC_DTYPE_BF16 11

// IEEE single precision.
#define PCC_DTYPE_F32 12

// IEEE double precision.
#define PCC_DTYPE_F64 13

// Complex of two F32.
#define PCC_DTYPE_C64 14

// Complex of two F64.
#define PCC_DTYPE_C128 15

// 8-bit float, 4 bits of exponent (float8_e4m3fn).
#define PCC_DTYPE_F8_E4M3 16

// 8-bit float, 5 bits of exponent.
#define PCC_DTYPE_F8_E5M2 17

// 8-bit exponent-only float.
#define PCC_DTYPE_F8_E8M0 18

// 8-bit float, 4 bits of exponent, no negative zero.
#define PCC_DTYPE_F8_E4M3FNUZ 19

// 8-bit float, 5 bits of exponent, no negative zero.
#define PCC_DTYPE_F8_E5M2FNUZ 20

// 6-bit float, 2 bits of exponent, packed.
#define PCC_DTYPE_F6_E2M3 21

// 6-bit float, 3 bits of exponent, packed.
#define PCC_DTYPE_F6_E3M2 22

// 4-bit float, two in a byte.
#define PCC_DTYPE_F4 23

// Choose by what was measured when the region was formatted, persistent memory first.
#define PCC_MEDIUM_AUTO 0

// Persistent memory, mapped with MAP_SYNC.
#define PCC_MEDIUM_DAX 1

// A shared mapping of any file, also on tmpfs.
#define PCC_MEDIUM_MMAP 2

// O_DIRECT on a file or block device, by io_uring where the kernel allows it.
#define PCC_MEDIUM_DIRECT 3

// io_uring, or threads where the kernel refuses it.
#define PCC_BACKEND_AUTO 0

// io_uring, or an error.
#define PCC_BACKEND_URING 1

// Blocking calls on threads.
#define PCC_BACKEND_THREADS 2

// A durable save survives the death of the process (tmpfs is enough).
#define PCC_DURABILITY_PROCESS 1

// A durable save survives power loss.
#define PCC_DURABILITY_POWER 2

// Memory of the host.
#define PCC_DEVICE_HOST 0

// Memory of an NVIDIA GPU, `device_index` as CUDA counts them in this process. Builds without CUDA, and systems without
// its driver, give PCC_UNSUPPORTED.
#define PCC_DEVICE_CUDA 1

// A state on GPUs goes straight into the staging pool: copied when all has passed through it.
#define PCC_SNAPSHOT_STAGING 0

// It goes into spare memory of its GPU first where that has room for it beside a tenth of the memory (and 1 GiB) left
// free, else as PCC_SNAPSHOT_STAGING.
#define PCC_SNAPSHOT_AUTO 1

// It goes into spare memory of its GPU first, at the speed of that memory, and is copied at once. As much as the state
// takes there is allocated by the first such save and kept; where there is not so much, the save fails.
#define PCC_SNAPSHOT_SPARE 2

// All of a state goes through the staging pool.
#define PCC_DIRECT_OFF 0

// Chunks of a state on a GPU go from spare memory of it to the file by GPUDirect Storage, past host memory, where that is possible: the
// snapshot is in spare memory (PCC_SNAPSHOT_SPARE, or AUTO where there is room), all of the state's GPU memory is on one GPU with no
// more than 64 MiB of host memory in between, the region is one file or device on the direct medium, the staging pool could be
// page-locked, and cuFile (libcufile.so.0) is there and does not itself go through host memory. Else, and for chunks that are
// partly in host memory, as PCC_DIRECT_OFF; so also for later saves of a store, once cuFile, driver or region have refused
// something. `direct_bytes` of `pcc_stats` tells.
#define PCC_DIRECT_AUTO 1

// The same, but where it is not possible the save fails and says why (PCC_UNSUPPORTED; PCC_OUT_OF_MEMORY where there is no room for spare
// memory), or does not begin (PCC_INVALID_ARGUMENT with PCC_SNAPSHOT_STAGING); and cuFile is used also where it itself goes through
// host memory (its compatibility mode). A state without memory of a GPU is saved as ever.
#define PCC_DIRECT_REQUIRED 2

// The checkpoint with the highest generation; falls back to the next newest where it is damaged.
#define PCC_SELECT_NEWEST 0

// The newest of those with a generation below `value`, with the same fall-back.
#define PCC_SELECT_OLDER_THAN 1

// Exactly the generation `value`.
#define PCC_SELECT_GENERATION 2

// The newest of step `value`, falling back to an older one of the same step.
#define PCC_SELECT_STEP 3

// Flag of a checkpoint: made by a raw save, its one tensor is called "raw".
#define PCC_CHECKPOINT_RAW 1

// An open checkpoint. It is not overwritten while it is open (a read-only store cannot promise that: it gives
// PCC_RECLAIMED when the writer was faster).
typedef struct pcc_checkpoint pcc_checkpoint;

// A raw save that is being written.
typedef struct pcc_raw pcc_raw;

// One save, in flight or ended.
typedef struct pcc_save pcc_save;

// An open region and its threads.
typedef struct pcc_store pcc_store;

// Result of a call: `PCC_OK` or one of the negative numbers below. More may be added; none ever changes.
typedef int32_t pcc_status;

// How a region is formatted. Initialise with `pcc_format_options_init`.
typedef struct pcc_format_options {
    // Size of this struct as the program knows it.
    uint64_t struct_bytes;
    // 1: overwrite what the path holds, even a valid region. Default 0.
    uint32_t force;
    // 1: write the whole region once now, so that the first saves are as fast as later ones. Default 0.
    uint32_t prewrite;
    // PCC_MEDIUM_...: which medium it is meant for. Default PCC_MEDIUM_AUTO: measure.
    uint32_t medium;
    // 0.
    uint32_t reserved;
    // Members beside `path`, which is member 0: `stripe_count` files or devices over which the region is striped, so
    // that their bandwidth adds up. The region is opened by `path`, and all of them must be there. Default NULL.
    const char *const *stripe_paths;
    // How many, at most 15. Default 0: the region is not striped.
    uint64_t stripe_count;
    // Bytes of the region that lie together on one member: a power of two from 2 MiB to 1 GiB, which chunk_bytes must
    // divide at open. Default 0: 4 MiB.
    uint64_t stripe_unit_bytes;
} pcc_format_options;

// How a region is opened. Initialise with `pcc_open_options_init`; NULL means all defaults.
typedef struct pcc_open_options {
    // Size of this struct as the program knows it.
    uint64_t struct_bytes;
    // 1: open beside a live writer: no lock, no saves, no pins. Default 0.
    uint32_t read_only;
    // PCC_MEDIUM_... Default PCC_MEDIUM_AUTO.
    uint32_t medium;
    // PCC_BACKEND_... of the direct medium. Default PCC_BACKEND_AUTO.
    uint32_t backend;
    // PCC_DURABILITY_...: the weakest that is acceptable; opening fails where the medium cannot give it.
    // Default PCC_DURABILITY_POWER.
    uint32_t required_durability;
    // N: saves that may be in flight at once, 1 to 128. Default 2.
    uint32_t max_in_flight;
    // K: newest checkpoints that are kept. N + K may not exceed the slots of the region. Default 1.
    uint32_t keep;
    // 1: keep every durable checkpoint until `pcc_mark_global` names a newer step. Default 0.
    uint32_t hold;
    // Threads that copy and hash state, 1 to 64. Default: the cores, at most 4; on more than 8, half of them, at most 8.
    uint32_t writers;
    // Threads that verify and copy on restore, 1 to 64. Default: the cores, at most 16.
    uint32_t readers;
    // Operations in flight on the direct medium, 1 to 4096. Default 32.
    uint32_t queue_depth;
    // 1: lock the staging pool in memory where the limit allows it. Default 0.
    uint32_t lock_memory;
    // A save does not write chunks that its slot durably holds already, as their hashes tell; but of so many saves into
    // a slot one writes everything, so that damage is not kept for ever. 1: every save does. 0 or default: 16.
    uint32_t rewrite_every;
    // Names this training run, the same on all its ranks: steps are compared within one run. Default 0.
    uint64_t run_id;
    // Bytes of the staging pool, which bounds the memory that the library takes. At least (N + 1) chunks.
    // Default 256 MiB.
    uint64_t staging_bytes;
    // Unit of copying, hashing and writing: a multiple of 4096, up to 64 MiB. Default 1 MiB.
    uint64_t chunk_bytes;
    // Milliseconds to wait while another writer holds the region; negative: for ever. Default 10000.
    int64_t lock_wait_ms;
} pcc_open_options;

// How a save begins. Initialise with `pcc_save_options_init`; NULL means all defaults.
typedef struct pcc_save_options {
    // Size of this struct as the program knows it.
    uint64_t struct_bytes;
    // Milliseconds to wait for a slot while N saves are in flight; negative: for ever; 0: not at all.
    // Default 60000.
    int64_t wait_ms;
    // For tensors on GPUs: a CUDA stream (CUstream, cudaStream_t). What is saved is the state as of everything that was
    // enqueued on it before; the call does not wait for that. NULL: the legacy default stream of each GPU concerned. For
    // tensors on several GPUs, one that waits for the others' streams. Not used for tensors in host memory.
    void *stream;
    // 1: the save does not commit before `pcc_save_confirm`, and is cancelled when it is freed without. Until then it
    // is one of the N in flight and keeps its slot, though no staging memory once it is written; later saves may commit
    // before it. Default 0.
    uint32_t confirm;
    // 1: the checkpoint is pinned from the instant it commits. Refused at begin (PCC_NO_SLOT) where pins, those of saves
    // in flight among them, would leave fewer than N slots to save into. Default 0.
    uint32_t pin;
    // Where a state on GPUs goes first: PCC_SNAPSHOT_... Default PCC_SNAPSHOT_STAGING.
    uint32_t snapshot;
    // 1: where the staging pool is smaller than the state, copies wait on the GPU, by flags in memory, for buffers to be
    // written, so that all are enqueued at once: `pcc_save_stream_wait_copied` has a stream wait for the copies, and the
    // calling thread waits only until they are enqueued, for no storage (but that of earlier saves; and of a state of many
    // hundred tensors for all but the last copies). At `device_timeout_ms` the save fails, and nothing waits for storage any
    // more. What waits for all that runs on the GPU (synchronising the device, freeing its memory) waits for storage
    // meanwhile, too. As if 0 with a driver before CUDA 11.7, under CUDA_DEVICE_MAX_CONNECTIONS=1, where the staging pool
    // cannot be page-locked, has fewer than four buffers or too few that become free, where more than 16 MiB in host memory
    // stand between tensors of GPUs, and once chunks of the store have gone past host memory. Default 0.
    uint32_t flag_waits;
    // Milliseconds after which a save that a GPU has not finished copying fails, lest one that hangs hold it for ever.
    // 0 or default: 600000.
    uint64_t device_timeout_ms;
    // Whether chunks go from a GPU to the file past host memory: PCC_DIRECT_... Default PCC_DIRECT_OFF.
    uint32_t direct_storage;
    // Must be 0.
    uint32_t reserved;
} pcc_save_options;

// Which checkpoint to open. Initialise with `pcc_select_options_init`; NULL means the newest.
typedef struct pcc_select_options {
    // Size of this struct as the program knows it.
    uint64_t struct_bytes;
    // Generation or step, as `select` says. Default 0.
    uint64_t value;
    // PCC_SELECT_... Default PCC_SELECT_NEWEST.
    uint32_t select;
    // 1: read and verify the whole payload before the checkpoint is returned, and fall back where it is damaged. 0:
    // verify each chunk when it is read. Default 1. `pcc_restore` ignores it: it verifies what it reads.
    uint32_t verify;
} pcc_select_options;

// What `pcc_tune` starts from. Initialise with `pcc_tune_options_init`.
typedef struct pcc_tune_options {
    // Size of this struct as the program knows it.
    uint64_t struct_bytes;
    // Bytes of the state (see `pcc_payload_bytes`).
    uint64_t state_bytes;
    // Nanoseconds of one iteration without saves.
    uint64_t iteration_ns;
    // Durable bytes per second of all saves together; 0: measured by this store's own saves.
    uint64_t durable_bytes_per_s;
    // Nanoseconds for which one save keeps the trainer from updating; UINT64_MAX (all bits set): the mean time to
    // copied of this store's saves, or 0 before its first. Default UINT64_MAX.
    uint64_t stall_ns;
    // Largest acceptable run time over the run time without saves, in millionths: 1050000 is 5% slower. At least
    // 1000000. Default 1050000.
    uint64_t max_slowdown_ppm;
    // N; 0: the store's. Default 0.
    uint32_t max_in_flight;
    // 0.
    uint32_t reserved;
} pcc_tune_options;

// One checkpoint.
typedef struct pcc_checkpoint_info {
    // Set by the caller: sizeof(pcc_checkpoint_info).
    uint64_t struct_bytes;
    // Its generation.
    uint64_t generation;
    // The trainer's step.
    uint64_t step;
    // Run that saved it.
    uint64_t run_id;
    // Bytes of its payload: a complete safetensors file.
    uint64_t payload_bytes;
    // Bytes of one of its chunks.
    uint64_t chunk_bytes;
    // Wall-clock time of its commit, in nanoseconds since 1970. For people: nothing is ordered by it.
    uint64_t unix_ns;
    // Slot that holds it.
    uint32_t slot;
    // Number of stored tensors (tied ones not counted).
    uint32_t tensor_count;
    // PCC_CHECKPOINT_... bits.
    uint32_t flags;
    // 1: durably kept until unpinned.
    uint32_t pinned;
    // How many handles of this store have it open now.
    uint32_t readers;
    // Newer candidates that were passed over when it was opened, because they are damaged. 0 in a list.
    uint32_t rejected;
} pcc_checkpoint_info;

// What `pcc_verify` found.
typedef struct pcc_verify_report {
    // Set by the caller: sizeof(pcc_verify_report).
    uint64_t struct_bytes;
    // Checkpoints that verified in full.
    uint64_t intact;
    // Checkpoints of which some byte is damaged or cannot be read.
    uint64_t damaged;
    // Checkpoints that were overwritten while they were read: not damaged.
    uint64_t reclaimed;
    // Bytes that the whole report text takes with its NUL.
    uint64_t text_bytes;
} pcc_verify_report;

// Counters since open, and gauges of this moment.
typedef struct pcc_stats_info {
    // Set by the caller: sizeof(pcc_stats_info).
    uint64_t struct_bytes;
    // Saves begun.
    uint64_t saves_begun;
    // Saves that became durable, superseded ones included.
    uint64_t saves_durable;
    // Durable saves that a newer checkpoint had made superfluous by then.
    uint64_t saves_superseded;
    // Saves that failed.
    uint64_t saves_failed;
    // Saves that were cancelled.
    uint64_t saves_cancelled;
    // Payload bytes of durable saves.
    uint64_t durable_bytes;
    // Nanoseconds in which at least one save was in flight: durable_bytes over this is the bandwidth got.
    uint64_t busy_ns;
    // Sum over durable saves of the nanoseconds from begin to copied.
    uint64_t copied_ns;
    // Sum over durable saves of the nanoseconds from begin to durable.
    uint64_t durable_ns;
    // Generation of the newest checkpoint; 0: none.
    uint64_t newest_generation;
    // Saves in flight now.
    uint32_t in_flight;
    // Slots out of use after a failed flush: see `pcc_repair`.
    uint32_t quarantined_slots;
    // Slots that saves may use now: free, being written, or reclaimable.
    uint32_t claimable_slots;
    // 0.
    uint32_t reserved;
    // Those of durable_bytes that were in their places already, and were not written.
    uint64_t unchanged_bytes;
    // Those of durable_bytes that cuFile wrote from the memory of a GPU: see PCC_DIRECT_AUTO.
    uint64_t direct_bytes;
} pcc_stats_info;

// What was got at open, as opposed to what was asked for. Texts live as long as the store.
typedef struct pcc_got_info {
    // Set by the caller: sizeof(pcc_got_info).
    uint64_t struct_bytes;
    // How bytes are moved: "io_uring", "io_uring, registered buffers", "pwrite", "avx512", ...
    const char *path_text;
    // For people: what was refused and what is used instead, one per line.
    const char *notes_text;
    // Identity of the region.
    uint8_t region_uuid[16];
    // Bytes of one slot: the largest payload with its chunk table.
    uint64_t slot_bytes;
    // Bytes of the staging pool.
    uint64_t staging_bytes;
    // Of these, bytes in huge pages.
    uint64_t staging_huge_bytes;
    // Bytes of one chunk of new saves.
    uint64_t chunk_bytes;
    // Checkpoints that recovery found at open.
    uint32_t recovered_checkpoints;
    // 1: the staging pool is locked in memory.
    uint32_t staging_locked;
    // PCC_MEDIUM_...
    uint32_t medium;
    // PCC_DURABILITY_...
    uint32_t durability;
    // Slots of the region.
    uint32_t slot_count;
    // N.
    uint32_t max_in_flight;
    // K.
    uint32_t keep;
    // 1: opened read-only.
    uint32_t read_only;
    // Bytes of the region that lie together on one member; 0: the region is not striped.
    uint64_t stripe_unit_bytes;
    // Files or devices over which the region is striped; 1: it is not.
    uint32_t members;
    // 0.
    uint32_t reserved;
} pcc_got_info;

// One tensor: what a save reads, and what `pcc_restore` writes. The same array serves both. In an array every
// element has the same `struct_bytes`.
typedef struct pcc_tensor {
    // sizeof(pcc_tensor).
    uint64_t struct_bytes;
    // Unique in the array, not empty, at most 4096 bytes; NUL-terminated UTF-8.
    const char *name;
    // `rank` dimensions, outermost first; may be NULL where rank is 0 (a scalar).
    const uint64_t *shape;
    // First byte: contiguous, row-major, of any alignment; may be NULL where `bytes` is 0. A save only reads it. In memory
    // of a GPU the device's address.
    void *data;
    // Size in bytes: the product of the shape times the element size.
    uint64_t bytes;
    // PCC_DTYPE_...
    uint32_t dtype;
    // Number of dimensions, at most 64.
    uint32_t rank;
    // PCC_DEVICE_...
    uint32_t device;
    // Which GPU; 0 for host memory.
    uint32_t device_index;
} pcc_tensor;

// One entry of metadata.
typedef struct pcc_pair {
    // Unique in the array, must not begin with "pccheck."; NUL-terminated UTF-8.
    const char *key;
    // NUL-terminated UTF-8.
    const char *value;
} pcc_pair;

// What is known of a durable save.
typedef struct pcc_durable {
    // Set by the caller: sizeof(pcc_durable).
    uint64_t struct_bytes;
    // The save's generation.
    uint64_t generation;
    // The newer checkpoint that had made this one superfluous by the time it was durable; 0: none.
    uint64_t superseded_by;
    // Nanoseconds from begin to copied.
    uint64_t copied_ns;
    // Nanoseconds from begin to durable.
    uint64_t durable_ns;
    // The slot that it was written to.
    uint32_t slot;
    // 0.
    uint32_t reserved;
} pcc_durable;

// How far a save is.
typedef struct pcc_progress {
    // Set by the caller: sizeof(pcc_progress).
    uint64_t struct_bytes;
    // The save's generation: its place in the order of all saves of the region, never used twice.
    uint64_t generation;
    // The trainer's step.
    uint64_t step;
    // Bytes of the payload.
    uint64_t total_bytes;
    // Bytes that have left the caller's memory.
    uint64_t copied_bytes;
    // Bytes handed to the medium (not yet durable).
    uint64_t written_bytes;
    // 1 when every byte has left the caller's memory.
    uint32_t copied;
    // 1 when the save has ended, durably or not.
    uint32_t ended;
} pcc_progress;

// Called with `user` when a save has ended. It may ask for the outcome (`pcc_save_wait_durable` with 0), begin no
// save, wait for none, and close nothing but may free the save it is told of.
typedef void (*pcc_end_callback)(void *user);

// One tensor of a checkpoint.
typedef struct pcc_tensor_info {
    // Set by the caller: sizeof(pcc_tensor_info).
    uint64_t struct_bytes;
    // Its name: UTF-8 of `name_bytes` bytes, then a NUL. Lives as long as the checkpoint's handle.
    const char *name;
    // Bytes of the name, without the NUL.
    uint64_t name_bytes;
    // `rank` dimensions. Lives as long as the checkpoint's handle.
    const uint64_t *shape;
    // Name of the tensor that stores its bytes where it is tied to one; else NULL.
    const char *tied_to;
    // Size in bytes.
    uint64_t bytes;
    // Its first byte in the payload.
    uint64_t payload_offset;
    // PCC_DTYPE_...
    uint32_t dtype;
    // Number of dimensions.
    uint32_t rank;
} pcc_tensor_info;

// One piece of a tensor to read. In an array every element has the same `struct_bytes`.
typedef struct pcc_read {
    // sizeof(pcc_read).
    uint64_t struct_bytes;
    // Name of the tensor, NUL-terminated UTF-8; NULL: `index` says which.
    const char *name;
    // Index of the tensor; not used where `name` is not NULL.
    uint64_t index;
    // First byte of the tensor that is wanted.
    uint64_t offset;
    // How many bytes are wanted.
    uint64_t bytes;
    // Where they go: any alignment; no two pieces of one call may overlap.
    void *dst;
    // PCC_DEVICE_...
    uint32_t device;
    // Which GPU; 0 for host memory.
    uint32_t device_index;
} pcc_read;

// What `pcc_tune` advises.
typedef struct pcc_tuning {
    // Set by the caller: sizeof(pcc_tuning).
    uint64_t struct_bytes;
    // Smallest number of iterations between saves that keeps within the slowdown.
    uint64_t interval_iterations;
    // Nanoseconds from begin to durable of one save among N.
    uint64_t durable_ns;
    // Run time over run time without saves at that interval, in millionths.
    uint64_t slowdown_ppm;
    // Expected nanoseconds of work lost by a crash at a random moment.
    uint64_t expected_lost_ns;
    // Most nanoseconds of work lost by a crash.
    uint64_t worst_lost_ns;
} pcc_tuning;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The name of a status as it is spelled in this header, such as "PCC_NO_SLOT"; "PCC_UNKNOWN" for a number that this
// library does not know.
//
// Durability: none.
// Threads: any.
// Ownership: static text, never freed.
// Errors: none.
const char *pcc_status_name(pcc_status status);

// What a status means, in a few English words. `pcc_last_error` says more of one failure.
//
// Durability: none.
// Threads: any.
// Ownership: static text, never freed.
// Errors: none.
const char *pcc_status_text(pcc_status status);

// Version of the library, such as "0.1.0".
//
// Durability: none.
// Threads: any.
// Ownership: static text, never freed.
// Errors: none.
const char *pcc_version(void);

// Version of the ABI that the loaded library has: major * 65536 + minor. A program that loads the library with
// dlopen checks that the major is the PCC_ABI_MAJOR it was written for and that the minor is not below its own:
//
//   uint32_t abi = pcc_abi_version();
//   int fits = abi / 65536u == PCC_ABI_MAJOR && abi >= PCC_ABI_MAJOR * 65536u + PCC_ABI_MINOR;
//
// Durability: none.
// Threads: any.
// Ownership: none.
// Errors: none.
uint32_t pcc_abi_version(void);

// Copies what is known of the last call that failed on this thread: operation, path, byte offset, what was
// expected and found, what to do next; one line of UTF-8, NUL-terminated, cut at a character where `cap` is too
// small. Returns the bytes that the whole text takes with its NUL, or 0 where no call has failed on this thread.
// A call that succeeds leaves the last error as it is, so look at it only after a negative status.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: none.
uint64_t pcc_last_error(char *buf,
                        uint64_t cap);

// The status of the last call that failed on this thread; `PCC_OK` where none has.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: none.
// Errors: none.
pcc_status pcc_last_error_status(void);

// The operating system's error number (errno) in this thread's last error; 0 where there is none.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: none.
// Errors: none.
int32_t pcc_last_error_errno(void);

// The byte offset in the region that this thread's last error concerns; `PCC_NO_OFFSET` (all bits set) where there
// is none.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: none.
// Errors: none.
uint64_t pcc_last_error_offset(void);

// Copies the operation in this thread's last error, as `pcc_last_error` does with the whole text.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: none.
uint64_t pcc_last_error_operation(char *buf, uint64_t cap);

// Copies the path in this thread's last error, as `pcc_last_error` does with the whole text; 0 where there is none.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: none.
uint64_t pcc_last_error_path(char *buf,
                             uint64_t cap);

// Copies what this thread's last error advises to do next, as `pcc_last_error` does with the whole text; 0 where it
// advises nothing.
//
// Durability: none.
// Threads: any; every thread has its own last error.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: none.
uint64_t pcc_last_error_advice(char *buf,
                               uint64_t cap);

// Initialises options for `pcc_format`; `struct_bytes` is sizeof(pcc_format_options).
//
// Durability: none.
// Threads: any.
// Ownership: the struct is the caller's.
// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_format_options_init(struct pcc_format_options *options, uint64_t struct_bytes);

// Initialises options for `pcc_open`; `struct_bytes` is sizeof(pcc_open_options).
//
// Durability: none.
// Threads: any.
// Ownership: the struct is the caller's.
// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_open_options_init(struct pcc_open_options *options, uint64_t struct_bytes);

// Initialises options for `pcc_save_begin` and `pcc_raw_begin`; `struct_bytes` is sizeof(pcc_save_options).
//
// Durability: none.
// Threads: any.
// Ownership: the struct is the caller's.
// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_save_options_init(struct pcc_save_options *options, uint64_t struct_bytes);

// Initialises options for `pcc_checkpoint_open` and `pcc_restore`; `struct_bytes` is sizeof(pcc_select_options).
//
// Durability: none.
// Threads: any.
// Ownership: the struct is the caller's.
// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_select_options_init(struct pcc_select_options *options,
                                   uint64_t struct_bytes);

// Initialises options for `pcc_tune`; `struct_bytes` is sizeof(pcc_tune_options).
//
// Durability: none.
// Threads: any.
// Ownership: the struct is the caller's.
// Errors: PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_tune_options_init(struct pcc_tune_options *options, uint64_t struct_bytes);

// The safetensors name of a dtype code, such as "BF16"; NULL for a number that is none.
//
// Durability: none.
// Threads: any.
// Ownership: static text, never freed.
// Errors: none.
const char *pcc_dtype_name(uint32_t dtype);

// Bits of one element of a dtype; 0 for a number that is none.
//
// Durability: none.
// Threads: any.
// Ownership: none.
// Errors: none.
uint32_t pcc_dtype_bits(uint32_t dtype);

// The PCC_DTYPE_ code of a safetensors name (NUL-terminated), such as "BF16": for programs that cannot read this
// header's constants.
//
// Durability: none.
// Threads: any.
// Ownership: `dtype` receives the code, or 0.
// Errors: PCC_NOT_FOUND for a name that is none; PCC_BAD_POINTER; PCC_INVALID_ARGUMENT for text that is not UTF-8.
pcc_status pcc_dtype_from_name(const char *name,
                               uint32_t *dtype);

// Creates a region at `path` (NUL-terminated): a new file, an empty file, or a block device. It has `slot_count`
// slots (2 to 240): saves in flight + checkpoints kept + pinned; each holds up to `payload_bytes` (see
// `pcc_payload_bytes`). All space is allocated now. Nothing is ever destroyed unless `options->force` is 1.
//
// Durability: the empty region is durable on return.
// Threads: any.
// Ownership: nothing is kept; `options` may be NULL.
// Errors: PCC_ALREADY_EXISTS, PCC_NO_SPACE, PCC_IN_USE, PCC_INVALID_ARGUMENT, PCC_TOO_LARGE (the members' paths),
// PCC_UNSUPPORTED, PCC_IO, PCC_BAD_POINTER.
pcc_status pcc_format(const char *path,
                      uint32_t slot_count,
                      uint64_t payload_bytes,
                      const struct pcc_format_options *options);

// Replaces a region file by a larger one (more slots, larger slots, or both) that holds the same checkpoints and pins.
// A crash leaves the old file or the new one. Refused on devices and while a writer has the region open; waits for
// that writer for `lock_wait_ms` milliseconds (negative: for ever). `left_out` (may be NULL) receives how many
// checkpoints the medium could no longer read, which the new file lacks; where it can read none, the call fails.
//
// Durability: the new region and its checkpoints are durable on return.
// Threads: any.
// Ownership: `left_out` is the caller's; nothing is kept.
// Errors: PCC_IN_USE, PCC_NO_SPACE, PCC_UNSUPPORTED, PCC_INVALID_ARGUMENT, PCC_NOT_A_REGION, PCC_CORRUPT, PCC_IO,
// PCC_BAD_POINTER.
pcc_status pcc_grow(const char *path,
                    uint32_t slot_count,
                    uint64_t payload_bytes,
                    int64_t lock_wait_ms,
                    uint64_t *left_out);

// Opens a region, recovers what it holds, and starts the library's threads. One writer at a time has a region open;
// read-only stores work beside it.
//
// Durability: every checkpoint that recovery found is durable on return (not made so by a read-only store).
// Threads: any.
// Ownership: `store` receives a handle to be given to `pcc_close`, or NULL on failure. `options` may be NULL.
// Errors: PCC_NOT_FOUND, PCC_NOT_A_REGION, PCC_CORRUPT where both superblocks are damaged, PCC_IN_USE (names the
// holder), PCC_DURABILITY, PCC_UNSUPPORTED_VERSION, PCC_UNSUPPORTED_FEATURE, PCC_UNSUPPORTED, PCC_OUT_OF_MEMORY,
// PCC_INVALID_ARGUMENT, PCC_IO, PCC_BAD_POINTER.
pcc_status pcc_open(const char *path,
                    const struct pcc_open_options *options,
                    struct pcc_store **store);

// Closes a store: cancels the saves in flight and waits until their I/O has ended; NULL is fine. Call `pcc_drain`
// before, to let them become durable. Handles of its saves stay valid until freed. The region's lock is released
// here, or when the last raw save or checkpoint opened through it is freed.
//
// Durability: commits nothing.
// Threads: no other call may use the store meanwhile or later.
// Ownership: frees `store`. In a forked child it only forgets it.
// Errors: none.
void pcc_close(struct pcc_store *store);

// Waits until no save is in flight, for at most `timeout_ms` (negative: for ever). Says nothing of how they ended. A save
// that waits only for `pcc_save_confirm` is in flight: with a timeout it is waited for like any other; for ever, and
// nothing else in flight, this returns PCC_INVALID_STATE at once, lest it never return.
//
// Durability: saves that ended with PCC_OK are durable, as ever.
// Threads: any number at once.
// Ownership: none.
// Errors: PCC_TIMED_OUT, PCC_INVALID_STATE, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_drain(const struct pcc_store *store,
                     int64_t timeout_ms);

// Lists the checkpoints, newest first: fills up to `capacity` elements of `infos`, which are `info_bytes`
// (sizeof(pcc_checkpoint_info)) apart, and stores in `count` how many there are, which may be more. With `capacity` 0
// it only counts. Another save may become durable between two calls.
//
// Durability: all listed checkpoints are durable.
// Threads: any number at once.
// Ownership: `infos` and `count` are the caller's; nothing refers to the store.
// Errors: PCC_IO (read-only stores read the medium), PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
pcc_status pcc_list(const struct pcc_store *store,
                    struct pcc_checkpoint_info *infos,
                    uint64_t info_bytes,
                    uint64_t capacity,
                    uint64_t *count);

// Keeps the checkpoint of `generation` until it is unpinned, also across restarts. Pinning twice is pinning once.
//
// Durability: the pin is durable on return.
// Threads: any number at once.
// Ownership: none.
// Errors: PCC_NOT_FOUND; PCC_NO_SLOT where fewer than N slots would be left to save into; PCC_READ_ONLY, PCC_IO,
// PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_pin(const struct pcc_store *store,
                   uint64_t generation);

// Lifts a pin; the checkpoint is then kept as long as it is among the newest K. No error where it was not pinned.
//
// Durability: durable on return.
// Threads: any number at once.
// Ownership: none.
// Errors: PCC_NOT_FOUND, PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_unpin(const struct pcc_store *store,
                     uint64_t generation);

// Marks `step` of run `run_id` as durable on every rank of a group: a store opened with `hold` may now reclaim what is
// older. How ranks learn that of each other is the caller's business. `generation` (may be NULL) receives the
// checkpoint's generation here.
//
// Durability: the mark is durable on return.
// Threads: any number at once.
// Ownership: `generation` is the caller's.
// Errors: PCC_NOT_FOUND where this rank has no such checkpoint; PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN,
// PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_mark_global(const struct pcc_store *store,
                           uint64_t run_id,
                           uint64_t step,
                           uint64_t *generation);

// Gives up `step` of run `run_id`, which some rank skipped, lost or failed: cancels its saves in flight, waits until
// their I/O has ended (for at most `timeout_ms`; negative: for ever), and discards the step's checkpoints. Every rank
// calls it. `discarded` (may be NULL) receives how many checkpoints went.
//
// Durability: the discard is durable on return.
// Threads: any number at once.
// Ownership: `discarded` is the caller's.
// Errors: PCC_TIMED_OUT: the saves are cancelled but have not ended, nothing is discarded yet, call again;
// PCC_INVALID_STATE where the step is marked as durable everywhere, or its checkpoint is open; PCC_READ_ONLY,
// PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_abandon(const struct pcc_store *store,
                       uint64_t run_id,
                       uint64_t step,
                       int64_t timeout_ms,
                       uint32_t *discarded);

// Discards every checkpoint newer than `generation` (0: all of them): what a group does after a restart, before any
// rank saves again. `discarded` (may be NULL) receives how many went.
//
// Durability: the discard is durable on return.
// Threads: any number at once, but no save may be in flight.
// Ownership: `discarded` is the caller's.
// Errors: PCC_NOT_FOUND where `generation` is not a checkpoint; PCC_INVALID_STATE where saves are in flight or such a
// checkpoint is open; PCC_READ_ONLY, PCC_IO, PCC_DURABILITY_UNKNOWN, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_discard_newer(const struct pcc_store *store,
                             uint64_t generation,
                             uint32_t *discarded);

// Reads and verifies every byte of the checkpoint of `generation`, or of all checkpoints where it is 0. `report` (may
// be NULL) receives the counts, `text` (`text_cap` bytes, may be NULL) one line per checkpoint, NUL-terminated UTF-8.
//
// Durability: none; nothing is changed.
// Threads: any number at once.
// Ownership: `report` and `text` are the caller's.
// Errors: PCC_CORRUPT where at least one checkpoint is damaged (report and text are filled all the same);
// PCC_NOT_FOUND, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_verify(const struct pcc_store *store,
                      uint64_t generation,
                      struct pcc_verify_report *report,
                      char *text,
                      uint64_t text_cap);

// Rewrites every quarantined slot in full, flushes it, and takes it back into use. `repaired` (may be NULL) receives
// how many.
//
// Durability: the slots are durably empty on return.
// Threads: any number at once.
// Ownership: `repaired` is the caller's.
// Errors: PCC_IO where the medium still fails; PCC_TIMED_OUT after `timeout_ms` (negative: never); PCC_READ_ONLY,
// PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_repair(const struct pcc_store *store,
                      int64_t timeout_ms,
                      uint32_t *repaired);

// Counters since open, and gauges of this moment. Set `stats->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `stats` is the caller's.
// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_stats(const struct pcc_store *store, struct pcc_stats_info *stats);

// What was got at open, as opposed to what was asked for. Set `got->struct_bytes` before.
//
// Durability: `got->durability` says what a durable save survives.
// Threads: any number at once.
// Ownership: `got` is the caller's; the texts in it belong to the store and live until `pcc_close`.
// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_got(const struct pcc_store *store, struct pcc_got_info *got);

// Copies what recovery found at open, one line per slot with the reason why it counts or not, then notes on damage
// that was survived; UTF-8, NUL-terminated, cut at a character where `cap` is too small. Returns the bytes that the
// whole text takes with its NUL, or 0 on failure.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
uint64_t pcc_recovery_text(const struct pcc_store *store,
                           char *buf,
                           uint64_t cap);

// Begins a save of `tensor_count` tensors and `metadata_count` entries of metadata under the trainer's `step`; waits
// for a slot as long as `options->wait_ms` says, then returns while the save goes on. What is saved is the memory as it
// is now; of GPUs, as it is when `options->stream` has done what was enqueued on it before, which is not waited for here.
// Tensors with the same address, size, dtype and shape are stored once and restored under all their names.
//
// Durability: none yet: see `pcc_save_wait_durable`.
// Threads: any number at once; up to N saves are in flight.
// Ownership: the memory of every tensor must stay valid and unchanged until `pcc_save_wait_copied` has returned
// anything but PCC_TIMED_OUT, or the save is freed, or the store is closed; memory of GPUs may be changed by work that
// is enqueued after `pcc_save_stream_wait_copied` on its stream, but not be freed before then. Names, shapes, metadata and the arrays are
// copied at once. `save` receives a handle to be given to `pcc_save_free`, or NULL on failure. `options` may be NULL.
// Errors: PCC_NO_SLOT, also at once where there is no room for `options->pin`; PCC_TOO_LARGE; PCC_INVALID_ARGUMENT for
// empty, duplicate or reserved names, wrong sizes, and options that are neither 0 nor 1;
// PCC_IO where the region's file was deleted, replaced or cut short;
// PCC_UNSUPPORTED for memory of a GPU where this system or this build has none; PCC_INVALID_ARGUMENT for memory that is
// not that GPU's (what a save before was of is looked at later: then the save fails so); PCC_INVALID_STATE while the stream captures a graph; PCC_DEVICE; PCC_READ_ONLY, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL, PCC_FORKED,
// PCC_BAD_POINTER.
pcc_status pcc_save_begin(const struct pcc_store *store,
                          uint64_t step,
                          const struct pcc_tensor *tensors,
                          uint64_t tensor_count,
                          const struct pcc_pair *metadata,
                          uint64_t metadata_count,
                          const struct pcc_save_options *options,
                          struct pcc_save **save);

// Stores in `payload_bytes` what a save of these tensors and this metadata takes: the `payload_bytes` to format a
// region for. No memory of tensors is read: their `data` may be NULL, and each such tensor then counts in full, where
// tensors with one address are stored once.
//
// Durability: none.
// Threads: any.
// Ownership: nothing is kept.
// Errors: PCC_INVALID_ARGUMENT and PCC_TOO_LARGE as `pcc_save_begin`; PCC_BAD_POINTER.
pcc_status pcc_payload_bytes(const struct pcc_tensor *tensors,
                             uint64_t tensor_count,
                             const struct pcc_pair *metadata,
                             uint64_t metadata_count,
                             uint64_t *payload_bytes);

// Waits until every byte of the state has left the caller's memory: the trainer may then update it. The save goes on
// to durable by itself. Waits for at most `timeout_ms` (negative: for ever, 0: only looks).
//
// Durability: none yet.
// Threads: any number at once.
// Ownership: after any status but PCC_TIMED_OUT the tensors' memory is the caller's again.
// Errors: PCC_TIMED_OUT; otherwise why the save failed, as `pcc_save_wait_durable`.
pcc_status pcc_save_wait_copied(const struct pcc_save *save,
                                int64_t timeout_ms);

// Makes a CUDA stream wait until every byte of the state has left the caller's memory, so that what is enqueued on it from
// now on may update the state. The calling thread waits, for at most `timeout_ms` (negative: for ever), only until all
// copies are enqueued: not at all worth speaking of where the state goes into spare memory of its GPU or finds room in the
// staging pool, or where the save was begun with `flag_waits`, else until all but the last pool's worth has passed through it;
// of a state of more tensors than the driver queues copies of (about 1800) also until all but those are copied, for which the
// stream given at begin must have come so far; and for tensors in host memory until they are copied. Where the stream cannot
// be made to wait (it captures a graph, the driver refuses), the calling thread waits until all is copied. `stream` NULL is
// the legacy default stream. For tensors on several GPUs each stream that may update one of them is to wait.
//
// Durability: none yet.
// Threads: any number at once.
// Ownership: after PCC_OK the tensors' memory is the caller's again for work on that stream.
// Errors: PCC_TIMED_OUT: the memory must still not change; otherwise why the save failed, as `pcc_save_wait_durable`: the
// memory is the caller's again.
pcc_status pcc_save_stream_wait_copied(const struct pcc_save *save,
                                       void *stream,
                                       int64_t timeout_ms);

// Waits until the save has ended, for at most `timeout_ms` (negative: for ever, 0: only looks). PCC_OK means that the
// checkpoint will be found after a crash of the kind that the store's durability names. `durable` (may be NULL, else
// with its `struct_bytes` set) receives the particulars. A save that was begun with `confirm` ends only after
// `pcc_save_confirm`, or by being cancelled: waiting for it for ever is for another thread than the one that confirms.
//
// Durability: durable on PCC_OK, and only then.
// Threads: any number at once; all get the same outcome.
// Ownership: `durable` is the caller's.
// Errors: PCC_TIMED_OUT: it goes on; PCC_CANCELLED: cancelled, or the store was closed; PCC_IO, PCC_NO_SPACE,
// PCC_DEVICE, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL: it failed, and earlier checkpoints are intact; PCC_INVALID_ARGUMENT: so it
// did, as memory of the state was unmapped before it was copied, or is not that of its GPU any more; PCC_UNSUPPORTED,
// PCC_OUT_OF_MEMORY: so it did, as what its options require is not to be had; PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_save_wait_durable(const struct pcc_save *save,
                                 int64_t timeout_ms,
                                 struct pcc_durable *durable);

// Lets a save commit that was begun with `confirm`: before it is copied or after it, at any time; calling it again does
// no harm. PCC_OK without any effect for every other save. If a newer save is durable by then, this one ends superseded
// unless it is to be pinned or still among the newest K.
//
// Durability: none yet: see `pcc_save_wait_durable`. A save that is not confirmed is never found after a crash.
// Threads: any number at once.
// Ownership: none.
// Errors: why the save has failed, as `pcc_save_wait_durable`: PCC_CANCELLED also where the store was closed;
// PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_save_confirm(const struct pcc_save *save);

// How far the save is. Never blocks. Set `progress->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `progress` is the caller's.
// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_save_progress(const struct pcc_save *save, struct pcc_progress *progress);

// Asks for the save to end without a checkpoint. It comes too late where the save is already being committed: wait to
// learn how it ended.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the tensors' memory is the caller's again once `pcc_save_wait_copied` returns.
// Errors: PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_save_cancel(const struct pcc_save *save);

// Copies why the save failed, as `pcc_last_error` does; kept until the save is freed. Returns 0 where it has not
// failed.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
uint64_t pcc_save_error(const struct pcc_save *save,
                        char *buf,
                        uint64_t cap);

// Stores in `fd` an eventfd that becomes readable when the save has ended, for poll, epoll, select or an event loop.
// The same one on every call.
//
// Durability: readable does not mean durable: ask `pcc_save_wait_durable` with 0.
// Threads: any number at once.
// Ownership: the descriptor belongs to the save: do not close it, nor use it after `pcc_save_free`.
// Errors: PCC_IO where the system has no descriptors left; PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_save_event_fd(const struct pcc_save *save,
                             int32_t *fd);

// Has `callback` called once with `user` when the save has ended: on a thread of the library, or at once on this thread
// if it has ended already. Replaces an earlier one that was not called yet; NULL only takes that back.
//
// Durability: the end is not success: ask `pcc_save_wait_durable` with 0.
// Threads: any number at once. The callback holds up other saves while it runs: keep it short, and call no function of CUDA in it,
// nor wait for a thread that does: that may wait for copies, and they for this.
// Ownership: function and `user` must stay valid until it was called or `pcc_save_free` has returned, which waits for
// a call that is running on another thread, and after which none begins: a save that is freed early tells nobody.
// Errors: PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_save_on_end(const struct pcc_save *save,
                           pcc_end_callback callback,
                           void *user);

// Frees a save's handle; NULL is fine. A save that is copied (and confirmed, where it was begun with `confirm`) goes on
// to durable by itself; any other is cancelled, and this waits until the library has stopped reading the caller's
// memory.
//
// Durability: commits nothing, and takes nothing back.
// Threads: no other call may use the handle meanwhile or later.
// Ownership: frees `save`. In a forked child it only forgets it.
// Errors: none.
void pcc_save_free(struct pcc_save *save);

// Begins a raw save of exactly `data_bytes` bytes with `metadata_count` entries of metadata; waits for a slot as long
// as `options->wait_ms` says, which also bounds each wait for room to copy to, here and in `pcc_raw_write` (negative:
// for ever; 0 is said of the slot, the others then take 10 s at most). It is stored as one tensor of bytes
// (PCC_DTYPE_U8) called "raw". `options->confirm` and `pin` are those of any save: after `pcc_raw_commit` the save is
// still to be confirmed.
//
// Durability: none yet.
// Threads: any number at once; raw saves count among the N in flight.
// Ownership: `raw` receives a handle to be given to `pcc_raw_free`, or NULL on failure. Nothing else is kept; `options`
// may be NULL.
// Errors: PCC_NO_SLOT as `pcc_save_begin`, PCC_TIMED_OUT where the staging pool stayed full, PCC_TOO_LARGE,
// PCC_INVALID_ARGUMENT, PCC_READ_ONLY, PCC_IO as `pcc_save_begin`, PCC_DURABILITY_UNKNOWN, PCC_INTERNAL, PCC_FORKED,
// PCC_BAD_POINTER.
pcc_status pcc_raw_begin(const struct pcc_store *store,
                         uint64_t step,
                         uint64_t data_bytes,
                         const struct pcc_pair *metadata,
                         uint64_t metadata_count,
                         const struct pcc_save_options *options,
                         struct pcc_raw **raw);

// Stores in `payload_bytes` what a raw save of `data_bytes` bytes and this metadata takes: the `payload_bytes` to format
// a region for.
//
// Durability: none.
// Threads: any.
// Ownership: nothing is kept.
// Errors: PCC_INVALID_ARGUMENT and PCC_TOO_LARGE as `pcc_raw_begin`; PCC_BAD_POINTER.
pcc_status pcc_raw_payload_bytes(uint64_t data_bytes,
                                 const struct pcc_pair *metadata,
                                 uint64_t metadata_count,
                                 uint64_t *payload_bytes);

// Copies `bytes` bytes of `data` to `offset` of the stream. Each byte is written once, in any order; writing in order
// is fastest. Blocks while the staging pool is full, but no single wait longer than the `wait_ms` given at begin.
//
// Durability: none yet.
// Threads: any number at once on one save.
// Ownership: `data` is the caller's again on return.
// Errors: PCC_INVALID_ARGUMENT for a range that passes the end or was written before (nothing is changed by it, unless
// only a part of the range was written before); PCC_INVALID_STATE after commit. After the following the save has
// failed: PCC_TIMED_OUT (the write may have taken a part, so it cannot be repeated); PCC_TOO_LARGE after 65536 ranges
// with gaps between them (write larger or adjoining pieces); PCC_CORRUPT where the medium changed what was put by;
// otherwise why it failed before. PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_raw_write(const struct pcc_raw *raw,
                         uint64_t offset,
                         const void *data,
                         uint64_t bytes);

// Lets the save commit (once it is confirmed, where it was begun with `confirm`); every byte must have been written.
// `save` receives the save that can be waited for, confirmed, cancelled and freed like any other. The raw handle remains
// to be freed.
//
// Durability: none yet: see `pcc_save_wait_durable`.
// Threads: no other call may use `raw` meanwhile.
// Ownership: `save` receives a handle to be given to `pcc_save_free`, or NULL on failure.
// Errors: PCC_INVALID_STATE where bytes are missing (they may still be written) or it was committed before; otherwise
// why the save failed; PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_raw_commit(struct pcc_raw *raw,
                          struct pcc_save **save);

// How far a raw save is that was not committed yet. Never blocks. Set `progress->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `progress` is the caller's.
// Errors: PCC_INVALID_STATE after commit; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_raw_progress(const struct pcc_raw *raw,
                            struct pcc_progress *progress);

// Cancels a raw save that was not committed yet; writes that are going on in other threads end with PCC_CANCELLED.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the handle remains to be freed.
// Errors: PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_raw_cancel(const struct pcc_raw *raw);

// Frees a raw save's handle; NULL is fine. Cancels it unless it was committed.
//
// Durability: commits nothing, and takes nothing back.
// Threads: no other call may use the handle meanwhile or later.
// Ownership: frees `raw`. In a forked child it only forgets it.
// Errors: none.
void pcc_raw_free(struct pcc_raw *raw);

// Opens the checkpoint that `options` select (NULL: the newest), passing over damaged ones where the selection allows
// it; `pcc_checkpoint_info` and `pcc_checkpoint_rejected` tell of those.
//
// Durability: what was opened is durable.
// Threads: any number at once.
// Ownership: `checkpoint` receives a handle to be given to `pcc_checkpoint_close`, or NULL on failure.
// Errors: PCC_NOT_FOUND; PCC_CORRUPT where all candidates are damaged; PCC_NO_SLOT where holding it would leave fewer
// than N slots to save into; PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
pcc_status pcc_checkpoint_open(const struct pcc_store *store,
                               const struct pcc_select_options *options,
                               struct pcc_checkpoint **checkpoint);

// Restores in one verified pass: reads the `tensor_count` named tensors of the checkpoint that `options` select (NULL:
// the newest) into their `data`, in parallel, verifying every chunk on the way. Name, dtype, shape and size must be
// those of the checkpoint; it may hold further tensors. Where a payload turns out to be damaged, the next candidate is
// read instead. Tensors may be on GPUs, where nothing that was enqueued before may still be at work on them: synchronise
// first. `checkpoint` (may be NULL) receives the checkpoint that was restored, for its step and metadata.
//
// Durability: what was restored is durable.
// Threads: any number at once.
// Ownership: on failure the tensors hold unspecified bytes, unless it is PCC_NOT_FOUND or PCC_INVALID_ARGUMENT: then
// nothing was written. `checkpoint` receives a handle to be given to `pcc_checkpoint_close`, or NULL on failure.
// Errors: as `pcc_checkpoint_open`, so that PCC_NOT_FOUND says that there is no such checkpoint; PCC_INVALID_ARGUMENT
// also for a tensor that it lacks or that differs in dtype, shape or size, and for memory that overlaps (but for tied
// tensors).
pcc_status pcc_restore(const struct pcc_store *store,
                       const struct pcc_select_options *options,
                       const struct pcc_tensor *tensors,
                       uint64_t tensor_count,
                       struct pcc_checkpoint **checkpoint);

// Fills `info` for an open checkpoint. Set `info->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `info` is the caller's.
// Errors: PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for an impossible size.
pcc_status pcc_checkpoint_get_info(const struct pcc_checkpoint *checkpoint, struct pcc_checkpoint_info *info);

// Copies why newer candidates were passed over when this checkpoint was opened, one line each; as `pcc_last_error`.
// Returns 0 where none was.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the text is copied to `buf` (`cap` bytes); NULL or 0 only ask for the size.
// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
uint64_t pcc_checkpoint_rejected(const struct pcc_checkpoint *checkpoint,
                                 char *buf,
                                 uint64_t cap);

// Number of entries of metadata; 0 on failure.
//
// Durability: none.
// Threads: any number at once.
// Ownership: none.
// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
uint64_t pcc_checkpoint_metadata_count(const struct pcc_checkpoint *checkpoint);

// Entry `index` of the metadata, in the order of the keys' bytes. Each text is UTF-8 and followed by a NUL; the
// lengths (either may be NULL) do not count it.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the texts live until `pcc_checkpoint_close`.
// Errors: PCC_NOT_FOUND where there is no such index; PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_checkpoint_metadata_get(const struct pcc_checkpoint *checkpoint,
                                       uint64_t index,
                                       const char **key,
                                       uint64_t *key_bytes,
                                       const char **value,
                                       uint64_t *value_bytes);

// The value of a metadata key (NUL-terminated UTF-8). `value_bytes` may be NULL, and does not count the final NUL.
//
// Durability: none.
// Threads: any number at once.
// Ownership: the value lives until `pcc_checkpoint_close`.
// Errors: PCC_NOT_FOUND where there is no such key; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
pcc_status pcc_checkpoint_metadata_find(const struct pcc_checkpoint *checkpoint,
                                        const char *key,
                                        const char **value,
                                        uint64_t *value_bytes);

// Number of tensors, tied ones included; 0 on failure. Stored tensors come first, in payload order.
//
// Durability: none.
// Threads: any number at once.
// Ownership: none.
// Errors: returns 0; PCC_FORKED or PCC_BAD_POINTER in `pcc_last_error_status`.
uint64_t pcc_checkpoint_tensor_count(const struct pcc_checkpoint *checkpoint);

// Fills `info` for tensor `index`. Set `info->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `info` is the caller's; name and shape in it live until `pcc_checkpoint_close`.
// Errors: PCC_NOT_FOUND where there is no such index; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT.
pcc_status pcc_checkpoint_tensor_get(const struct pcc_checkpoint *checkpoint,
                                     uint64_t index,
                                     struct pcc_tensor_info *info);

// Stores in `index` the index of the tensor called `name` (NUL-terminated UTF-8).
//
// Durability: none.
// Threads: any number at once.
// Ownership: `index` is the caller's.
// Errors: PCC_NOT_FOUND; PCC_FORKED, PCC_BAD_POINTER, PCC_INVALID_ARGUMENT for text that is not UTF-8.
pcc_status pcc_checkpoint_tensor_find(const struct pcc_checkpoint *checkpoint,
                                      const char *name,
                                      uint64_t *index);

// Reads `read_count` pieces of tensors in parallel; every chunk that holds a byte of them is verified. Blocks until
// done, also for memory of GPUs, on which nothing that was enqueued before may still be at work: synchronise first.
//
// Durability: none.
// Threads: any number at once.
// Ownership: on failure the destinations hold unspecified bytes.
// Errors: PCC_NOT_FOUND for an unknown tensor; PCC_INVALID_ARGUMENT for a piece that passes its tensor, and for
// destinations that overlap; PCC_CORRUPT where stored bytes are damaged; PCC_UNSUPPORTED for memory of a GPU
// where this system or this build has none; PCC_DEVICE, PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_checkpoint_read(const struct pcc_checkpoint *checkpoint,
                               const struct pcc_read *reads,
                               uint64_t read_count);

// Reads `bytes` bytes of the payload from `offset`, verified. The whole payload (`payload_bytes` of its info) is a
// complete safetensors file: written to a file, it is the checkpoint's export.
//
// Durability: none.
// Threads: any number at once.
// Ownership: on failure `dst` holds unspecified bytes.
// Errors: PCC_INVALID_ARGUMENT for a range that passes the payload; PCC_CORRUPT, PCC_RECLAIMED, PCC_IO, PCC_FORKED,
// PCC_BAD_POINTER.
pcc_status pcc_checkpoint_read_payload(const struct pcc_checkpoint *checkpoint,
                                       uint64_t offset,
                                       void *dst,
                                       uint64_t bytes);

// Reads and verifies every chunk of the payload; nothing is kept.
//
// Durability: none.
// Threads: any number at once.
// Ownership: none.
// Errors: PCC_CORRUPT where stored bytes are damaged; PCC_RECLAIMED, PCC_IO, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_checkpoint_verify(const struct pcc_checkpoint *checkpoint);

// Closes a checkpoint, which may then be overwritten unless it is pinned; NULL is fine.
//
// Durability: none.
// Threads: no other call may use the handle meanwhile or later.
// Ownership: frees `checkpoint` and every text that was got from it. In a forked child it only forgets it.
// Errors: none.
void pcc_checkpoint_close(struct pcc_checkpoint *checkpoint);

// Advises how often to save: the smallest interval at which N saves in flight keep up and the run is not slowed down
// by more than the caller accepts, and the work that a crash then loses. With t the time of an iteration, N * bytes /
// bandwidth the time Tw to durable of one save among N, s the stall of one save and q the slowdown, the interval is
// the larger of Tw / (N * q * t) and s / ((q - 1) * t), rounded up; a crash loses Tw and up to one interval. `store`
// may be NULL where bandwidth, stall and N are given. Set `tuning->struct_bytes` before.
//
// Durability: none.
// Threads: any number at once.
// Ownership: `options` and `tuning` are the caller's.
// Errors: PCC_INVALID_STATE where the bandwidth shall be measured and no save of the store is durable yet;
// PCC_INVALID_ARGUMENT, PCC_FORKED, PCC_BAD_POINTER.
pcc_status pcc_tune(const struct pcc_store *store,
                    const struct pcc_tune_options *options,
                    struct pcc_tuning *tuning);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PCCHECK_H */
