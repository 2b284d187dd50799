/*
 * Checks of device memory and of registered memory.
 */
#include "selftest.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

void memory_of_devices(void) {
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

void registered_memory(void) {
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

struct pointer {
    CUcontext context;
    uint32_t type;
    int device;
    CUdeviceptr start;
    size_t bytes;
};

static struct pointer pointer_at(CUdeviceptr address) {
    struct pointer found;
    int attributes[] = {POINTER_CONTEXT, POINTER_TYPE, POINTER_DEVICE, POINTER_START, POINTER_BYTES};
    void *values[] = {&found.context, &found.type, &found.device, &found.start, &found.bytes};
    OK(cuPointerGetAttributes(5, attributes, values, address));
    return found;
}

void pointers(void) {
    CUdeviceptr there;
    enter(1);
    OK(cuMemAlloc_v2(&there, 10));
    leave();
    struct pointer found = pointer_at(memory + BYTES - 1);
    SAME(found.type, TYPE_DEVICE);
    SAME(found.device, 0);
    CHECK(found.start == memory && found.bytes == BYTES);
    found = pointer_at(there);
    SAME(found.device, 1);
    CHECK(found.context == context[1]);
    found = pointer_at((uintptr_t)pinned);
    SAME(found.type, TYPE_HOST);
    /* What is not known is no failure. */
    CUdeviceptr unknown[] = {(uintptr_t)plain, memory + BYTES};
    for (int at = 0; at < 2; at++) {
        found = pointer_at(unknown[at]);
        CHECK(found.type == 0 && found.device == -2 && found.start == 0 && found.bytes == 0 && found.context == NULL);
    }
    OK(cuMemFree_v2(there));
    SAME(pointer_at(there).type, 0);
    int attribute = 1000;
    void *value = &found;
    SAME(cuPointerGetAttributes(1, &attribute, &value, memory), INVALID_VALUE);
    SAME(cuPointerGetAttributes(1, &attribute, NULL, memory), INVALID_VALUE);
}

/* Memory is given back when the work of its context is done, and not before. */
void giving_back_waits(void) {
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

/* Memory that goes while other devices' work still uses it makes that work fail. */
void memory_that_is_gone(void) {
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
