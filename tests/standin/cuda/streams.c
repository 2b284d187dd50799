/*
 * Streams, and what may not be done while one of them captures.
 */
#include "standin.h"

enum { CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED };

bool capture_invalidated;
uint32_t captures;
static __thread uint32_t capture_mode;

/* ---- What captures forbid ---- */

static CUresult invalidate_capture(CUresult code) {
    capture_invalidated = true;
    return code;
}

/* For calls that must not be made while a capture is open. All are of the global mode here, so that they forbid it to
 * all threads. */
CUresult check_no_capture(void) {
    if (captures == 0 || capture_mode == CAPTURE_RELAXED)
        return CUDA_SUCCESS;
    return invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

/* Whether it is a legacy default stream, and ordered with a stream that captures. */
static bool implies_capture(const struct lane *lane) {
    for (const struct lane *other = lane->context->lanes; other != NULL; other = other->next)
        if (lane == lane->context->legacy && other->blocking && other->capturing)
            return true;
    return false;
}

/* Why a stream takes no work. What is refused here leaves the capture as it is, unless it is on another stream. */
CUresult check_lane(const struct lane *lane) {
    TRY(lane->context->failed);
    if (lane->capturing)
        return capture_invalidated ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    return implies_capture(lane) ? invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) : CUDA_SUCCESS;
}

/* Why a stream cannot be asked or waited for. */
static CUresult check_look(const struct lane *lane) {
    TRY(lane->context->failed);
    if (lane->capturing)
        return invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    return implies_capture(lane) ? invalidate_capture(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT) : CUDA_SUCCESS;
}

/* ---- Streams ---- */

static CUresult create_stream(CUstream *stream, uint32_t flags) {
    NEED_VALID(stream != NULL && flags <= 1);
    CURRENT(context);
    *stream = make_lane(context, flags == 0);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamCreateWithPriority(CUstream *stream, uint32_t flags, int priority) {
    ENTER(cuStreamCreateWithPriority);
    (void)priority;
    return create_stream(stream, flags);
}

EXPORTED CUresult cuStreamCreate(CUstream *stream, uint32_t flags) {
    ENTER(cuStreamCreate);
    return create_stream(stream, flags);
}

EXPORTED CUresult cuStreamDestroy_v2(CUstream stream) {
    ENTER(cuStreamDestroy_v2);
    struct lane *lane = made_lane(stream);
    NEED(lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    captures -= lane->capturing;
    lane->capturing = false;
    lane->open = false;
    pthread_cond_signal(&lane->more);
    return CUDA_SUCCESS;
}

/* Only a default stream needs a current context, which is then the answer. */
EXPORTED CUresult cuStreamGetCtx(CUstream stream, CUcontext *context) {
    ENTER(cuStreamGetCtx);
    NEED_VALID(context != NULL);
    if ((uintptr_t)stream <= 2)
        return current(context);
    struct lane *lane = made_lane(stream);
    NEED(lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    *context = lane->context;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamQuery(CUstream stream) {
    ENTER(cuStreamQuery);
    LANE(lane, stream);
    bool legacy = lane == lane->context->legacy;
    TRY(check_look(lane));
    TRY(legacy ? check_no_capture() : CUDA_SUCCESS);
    for (struct lane *other = lane->context->lanes; other != NULL; other = other->next)
        if (other == lane || (legacy && other->blocking))
            NEED(other->first == NULL, CUDA_ERROR_NOT_READY);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuStreamSynchronize(CUstream stream) {
    ENTER(cuStreamSynchronize);
    LANE(lane, stream);
    struct context *context = lane->context;
    TRY(check_look(lane));
    TRY(check_no_capture());
    /* The legacy one ends when all do that it is ordered with. */
    if (lane == context->legacy)
        order_by_legacy(lane);
    reach(lane, last_number, context);
    return context->failed;
}

EXPORTED CUresult cuStreamWaitValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, uint32_t flags) {
    ENTER(cuStreamWaitValue32_v2);
    LANE(lane, stream);
    TRY(check_lane(lane));
    NEED(flags <= WAIT_EQ, CUDA_ERROR_NOT_SUPPORTED);
    NEED_VALID(address % 4 == 0 && containing(address, 4) != NULL);
    struct work *work = make_work(WORK_POLL, 0);
    work->address = address;
    work->value = value;
    work->flags = flags;
    enqueue(lane, work);
    return CUDA_SUCCESS;
}

#ifndef STANDIN_WITHOUT_WORDS
/* Without flags: everything before it on the stream is visible to whoever sees the value. */
EXPORTED CUresult cuStreamWriteValue32_v2(CUstream stream, CUdeviceptr address, uint32_t value, uint32_t flags) {
    ENTER(cuStreamWriteValue32_v2);
    LANE(lane, stream);
    TRY(check_lane(lane));
    NEED(flags == 0, CUDA_ERROR_NOT_SUPPORTED);
    NEED_VALID(address % 4 == 0 && containing(address, 4) != NULL);
    struct work *work = make_work(WORK_STORE, 0);
    work->address = address;
    work->value = value;
    enqueue(lane, work);
    return CUDA_SUCCESS;
}
#endif

/* ---- Captures ---- */

EXPORTED CUresult cuStreamIsCapturing(CUstream stream, uint32_t *status) {
    ENTER(cuStreamIsCapturing);
    NEED_VALID(status != NULL);
    LANE(lane, stream);
    NEED(!implies_capture(lane), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    *status = !lane->capturing ? 0 : capture_invalidated ? 2 : 1;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuThreadExchangeStreamCaptureMode(uint32_t *mode) {
    ENTER(cuThreadExchangeStreamCaptureMode);
    NEED_VALID(mode != NULL && *mode <= CAPTURE_RELAXED);
    uint32_t before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return CUDA_SUCCESS;
}

/* A capture of the global mode begins or ends on a stream that is no default one. */
EXPORTED void standin_capture(CUstream stream, uint32_t on) {
    LOCKED;
    struct lane *lane = made_lane(stream);
    if (lane == NULL)
        die("not a stream that can capture", "standin_capture");
    if (on && captures == 0)
        capture_invalidated = false;
    captures = captures - lane->capturing + (on != 0);
    lane->capturing = on != 0;
}

/* Whether a call has ended a capture since the last one began. */
EXPORTED uint32_t standin_capture_invalidated(void) {
    LOCKED;
    return capture_invalidated;
}
