/*
 * Whether the stand-in for the NVIDIA driver does as it says: loads the library given as the argument, prints a line
 * for each check, and ends with 0, or says which line failed.
 *
 * Below is what the files share: the functions of the library, what checks work with (bed.c), and the checks, file by
 * file. They know nothing of each other, but each begins with what those before it in main.c have left.
 */
#ifndef SELFTEST_H
#define SELFTEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void *CUcontext, *CUstream, *CUevent, *CUmodule, *CUfunction;
typedef unsigned long long CUdeviceptr;

typedef struct {
    int32_t order, source[2], destination[2];
    uint32_t flags;
} Attributes;

enum {
    INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201,
    INVALID_PTX = 218, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, CONTEXT_IS_DESTROYED = 709, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905, CAPTURE_IMPLICIT = 906
};
enum { BLOCKING = 0, NON_BLOCKING = 1, PORTABLE = 1, NO_TIMING = 2, RELAXED = 2, GEQ = 0, EQ = 1 };
enum { POINTER_CONTEXT = 1, POINTER_TYPE = 2, POINTER_DEVICE = 9, POINTER_START = 11, POINTER_BYTES = 12 };
enum { TYPE_HOST = 1, TYPE_DEVICE = 2 };

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
    F(int, cuStreamWriteValue32_v2, (CUstream, CUdeviceptr, uint32_t, uint32_t))                                   \
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
    F(int, cuModuleLoadData, (CUmodule *, const void *))                                                           \
    F(int, cuModuleGetFunction, (CUfunction *, CUmodule, const char *))                                            \
    F(int, cuModuleUnload, (CUmodule))                                                                             \
    F(int, cuLaunchKernel,                                                                                         \
      (CUfunction, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t, CUstream, void **,        \
       void **))                                                                                                   \
    F(int, cuThreadExchangeStreamCaptureMode, (uint32_t *))                                                        \
    F(int, cuPointerGetAttributes, (uint32_t, int *, void **, CUdeviceptr))                                        \
    F(int, cuGetErrorName, (int, const char **))                                                                   \
    F(int, cuGetErrorString, (int, const char **))                                                                 \
    F(void, standin_reset, (void))                                                                                 \
    F(void, standin_fail, (const char *, uint64_t, int32_t, uint32_t))                                             \
    F(void, standin_fail_work, (uint64_t, int32_t))                                                                \
    F(uint64_t, standin_calls, (const char *))                                                                     \
    F(void, standin_delay_us, (uint64_t))                                                                          \
    F(void, standin_queue_limit, (uint64_t))                                                                       \
    F(uint64_t, standin_jams, (void))                                                                              \
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

#define DECLARE(result, name, arguments) extern result(*name) arguments;
FUNCTIONS(DECLARE)

#define CHECK(condition)                                           \
    do {                                                           \
        if (!(condition)) {                                        \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                               \
        }                                                          \
    } while (0)
#define SAME(value, expected)                                                                       \
    do {                                                                                            \
        long long value_ = (long long)(value), expected_ = (long long)(expected);                   \
        if (value_ != expected_) {                                                                  \
            printf("%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #value, value_, expected_); \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)
#define OK(call) SAME(call, 0)

/* ---- bed.c ---- */

enum { BYTES = 10000 };

extern CUcontext context[2];
/* What most checks work with, on device 0: a stream apart from the legacy default one, and 2 that go by it. */
extern CUstream alone, stream, second;
extern CUdeviceptr memory, spare;
extern uint8_t pinned[BYTES], plain[BYTES];

void load(void *library);
void set_up(void);
void tear_down(void);
void enter(int device);
void leave(void);
bool is_filled(const void *bytes, uint64_t seed);
bool is_at(CUdeviceptr address, uint64_t seed);
void nap(void);
double now(void);
void fill(CUstream on, uint64_t seed, uint64_t us);
uint32_t *word_of_pinned(void);
CUevent make_event(void);

/* ---- Checks ---- */

/* contexts.c */
void initialisation(void), devices(void), contexts(void), texts(void);

/* streams.c */
void streams(void), legacy_stream(void), events(void), events_recorded_anew(void), waits_for_values(void);
void writes_of_values(void), full_queues(void);

/* memory.c */
void memory_of_devices(void), registered_memory(void), pointers(void), giving_back_waits(void),
    memory_that_is_gone(void);

/* copies.c */
void copies(void), copies_that_are_refused(void), batches(void), many_threads(void);

/* modules.c */
void modules(void), hashes(void), launches_that_are_refused(void);

/* control.c */
void faults(void), failing_work(void), delays_and_holds(void), captures(void);

#endif
