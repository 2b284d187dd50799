/*
 * Which bytes are device memory or registered: ranges of addresses.
 */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

/* Sorted by address: no two overlap. */
struct range **ranges;
size_t range_count;
static size_t range_room;

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
struct range *overlapping(CUdeviceptr address, size_t bytes) {
    size_t at = ranges_before(address);
    return at < range_count && ranges[at]->start < address + bytes ? ranges[at] : NULL;
}

/* The range that all of the bytes are in. */
struct range *containing(CUdeviceptr address, size_t bytes) {
    struct range *range = overlapping(address, 1);
    return range != NULL && bytes <= range->start + range->bytes - address ? range : NULL;
}

/* Where the host finds bytes of device or registered memory; NULL where they are neither. */
uint8_t *bytes_at(CUdeviceptr address, size_t bytes) {
    struct range *range = containing(address, bytes);
    if (range == NULL)
        return NULL;
    return range->shadow == NULL ? (uint8_t *)(uintptr_t)address : range->shadow + (address - range->start);
}

void add_range(struct range range) {
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

void remove_range(struct range *range) {
    size_t at = ranges_before(range->start);
    range_count--;
    memmove(&ranges[at], &ranges[at + 1], (range_count - at) * sizeof *ranges);
    free(range);
}

/* Whether work may use the bytes, and whether they are host memory that is not registered, as far as the context knows.
 * What is registered cannot be copied together with what is not. */
CUresult check_bytes(CUdeviceptr address, size_t bytes, enum side side, const struct context *context, bool *pageable) {
    NEED_VALID(address != 0 && bytes <= UINT64_MAX - address);
    struct range *range = overlapping(address, bytes);
    NEED_VALID(range == NULL ? side != SIDE_DEVICE : containing(address, bytes) != NULL);
    NEED_VALID(range == NULL || side == SIDE_EITHER || (range->shadow != NULL) == (side == SIDE_DEVICE));
    *pageable = range == NULL || (range->shadow == NULL && !range->portable && range->context != context);
    return CUDA_SUCCESS;
}

/* Registered memory has the same address on devices as on the host. */
EXPORTED CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *memory, uint32_t flags) {
    ENTER(cuMemHostGetDevicePointer_v2);
    CURRENT(context);
    struct range *range = overlapping((uintptr_t)memory, 1);
    NEED_VALID(address != NULL && flags == 0 && range != NULL && range->shadow == NULL);
    *address = (uintptr_t)memory;
    return CUDA_SUCCESS;
}

/* Of an address that is not known, too: all are 0 then, but the device, which is none. */
EXPORTED CUresult cuPointerGetAttributes(uint32_t count, int *attributes, void **values, CUdeviceptr address) {
    enum { CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_ORDINAL = 9, RANGE_START = 11, RANGE_BYTES = 12, HOST = 1, DEVICE = 2, NONE = -2 };
    ENTER(cuPointerGetAttributes);
    NEED_VALID(attributes != NULL && values != NULL);
    struct range *range = overlapping(address, 1);
    for (uint32_t at = 0; at < count; at++) {
        NEED_VALID(values[at] != NULL);
        switch (attributes[at]) {
        case CONTEXT:
            *(CUcontext *)values[at] = range == NULL ? NULL : range->context;
            break;
        case MEMORY_TYPE:
            *(uint32_t *)values[at] = range == NULL ? 0 : range->shadow == NULL ? HOST : DEVICE;
            break;
        case DEVICE_ORDINAL:
            *(int *)values[at] = range == NULL ? NONE : range->context->device;
            break;
        case RANGE_START:
            *(CUdeviceptr *)values[at] = range == NULL ? 0 : range->start;
            break;
        case RANGE_BYTES:
            *(size_t *)values[at] = range == NULL ? 0 : range->bytes;
            break;
        default:
            return CUDA_ERROR_INVALID_VALUE;
        }
    }
    return CUDA_SUCCESS;
}

/* Where the host finds the bytes of device memory; NULL where it is none. */
EXPORTED void *standin_shadow(uint64_t address) {
    LOCKED;
    struct range *range = overlapping(address, 1);
    return range == NULL || range->shadow == NULL ? NULL : range->shadow + (address - range->start);
}
