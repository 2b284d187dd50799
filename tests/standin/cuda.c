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
 *  - A capture records nothing: its stream refuses work.
 *  - The copies of a batch run from the last to the first, since their order is open; sources are read in stream order,
 *    whatever the attributes allow. A batch is one piece of work, and delayed once.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

typedef int32_t CUresult;
typedef int32_t CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct context *CUcontext;
typedef struct lane *CUstream;
typedef struct event *CUevent;

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
    X(CUDA_ERROR_ECC_UNCORRECTABLE, 214, "uncorrectable ECC error encountered")           \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                          \
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
#define CODE_ROW(name, number, text) {number, #name, text},
enum { CODES(CODE_NUMBER) };
static const struct code {
    CUresult number;
    const char *name, *text;
} codes[] = {CODES(CODE_ROW)};
enum { CODE_COUNT = sizeof codes / sizeof codes[0] };

#define CALLS(X)                                                                                               \
    X(cuInit) X(cuDriverGetVersion) X(cuGetErrorName) X(cuGetErrorString)                                      \
    X(cuDeviceGetCount) X(cuDeviceGet) X(cuDeviceGetName) X(cuDeviceGetAttribute)                              \
    X(cuDevicePrimaryCtxRetain) X(cuDevicePrimaryCtxRelease_v2)                                                \
    X(cuCtxPushCurrent_v2) X(cuCtxPopCurrent_v2) X(cuCtxGetCurrent) X(cuCtxSetCurrent) X(cuCtxGetDevice)       \
    X(cuStreamCreateWithPriority) X(cuStreamCreate) X(cuStreamDestroy_v2) X(cuStreamWaitEvent)                 \
    X(cuStreamIsCapturing) X(cuStreamGetCtx) X(cuStreamQuery) X(cuStreamSynchronize) X(cuStreamWaitValue32_v2) \
    X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventRecord) X(cuEventQuery) X(cuEventSynchronize)               \
    X(cuMemAlloc_v2) X(cuMemFree_v2) X(cuMemGetInfo_v2)                                                        \
    X(cuMemHostRegister_v2) X(cuMemHostUnregister) X(cuMemHostGetDevicePointer_v2) X(cuPointerGetAttribute)    \
    X(cuMemcpyDtoHAsync_v2) X(cuMemcpyHtoDAsync_v2) X(cuMemcpyDtoDAsync_v2) X(cuMemcpyBatchAsync)              \
    X(cuThreadExchangeStreamCaptureMode)

#define CALL_NUMBER(name) CALL_##name,
#define CALL_NAME(name) #name,
enum call { CALLS(CALL_NUMBER) CALL_COUNT };
static const char *const call_names[] = {CALLS(CALL_NAME)};

enum { MAX_DEVICES = 16, MAX_PUSHED = 64, MAX_FAULTS = 64 };

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
    /* What is being done, and what comes after it. */
    struct work *first, **last;
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

struct copy {
    CUdeviceptr to, from;
    size_t bytes;
    /* Host memory that is not registered. */
    bool to_pageable, from_pageable;
};

enum kind { WORK_MARK, WORK_WAIT, WORK_POLL, WORK_FILL, WORK_COPIES };

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
    size_t count;
    struct copy copies[];
};

struct fault {
    bool armed, sticky;
    enum call call;
    uint64_t at;
    CUresult code;
};

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
static int device_count;
static uint64_t device_bytes, last_number;
static struct context contexts[MAX_DEVICES];
static struct event *events;
/* Sorted by address: no two overlap. */
static struct range **ranges;
static size_t range_count, range_room;

static __thread struct context *pushed[MAX_PUSHED];
static __thread int pushed_count;
static __thread uint32_t capture_mode;

static struct fault faults[MAX_FAULTS];
static uint64_t calls_ever[CALL_COUNT], calls_at_reset[CALL_COUNT];
static uint64_t work_to_fail, delay_us, copied_bytes, copies_done;
static CUresult work_code;
static bool stalled[CALL_COUNT];
static bool all_held, capture_invalidated, allocations_wait;
static uint32_t captures;

static int lock(void) {
    pthread_mutex_lock(&mutex);
    return 0;
}

static void unlock(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&mutex);
}

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

static void die(const char *what, const char *name) {
    fprintf(stderr, "standin: %s: %s\n", what, name);
    abort();
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL)
        die("out of memory", "calloc");
    return memory;
}

static CUresult enter(enum call call) {
    uint64_t now = ++calls_ever[call];
    while (stalled[call])
        pthread_cond_wait(&moved, &mutex);
    for (struct fault *fault = faults; fault < faults + MAX_FAULTS; fault++) {
        if (fault->armed && fault->call == call && now >= fault->at) {
            fault->armed = fault->sticky;
            return fault->code;
        }
    }
    return CUDA_SUCCESS;
}

/* ---- The driver ---- */

static uint64_t number_from(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text == NULL || *text == 0 ? otherwise : strtoull(text, NULL, 0);
}

CUresult cuInit(uint32_t flags) {
    ENTER_ALWAYS(cuInit);
    NEED_VALID(flags == 0);
    uint64_t count = number_from("STANDIN_DEVICES", 2);
    NEED(count > 0, CUDA_ERROR_NO_DEVICE);
    if (device_count == 0) {
        device_count = count > MAX_DEVICES ? MAX_DEVICES : (int)count;
        device_bytes = number_from("STANDIN_MEMORY_BYTES", 1 << 30);
        for (int i = 0; i < device_count; i++)
            contexts[i].device = i;
    }
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
    ENTER_ALWAYS(cuDriverGetVersion);
    NEED_VALID(version != NULL);
    *version = 12080;
    return CUDA_SUCCESS;
}

static const struct code *find_code(CUresult number) {
    for (const struct code *code = codes; code < codes + CODE_COUNT; code++)
        if (code->number == number)
            return code;
    return NULL;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    ENTER_ALWAYS(cuGetErrorName);
    const struct code *code = find_code(error);
    *name = code == NULL ? NULL : code->name;
    return code == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    ENTER_ALWAYS(cuGetErrorString);
    const struct code *code = find_code(error);
    *text = code == NULL ? NULL : code->text;
    return code == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* ---- Devices ---- */

#define NEED_DEVICE(device) NEED((device) >= 0 && (device) < device_count, CUDA_ERROR_INVALID_DEVICE)

CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    NEED_VALID(count != NULL);
    *count = device_count;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet);
    NEED_VALID(device != NULL);
    NEED_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
    ENTER(cuDeviceGetName);
    NEED_VALID(name != NULL && room > 0);
    NEED_DEVICE(device);
    snprintf(name, (size_t)room, "Stand-in %d", (int)device);
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    /* CAN_MAP_HOST_MEMORY, UNIFIED_ADDRESSING, CAN_USE_STREAM_MEM_OPS_V1, HOST_REGISTER_SUPPORTED */
    enum { MAPS = 19, UNIFIED = 41, WAITS_FOR_VALUES = 92, REGISTERS = 99 };
    ENTER(cuDeviceGetAttribute);
    NEED_VALID(value != NULL && attribute > 0);
    NEED_DEVICE(device);
    *value = attribute == MAPS || attribute == UNIFIED || attribute == WAITS_FOR_VALUES || attribute == REGISTERS;
    return CUDA_SUCCESS;
}

/* ---- Contexts ---- */

/* The calling thread's context. */
static CUresult current(struct context **context) {
    NEED(pushed_count > 0, CUDA_ERROR_INVALID_CONTEXT);
    *context = pushed[pushed_count - 1];
    NEED((*context)->retains > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return CUDA_SUCCESS;
}

static bool is_context(const struct context *context) {
    for (int i = 0; i < device_count; i++)
        if (context == &contexts[i])
            return context->retains > 0;
    return false;
}

/* From now on nothing runs in the context, and every call that may report it says why. */
static void fail_context(struct context *context, CUresult code) {
    while (context->moving > 0)
        pthread_cond_wait(&moved, &mutex);
    context->failed = code;
    /* Its lanes may be waiting for points on any. */
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            pthread_cond_broadcast(&lane->progress);
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(cuDevicePrimaryCtxRetain);
    NEED_VALID(context != NULL);
    NEED_DEVICE(device);
    *context = &contexts[device];
    (*context)->retains++;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(cuDevicePrimaryCtxRelease_v2);
    NEED_DEVICE(device);
    NEED(contexts[device].retains > 0, CUDA_ERROR_INVALID_CONTEXT);
    contexts[device].retains--;
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(cuCtxPushCurrent_v2);
    NEED(is_context(context), CUDA_ERROR_INVALID_CONTEXT);
    if (pushed_count == MAX_PUSHED)
        die("contexts pushed without being popped", "cuCtxPushCurrent_v2");
    pushed[pushed_count++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER(cuCtxPopCurrent_v2);
    NEED(pushed_count > 0, CUDA_ERROR_INVALID_CONTEXT);
    pushed_count--;
    if (context != NULL)
        *context = pushed[pushed_count];
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER(cuCtxGetCurrent);
    NEED_VALID(context != NULL);
    *context = pushed_count == 0 ? NULL : pushed[pushed_count - 1];
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(cuCtxSetCurrent);
    NEED(context == NULL || is_context(context), CUDA_ERROR_INVALID_CONTEXT);
    pushed_count -= pushed_count > 0;
    if (context != NULL)
        pushed[pushed_count++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER(cuCtxGetDevice);
    NEED_VALID(device != NULL);
    CURRENT(context);
    *device = context->device;
    return CUDA_SUCCESS;
}

/* ---- Lanes and points ---- */

static bool is_reached(const struct lane *lane, uint64_t number) {
    return lane->first == NULL || lane->first->number > number;
}

static void release_lane(struct lane *lane) {
    if (--lane->users > 0)
        return;
    pthread_cond_destroy(&lane->more);
    pthread_cond_destroy(&lane->progress);
    free(lane);
}

/* Waits for a point; not any longer once a context has failed, where one is given. */
static void reach(struct lane *lane, uint64_t number, const struct context *unless_failed) {
    lane->users++;
    while (!is_reached(lane, number) && (unless_failed == NULL || unless_failed->failed == 0))
        pthread_cond_wait(&lane->progress, &mutex);
    release_lane(lane);
}

/* Waits for all that has been enqueued in a context so far. */
static void drain(struct context *context) {
    uint64_t number = last_number;
    for (struct lane *lane = context->lanes; lane != NULL;) {
        if (is_reached(lane, number)) {
            lane = lane->next;
            continue;
        }
        /* Other lanes may go meanwhile. */
        reach(lane, number, NULL);
        lane = context->lanes;
    }
}

static void run(struct lane *lane, struct work *work);

static void *serve(void *argument) {
    struct lane *lane = argument, **link;
    struct work *work;
    LOCKED;
    for (;;) {
        while (lane->first == NULL ? lane->open : all_held || lane->held)
            pthread_cond_wait(&lane->more, &mutex);
        work = lane->first;
        if (work == NULL)
            break;
        /* In a context that has failed, work is dropped. */
        if (lane->context->failed == 0)
            run(lane, work);
        lane->first = work->next;
        if (lane->first == NULL)
            lane->last = &lane->first;
        if (work->lane != NULL)
            release_lane(work->lane);
        free(work);
        pthread_cond_broadcast(&lane->progress);
    }
    for (link = &lane->context->lanes; *link != lane; link = &(*link)->next)
        continue;
    *link = lane->next;
    release_lane(lane);
    return NULL;
}

static struct lane *make_lane(struct context *context, bool blocking) {
    struct lane *lane = allocate(sizeof *lane);
    pthread_attr_t attributes;
    pthread_t thread;
    *lane = (struct lane){.next = context->lanes, .context = context, .open = true, .blocking = blocking, .users = 1};
    lane->last = &lane->first;
    context->lanes = lane;
    pthread_cond_init(&lane->more, NULL);
    pthread_cond_init(&lane->progress, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 512 << 10);
    if (pthread_create(&thread, &attributes, serve, lane) != 0)
        die("no thread for a stream", "pthread_create");
    pthread_attr_destroy(&attributes);
    return lane;
}

static struct work *make_work(enum kind kind, size_t copies) {
    struct work *work = allocate(sizeof *work + copies * sizeof work->copies[0]);
    work->kind = kind;
    work->count = copies;
    return work;
}

static uint64_t append(struct lane *lane, struct work *work) {
    work->number = ++last_number;
    *lane->last = work;
    lane->last = &work->next;
    pthread_cond_signal(&lane->more);
    return work->number;
}

static struct work *make_wait(struct lane *lane, uint64_t number) {
    struct work *work = make_work(WORK_WAIT, 0);
    work->lane = lane;
    work->until = number;
    lane->users++;
    return work;
}

/* Makes a lane wait for what the legacy default stream's ordering has before its next work. */
static void order_by_legacy(struct lane *lane) {
    struct lane *legacy = lane->context->legacy;
    for (struct lane *other = lane->context->lanes; other != NULL && lane->blocking; other = other->next) {
        bool ordered = other != lane && other->blocking && (lane == legacy || other == legacy);
        if (ordered && other->first != NULL) {
            struct work *work = make_wait(other, last_number);
            work->implied = true;
            append(lane, work);
        }
    }
}

static uint64_t enqueue(struct lane *lane, struct work *work) {
    order_by_legacy(lane);
    return append(lane, work);
}

/* The stream that a program made and has not destroyed; NULL where the handle is none. */
static struct lane *made_lane(CUstream handle) {
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            if (lane == handle && lane->open)
                return lane;
    return NULL;
}

/* Any stream, the default ones of the current context included. */
static CUresult find_lane(CUstream handle, struct lane **lane) {
    CURRENT(context);
    if ((uintptr_t)handle <= 2) {
        struct lane **slot = (uintptr_t)handle == 2 ? &context->per_thread : &context->legacy;
        if (*slot == NULL)
            *slot = make_lane(context, true);
        *lane = *slot;
    } else {
        *lane = made_lane(handle);
    }
    NEED(*lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    return CUDA_SUCCESS;
}

/* ---- What captures forbid ---- */

enum { CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED };

static CUresult invalidate_capture(CUresult code) {
    capture_invalidated = true;
    return code;
}

/* For calls that must not be made while a capture is open. All are of the global mode here, so that they forbid it to
 * all threads. */
static CUresult check_no_capture(void) {
    if (captures == 0 || capture_mode == CAPTURE_RELAXED)
        return CUDA_SUCCESS;
    return invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

/* Whether it is a legacy default stream, and ordered with a stream that captures. */
static bool implies_capture(const struct lane *lane) {
    for (const struct lane *other = lane->context->lanes; other != NULL; other = other->next)
        if (lane == lane->context->legacy && other->blocking && other->capturing)
            return true;
    return false;
}

/* Why a stream takes no work. What is refused here leaves the capture as it is, unless it is on another stream. */
static CUresult check_lane(const struct lane *lane) {
    TRY(lane->context->failed);
    if (lane->capturing)
        return capture_invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    return implies_capture(lane) ? invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) : CUDA_SUCCESS;
}

/* Why a stream cannot be asked or waited for. */
static CUresult check_look(const struct lane *lane) {
    TRY(lane->context->failed);
    if (lane->capturing)
        return invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return implies_capture(lane) ? invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) : CUDA_SUCCESS;
}

/* ---- Streams ---- */

static CUresult create_stream(CUstream *stream, uint32_t flags) {
    NEED_VALID(stream != NULL && flags <= 1);
    CURRENT(context);
    *stream = make_lane(context, flags == 0);
    return CUDA_SUCCESS;
}

CUresult cuStreamCreateWithPriority(CUstream *stream, uint32_t flags, int priority) {
    ENTER(cuStreamCreateWithPriority);
    (void)priority;
    return create_stream(stream, flags);
}

CUresult cuStreamCreate(CUstream *stream, uint32_t flags) {
    ENTER(cuStreamCreate);
    return create_stream(stream, flags);
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER(cuStreamDestroy_v2);
    struct lane *lane = made_lane(stream);
    NEED(lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    captures -= lane->capturing;
    lane->capturing = false;
    lane->open = false;
    pthread_cond_signal(&lane->more);
    return CUDA_SUCCESS;
}

static struct event *find_event(CUevent handle) {
    struct event *event = events;
    while (event != NULL && event != handle)
        event = event->next;
    return event;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent handle, uint32_t flags) {
    ENTER(cuStreamWaitEvent);
    LANE(lane, stream);
    struct event *event = find_event(handle);
    NEED(event != NULL, CUDA_ERROR_INVALID_HANDLE);
    NEED_VALID(flags <= 1);
    TRY(event->context->failed);
    TRY(check_lane(lane));
    NEED(!event->captured, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (event->lane != NULL)
        enqueue(lane, make_wait(event->lane, event->number));
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, uint32_t *status) {
    ENTER(cuStreamIsCapturing);
    NEED_VALID(status != NULL);
    LANE(lane, stream);
    NEED(!implies_capture(lane), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    *status = !lane->capturing ? 0 : capture_invalidated ? 2 : 1;
    return CUDA_SUCCESS;
}

/* Only a default stream needs a current context, which is then the answer. */
CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
    ENTER(cuStreamGetCtx);
    NEED_VALID(context != NULL);
    if ((uintptr_t)stream <= 2)
        return current(context);
    struct lane *lane = made_lane(stream);
    NEED(lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    *context = lane->context;
    return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream stream) {
    ENTER(cuStreamQuery);
    LANE(lane, stream);
    bool legacy = lane == lane->context->legacy;
    TRY(check_look(lane));
    TRY(legacy ? check_no_capture() : CUDA_SUCCESS);
    for (struct lane *other = lane->context->lanes; other != NULL; other = other->next)
        if (other == lane || (legacy && other->blocking))
            NEED(other->first == NULL, CUDA_ERROR_NOT_READY);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    ENTER(cuStreamSynchronize);
    LANE(lane, stream);
    struct context *context = lane->context;
    TRY(check_look(lane));
    TRY(check_no_capture());
    /* The legacy one ends when all do that it is ordered with. */
    if (lane == context->legacy)
        order_by_legacy(lane);
    reach(lane, last_number, context);
    return context->failed;
}

/* ---- Events ---- */

CUresult cuEventCreate(CUevent *event, uint32_t flags) {
    ENTER(cuEventCreate);
    NEED_VALID(event != NULL && flags <= 7);
    CURRENT(context);
    *event = allocate(sizeof **event);
    **event = (struct event){.next = events, .context = context};
    events = *event;
    return CUDA_SUCCESS;
}

/* Waits that were enqueued for it stay, since they are for a point. */
CUresult cuEventDestroy_v2(CUevent event) {
    ENTER(cuEventDestroy_v2);
    struct event **link = &events;
    while (*link != NULL && *link != event)
        link = &(*link)->next;
    NEED(*link != NULL, CUDA_ERROR_INVALID_HANDLE);
    *link = event->next;
    if (event->lane != NULL)
        release_lane(event->lane);
    free(event);
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent handle, CUstream stream) {
    ENTER(cuEventRecord);
    LANE(lane, stream);
    struct event *event = find_event(handle);
    NEED(event != NULL && event->context == lane->context, CUDA_ERROR_INVALID_HANDLE);
    event->captured = event->captured || lane->capturing;
    TRY(check_lane(lane));
    lane->users++;
    if (event->lane != NULL)
        release_lane(event->lane);
    event->lane = lane;
    event->captured = false;
    event->number = enqueue(lane, make_work(WORK_MARK, 0));
    return CUDA_SUCCESS;
}

static CUresult look_at_event(CUevent handle, struct event **event) {
    CURRENT(context);
    *event = find_event(handle);
    NEED(*event != NULL, CUDA_ERROR_INVALID_HANDLE);
    TRY((*event)->context->failed);
    TRY(check_no_capture());
    NEED(!(*event)->captured, CUDA_ERROR_CAPTURED_EVENT);
    return CUDA_SUCCESS;
}

CUresult cuEventQuery(CUevent handle) {
    ENTER(cuEventQuery);
    struct event *event;
    TRY(look_at_event(handle, &event));
    NEED(event->lane == NULL || is_reached(event->lane, event->number), CUDA_ERROR_NOT_READY);
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent handle) {
    ENTER(cuEventSynchronize);
    struct event *event;
    TRY(look_at_event(handle, &event));
    /* Others may destroy it meanwhile. */
    struct context *context = event->context;
    if (event->lane != NULL)
        reach(event->lane, event->number, context);
    return context->failed;
}

/* ---- Memory ---- */

/* How many ranges end at or before an address: the next one contains it or is the first behind it. */
static size_t ranges_before(CUdeviceptr address) {
    size_t low = 0, high = range_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle]->start + ranges[middle]->bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* The first range that has bytes in common; NULL where none has. */
static struct range *overlapping(CUdeviceptr address, size_t bytes) {
    size_t at = ranges_before(address);
    return at < range_count && ranges[at]->start < address + bytes ? ranges[at] : NULL;
}

/* The range that all of the bytes are in. */
static struct range *containing(CUdeviceptr address, size_t bytes) {
    struct range *range = overlapping(address, 1);
    return range != NULL && bytes <= range->start + range->bytes - address ? range : NULL;
}

/* Where the host finds bytes of device or registered memory; NULL where they are neither. */
static uint8_t *bytes_at(CUdeviceptr address, size_t bytes) {
    struct range *range = containing(address, bytes);
    if (range == NULL)
        return NULL;
    return range->shadow == NULL ? (uint8_t *)(uintptr_t)address : range->shadow + (address - range->start);
}

static void add_range(struct range range) {
    size_t at = ranges_before(range.start);
    if (range_count == range_room) {
        range_room = range_room * 2 + 16;
        ranges = realloc(ranges, range_room * sizeof *ranges);
        if (ranges == NULL)
            die("out of memory", "realloc");
    }
    memmove(&ranges[at + 1], &ranges[at], (range_count - at) * sizeof *ranges);
    ranges[at] = allocate(sizeof range);
    *ranges[at] = range;
    range_count++;
}

/* Takes out the allocation or the registered range that begins there, once the work that may use it is done; false
 * where there is none. */
static bool take_range(CUdeviceptr address, bool registered, struct range *taken) {
    for (bool drained = false;; drained = true) {
        struct range *range = overlapping(address, 1);
        /* Looked for again after waiting: another thread may have taken it. */
        if (range == NULL || range->start != address || (range->shadow == NULL) != registered)
            return false;
        *taken = *range;
        if (drained) {
            size_t at = ranges_before(address);
            range_count--;
            memmove(&ranges[at], &ranges[at + 1], (range_count - at) * sizeof *ranges);
            free(range);
            return true;
        }
        for (int i = 0; i < device_count; i++)
            if (taken->portable || taken->context == &contexts[i])
                drain(&contexts[i]);
    }
}

/* Address space of one device, and the alignment of what is allocated in it. As on a real one, allocations may touch. */
enum { ALIGNMENT = 512 };
static const size_t arena_bytes = (size_t)1 << 34;

/* The device's bytes lie below their addresses, through which nobody can read or write. Addresses are given out once. */
static uint8_t *arena(struct context *context) {
    if (context->arena == NULL) {
        uint8_t *start = mmap(NULL, 2 * arena_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED || mprotect(start, arena_bytes, PROT_READ | PROT_WRITE) != 0)
            die("no memory for a device", "mmap");
        context->arena = start;
    }
    return context->arena;
}

/* The driver may wait for all that runs when it allocates or page-locks, as it does when it frees. */
static void drain_to_allocate(void) {
    for (int i = 0; allocations_wait && i < device_count; i++)
        drain(&contexts[i]);
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    ENTER(cuMemAlloc_v2);
    NEED_VALID(address != NULL && bytes > 0);
    CURRENT(context);
    TRY(check_no_capture());
    drain_to_allocate();
    NEED(bytes <= device_bytes - context->used, CUDA_ERROR_OUT_OF_MEMORY);
    size_t whole = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    NEED(whole <= arena_bytes - context->given, CUDA_ERROR_OUT_OF_MEMORY);
    uint8_t *shadow = arena(context) + context->given;
    context->given += whole;
    *address = (uintptr_t)shadow + arena_bytes;
    context->used += bytes;
    add_range((struct range){.start = *address, .bytes = bytes, .context = context, .shadow = shadow});
    return CUDA_SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(cuMemFree_v2);
    CURRENT(context);
    TRY(check_no_capture());
    struct range range;
    NEED_VALID(take_range(address, false, &range));
    range.context->used -= range.bytes;
    return CUDA_SUCCESS;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER(cuMemGetInfo_v2);
    NEED_VALID(free_bytes != NULL && total != NULL);
    CURRENT(context);
    *free_bytes = device_bytes - context->used;
    *total = device_bytes;
    return CUDA_SUCCESS;
}

CUresult cuMemHostRegister_v2(void *memory, size_t bytes, uint32_t flags) {
    ENTER(cuMemHostRegister_v2);
    NEED_VALID(memory != NULL && bytes > 0 && flags <= 15);
    CURRENT(context);
    TRY(check_no_capture());
    drain_to_allocate();
    struct range *other = overlapping((uintptr_t)memory, bytes);
    NEED_VALID(other == NULL || other->shadow == NULL);
    NEED(other == NULL, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    struct range range = {.start = (uintptr_t)memory, .bytes = bytes, .context = context, .portable = flags & 1};
    add_range(range);
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void *memory) {
    ENTER(cuMemHostUnregister);
    CURRENT(context);
    TRY(check_no_capture());
    struct range range;
    NEED(take_range((uintptr_t)memory, true, &range), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    return CUDA_SUCCESS;
}

/* Registered memory has the same address on devices as on the host. */
CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *memory, uint32_t flags) {
    ENTER(cuMemHostGetDevicePointer_v2);
    CURRENT(context);
    struct range *range = overlapping((uintptr_t)memory, 1);
    NEED_VALID(address != NULL && flags == 0 && range != NULL && range->shadow == NULL);
    *address = (uintptr_t)memory;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
    enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_ORDINAL = 9, HOST = 1, DEVICE = 2 };
    ENTER(cuPointerGetAttribute);
    struct range *range = overlapping(address, 1);
    NEED_VALID(value != NULL && range != NULL);
    if (attribute == CONTEXT)
        *(CUcontext *)value = range->context;
    else if (attribute == MEMORY_TYPE)
        *(uint32_t *)value = range->shadow == NULL ? HOST : DEVICE;
    else if (attribute == DEVICE_ORDINAL)
        *(int *)value = range->context->device;
    else
        return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

/* ---- Copies ---- */

enum side { SIDE_HOST, SIDE_DEVICE, SIDE_EITHER };

/* Whether work may use the bytes, and whether they are host memory that is not registered, as far as the context knows.
 * What is registered cannot be copied together with what is not. */
static CUresult check_bytes(CUdeviceptr address, size_t bytes, enum side side, const struct context *context,
                            bool *pageable) {
    NEED_VALID(address != 0 && bytes <= UINT64_MAX - address);
    struct range *range = overlapping(address, bytes);
    NEED_VALID(range == NULL ? side != SIDE_DEVICE : containing(address, bytes) != NULL);
    NEED_VALID(range == NULL || side == SIDE_EITHER || (range->shadow != NULL) == (side == SIDE_DEVICE));
    *pageable = range == NULL || (range->shadow == NULL && !range->portable && range->context != context);
    return CUDA_SUCCESS;
}

static CUresult check_copy(struct copy *copy, enum side to, enum side from, const struct context *context) {
    TRY(check_bytes(copy->to, copy->bytes, to, context, &copy->to_pageable));
    return check_bytes(copy->from, copy->bytes, from, context, &copy->from_pageable);
}

static CUresult enqueue_copies(struct lane *lane, struct work *work, bool complete) {
    struct context *context = lane->context;
    uint64_t number = enqueue(lane, work);
    if (!complete)
        return CUDA_SUCCESS;
    /* However it ends, nothing touches the caller's memory afterwards. */
    reach(lane, number, NULL);
    return context->failed;
}

static CUresult copy_one(CUstream stream, CUdeviceptr to, enum side to_side, CUdeviceptr from, enum side from_side,
                         size_t bytes) {
    struct copy copy = {.to = to, .from = from, .bytes = bytes};
    LANE(lane, stream);
    TRY(check_lane(lane));
    if (bytes == 0)
        return CUDA_SUCCESS;
    TRY(check_copy(&copy, to_side, from_side, lane->context));
    struct work *work = make_work(WORK_COPIES, 1);
    work->copies[0] = copy;
    return enqueue_copies(lane, work, copy.to_pageable || copy.from_pageable);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoHAsync_v2);
    return copy_one(stream, (uintptr_t)to, SIDE_HOST, from, SIDE_DEVICE, bytes);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyHtoDAsync_v2);
    return copy_one(stream, to, SIDE_DEVICE, (uintptr_t)from, SIDE_HOST, bytes);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoDAsync_v2);
    return copy_one(stream, to, SIDE_DEVICE, from, SIDE_DEVICE, bytes);
}

#ifndef STANDIN_WITHOUT_BATCH
static CUresult check_attributes(const CUmemcpyAttributes *attributes, const size_t *firsts, size_t attribute_count,
                                 size_t count, bool *complete) {
    enum { ORDER_STREAM = 1, ORDER_DURING_API_CALL = 2, ORDER_ANY = 3 };
    NEED_VALID(attributes != NULL && firsts != NULL && attribute_count > 0 && attribute_count <= count);
    for (size_t i = 0; i < attribute_count; i++) {
        int32_t order = attributes[i].srcAccessOrder;
        NEED_VALID(order >= ORDER_STREAM && order <= ORDER_ANY);
        NEED_VALID(i == 0 ? firsts[i] == 0 : firsts[i] > firsts[i - 1] && firsts[i] < count);
        *complete = *complete || order == ORDER_DURING_API_CALL;
    }
    return CUDA_SUCCESS;
}

CUresult cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count,
                            CUmemcpyAttributes *attributes, size_t *firsts, size_t attribute_count, size_t *failed,
                            CUstream stream) {
    ENTER(cuMemcpyBatchAsync);
    bool complete = false;
    CUresult code = CUDA_SUCCESS;
    size_t i, ignored;
    failed = failed == NULL ? &ignored : failed;
    *failed = SIZE_MAX;
    /* The driver takes no batches on the legacy default stream. */
    NEED_VALID(to != NULL && from != NULL && bytes != NULL && count > 0 && (uintptr_t)stream > 1);
    TRY(check_attributes(attributes, firsts, attribute_count, count, &complete));
    LANE(lane, stream);
    TRY(check_lane(lane));
    struct work *work = make_work(WORK_COPIES, count);
    for (i = 0; i < count && code == CUDA_SUCCESS; i++) {
        struct copy *copy = &work->copies[i];
        *copy = (struct copy){.to = to[i], .from = from[i], .bytes = bytes[i]};
        code = bytes[i] == 0 ? CUDA_ERROR_INVALID_VALUE : check_copy(copy, SIDE_EITHER, SIDE_EITHER, lane->context);
        complete = complete || copy->to_pageable || copy->from_pageable;
    }
    if (code == CUDA_SUCCESS)
        return enqueue_copies(lane, work, complete);
    *failed = i - 1;
    free(work);
    return code;
}
#endif

/* ---- Waits for a value ---- */

enum { WAIT_GEQ, WAIT_EQ };

CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, uint32_t flags) {
    ENTER(cuStreamWaitValue32_v2);
    LANE(lane, stream);
    TRY(check_lane(lane));
    NEED(flags <= WAIT_EQ, CUDA_ERROR_NOT_SUPPORTED);
    NEED_VALID(address % 4 == 0 && containing(address, 4) != NULL);
    struct work *work = make_work(WORK_POLL, 0);
    work->address = address;
    work->value = value;
    work->flags = flags;
    enqueue(lane, work);
    return CUDA_SUCCESS;
}

/* ---- What lanes do: the lock is held before and after ---- */

static void sleep_unlocked(uint64_t us) {
    struct timespec left = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    if (us == 0)
        return;
    pthread_mutex_unlock(&mutex);
    while (nanosleep(&left, &left) != 0)
        continue;
    pthread_mutex_lock(&mutex);
}

static void begin_moving(struct context *context) {
    context->moving++;
    pthread_mutex_unlock(&mutex);
}

static void end_moving(struct context *context) {
    pthread_mutex_lock(&mutex);
    if (--context->moving == 0)
        pthread_cond_broadcast(&moved);
}

static void poll_value(struct context *context, const struct work *work) {
    uint32_t *place = (uint32_t *)(void *)bytes_at(work->address, 4);
    if (place == NULL)
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    while (context->failed == 0) {
        uint32_t found = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        /* Numbers wrap around. */
        if (work->flags == WAIT_EQ ? found == work->value : (int32_t)(found - work->value) >= 0)
            return;
        sleep_unlocked(50);
    }
}

uint8_t standin_pattern(uint64_t seed, uint64_t i) {
    return (uint8_t)(((seed * 0x9E3779B97F4A7C15u + i) * 0xBF58476D1CE4E5B9u) >> 56);
}

static void fill(struct context *context, const struct work *work) {
    sleep_unlocked(work->delay_us);
    uint8_t *bytes = bytes_at(work->address, work->bytes);
    if (bytes == NULL)
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    if (context->failed != 0)
        return;
    begin_moving(context);
    for (uint64_t i = 0; i < work->bytes; i++)
        bytes[i] = standin_pattern(work->seed, i);
    end_moving(context);
}

static void copy_all(struct context *context, struct work *work) {
    sleep_unlocked(delay_us);
    /* Somebody may have freed memory since the call without waiting. */
    for (struct copy *copy = work->copies; copy < work->copies + work->count; copy++) {
        if (!copy->to_pageable)
            copy->to = (uintptr_t)bytes_at(copy->to, copy->bytes);
        if (!copy->from_pageable)
            copy->from = (uintptr_t)bytes_at(copy->from, copy->bytes);
        if (context->failed == 0 && (copy->to == 0 || copy->from == 0))
            fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
        if (context->failed != 0)
            return;
    }
    begin_moving(context);
    for (size_t i = work->count; i-- > 0;) {
        const struct copy *copy = &work->copies[i];
        memmove((void *)(uintptr_t)copy->to, (const void *)(uintptr_t)copy->from, copy->bytes);
    }
    end_moving(context);
    copies_done += work->count;
    for (size_t i = 0; i < work->count; i++)
        copied_bytes += work->copies[i].bytes;
}

static void run(struct lane *lane, struct work *work) {
    struct context *context = lane->context;
    if (!work->implied && work_to_fail > 0 && --work_to_fail == 0)
        fail_context(context, work_code);
    else if (work->kind == WORK_WAIT)
        reach(work->lane, work->until, context);
    else if (work->kind == WORK_POLL)
        poll_value(context, work);
    else if (work->kind == WORK_FILL)
        fill(context, work);
    else if (work->kind == WORK_COPIES)
        copy_all(context, work);
}

/* ---- Capture ---- */

CUresult cuThreadExchangeStreamCaptureMode(uint32_t *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode);
    NEED_VALID(mode != NULL && *mode <= CAPTURE_RELAXED);
    uint32_t before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

/* A capture of the global mode begins or ends on a stream that is no default one. */
void standin_capture(CUstream stream, uint32_t on) {
    LOCKED;
    struct lane *lane = made_lane(stream);
    if (lane == NULL)
        die("not a stream that can capture", "standin_capture");
    if (on && captures == 0)
        capture_invalidated = false;
    captures = captures - lane->capturing + (on != 0);
    lane->capturing = on != 0;
}

/* Whether a call has ended a capture since the last one began. */
uint32_t standin_capture_invalidated(void) {
    LOCKED;
    return capture_invalidated;
}

/* ---- Control ---- */

static enum call call_named(const char *name) {
    int call = 0;
    while (call < CALL_COUNT && strcmp(call_names[call], name) != 0)
        call++;
    if (call == CALL_COUNT)
        die("there is no such call", name);
    return (enum call)call;
}

static void wake_all(void) {
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            pthread_cond_signal(&lane->more);
}

/* Takes back all that tests set, and counts anew. Objects and enqueued work stay. */
void standin_reset(void) {
    LOCKED;
    memset(faults, 0, sizeof faults);
    memset(stalled, 0, sizeof stalled);
    pthread_cond_broadcast(&moved);
    memcpy(calls_at_reset, calls_ever, sizeof calls_at_reset);
    work_to_fail = delay_us = copied_bytes = copies_done = captures = 0;
    all_held = capture_invalidated = allocations_wait = false;
    for (int i = 0; i < device_count; i++) {
        contexts[i].failed = CUDA_SUCCESS;
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            lane->held = lane->capturing = false;
    }
    for (struct event *event = events; event != NULL; event = event->next)
        event->captured = false;
    wake_all();
}

/* The nth call from now on, and with sticky all after it, does nothing and returns the code. */
void standin_fail(const char *call, uint64_t nth, int32_t code, uint32_t sticky) {
    LOCKED;
    struct fault *fault = faults;
    while (fault < faults + MAX_FAULTS && fault->armed)
        fault++;
    if (fault == faults + MAX_FAULTS)
        die("too many faults", call);
    enum call number = call_named(call);
    *fault = (struct fault){true, sticky != 0, number, calls_ever[number] + nth, code};
}

/* Until it is off again, the call does not return. */
void standin_stall(const char *call, uint32_t on) {
    LOCKED;
    stalled[call_named(call)] = on != 0;
    pthread_cond_broadcast(&moved);
}

/* The nth piece of work that starts from now on is not done, and its context fails. Copies (a batch is one), fills,
 * waits for events and for values, and records count. */
void standin_fail_work(uint64_t nth, int32_t code) {
    LOCKED;
    work_to_fail = nth;
    work_code = code;
}

/* Calls since the reset. */
uint64_t standin_calls(const char *call) {
    LOCKED;
    enum call number = call_named(call);
    return calls_ever[number] - calls_at_reset[number];
}

/* How long copies wait on their stream before they move a byte. */
void standin_delay_us(uint64_t us) {
    LOCKED;
    delay_us = us;
}

/* While on, allocating and page-locking wait for all that has been enqueued on any device. */
void standin_allocations_wait(uint32_t on) {
    LOCKED;
    allocations_wait = on != 0;
}

/* While on, no stream starts anything. */
void standin_hold(uint32_t on) {
    LOCKED;
    all_held = on != 0;
    wake_all();
}

/* The same of one stream; default streams are the current context's. */
void standin_hold_stream(CUstream stream, uint32_t on) {
    LOCKED;
    struct lane *lane = made_lane(stream);
    if (lane == NULL && find_lane(stream, &lane) != CUDA_SUCCESS)
        die("not a stream", "standin_hold_stream");
    lane->held = on != 0;
    pthread_cond_signal(&lane->more);
}

/* How many there are: "stream" and "event" (made and not destroyed), "memory" (allocations), "memory_bytes",
 * "registered" (ranges), "context" (retains that were not released). */
uint64_t standin_live(const char *kind) {
    enum { STREAM, EVENT, MEMORY, BYTES, REGISTERED, CONTEXT, KINDS };
    static const char *const names[KINDS] = {"stream", "event", "memory", "memory_bytes", "registered", "context"};
    uint64_t live[KINDS] = {0};
    LOCKED;
    for (struct context *context = contexts; context < contexts + device_count; context++) {
        live[CONTEXT] += context->retains;
        live[BYTES] += context->used;
        for (struct lane *lane = context->lanes; lane != NULL; lane = lane->next)
            live[STREAM] += lane->open && lane != context->legacy && lane != context->per_thread;
    }
    for (struct event *event = events; event != NULL; event = event->next)
        live[EVENT]++;
    for (size_t i = 0; i < range_count; i++)
        live[ranges[i]->shadow != NULL ? MEMORY : REGISTERED]++;
    for (int i = 0; i < KINDS; i++)
        if (strcmp(names[i], kind) == 0)
            return live[i];
    die("there is no such kind", kind);
    return 0;
}

/* Where the host finds the bytes of device memory; NULL where it is none. */
void *standin_shadow(uint64_t address) {
    LOCKED;
    struct range *range = overlapping(address, 1);
    return range == NULL || range->shadow == NULL ? NULL : range->shadow + (address - range->start);
}

/* A kernel: in stream order it sleeps and then fills device memory with standin_pattern. */
int32_t standin_fill(CUstream stream, uint64_t address, uint64_t bytes, uint64_t seed, uint64_t us) {
    LOCKED;
    bool pageable;
    LANE(lane, stream);
    TRY(check_lane(lane));
    TRY(check_bytes(address, bytes, SIDE_DEVICE, lane->context, &pageable));
    struct work *work = make_work(WORK_FILL, 0);
    work->address = address;
    work->bytes = bytes;
    work->seed = seed;
    work->delay_us = us;
    enqueue(lane, work);
    return CUDA_SUCCESS;
}

/* Bytes that copies have moved since the reset. */
uint64_t standin_copied_bytes(void) {
    LOCKED;
    return copied_bytes;
}

/* Copies done since the reset: of a batch each one. */
uint64_t standin_copies(void) {
    LOCKED;
    return copies_done;
}
