/*
 * Registered memory of GPUs.
 */
#include "standin.h"

enum { MAX_BUFFERS = 1024 };
/* Free places have no bytes. */
static struct buffer buffers[MAX_BUFFERS];

uint64_t buffers_live(void) {
    uint64_t live = 0;
    for (int i = 0; i < MAX_BUFFERS; i++)
        live += buffers[i].bytes > 0;
    return live;
}

/* Whether the bytes are of one allocation of the GPU whose context is current. */
int check_memory(uint64_t address, size_t bytes) {
    enum { CONTEXT = 1, MEMORY_TYPE = 2, RANGE_START = 11, RANGE_BYTES = 12, DEVICE = 2 };
    int attributes[] = {CONTEXT, MEMORY_TYPE, RANGE_START, RANGE_BYTES};
    void *context = NULL, *now = NULL;
    uint32_t type = 0;
    unsigned long long start = 0;
    size_t whole = 0;
    void *values[] = {&context, &type, &start, &whole};
    if (cuCtxGetCurrent(&now) != 0 || now == NULL)
        return CUDA_CONTEXT_MISMATCH;
    if (cuPointerGetAttributes(4, attributes, values, address) != 0 || type != DEVICE)
        return CUDA_MEMORY_TYPE_INVALID;
    if (context != now)
        return CUDA_CONTEXT_MISMATCH;
    return bytes > start + whole - address ? CUDA_POINTER_RANGE_ERROR : SUCCESS;
}

/* The one that begins there; NULL where none does. */
struct buffer *find_buffer(uint64_t start) {
    for (int i = 0; i < MAX_BUFFERS; i++)
        if (buffers[i].bytes > 0 && buffers[i].start == start)
            return &buffers[i];
    return NULL;
}

EXPORTED CUfileError_t cuFileBufRegister(const void *base, size_t bytes, int flags) {
    uint64_t start = (uintptr_t)base;
    struct buffer *place = NULL;
    ENTER(cuFileBufRegister);
    NEED(base != NULL && bytes > 0 && flags == 0, INVALID_VALUE);
    NEED(check_memory(start, bytes) == SUCCESS, check_memory(start, bytes));
    for (struct buffer *other = buffers; other < buffers + MAX_BUFFERS; other++) {
        bool apart = start + bytes <= other->start || other->start + other->bytes <= start;
        NEED(other->bytes == 0 || apart, MEMORY_ALREADY_REGISTERED);
        place = place == NULL && other->bytes == 0 ? other : place;
    }
    if (place == NULL)
        die("too many buffers", "cuFileBufRegister");
    *place = (struct buffer){start, bytes};
    return (CUfileError_t){SUCCESS, 0};
}

EXPORTED CUfileError_t cuFileBufDeregister(const void *base) {
    ENTER(cuFileBufDeregister);
    struct buffer *buffer = find_buffer((uintptr_t)base);
    if (buffer == NULL) {
        misuse("memory is deregistered that is not registered");
        return (CUfileError_t){MEMORY_NOT_REGISTERED, 0};
    }
    if (check_memory(buffer->start, buffer->bytes) != SUCCESS)
        misuse("memory is deregistered in another context, or was freed before");
    *buffer = (struct buffer){0, 0};
    return (CUfileError_t){SUCCESS, 0};
}
