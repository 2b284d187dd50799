/*
 * Device memory, and host memory that is registered.
 */
#include "standin.h"

#include <sys/mman.h>

/* Address space of one device, and the alignment of what is allocated in it. As on a real one, allocations may touch. */
enum { ALIGNMENT = 512 };
static const size_t arena_bytes = (size_t)1 << 34;

bool allocations_wait;

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
            remove_range(range);
            return true;
        }
        for (int i = 0; i < device_count; i++)
            if (taken->portable || taken->context == &contexts[i])
                drain(&contexts[i]);
    }
}

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

/* The driver may wait for all that runs when it allocates, page-locks or loads code, as it does when it frees. */
void drain_to_allocate(void) {
    for (int i = 0; allocations_wait && i < device_count; i++)
        drain(&contexts[i]);
}

EXPORTED CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
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

EXPORTED CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER(cuMemFree_v2);
    CURRENT(context);
    TRY(check_no_capture());
    struct range range;
    NEED_VALID(take_range(address, false, &range));
    range.context->used -= range.bytes;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    ENTER(cuMemGetInfo_v2);
    NEED_VALID(free_bytes != NULL && total != NULL);
    CURRENT(context);
    *free_bytes = device_bytes - context->used;
    *total = device_bytes;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemHostRegister_v2(void *memory, size_t bytes, uint32_t flags) {
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

EXPORTED CUresult cuMemHostUnregister(void *memory) {
    ENTER(cuMemHostUnregister);
    CURRENT(context);
    TRY(check_no_capture());
    struct range range;
    NEED(take_range((uintptr_t)memory, true, &range), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    return CUDA_SUCCESS;
}
