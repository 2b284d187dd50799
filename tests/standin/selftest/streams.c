/*
 * Checks of streams and events: the order of work.
 */
#include <pthread.h>

#include "selftest.h"

void streams(void) {
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

void legacy_stream(void) {
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

void events(void) {
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
void events_recorded_anew(void) {
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

void waits_for_values(void) {
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

/* A value is written behind all that was enqueued before, and not before. */
void writes_of_values(void) {
    uint32_t *word = word_of_pinned();
    CUdeviceptr address = (uintptr_t)word;
    *word = 7;
    SAME(cuStreamWriteValue32_v2(stream, (uintptr_t)plain, 1, 0), INVALID_VALUE);
    SAME(cuStreamWriteValue32_v2(stream, address + 2, 1, 0), INVALID_VALUE);
    fill(stream, 1, 5000);
    OK(cuStreamWriteValue32_v2(stream, address, 8, 0));
    fill(stream, 2, 5000);
    CHECK(__atomic_load_n(word, __ATOMIC_ACQUIRE) == 7);
    while (__atomic_load_n(word, __ATOMIC_ACQUIRE) == 7)
        nap();
    CHECK(*word == 8);
    OK(cuStreamSynchronize(stream));
    CHECK(is_at(memory, 2));
    /* Another stream waits for what this one writes. */
    OK(cuStreamWaitValue32_v2(alone, address, 9, GEQ));
    fill(alone, 3, 0);
    nap();
    SAME(cuStreamQuery(alone), NOT_READY);
    CHECK(is_at(memory, 2));
    OK(cuStreamWriteValue32_v2(stream, address, 9, 0));
    OK(cuStreamSynchronize(alone));
    CHECK(is_at(memory, 3));
}

static void *let_go(void *unused) {
    (void)unused;
    while (standin_jams() == 0)
        nap();
    nap();
    standin_hold_stream(stream, 0);
    return NULL;
}

/* A call that finds no room on its stream waits, and others with it. */
void full_queues(void) {
    pthread_t other;
    standin_queue_limit(3);
    standin_hold_stream(stream, 1);
    for (int i = 0; i < 3; i++)
        fill(stream, 1, 0);
    SAME(standin_jams(), 0);
    SAME(pthread_create(&other, NULL, let_go, NULL), 0);
    fill(stream, 2, 0);
    SAME(standin_jams(), 1);
    pthread_join(other, NULL);
    OK(cuStreamSynchronize(stream));
    CHECK(is_at(memory, 2));
    standin_queue_limit(0);
}
