/*
 * A stand-in for the NVIDIA driver (libcuda.so.1), for tests on machines without a GPU: the calls that the engine
 * makes, with their real signatures and semantics, and further ones (standin_...) by which tests control and watch it.
 *
 * Each stream is a lane, whose thread does its work in order. Work is numbered as it is enqueued, on all lanes
 * together; a point is a lane and a number, and is reached once the lane has no work left up to that number. Events,
 * waits and the ordering of the legacy default stream are all points. One lock guards everything; only delays and the
 * moving of bytes run outside of it.
 *
 * In this it differs from the driver:
 *  - A primary context that nobody retains any more refuses to be used, but what is in it stays, so that it can be
 *    counted, and is there again when the context is retained again.
 *  - The per-thread default stream (2) is one stream per context, which all threads share. Like the driver's it is
 *    ordered with the legacy default stream.
 *  - Streams take any number of pieces of work, unless standin_queue_limit says otherwise; each has a queue of its own.
 *  - A capture records nothing: its stream refuses work.
 *  - The copies of a batch run from the last to the first, since their order is open; sources are read in stream order,
 *    whatever the attributes allow. A batch is one piece of work, and delayed once; of a queue it takes the room of as
 *    many as there are copies, and goes there as a whole.
 *
 * It is compiled with -fvisibility=hidden: what is not EXPORTED stays out of the way of the program's own names. What
 * the files share is below, file by file; each uses only those before it.
 */
#ifndef STANDIN_H
#define STANDIN_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define EXPORTED __attribute__((visibility("default")))

/* ---- The driver's types, codes and calls ---- */

typedef int32_t CUresult;
typedef int32_t CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct context *CUcontext;
typedef struct lane *CUstream;
typedef struct event *CUevent;
typedef struct module *CUmodule, *CUfunction;

typedef struct {
    int32_t srcAccessOrder;
    struct {
        int32_t type, id;
    } srcLocHint, dstLocHint;
    uint32_t flags;
} CUmemcpyAttributes;

#define CODES(X)                                                                          \
    X(CUDA_SUCCESS, 0, "no error")                                                        \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                                    \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                       \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                              \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")                    \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                           \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                          \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, "no kernel image is available for execution on the device") \
    X(CUDA_ERROR_ECC_UNCORRECTABLE, 214, "uncorrectable ECC error encountered")           \
    X(CUDA_ERROR_INVALID_PTX, 218, "a PTX JIT compilation failed")                        \
    X(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, 222, "the PTX was compiled with an unsupported toolchain") \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                          \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                                \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                      \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")        \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709, "context is destroyed")                       \
    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712, "memory is already mapped")         \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, 713, "memory is not registered")             \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                        \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                           \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "not permitted when stream is capturing") \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "failed in the capture before")         \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905, "dependency between captured and other work") \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906, "implicit dependency on a capturing stream") \
    X(CUDA_ERROR_CAPTURED_EVENT, 907, "not permitted on an event of a capturing stream")  \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")

#define CODE_NUMBER(name, number, text) name = number,
enum { CODES(CODE_NUMBER) };

#define CALLS(X)                                                                                               \
    X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString)                                      \
    X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName) X(cuDeviceGetAttribute)                              \
    X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease_v2)                                                \
    X(cuCtxPushCurrent_v2) X(cuCtxPopCurrent_v2) X(cuCtxGetCurrent) X(cuCtxSetCurrent) X(cuCtxGetDevice)       \
    X(cuStreamCreateWithPriority) X(cuStreamCreate) X(cuStreamDestroy_v2) X(cuStreamWaitEvent)                 \
    X(cuStreamIsCapturing) X(cuStreamGetCtx) X(cuStreamQuery) X(cuStreamSynchronize) X(cuStreamWaitValue32_v2) \
    X(cuStreamWriteValue32_v2)                                                                                 \
    X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)               \
    X(cuMemAlloc_v2) X(cuMemFree_v2) X(cuMemGetInfo_v2)                                                        \
    X(cuMemHostRegister_v2) X(cuMemHostUnregister) X(cuMemHostGetDevicePointer_v2) X(cuPointerGetAttributes)   \
    X(cuMemcpyDtoHAsync_v2) X(cuMemcpyHtoDAsync_v2) X(cuMemcpyDtoDAsync_v2) X(cuMemcpyBatchAsync)              \
    X(cuModuleLoadData) X(cuModuleGetFunction) X(cuModuleUnload) X(cuLaunchKernel)                             \
    X(cuThreadExchangeStreamCaptureMode)

#define CALL_NUMBER(name) CALL_##name,
enum call { CALLS(CALL_NUMBER) CALL_COUNT };

/* ---- What there is ---- */

enum { MAX_DEVICES = 16 };

struct context {
    CUdevice device;
    uint32_t retains;
    uint64_t used;
    /* Its address space, and how much of it was ever given out. */
    uint8_t *arena;
    uint64_t given;
    /* Once work has failed: what all that may report it says. */
    CUresult failed;
    /* Lanes that are moving bytes. */
    uint32_t moving;
    /* All that have work or may get some: destroyed streams stay until theirs is done. */
    struct lane *lanes;
    /* The default streams, made when they are first used. */
    struct lane *legacy, *per_thread;
};

struct lane {
    struct lane *next;
    struct context *context;
    bool open, blocking, capturing, held;
    /* Its thread and all that name a point on it. */
    uint32_t users;
    /* What is being done, and what comes after it; how much room that takes. */
    struct work *first, **last;
    size_t length;
    pthread_cond_t more, progress;
};

struct event {
    struct event *next;
    struct context *context;
    /* The point where it was recorded last; NULL where never. */
    struct lane *lane;
    uint64_t number;
    bool captured;
};

/* Device memory, whose bytes are at its shadow, or registered host memory, which has none. */
struct range {
    CUdeviceptr start;
    size_t bytes;
    struct context *context;
    uint8_t *shadow;
    bool portable;
};

/* Code that is loaded on a device. */
struct module {
    struct module *next;
    struct context *context;
    bool has_entry;
};

struct launch {
    uint32_t blocks, threads;
    CUdeviceptr base;
    uint64_t chunk_bytes, count;
    CUdeviceptr out;
};

struct copy {
    CUdeviceptr to, from;
    size_t bytes;
    /* Host memory that is not registered. */
    bool to_pageable, from_pageable;
};

enum kind { WORK_MARK, WORK_WAIT, WORK_POLL, WORK_STORE, WORK_FILL, WORK_KERNEL, WORK_COPIES };
enum { WAIT_GEQ, WAIT_EQ };

struct work {
    struct work *next;
    enum kind kind;
    uint64_t number;
    /* Made by the ordering of the legacy default stream: no call's own. */
    bool implied;
    /* The point that is waited for. */
    struct lane *lane;
    uint64_t until;
    CUdeviceptr address;
    uint32_t value, flags;
    uint64_t bytes, seed, delay_us;
    struct launch launch;
    size_t count;
    struct copy copies[];
};

enum side { SIDE_HOST, SIDE_DEVICE, SIDE_EITHER };

/* ---- How calls begin and return ---- */

/* Holds the lock until the end of the block. */
#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = lock()

#define TRY(expression)                \
    do {                               \
        CUresult code_ = (expression); \
        if (code_ != CUDA_SUCCESS)     \
            return code_;              \
    } while (0)
#define NEED(condition, code) TRY((condition) ? CUDA_SUCCESS : (code))
#define NEED_VALID(condition) NEED(condition, CUDA_ERROR_INVALID_VALUE)

/* Every call begins with this: it is counted, and fails where a test wants it to. */
#define ENTER_ALWAYS(name) \
    LOCKED;                \
    TRY(enter(CALL_##name))
#define ENTER(name)     \
    ENTER_ALWAYS(name); \
    NEED(device_count > 0, CUDA_ERROR_NOT_INITIALIZED)

/* Declares what a call works on, and returns where there is none. */
#define CURRENT(context)     \
    struct context *context; \
    TRY(current(&context))
#define LANE(lane, stream) \
    struct lane *lane;     \
    TRY(find_lane(stream, &lane))

/* ---- calls.c ---- */

extern pthread_mutex_t mutex;
/* A context's lanes have stopped moving bytes, or a call is not stalled any more. */
extern pthread_cond_t moved;
/* Calls that wait for room on a stream: no other call gets in meanwhile. */
extern uint32_t jammed;
int lock(void);
void unlock(int *unused);
void die(const char *what, const char *name);
void *allocate(size_t bytes);
CUresult enter(enum call call);
void reset_calls(void);

/* ---- devices.c ---- */

extern int device_count;
extern uint64_t device_bytes;
extern struct context contexts[MAX_DEVICES];
CUresult current(struct context **context);
void fail_context(struct context *context, CUresult code);

/* ---- ranges.c ---- */

extern struct range **ranges;
extern size_t range_count;
struct range *overlapping(CUdeviceptr address, size_t bytes);
struct range *containing(CUdeviceptr address, size_t bytes);
uint8_t *bytes_at(CUdeviceptr address, size_t bytes);
void add_range(struct range range);
void remove_range(struct range *range);
CUresult check_bytes(CUdeviceptr address, size_t bytes, enum side side, const struct context *context, bool *pageable);

/* ---- kernel.c ---- */

void run_kernel(const struct launch *launch, const uint8_t *chunks, size_t bytes, uint8_t *hashes);

/* ---- work.c ---- */

extern uint64_t last_number, work_to_fail, delay_us, copied_bytes, copies_done;
extern CUresult work_code;
bool is_reached(const struct lane *lane, uint64_t number);
void release_lane(struct lane *lane);
void reach(struct lane *lane, uint64_t number, const struct context *unless_failed);
void drain(struct context *context);
struct work *make_work(enum kind kind, size_t copies);
struct work *make_wait(struct lane *lane, uint64_t number);
void run(struct lane *lane, struct work *work);

/* ---- lanes.c ---- */

extern bool all_held;
extern uint64_t queue_limit, jams;
struct lane *make_lane(struct context *context, bool blocking);
void order_by_legacy(struct lane *lane);
uint64_t enqueue(struct lane *lane, struct work *work);
struct lane *made_lane(CUstream handle);
CUresult find_lane(CUstream handle, struct lane **lane);

/* ---- streams.c ---- */

extern bool capture_invalidated;
extern uint32_t captures;
CUresult check_no_capture(void);
CUresult check_lane(const struct lane *lane);

/* ---- events.c, memory.c, modules.c ---- */

extern struct event *events;
extern bool allocations_wait;
void drain_to_allocate(void);
extern struct module *modules;

#endif
