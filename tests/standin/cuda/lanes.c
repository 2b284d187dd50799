/*
 * Lanes: their threads, what is enqueued on them, and which one a stream is.
 */
#include "standin.h"

#include <stdlib.h>

bool all_held;
uint64_t queue_limit, jams;

/* In the queue of its stream: each copy of a batch takes as much as one alone. */
static size_t room_of(const struct work *work) {
    return work->count > 0 ? work->count : 1;
}

static void *serve(void *argument) {
    struct lane *lane = argument, **link;
    struct work *work;
    LOCKED;
    for (;;) {
        while (lane->first == NULL ? lane->open : all_held || lane->held)
            pthread_cond_wait(&lane->more, &mutex);
        work = lane->first;
        if (work == NULL)
            break;
        /* In a context that has failed, work is dropped. */
        if (lane->context->failed == 0)
            run(lane, work);
        lane->first = work->next;
        lane->length -= room_of(work);
        if (lane->first == NULL)
            lane->last = &lane->first;
        if (work->lane != NULL)
            release_lane(work->lane);
        free(work);
        pthread_cond_broadcast(&lane->progress);
    }
    for (link = &lane->context->lanes; *link != lane; link = &(*link)->next)
        continue;
    *link = lane->next;
    release_lane(lane);
    return NULL;
}

struct lane *make_lane(struct context *context, bool blocking) {
    struct lane *lane = allocate(sizeof *lane);
    pthread_attr_t attributes;
    pthread_t thread;
    *lane = (struct lane){.next = context->lanes, .context = context, .open = true, .blocking = blocking, .users = 1};
    lane->last = &lane->first;
    context->lanes = lane;
    pthread_cond_init(&lane->more, NULL);
    pthread_cond_init(&lane->progress, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 512 << 10);
    if (pthread_create(&thread, &attributes, serve, lane) != 0)
        die("no thread for a stream", "pthread_create");
    pthread_attr_destroy(&attributes);
    return lane;
}

static uint64_t append(struct lane *lane, struct work *work) {
    work->number = ++last_number;
    *lane->last = work;
    lane->last = &work->next;
    lane->length += room_of(work);
    pthread_cond_signal(&lane->more);
    return work->number;
}

/* Makes a lane wait for what the legacy default stream's ordering has before its next work. */
void order_by_legacy(struct lane *lane) {
    struct lane *legacy = lane->context->legacy;
    for (struct lane *other = lane->context->lanes; other != NULL && lane->blocking; other = other->next) {
        bool ordered = other != lane && other->blocking && (lane == legacy || other == legacy);
        if (ordered && other->first != NULL) {
            struct work *work = make_wait(other, last_number);
            work->implied = true;
            append(lane, work);
        }
    }
}

static bool lacks_room(const struct lane *lane, const struct work *work) {
    return queue_limit > 0 && lane->length > 0 && lane->length + room_of(work) > queue_limit;
}

/* As the driver does where a queue has no room: the call waits, with the lock that all others want. */
static void wait_for_room(struct lane *lane, const struct work *work) {
    if (!lacks_room(lane, work))
        return;
    jams++;
    jammed++;
    lane->users++;
    while (lacks_room(lane, work))
        pthread_cond_wait(&lane->progress, &mutex);
    release_lane(lane);
    if (--jammed == 0)
        pthread_cond_broadcast(&moved);
}

uint64_t enqueue(struct lane *lane, struct work *work) {
    wait_for_room(lane, work);
    order_by_legacy(lane);
    return append(lane, work);
}

/* The stream that a program made and has not destroyed; NULL where the handle is none. */
struct lane *made_lane(CUstream handle) {
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            if (lane == handle && lane->open)
                return lane;
    return NULL;
}

/* Any stream, the default ones of the current context included. */
CUresult find_lane(CUstream handle, struct lane **lane) {
    CURRENT(context);
    if ((uintptr_t)handle <= 2) {
        struct lane **slot = (uintptr_t)handle == 2 ? &context->per_thread : &context->legacy;
        if (*slot == NULL)
            *slot = make_lane(context, true);
        *lane = *slot;
    } else {
        *lane = made_lane(handle);
    }
    NEED(*lane != NULL, CUDA_ERROR_INVALID_HANDLE);
    return CUDA_SUCCESS;
}
