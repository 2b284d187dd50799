/*
 * Checks of what tests can bring about: calls and work that fail, delays, captures.
 */
#include "selftest.h"

#include <pthread.h>

void faults(void) {
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
void failing_work(void) {
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

void delays_and_holds(void) {
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

void captures(void) {
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
