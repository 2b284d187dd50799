/*
 * How tests control the devices and watch what is on them.
 */
#include "standin.h"

#include <string.h>

static void wake_all(void) {
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            pthread_cond_signal(&lane->more);
}

static void wake_the_jammed(void) {
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            pthread_cond_broadcast(&lane->progress);
}

/* Takes back all that tests set, and counts anew. Objects and enqueued work stay. */
EXPORTED void standin_reset(void) {
    LOCKED;
    reset_calls();
    work_to_fail = delay_us = copied_bytes = copies_done = captures = 0;
    queue_limit = jams = 0;
    all_held = capture_invalidated = allocations_wait = false;
    for (int i = 0; i < device_count; i++) {
        contexts[i].failed = CUDA_SUCCESS;
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            lane->held = lane->capturing = false;
    }
    wake_the_jammed();
    for (struct event *event = events; event != NULL; event = event->next)
        event->captured = false;
    wake_all();
}

/* The nth piece of work that starts from now on is not done, and its context fails. Copies (a batch is one), fills,
 * kernels, waits for events and for values, and records count. */
EXPORTED void standin_fail_work(uint64_t nth, int32_t code) {
    LOCKED;
    work_to_fail = nth;
    work_code = code;
}

/* A device fails at what it is doing. */
EXPORTED void standin_fail_device(uint32_t device, int32_t code) {
    LOCKED;
    if (device >= (uint32_t)device_count)
        die("no such device", "standin_fail_device");
    fail_context(&contexts[device], code);
}

/* How long copies and kernels wait on their stream before they touch a byte. */
EXPORTED void standin_delay_us(uint64_t us) {
    LOCKED;
    delay_us = us;
}

/* A stream takes so many pieces of work that are not done; 0: any number. */
EXPORTED void standin_queue_limit(uint64_t most) {
    LOCKED;
    queue_limit = most;
    wake_the_jammed();
}

/* How often a call had to wait for room. */
EXPORTED uint64_t standin_jams(void) {
    LOCKED;
    return jams;
}

/* While on, allocating, page-locking and loading code wait for all that has been enqueued on any device. */
EXPORTED void standin_allocations_wait(uint32_t on) {
    LOCKED;
    allocations_wait = on != 0;
}

/* While on, no stream starts anything. */
EXPORTED void standin_hold(uint32_t on) {
    LOCKED;
    all_held = on != 0;
    wake_all();
}

/* The same of one stream; default streams are the current context's. */
EXPORTED void standin_hold_stream(CUstream stream, uint32_t on) {
    LOCKED;
    struct lane *lane = made_lane(stream);
    if (lane == NULL && find_lane(stream, &lane) != CUDA_SUCCESS)
        die("not a stream", "standin_hold_stream");
    lane->held = on != 0;
    pthread_cond_signal(&lane->more);
}

/* How many there are: "stream" and "event" (made and not destroyed), "memory" (allocations), "memory_bytes",
 * "registered" (ranges), "module", "context" (retains that were not released). */
EXPORTED uint64_t standin_live(const char *kind) {
    enum { STREAM, EVENT, MEMORY, BYTES, REGISTERED, MODULE, CONTEXT, KINDS };
    static const char *const names[KINDS] = {"stream", "event", "memory", "memory_bytes", "registered", "module", "context"};
    uint64_t live[KINDS] = {0};
    LOCKED;
    for (struct context *context = contexts; context < contexts + device_count; context++) {
        live[CONTEXT] += context->retains;
        live[BYTES] += context->used;
        for (struct lane *lane = context->lanes; lane != NULL; lane = lane->next)
            live[STREAM] += lane->open && lane != context->legacy && lane != context->per_thread;
    }
    for (struct event *event = events; event != NULL; event = event->next)
        live[EVENT]++;
    for (struct module *module = modules; module != NULL; module = module->next)
        live[MODULE]++;
    for (size_t i = 0; i < range_count; i++)
        live[ranges[i]->shadow != NULL ? MEMORY : REGISTERED]++;
    for (int i = 0; i < KINDS; i++)
        if (strcmp(names[i], kind) == 0)
            return live[i];
    die("there is no such kind", kind);
    return 0;
}

/* A kernel: in stream order it sleeps and then fills device memory with standin_pattern. */
EXPORTED int32_t standin_fill(CUstream stream, uint64_t address, uint64_t bytes, uint64_t seed, uint64_t us) {
    LOCKED;
    bool pageable;
    LANE(lane, stream);
    TRY(check_lane(lane));
    TRY(check_bytes(address, bytes, SIDE_DEVICE, lane->context, &pageable));
    struct work *work = make_work(WORK_FILL, 0);
    work->address = address;
    work->bytes = bytes;
    work->seed = seed;
    work->delay_us = us;
    enqueue(lane, work);
    return CUDA_SUCCESS;
}
