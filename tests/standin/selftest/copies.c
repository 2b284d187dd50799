/*
 * Checks of copies: what they move and when, in batches, and by many threads.
 */
#include "selftest.h"

#include <pthread.h>
#include <string.h>

void copies(void) {
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

void copies_that_are_refused(void) {
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

void batches(void) {
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

void many_threads(void) {
    pthread_t threads[CROWD];
    for (uintptr_t i = 0; i < CROWD; i++)
        OK(pthread_create(&threads[i], NULL, one_of_many, (void *)i));
    for (int i = 0; i < CROWD; i++)
        OK(pthread_join(threads[i], NULL));
    SAME(standin_copies(), CROWD * ROUNDS);
}
