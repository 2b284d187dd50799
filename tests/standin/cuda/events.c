/*
 * Events. Each is the point where it was recorded last, which can be asked for, and waited for by threads and
 * streams.
 */
#include "standin.h"

#include <stdlib.h>

struct event *events;

static struct event *find_event(CUevent handle) {
    struct event *event = events;
    while (event != NULL && event != handle)
        event = event->next;
    return event;
}

EXPORTED CUresult cuEventCreate(CUevent *event, uint32_t flags) {
    ENTER(cuEventCreate);
    NEED_VALID(event != NULL && flags <= 7);
    CURRENT(context);
    *event = allocate(sizeof **event);
    **event = (struct event){.next = events, .context = context};
    events = *event;
    return CUDA_SUCCESS;
}

/* Waits that were enqueued for it stay, since they are for a point. */
EXPORTED CUresult cuEventDestroy_v2(CUevent event) {
    ENTER(cuEventDestroy_v2);
    struct event **link = &events;
    while (*link != NULL && *link != event)
        link = &(*link)->next;
    NEED(*link != NULL, CUDA_ERROR_INVALID_HANDLE);
    *link = event->next;
    if (event->lane != NULL)
        release_lane(event->lane);
    free(event);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventRecord(CUevent handle, CUstream stream) {
    ENTER(cuEventRecord);
    LANE(lane, stream);
    struct event *event = find_event(handle);
    NEED(event != NULL && event->context == lane->context, CUDA_ERROR_INVALID_HANDLE);
    event->captured = event->captured || lane->capturing;
    TRY(check_lane(lane));
    lane->users++;
    if (event->lane != NULL)
        release_lane(event->lane);
    event->lane = lane;
    event->captured = false;
    event->number = enqueue(lane, make_work(WORK_MARK, 0));
    return CUDA_SUCCESS;
}

static CUresult look_at_event(CUevent handle, struct event **event) {
    CURRENT(context);
    *event = find_event(handle);
    NEED(*event != NULL, CUDA_ERROR_INVALID_HANDLE);
    TRY((*event)->context->failed);
    TRY(check_no_capture());
    NEED(!(*event)->captured, CUDA_ERROR_CAPTURED_EVENT);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventQuery(CUevent handle) {
    ENTER(cuEventQuery);
    struct event *event;
    TRY(look_at_event(handle, &event));
    NEED(event->lane == NULL || is_reached(event->lane, event->number), CUDA_ERROR_NOT_READY);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuEventSynchronize(CUevent handle) {
    ENTER(cuEventSynchronize);
    struct event *event;
    TRY(look_at_event(handle, &event));
    /* Others may destroy it meanwhile. */
    struct context *context = event->context;
    if (event->lane != NULL)
        reach(event->lane, event->number, context);
    return context->failed;
}

EXPORTED CUresult cuStreamWaitEvent(CUstream stream, CUevent handle, uint32_t flags) {
    ENTER(cuStreamWaitEvent);
    LANE(lane, stream);
    struct event *event = find_event(handle);
    NEED(event != NULL, CUDA_ERROR_INVALID_HANDLE);
    NEED_VALID(flags <= 1);
    TRY(event->context->failed);
    TRY(check_lane(lane));
    NEED(!event->captured, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    if (event->lane != NULL)
        enqueue(lane, make_wait(event->lane, event->number));
    return CUDA_SUCCESS;
}
