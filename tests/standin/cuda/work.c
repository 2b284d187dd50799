/*
 * Points, and the work of lanes: made, waited for and done.
 */
#include "standin.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

uint64_t last_number, work_to_fail, delay_us, copied_bytes, copies_done;
CUresult work_code;

bool is_reached(const struct lane *lane, uint64_t number) {
    return lane->first == NULL || lane->first->number > number;
}

void release_lane(struct lane *lane) {
    if (--lane->users > 0)
        return;
    pthread_cond_destroy(&lane->more);
    pthread_cond_destroy(&lane->progress);
    free(lane);
}

/* Waits for a point; not any longer once a context has failed, where one is given. */
void reach(struct lane *lane, uint64_t number, const struct context *unless_failed) {
    lane->users++;
    while (!is_reached(lane, number) && (unless_failed == NULL || unless_failed->failed == 0))
        pthread_cond_wait(&lane->progress, &mutex);
    release_lane(lane);
}

/* Waits for all that has been enqueued in a context so far. */
void drain(struct context *context) {
    uint64_t number = last_number;
    for (struct lane *lane = context->lanes; lane != NULL;) {
        if (is_reached(lane, number)) {
            lane = lane->next;
            continue;
        }
        /* Other lanes may go meanwhile. */
        reach(lane, number, NULL);
        lane = context->lanes;
    }
}

struct work *make_work(enum kind kind, size_t copies) {
    struct work *work = allocate(sizeof *work + copies * sizeof work->copies[0]);
    work->kind = kind;
    work->count = copies;
    return work;
}

struct work *make_wait(struct lane *lane, uint64_t number) {
    struct work *work = make_work(WORK_WAIT, 0);
    work->lane = lane;
    work->until = number;
    lane->users++;
    return work;
}

/* ---- What lanes do: the lock is held before and after ---- */

static void sleep_unlocked(uint64_t us) {
    struct timespec left = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    if (us == 0)
        return;
    pthread_mutex_unlock(&mutex);
    while (nanosleep(&left, &left) != 0)
        continue;
    pthread_mutex_lock(&mutex);
}

static void begin_moving(struct context *context) {
    context->moving++;
    pthread_mutex_unlock(&mutex);
}

static void end_moving(struct context *context) {
    pthread_mutex_lock(&mutex);
    if (--context->moving == 0)
        pthread_cond_broadcast(&moved);
}

static void poll_value(struct context *context, const struct work *work) {
    uint32_t *place = (uint32_t *)(void *)bytes_at(work->address, 4);
    if (place == NULL)
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    while (context->failed == 0) {
        uint32_t found = __atomic_load_n(place, __ATOMIC_ACQUIRE);
        /* Numbers wrap around. */
        if (work->flags == WAIT_EQ ? found == work->value : (int32_t)(found - work->value) >= 0)
            return;
        sleep_unlocked(50);
    }
}

static void store_value(struct context *context, const struct work *work) {
    uint32_t *place = (uint32_t *)(void *)bytes_at(work->address, 4);
    if (place == NULL)
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    else if (context->failed == 0)
        __atomic_store_n(place, work->value, __ATOMIC_RELEASE);
}

EXPORTED uint8_t standin_pattern(uint64_t seed, uint64_t i) {
    return (uint8_t)(((seed * 0x9E3779B97F4A7C15u + i) * 0xBF58476D1CE4E5B9u) >> 56);
}

static void fill(struct context *context, const struct work *work) {
    sleep_unlocked(work->delay_us);
    uint8_t *bytes = bytes_at(work->address, work->bytes);
    if (bytes == NULL)
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
    if (context->failed != 0)
        return;
    begin_moving(context);
    for (uint64_t i = 0; i < work->bytes; i++)
        bytes[i] = standin_pattern(work->seed, i);
    end_moving(context);
}

/* Memory of the device, or registered. */
static uint8_t *reachable(const struct context *context, CUdeviceptr address, uint64_t bytes) {
    struct range *range = containing(address, bytes);
    return range == NULL || (range->shadow != NULL && range->context != context) ? NULL : bytes_at(address, bytes);
}

static void hash(struct context *context, const struct work *work) {
    const struct launch *launch = &work->launch;
    uint64_t count = launch->blocks < launch->count ? launch->blocks : launch->count, read, written;
    sleep_unlocked(delay_us);
    if (context->failed != 0 || count == 0)
        return;
    bool fit = !__builtin_mul_overflow(count, launch->chunk_bytes, &read) && !__builtin_mul_overflow(count, 16, &written);
    const uint8_t *chunks = fit ? reachable(context, launch->base, read) : NULL;
    uint8_t *hashes = fit ? reachable(context, launch->out, written) : NULL;
    /* A load or store of 16 bytes that is not aligned fails, too. */
    if (chunks == NULL || hashes == NULL || launch->base % 16 != 0 || launch->out % 8 != 0) {
        fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
        return;
    }
    begin_moving(context);
    run_kernel(launch, chunks, read, hashes);
    end_moving(context);
}

static void copy_all(struct context *context, struct work *work) {
    sleep_unlocked(delay_us);
    /* Somebody may have freed memory since the call without waiting. */
    for (struct copy *copy = work->copies; copy < work->copies + work->count; copy++) {
        if (!copy->to_pageable)
            copy->to = (uintptr_t)bytes_at(copy->to, copy->bytes);
        if (!copy->from_pageable)
            copy->from = (uintptr_t)bytes_at(copy->from, copy->bytes);
        if (context->failed == 0 && (copy->to == 0 || copy->from == 0))
            fail_context(context, CUDA_ERROR_ILLEGAL_ADDRESS);
        if (context->failed != 0)
            return;
    }
    begin_moving(context);
    for (size_t i = work->count; i-- > 0;) {
        const struct copy *copy = &work->copies[i];
        memmove((void *)(uintptr_t)copy->to, (const void *)(uintptr_t)copy->from, copy->bytes);
    }
    end_moving(context);
    copies_done += work->count;
    for (size_t i = 0; i < work->count; i++)
        copied_bytes += work->copies[i].bytes;
}

void run(struct lane *lane, struct work *work) {
    struct context *context = lane->context;
    if (!work->implied && work_to_fail > 0 && --work_to_fail == 0)
        fail_context(context, work_code);
    else if (work->kind == WORK_WAIT)
        reach(work->lane, work->until, context);
    else if (work->kind == WORK_POLL)
        poll_value(context, work);
    else if (work->kind == WORK_STORE)
        store_value(context, work);
    else if (work->kind == WORK_FILL)
        fill(context, work);
    else if (work->kind == WORK_KERNEL)
        hash(context, work);
    else if (work->kind == WORK_COPIES)
        copy_all(context, work);
}
