/*
 * What the checks work with: the functions of the library, streams and memory, and helpers.
 */
#include "selftest.h"

#include <dlfcn.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DEFINE(result, name, arguments) result(*name) arguments;
FUNCTIONS(DEFINE)

CUcontext context[2];
CUstream alone, stream, second;
CUdeviceptr memory, spare;
uint8_t pinned[BYTES], plain[BYTES];

#define LOAD(result, name, arguments) *(void **)&name = dlsym(library, #name);
#define IS_THERE(result, name, arguments) CHECK(name != NULL || strcmp(#name, "cuMemcpyBatchAsync") == 0);

void load(void *library) {
    FUNCTIONS(LOAD)
    FUNCTIONS(IS_THERE)
}

void enter(int device) {
    OK(cuCtxPushCurrent_v2(context[device]));
}

void leave(void) {
    OK(cuCtxPopCurrent_v2(NULL));
}

bool is_filled(const void *bytes, uint64_t seed) {
    for (size_t i = 0; i < BYTES; i++)
        if (((const uint8_t *)bytes)[i] != standin_pattern(seed, i))
            return false;
    return true;
}

bool is_at(CUdeviceptr address, uint64_t seed) {
    return is_filled(standin_shadow(address), seed);
}

void nap(void) {
    usleep(3000);
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

void fill(CUstream on, uint64_t seed, uint64_t us) {
    OK(standin_fill(on, memory, BYTES, seed, us));
}

/* 4 bytes that can be waited for. */
uint32_t *word_of_pinned(void) {
    return (uint32_t *)(void *)(pinned + (-(uintptr_t)pinned & 3));
}

CUevent make_event(void) {
    CUevent event;
    OK(cuEventCreate(&event, NO_TIMING));
    return event;
}

/* Leaves context 0 current, and what the checks after it work with. */
void set_up(void) {
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

void tear_down(void) {
    OK(cuMemHostUnregister(pinned));
    OK(cuMemFree_v2(memory));
    OK(cuMemFree_v2(spare));
    OK(cuStreamDestroy_v2(alone));
    OK(cuStreamDestroy_v2(stream));
    OK(cuStreamDestroy_v2(second));
    leave();
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuDevicePrimaryCtxRelease_v2(1));
    const char *const kinds[] = {"stream", "event", "memory", "memory_bytes", "registered", "module", "context"};
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++)
        SAME(standin_live(kinds[i]), 0);
}
