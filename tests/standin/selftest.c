/*
 * Whether the stand-in for the NVIDIA driver does as it says: loads the library given as the argument, prints a line
 * for each check, and ends with 0, or says which line failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef void *CUcontext, *CUstream, *CUevent;
typedef unsigned long long CUdeviceptr;

typedef struct {
    int32_t order, source[2], destination[2];
    uint32_t flags;
} Attributes;

enum {
    INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400, NOT_READY = 600, CONTEXT_IS_DESTROYED = 709, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906
};
enum { BLOCKING = 0, NON_BLOCKING = 1, PORTABLE = 1, NO_TIMING = 2, RELAXED = 2, GEQ = 0, EQ = 1 };
enum { POINTER_CONTEXT = 1, POINTER_TYPE = 2, POINTER_DEVICE = 9, TYPE_HOST = 1, TYPE_DEVICE = 2 };

#define FUNCTIONS(F)                                                                                               \
    F(int, cuInit, (uint32_t))                                                                                     \
    F(int, cuDriverGetVersion, (int *))                                                                            \
    F(int, cuDeviceGetCount, (int *))                                                                              \
    F(int, cuDeviceGet, (int *, int))                                                                              \
    F(int, cuDeviceGetName, (char *, int, int))                                                                    \
    F(int, cuDeviceGetAttribute, (int *, int, int))                                                                \
    F(int, cuDevicePrimaryCtxRetain, (CUcontext *, int))                                                           \
    F(int, cuDevicePrimaryCtxRelease_v2, (int))                                                                    \
    F(int, cuCtxPushCurrent_v2, (CUcontext))                                                                       \
    F(int, cuCtxPopCurrent_v2, (CUcontext *))                                                                      \
    F(int, cuCtxGetCurrent, (CUcontext *))                                                                         \
    F(int, cuCtxSetCurrent, (CUcontext))                                                                           \
    F(int, cuCtxGetDevice, (int *))                                                                                \
    F(int, cuStreamCreateWithPriority, (CUstream *, uint32_t, int))                                                \
    F(int, cuStreamCreate, (CUstream *, uint32_t))                                                                 \
    F(int, cuStreamDestroy_v2, (CUstream))                                                                         \
    F(int, cuStreamWaitEvent, (CUstream, CUevent, uint32_t))                                                       \
    F(int, cuStreamIsCapturing, (CUstream, uint32_t *))                                                            \
    F(int, cuStreamGetCtx, (CUstream, CUcontext *))                                                                \
    F(int, cuStreamQuery, (CUstream))                                                                              \
    F(int, cuStreamSynchronize, (CUstream))                                                                        \
    F(int, cuStreamWaitValue32_v2, (CUstream, CUdeviceptr, uint32_t, uint32_t))                                    \
    F(int, cuEventCreate, (CUevent *, uint32_t))                                                                   \
    F(int, cuEventDestroy_v2, (CUevent))                                                                           \
    F(int, cuEventRecord, (CUevent, CUstream))                                                                     \
    F(int, cuEventQuery, (CUevent))                                                                                \
    F(int, cuEventSynchronize, (CUevent))                                                                          \
    F(int, cuMemAlloc_v2, (CUdeviceptr *, size_t))                                                                 \
    F(int, cuMemFree_v2, (CUdeviceptr))                                                                            \
    F(int, cuMemGetInfo_v2, (size_t *, size_t *))                                                                  \
    F(int, cuMemHostRegister_v2, (void *, size_t, uint32_t))                                                       \
    F(int, cuMemHostUnregister, (void *))                                                                          \
    F(int, cuMemHostGetDevicePointer_v2, (CUdeviceptr *, void *, uint32_t))                                        \
    F(int, cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream))                                          \
    F(int, cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream))                                    \
    F(int, cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                     \
    F(int, cuMemcpyBatchAsync,                                                                                     \
      (CUdeviceptr *, CUdeviceptr *, size_t *, size_t, Attributes *, size_t *, size_t, size_t *, CUstream))        \
    F(int, cuThreadExchangeStreamCaptureMode, (uint32_t *))                                                        \
    F(int, cuPointerGetAttribute, (void *, int, CUdeviceptr))                                                      \
    F(int, cuGetErrorName, (int, const char **))                                                                   \
    F(int, cuGetErrorString, (int, const char **))                                                                 \
    F(void, standin_reset, (void))                                                                                 \
    F(void, standin_fail, (const char *, uint64_t, int32_t, uint32_t))                                             \
    F(void, standin_fail_work, (uint64_t, int32_t))                                                                \
    F(uint64_t, standin_calls, (const char *))                                                                     \
    F(void, standin_delay_us, (uint64_t))                                                                          \
    F(void, standin_hold, (uint32_t))                                                                              \
    F(void, standin_hold_stream, (void *, uint32_t))                                                               \
    F(uint64_t, standin_live, (const char *))                                                                      \
    F(void *, standin_shadow, (uint64_t))                                                                          \
    F(int32_t, standin_fill, (void *, uint64_t, uint64_t, uint64_t, uint64_t))                                     \
    F(uint8_t, standin_pattern, (uint64_t, uint64_t))                                                              \
    F(void, standin_capture, (void *, uint32_t))                                                                   \
    F(uint32_t, standin_capture_invalidated, (void))                                                               \
    F(uint64_t, standin_copied_bytes, (void))                                                                      \
    F(uint64_t, standin_copies, (void))

#define DECLARE(result, name, arguments) static result(*name) arguments;
#define LOAD(result, name, arguments) *(void **)&name = dlsym(library, #name);
#define IS_THERE(result, name, arguments) CHECK(name != NULL || strcmp(#name, "cuMemcpyBatchAsync") == 0);
FUNCTIONS(DECLARE)

#define CHECK(condition)                                     \
    do {                                                     \
        if (!(condition)) {                                  \
            printf("line %d: %s\n", __LINE__, #condition);   \
            exit(1);                                         \
        }                                                    \
    } while (0)
#define SAME(value, expected)                                                                    \
    do {                                                                                         \
        long long value_ = (long long)(value), expected_ = (long long)(expected);                \
        if (value_ != expected_) {                                                               \
            printf("line %d: %s is %lld, not %lld\n", __LINE__, #value, value_, expected_);      \
            exit(1);                                                                             \
        }                                                                                        \
    } while (0)
#define OK(call) SAME(call, 0)

enum { BYTES = 10000 };

static CUcontext context[2];
/* What most checks work with, on device 0: a stream apart from the legacy default one, and 2 that go by it. */
static CUstream alone, stream, second;
static CUdeviceptr memory, spare;
static uint8_t pinned[BYTES], plain[BYTES];

static void enter(int device) {
    OK(cuCtxPushCurrent_v2(context[device]));
}

static void leave(void) {
    OK(cuCtxPopCurrent_v2(NULL));
}

static bool is_filled(const void *bytes, uint64_t seed) {
    for (size_t i = 0; i < BYTES; i++)
        if (((const uint8_t *)bytes)[i] != standin_pattern(seed, i))
            return false;
    return true;
}

static bool is_at(CUdeviceptr address, uint64_t seed) {
    return is_filled(standin_shadow(address), seed);
}

static void nap(void) {
    usleep(3000);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fill(CUstream on, uint64_t seed, uint64_t us) {
    OK(standin_fill(on, memory, BYTES, seed, us));
}

/* 4 bytes that can be waited for. */
static uint32_t *word_of_pinned(void) {
    return (uint32_t *)(void *)(pinned + (-(uintptr_t)pinned & 3));
}

static CUevent make_event(void) {
    CUevent event;
    OK(cuEventCreate(&event, NO_TIMING));
    return event;
}

/* Before anything is initialised. */
static void initialisation(void) {
    int number;
    CUevent event;
    SAME(cuDeviceGetCount(&number), NOT_INITIALIZED);
    SAME(cuEventCreate(&event, 0), NOT_INITIALIZED);
    OK(cuDriverGetVersion(&number));
    SAME(number, 12080);
    SAME(cuInit(1), INVALID_VALUE);
    standin_fail("cuInit", 1, 100, 0);
    SAME(cuInit(0), 100);
    OK(cuInit(0));
    OK(cuInit(0));
}

static void devices(void) {
    int number;
    char name[64];
    OK(cuDeviceGetCount(&number));
    SAME(number, 2);
    OK(cuDeviceGet(&number, 1));
    SAME(number, 1);
    SAME(cuDeviceGet(&number, 2), INVALID_DEVICE);
    SAME(cuDeviceGet(&number, -1), INVALID_DEVICE);
    OK(cuDeviceGetName(name, sizeof name, 1));
    CHECK(strchr(name, '1') != NULL);
    OK(cuDeviceGetAttribute(&number, 41, 0));
    SAME(number, 1);
    OK(cuDeviceGetAttribute(&number, 115, 0));
    SAME(number, 0);
}

static void contexts(void) {
    CUcontext found;
    CUstream made;
    int device;
    size_t free_bytes, total;
    SAME(cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRetain(&context[0], 0));
    OK(cuDevicePrimaryCtxRetain(&context[1], 1));
    OK(cuDevicePrimaryCtxRetain(&found, 1));
    CHECK(found == context[1] && found != context[0]);
    SAME(standin_live("context"), 3);
    SAME(cuCtxPopCurrent_v2(&found), INVALID_CONTEXT);
    SAME(cuCtxGetDevice(&device), INVALID_CONTEXT);
    SAME(cuStreamCreate(&made, 0), INVALID_CONTEXT);
    SAME(cuMemGetInfo_v2(&free_bytes, &total), INVALID_CONTEXT);
    SAME(cuStreamSynchronize(NULL), INVALID_CONTEXT);
    SAME(cuCtxPushCurrent_v2((CUcontext)&device), INVALID_CONTEXT);
    OK(cuCtxGetCurrent(&found));
    CHECK(found == NULL);
    enter(0);
    enter(1);
    OK(cuCtxGetDevice(&device));
    SAME(device, 1);
    OK(cuCtxSetCurrent(context[0]));
    OK(cuCtxGetDevice(&device));
    SAME(device, 0);
    OK(cuCtxPopCurrent_v2(&found));
    CHECK(found == context[0]);
    OK(cuCtxSetCurrent(NULL));
    SAME(cuCtxPopCurrent_v2(&found), INVALID_CONTEXT);
    /* A context that nobody retains is not used. */
    enter(1);
    OK(cuDevicePrimaryCtxRelease_v2(1));
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    OK(cuDevicePrimaryCtxRelease_v2(1));
    SAME(cuMemGetInfo_v2(&free_bytes, &total), CONTEXT_IS_DESTROYED);
    leave();
    SAME(cuCtxPushCurrent_v2(context[1]), INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRetain(&context[1], 1));
}

/* Leaves context 0 current, and what the checks after it work with. */
static void set_up(void) {
    enter(0);
    OK(cuStreamCreateWithPriority(&alone, NON_BLOCKING, -1));
    OK(cuStreamCreate(&stream, BLOCKING));
    OK(cuStreamCreate(&second, BLOCKING));
    OK(cuMemAlloc_v2(&memory, BYTES));
    OK(cuMemAlloc_v2(&spare, BYTES));
    OK(cuMemHostRegister_v2(pinned, BYTES, PORTABLE));
    SAME(standin_live("stream"), 3);
    SAME(standin_live("memory"), 2);
    SAME(standin_live("memory_bytes"), 2 * BYTES);
    SAME(standin_live("registered"), 1);
}

static void streams(void) {
    CUstream made = NULL;
    CUcontext found;
    SAME(cuStreamCreate(&made, 2), INVALID_VALUE);
    OK(cuStreamGetCtx(stream, &found));
    CHECK(found == context[0]);
    OK(cuStreamGetCtx(NULL, &found));
    CHECK(found == context[0]);
    SAME(cuStreamDestroy_v2(NULL), INVALID_HANDLE);
    SAME(cuStreamQuery((CUstream)plain), INVALID_HANDLE);
    standin_hold_stream(stream, 1);
    fill(stream, 1, 20000);
    SAME(cuStreamQuery(stream), NOT_READY);
    double began = now();
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(stream));
    CHECK(now() - began >= 0.02 && is_at(memory, 1) && !is_at(memory, 2));
    OK(cuStreamQuery(stream));
    /* A stream that is destroyed does what it was given. */
    OK(cuStreamCreate(&made, NON_BLOCKING));
    CUevent event = make_event();
    standin_hold_stream(made, 1);
    OK(standin_fill(made, memory, BYTES, 2, 0));
    OK(cuEventRecord(event, made));
    OK(cuStreamDestroy_v2(made));
    SAME(cuStreamDestroy_v2(made), INVALID_HANDLE);
    SAME(cuStreamQuery(made), INVALID_HANDLE);
    SAME(standin_live("stream"), 3);
    SAME(cuEventQuery(event), NOT_READY);
    standin_reset();
    OK(cuEventSynchronize(event));
    CHECK(is_at(memory, 2));
    OK(cuEventDestroy_v2(event));
}

static void legacy_stream(void) {
    /* It waits for blocking streams, */
    standin_hold_stream(stream, 1);
    fill(stream, 1, 5000);
    fill(NULL, 2, 0);
    fill((CUstream)1, 3, 0);
    nap();
    SAME(cuStreamQuery(NULL), NOT_READY);
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(NULL));
    CHECK(is_at(memory, 3));
    OK(cuStreamQuery(stream));
    /* they for it, */
    fill(NULL, 4, 5000);
    fill(stream, 5, 0);
    OK(cuStreamSynchronize(stream));
    CHECK(is_at(memory, 5));
    fill(NULL, 6, 5000);
    fill((CUstream)2, 7, 0);
    OK(cuStreamSynchronize((CUstream)2));
    CHECK(is_at(memory, 7));
    /* and is done when they are; */
    standin_hold_stream(second, 1);
    fill(second, 8, 5000);
    SAME(cuStreamQuery(NULL), NOT_READY);
    standin_hold_stream(second, 0);
    OK(cuStreamSynchronize(NULL));
    CHECK(is_at(memory, 8));
    OK(cuStreamQuery(NULL));
    /* others take no part. */
    standin_hold_stream(alone, 1);
    OK(standin_fill(alone, spare, BYTES, 9, 0));
    fill(NULL, 10, 0);
    OK(cuStreamSynchronize(NULL));
    CHECK(is_at(memory, 10));
    standin_hold_stream(alone, 0);
    standin_hold_stream(NULL, 1);
    fill(NULL, 11, 0);
    OK(cuStreamSynchronize(alone));
    CHECK(is_at(spare, 9));
    SAME(cuStreamQuery(NULL), NOT_READY);
    standin_hold_stream(NULL, 0);
    OK(cuStreamSynchronize(NULL));
    /* Blocking streams are not ordered among each other, nor with other devices. */
    standin_hold_stream(stream, 1);
    fill(stream, 12, 0);
    OK(standin_fill(second, spare, BYTES, 13, 0));
    OK(cuStreamSynchronize(second));
    enter(1);
    OK(cuStreamQuery(NULL));
    OK(cuStreamSynchronize(NULL));
    leave();
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(stream));
}

static void events(void) {
    CUevent event = make_event(), foreign;
    CUstream theirs;
    OK(cuEventQuery(event));
    OK(cuEventSynchronize(event));
    OK(cuStreamWaitEvent(stream, event, 0));
    OK(cuStreamSynchronize(stream));
    standin_hold_stream(stream, 1);
    fill(stream, 1, 5000);
    OK(cuEventRecord(event, stream));
    SAME(cuEventQuery(event), NOT_READY);
    standin_hold_stream(stream, 0);
    OK(cuEventSynchronize(event));
    OK(cuEventQuery(event));
    CHECK(is_at(memory, 1));
    /* Other contexts' events are waited for, but not recorded. */
    enter(1);
    foreign = make_event();
    OK(cuStreamCreate(&theirs, NON_BLOCKING));
    SAME(cuEventRecord(event, theirs), INVALID_HANDLE);
    SAME(cuEventRecord(event, NULL), INVALID_HANDLE);
    standin_hold_stream(stream, 1);
    fill(stream, 2, 5000);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(theirs, event, 0));
    OK(cuEventRecord(foreign, theirs));
    nap();
    SAME(cuEventQuery(foreign), NOT_READY);
    standin_hold_stream(stream, 0);
    OK(cuEventSynchronize(foreign));
    OK(cuEventQuery(event));
    OK(cuEventDestroy_v2(foreign));
    OK(cuStreamDestroy_v2(theirs));
    leave();
    SAME(cuEventRecord((CUevent)plain, stream), INVALID_HANDLE);
    OK(cuEventDestroy_v2(event));
    SAME(cuEventDestroy_v2(event), INVALID_HANDLE);
    SAME(cuEventQuery(event), INVALID_HANDLE);
    SAME(standin_live("event"), 0);
}

/* A wait is for the record before it, whatever becomes of the event. */
static void events_recorded_anew(void) {
    CUevent event = make_event();
    uint32_t *word = word_of_pinned();
    *word = 0;
    OK(cuStreamWaitValue32_v2(alone, (uintptr_t)word, 1, GEQ));
    OK(cuEventRecord(event, alone));
    OK(cuStreamWaitEvent(stream, event, 0));
    OK(cuStreamWaitValue32_v2(alone, (uintptr_t)word, 2, GEQ));
    fill(alone, 2, 0);
    OK(cuEventRecord(event, alone));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(standin_fill(second, spare, BYTES, 3, 0));
    nap();
    SAME(cuStreamQuery(stream), NOT_READY);
    __atomic_store_n(word, 1, __ATOMIC_RELEASE);
    OK(cuStreamSynchronize(stream));
    SAME(cuEventQuery(event), NOT_READY);
    OK(cuEventDestroy_v2(event));
    nap();
    SAME(cuStreamQuery(second), NOT_READY);
    __atomic_store_n(word, 2, __ATOMIC_RELEASE);
    OK(cuStreamSynchronize(second));
    CHECK(is_at(memory, 2) && is_at(spare, 3));
}

static void memory_of_devices(void) {
    size_t free_bytes, total, now_free;
    CUdeviceptr first, all;
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    SAME(total, 1 << 20);
    SAME(free_bytes, total - 2 * BYTES);
    SAME(cuMemAlloc_v2(&first, 0), INVALID_VALUE);
    SAME(cuMemAlloc_v2(&first, free_bytes + 1), OUT_OF_MEMORY);
    OK(cuMemAlloc_v2(&all, free_bytes));
    SAME(cuMemAlloc_v2(&first, 1), OUT_OF_MEMORY);
    OK(cuMemGetInfo_v2(&now_free, &total));
    SAME(now_free, 0);
    enter(1);
    OK(cuMemAlloc_v2(&first, 1));
    OK(cuMemFree_v2(first));
    leave();
    SAME(cuMemFree_v2(all + 1), INVALID_VALUE);
    OK(cuMemFree_v2(all));
    SAME(cuMemFree_v2(all), INVALID_VALUE);
    SAME(cuMemFree_v2((uintptr_t)pinned), INVALID_VALUE);
    OK(cuMemGetInfo_v2(&now_free, &total));
    SAME(now_free, free_bytes);
    CHECK(standin_shadow(memory) != NULL && standin_shadow(memory + BYTES) == NULL);
    CHECK(standin_shadow((uintptr_t)pinned) == NULL);
    /* The host cannot touch it: neither the system reads it for us, nor writes to it. */
    int ends[2];
    OK(pipe(ends));
    for (CUdeviceptr at = memory; at < memory + BYTES; at += 4096) {
        SAME(syscall(SYS_write, ends[1], (void *)(uintptr_t)at, 1), -1);
        SAME(errno, EFAULT);
    }
    SAME(write(ends[1], "x", 1), 1);
    SAME(syscall(SYS_read, ends[0], (void *)(uintptr_t)memory, 1), -1);
    SAME(errno, EFAULT);
    close(ends[0]);
    close(ends[1]);
}

static void registered_memory(void) {
    CUdeviceptr address;
    SAME(cuMemHostRegister_v2(pinned + BYTES / 2, 1, 0), ALREADY_REGISTERED);
    SAME(cuMemHostRegister_v2(pinned - 1, 2, 0), ALREADY_REGISTERED);
    SAME(cuMemHostRegister_v2(NULL, 2, 0), INVALID_VALUE);
    SAME(cuMemHostRegister_v2(plain, 0, 0), INVALID_VALUE);
    SAME(cuMemHostUnregister(pinned + 1), NOT_REGISTERED);
    SAME(cuMemHostUnregister(plain), NOT_REGISTERED);
    OK(cuMemHostGetDevicePointer_v2(&address, pinned + 5, 0));
    CHECK(address == (uintptr_t)(pinned + 5));
    SAME(cuMemHostGetDevicePointer_v2(&address, plain, 0), INVALID_VALUE);
    OK(cuMemHostUnregister(pinned));
    SAME(standin_live("registered"), 0);
    /* Other contexts take it for registered only where it is portable. */
    CUstream theirs;
    enter(1);
    OK(cuStreamCreate(&theirs, NON_BLOCKING));
    OK(cuMemHostRegister_v2(pinned, BYTES, 0));
    standin_delay_us(2000);
    OK(cuMemcpyDtoHAsync_v2(pinned, memory, BYTES, stream));
    SAME(standin_copies(), 1);
    OK(cuMemcpyDtoHAsync_v2(pinned, memory, BYTES, theirs));
    OK(cuStreamDestroy_v2(theirs));
    OK(cuMemHostUnregister(pinned));
    leave();
    SAME(standin_copies(), 2);
    standin_delay_us(0);
    OK(cuMemHostRegister_v2(pinned, BYTES, PORTABLE));
}

static void pointers(void) {
    int number;
    CUcontext found;
    CUdeviceptr there;
    enter(1);
    OK(cuMemAlloc_v2(&there, 10));
    leave();
    OK(cuPointerGetAttribute(&number, POINTER_TYPE, memory + BYTES - 1));
    SAME(number, TYPE_DEVICE);
    OK(cuPointerGetAttribute(&number, POINTER_DEVICE, memory));
    SAME(number, 0);
    OK(cuPointerGetAttribute(&number, POINTER_DEVICE, there));
    SAME(number, 1);
    OK(cuPointerGetAttribute(&found, POINTER_CONTEXT, there));
    CHECK(found == context[1]);
    OK(cuPointerGetAttribute(&number, POINTER_TYPE, (uintptr_t)pinned));
    SAME(number, TYPE_HOST);
    SAME(cuPointerGetAttribute(&number, POINTER_TYPE, (uintptr_t)plain), INVALID_VALUE);
    SAME(cuPointerGetAttribute(&number, POINTER_TYPE, memory + BYTES), INVALID_VALUE);
    SAME(cuPointerGetAttribute(&number, 1000, memory), INVALID_VALUE);
    OK(cuMemFree_v2(there));
    SAME(cuPointerGetAttribute(&number, POINTER_TYPE, there), INVALID_VALUE);
}

static void copies(void) {
    uint64_t before = standin_copied_bytes();
    standin_hold_stream(stream, 1);
    fill(stream, 1, 5000);
    OK(cuMemcpyDtoDAsync_v2(spare, memory, BYTES, stream));
    OK(cuMemcpyDtoHAsync_v2(pinned, spare, BYTES, stream));
    fill(stream, 2, 0);
    SAME(cuStreamQuery(stream), NOT_READY);
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(stream));
    CHECK(is_filled(pinned, 1) && is_at(spare, 1) && is_at(memory, 2));
    OK(cuMemcpyHtoDAsync_v2(memory, pinned, BYTES, stream));
    /* Memory that is not registered has been read or written when the call ends, after what is before it. */
    OK(cuMemcpyDtoHAsync_v2(plain, memory, BYTES, stream));
    CHECK(is_filled(plain, 1));
    for (size_t i = 0; i < BYTES; i++)
        plain[i] = standin_pattern(3, i);
    fill(stream, 4, 5000);
    OK(cuMemcpyHtoDAsync_v2(memory, plain, BYTES, stream));
    memset(plain, 0, BYTES);
    CHECK(is_at(memory, 3));
    SAME(standin_copied_bytes() - before, 5 * BYTES);
    /* From one device to another. */
    enter(1);
    CUdeviceptr there;
    OK(cuMemAlloc_v2(&there, BYTES));
    OK(cuMemcpyDtoDAsync_v2(there, memory, BYTES, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(is_at(there, 3));
    OK(cuMemFree_v2(there));
    leave();
}

static void copies_that_are_refused(void) {
    uint64_t before = standin_copies();
    OK(cuMemcpyDtoHAsync_v2(pinned, memory, 0, stream));
    SAME(cuMemcpyDtoHAsync_v2(pinned, memory + 1, BYTES, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2(pinned, memory - 1, 2, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2(pinned, (uintptr_t)plain, 1, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2((void *)(uintptr_t)memory, spare, 1, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2(pinned + BYTES - 1, memory, 2, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2(NULL, memory, 2, stream), INVALID_VALUE);
    SAME(cuMemcpyHtoDAsync_v2(memory + BYTES, pinned, 1, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoDAsync_v2(memory, memory + BYTES, 1, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoDAsync_v2(memory, spare, SIZE_MAX, stream), INVALID_VALUE);
    SAME(cuMemcpyDtoHAsync_v2(pinned, memory, 1, (CUstream)plain), INVALID_HANDLE);
    leave();
    SAME(cuMemcpyDtoHAsync_v2(pinned, memory, 1, stream), INVALID_CONTEXT);
    enter(0);
    OK(cuStreamQuery(stream));
    SAME(standin_copies(), before);
}

/* Memory is given back when the work of its context is done, and not before. */
static void giving_back_waits(void) {
    CUdeviceptr address;
    OK(cuMemAlloc_v2(&address, BYTES));
    OK(standin_fill(stream, address, BYTES, 1, 5000));
    OK(cuMemcpyDtoHAsync_v2(pinned, address, BYTES, stream));
    OK(standin_fill(alone, memory, BYTES, 2, 5000));
    OK(cuMemFree_v2(address));
    OK(cuStreamQuery(stream));
    OK(cuStreamQuery(alone));
    CHECK(is_filled(pinned, 1) && is_at(memory, 2));
    standin_delay_us(5000);
    OK(cuMemcpyDtoHAsync_v2(pinned, memory, BYTES, stream));
    OK(cuMemHostUnregister(pinned));
    CHECK(is_filled(pinned, 2));
    OK(cuMemHostRegister_v2(pinned, BYTES, PORTABLE));
    standin_delay_us(0);
}

static void batches(void) {
    enum { PART = BYTES / 100 };
    CUdeviceptr to[100], from[100];
    size_t bytes[100], first = 0, failed = 7;
    Attributes attributes = {.order = 1};
    if (cuMemcpyBatchAsync == NULL)
        return;
    for (size_t i = 0; i < 100; i++) {
        to[i] = (uintptr_t)pinned + i * PART;
        from[i] = memory + i * PART;
        bytes[i] = PART;
    }
    uint64_t before = standin_copies();
#define BATCH() cuMemcpyBatchAsync(to, from, bytes, 100, &attributes, &first, 1, &failed, stream)
    standin_hold_stream(stream, 1);
    fill(stream, 1, 5000);
    OK(BATCH());
    SAME(cuStreamQuery(stream), NOT_READY);
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(stream));
    CHECK(is_filled(pinned, 1));
    SAME(standin_copies() - before, 100);
    /* Nothing is copied unless all is well. */
    fill(stream, 2, 0);
    from[42]++;
    bytes[99] = PART + 1;
    SAME(BATCH(), INVALID_VALUE);
    SAME(failed, 99);
    bytes[99] = PART;
    from[63] = (uintptr_t)pinned + BYTES;
    to[63] = memory + BYTES - 1;
    SAME(BATCH(), INVALID_VALUE);
    SAME(failed, 63);
    OK(cuStreamSynchronize(stream));
    CHECK(is_filled(pinned, 1));
    from[42]--;
    from[63] = memory + 63 * PART;
    to[63] = (uintptr_t)pinned + 63 * PART;
    attributes.order = 0;
    SAME(BATCH(), INVALID_VALUE);
    CHECK(failed == SIZE_MAX);
    attributes.order = 1;
    first = 1;
    SAME(BATCH(), INVALID_VALUE);
    first = 0;
    SAME(cuMemcpyBatchAsync(to, from, bytes, 100, &attributes, &first, 0, &failed, stream), INVALID_VALUE);
    SAME(cuMemcpyBatchAsync(to, from, bytes, 100, &attributes, &first, 1, &failed, NULL), INVALID_VALUE);
    /* One copy to memory that is not registered has the call wait. */
    to[10] = (uintptr_t)plain;
    OK(BATCH());
    OK(cuStreamQuery(stream));
    SAME(plain[3], standin_pattern(2, 10 * PART + 3));
    SAME(standin_copies() - before, 200);
}

static void waits_for_values(void) {
    uint32_t *word = word_of_pinned();
    CUdeviceptr address = (uintptr_t)word;
    *word = 0xFFFFFFFE;
    SAME(cuStreamWaitValue32_v2(stream, (uintptr_t)plain, 1, GEQ), INVALID_VALUE);
    SAME(cuStreamWaitValue32_v2(stream, address + 1, 1, GEQ), INVALID_VALUE);
    OK(cuStreamWaitValue32_v2(stream, address, 0xFFFFFFF0, GEQ));
    OK(cuStreamSynchronize(stream));
    OK(cuStreamWaitValue32_v2(stream, address, 3, GEQ));
    fill(stream, 1, 0);
    nap();
    SAME(cuStreamQuery(stream), NOT_READY);
    __atomic_store_n(word, 2, __ATOMIC_RELEASE);
    nap();
    SAME(cuStreamQuery(stream), NOT_READY);
    __atomic_store_n(word, 4, __ATOMIC_RELEASE);
    OK(cuStreamSynchronize(stream));
    CHECK(is_at(memory, 1));
    OK(cuStreamWaitValue32_v2(stream, address, 3, EQ));
    nap();
    SAME(cuStreamQuery(stream), NOT_READY);
    __atomic_store_n(word, 3, __ATOMIC_RELEASE);
    OK(cuStreamSynchronize(stream));
}

static void faults(void) {
    CUevent event = make_event();
    standin_reset();
    SAME(standin_calls("cuEventQuery"), 0);
    standin_fail("cuEventQuery", 2, 999, 0);
    standin_fail("cuEventQuery", 4, 719, 1);
    standin_fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY, 0);
    const int expected[] = {0, 999, 0, 719, 719};
    for (int i = 0; i < 5; i++)
        SAME(cuEventQuery(event), expected[i]);
    SAME(standin_calls("cuEventQuery"), 5);
    CUdeviceptr address = 5;
    SAME(cuMemAlloc_v2(&address, 1), OUT_OF_MEMORY);
    SAME(address, 5);
    OK(cuMemAlloc_v2(&address, 1));
    standin_fail("cuMemFree_v2", 1, 999, 0);
    SAME(cuMemFree_v2(address), 999);
    SAME(standin_live("memory"), 3);
    OK(cuMemFree_v2(address));
    standin_reset();
    OK(cuEventQuery(event));
    OK(cuEventDestroy_v2(event));
}

/* Work that fails makes all that can tell of it fail, in its context, until the reset. */
static void failing_work(void) {
    CUevent event = make_event(), early = make_event();
    fill(stream, 1, 0);
    OK(cuEventRecord(early, stream));
    OK(cuStreamSynchronize(stream));
    standin_hold(1);
    standin_fail_work(2, 700);
    fill(stream, 2, 0);
    fill(stream, 3, 0);
    fill(stream, 4, 0);
    OK(cuStreamWaitValue32_v2(alone, (uintptr_t)word_of_pinned(), 0x12345678, EQ));
    OK(cuEventRecord(event, stream));
    standin_hold_stream(alone, 1);
    standin_hold(0);
    SAME(cuStreamSynchronize(stream), 700);
    SAME(cuStreamQuery(stream), 700);
    SAME(cuStreamQuery(NULL), 700);
    SAME(cuEventQuery(event), 700);
    SAME(cuEventQuery(early), 700);
    SAME(cuEventSynchronize(event), 700);
    SAME(cuEventRecord(event, second), 700);
    SAME(cuStreamWaitEvent(second, early, 0), 700);
    SAME(cuMemcpyDtoHAsync_v2(pinned, memory, 1, second), 700);
    SAME(cuMemcpyDtoHAsync_v2(plain, memory, 1, second), 700);
    SAME(standin_fill(second, memory, 1, 1, 0), 700);
    enter(1);
    OK(cuStreamSynchronize(NULL));
    leave();
    /* What waited is let go. */
    standin_hold_stream(alone, 0);
    SAME(cuStreamSynchronize(alone), 700);
    CUdeviceptr address;
    OK(cuMemAlloc_v2(&address, 1));
    OK(cuMemFree_v2(address));
    standin_reset();
    OK(cuStreamSynchronize(stream));
    OK(cuStreamSynchronize(alone));
    CHECK(is_at(memory, 2));
    /* What the legacy default stream's ordering adds is not counted. */
    standin_hold(1);
    standin_fail_work(3, 700);
    fill(stream, 5, 0);
    fill(NULL, 6, 0);
    OK(cuEventRecord(event, NULL));
    standin_hold(0);
    SAME(cuStreamSynchronize(NULL), 700);
    CHECK(is_at(memory, 6));
    standin_reset();
    OK(cuEventDestroy_v2(event));
    OK(cuEventDestroy_v2(early));
}

/* Memory that goes while other devices' work still uses it makes that work fail. */
static void memory_that_is_gone(void) {
    CUdeviceptr there;
    CUstream theirs;
    enter(1);
    OK(cuMemAlloc_v2(&there, BYTES));
    OK(cuStreamCreate(&theirs, NON_BLOCKING));
    standin_hold_stream(stream, 1);
    OK(cuMemcpyDtoDAsync_v2(memory, there, BYTES, stream));
    OK(cuMemFree_v2(there));
    standin_hold_stream(stream, 0);
    SAME(cuStreamSynchronize(stream), 700);
    OK(cuStreamSynchronize(theirs));
    OK(cuStreamDestroy_v2(theirs));
    leave();
    standin_reset();
}

static void delays_and_holds(void) {
    double began = now();
    standin_delay_us(20000);
    OK(cuMemcpyDtoHAsync_v2(pinned, memory, BYTES, stream));
    OK(cuStreamSynchronize(stream));
    CHECK(now() - began >= 0.02);
    standin_hold(1);
    fill(stream, 1, 0);
    OK(standin_fill(alone, spare, BYTES, 2, 0));
    nap();
    SAME(cuStreamQuery(stream), NOT_READY);
    SAME(cuStreamQuery(alone), NOT_READY);
    standin_hold_stream(alone, 1);
    standin_hold(0);
    OK(cuStreamSynchronize(stream));
    SAME(cuStreamQuery(alone), NOT_READY);
    standin_reset();
    OK(cuStreamSynchronize(alone));
    SAME(standin_copies(), 0);
}

static void *query_relaxed(void *event) {
    uint32_t mode = RELAXED;
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    SAME(mode, 0);
    OK(cuCtxSetCurrent(context[0]));
    OK(cuEventQuery(event));
    return NULL;
}

static void captures(void) {
    uint32_t state, mode = RELAXED;
    CUdeviceptr address;
    CUevent event = make_event(), caught = make_event();
    pthread_t thread;
    OK(cuStreamIsCapturing(alone, &state));
    SAME(state, 0);
    standin_capture(alone, 1);
    OK(cuStreamIsCapturing(alone, &state));
    SAME(state, 1);
    OK(cuStreamIsCapturing(stream, &state));
    SAME(state, 0);
    OK(cuStreamIsCapturing(NULL, &state));
    /* What is safe, or done in the relaxed mode, leaves it alone. */
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(pthread_create(&thread, NULL, query_relaxed, caught));
    OK(pthread_join(thread, NULL));
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    SAME(mode, 0);
    OK(cuMemAlloc_v2(&address, 1));
    OK(cuMemFree_v2(address));
    OK(cuStreamSynchronize(second));
    SAME(cuEventRecord(caught, alone), CAPTURE_ISOLATION);
    SAME(cuStreamWaitEvent(stream, caught, 0), CAPTURE_ISOLATION);
    SAME(cuStreamWaitEvent(alone, event, 0), CAPTURE_ISOLATION);
    SAME(standin_capture_invalidated(), 0);
    OK(cuThreadExchangeStreamCaptureMode(&mode));
    SAME(mode, RELAXED);
    /* The rest ends it. */
    SAME(cuEventQuery(event), CAPTURE_UNSUPPORTED);
    SAME(standin_capture_invalidated(), 1);
    SAME(cuMemAlloc_v2(&address, 1), CAPTURE_UNSUPPORTED);
    SAME(cuMemFree_v2(memory), CAPTURE_UNSUPPORTED);
    SAME(cuMemHostRegister_v2(plain, 1, 0), CAPTURE_UNSUPPORTED);
    SAME(cuStreamSynchronize(stream), CAPTURE_UNSUPPORTED);
    SAME(cuEventSynchronize(event), CAPTURE_UNSUPPORTED);
    SAME(cuStreamQuery(NULL), CAPTURE_UNSUPPORTED);
    OK(cuStreamQuery(stream));
    OK(cuStreamIsCapturing(alone, &state));
    SAME(state, 2);
    SAME(cuEventRecord(caught, alone), CAPTURE_INVALIDATED);
    standin_capture(alone, 0);
    OK(cuEventQuery(event));
    /* On a blocking stream, the legacy default one is affected, too. */
    standin_capture(stream, 1);
    SAME(standin_capture_invalidated(), 0);
    SAME(cuStreamIsCapturing(NULL, &state), CAPTURE_IMPLICIT);
    SAME(standin_capture_invalidated(), 0);
    SAME(standin_fill(NULL, memory, 1, 1, 0), CAPTURE_IMPLICIT);
    SAME(standin_capture_invalidated(), 1);
    standin_reset();
    OK(cuStreamIsCapturing(stream, &state));
    SAME(state, 0);
    OK(cuEventRecord(caught, stream));
    OK(cuEventDestroy_v2(event));
    OK(cuEventDestroy_v2(caught));
}

static void texts(void) {
    const char *text;
    OK(cuGetErrorName(700, &text));
    CHECK(strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
    OK(cuGetErrorString(2, &text));
    CHECK(strcmp(text, "out of memory") == 0);
    SAME(cuGetErrorName(12345, &text), INVALID_VALUE);
    CHECK(text == NULL);
}

enum { CROWD = 8, STREAMS_EACH = 5, ROUNDS = 250, WORD = 8 };

/* Each has memory of its own, which goes around through several streams. */
static void *one_of_many(void *argument) {
    uint64_t number = (uint64_t)(uintptr_t)argument;
    uint8_t *own = calloc(1, WORD * STREAMS_EACH);
    CUstream made[STREAMS_EACH];
    CUevent event;
    CUdeviceptr address;
    OK(cuCtxPushCurrent_v2(context[number % 2]));
    OK(cuMemAlloc_v2(&address, WORD));
    OK(cuMemHostRegister_v2(own, WORD * STREAMS_EACH, PORTABLE));
    OK(cuEventCreate(&event, NO_TIMING));
    for (int i = 0; i < STREAMS_EACH; i++)
        OK(cuStreamCreate(&made[i], i % 2 == 0 ? NON_BLOCKING : BLOCKING));
    for (uint64_t round = 0; round < ROUNDS; round++) {
        CUstream from = made[round % STREAMS_EACH], to = made[(round + 1) % STREAMS_EACH];
        OK(standin_fill(from, address, WORD, number + round, 0));
        OK(cuMemcpyDtoHAsync_v2(own + round % STREAMS_EACH * WORD, address, WORD, from));
        OK(cuEventRecord(event, from));
        OK(cuStreamWaitEvent(to, event, 0));
        if (round % 50 != 0)
            continue;
        OK(cuEventSynchronize(event));
        for (uint64_t i = 0; i < WORD; i++)
            SAME(own[round % STREAMS_EACH * WORD + i], standin_pattern(number + round, i));
        OK(cuStreamWaitEvent(NULL, event, 0));
    }
    for (int i = 0; i < STREAMS_EACH; i++)
        OK(cuStreamDestroy_v2(made[i]));
    OK(cuEventDestroy_v2(event));
    OK(cuMemHostUnregister(own));
    OK(cuMemFree_v2(address));
    OK(cuCtxPopCurrent_v2(NULL));
    free(own);
    return NULL;
}

static void many_threads(void) {
    pthread_t threads[CROWD];
    for (uintptr_t i = 0; i < CROWD; i++)
        OK(pthread_create(&threads[i], NULL, one_of_many, (void *)i));
    for (int i = 0; i < CROWD; i++)
        OK(pthread_join(threads[i], NULL));
    SAME(standin_copies(), CROWD * ROUNDS);
}

static void tear_down(void) {
    OK(cuMemHostUnregister(pinned));
    OK(cuMemFree_v2(memory));
    OK(cuMemFree_v2(spare));
    OK(cuStreamDestroy_v2(alone));
    OK(cuStreamDestroy_v2(stream));
    OK(cuStreamDestroy_v2(second));
    leave();
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuDevicePrimaryCtxRelease_v2(1));
    const char *const kinds[] = {"stream", "event", "memory", "memory_bytes", "registered", "context"};
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        SAME(standin_live(kinds[i]), 0);
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (library == NULL) {
        printf("usage: selftest LIBRARY\n%s\n", count == 2 ? dlerror() : "");
        return 2;
    }
    FUNCTIONS(LOAD)
    FUNCTIONS(IS_THERE)
    setvbuf(stdout, NULL, _IOLBF, 0);
    setenv("STANDIN_DEVICES", "2", 1);
    setenv("STANDIN_MEMORY_BYTES", "1048576", 1);
#define RUN(check)                 \
    do {                           \
        check();                   \
        printf("ok %s\n", #check); \
    } while (0)
    RUN(initialisation);
    RUN(devices);
    RUN(contexts);
    RUN(set_up);
    RUN(streams);
    RUN(legacy_stream);
    RUN(events);
    RUN(events_recorded_anew);
    RUN(memory_of_devices);
    RUN(registered_memory);
    RUN(pointers);
    RUN(copies);
    RUN(copies_that_are_refused);
    RUN(giving_back_waits);
    RUN(batches);
    RUN(waits_for_values);
    RUN(faults);
    RUN(failing_work);
    RUN(memory_that_is_gone);
    RUN(delays_and_holds);
    RUN(captures);
    RUN(texts);
    RUN(many_threads);
    RUN(tear_down);
    return 0;
}
