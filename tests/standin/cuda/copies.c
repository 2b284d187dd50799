/*
 * Copies: one, or many in a batch.
 */
#include "standin.h"

#include <stdlib.h>

static CUresult check_copy(struct copy *copy, enum side to, enum side from, const struct context *context) {
    TRY(check_bytes(copy->to, copy->bytes, to, context, &copy->to_pageable));
    return check_bytes(copy->from, copy->bytes, from, context, &copy->from_pageable);
}

static CUresult enqueue_copies(struct lane *lane, struct work *work, bool complete) {
    struct context *context = lane->context;
    uint64_t number = enqueue(lane, work);
    if (!complete)
        return CUDA_SUCCESS;
    /* However it ends, nothing touches the caller's memory afterwards. */
    reach(lane, number, NULL);
    return context->failed;
}

static CUresult copy_one(CUstream stream, CUdeviceptr to, enum side to_side, CUdeviceptr from, enum side from_side,
                         size_t bytes) {
    struct copy copy = {.to = to, .from = from, .bytes = bytes};
    LANE(lane, stream);
    TRY(check_lane(lane));
    if (bytes == 0)
        return CUDA_SUCCESS;
    TRY(check_copy(&copy, to_side, from_side, lane->context));
    struct work *work = make_work(WORK_COPIES, 1);
    work->copies[0] = copy;
    return enqueue_copies(lane, work, copy.to_pageable || copy.from_pageable);
}

EXPORTED CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoHAsync_v2);
    return copy_one(stream, (uintptr_t)to, SIDE_HOST, from, SIDE_DEVICE, bytes);
}

EXPORTED CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyHtoDAsync_v2);
    return copy_one(stream, to, SIDE_DEVICE, (uintptr_t)from, SIDE_HOST, bytes);
}

EXPORTED CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    ENTER(cuMemcpyDtoDAsync_v2);
    return copy_one(stream, to, SIDE_DEVICE, from, SIDE_DEVICE, bytes);
}

#ifndef STANDIN_WITHOUT_BATCH
static CUresult check_attributes(const CUmemcpyAttributes *attributes, const size_t *firsts, size_t attribute_count,
                                 size_t count, bool *complete) {
    enum { ORDER_STREAM = 1, ORDER_DURING_API_CALL = 2, ORDER_ANY = 3 };
    NEED_VALID(attributes != NULL && firsts != NULL && attribute_count > 0 && attribute_count <= count);
    for (size_t i = 0; i < attribute_count; i++) {
        int32_t order = attributes[i].srcAccessOrder;
        NEED_VALID(order >= ORDER_STREAM && order <= ORDER_ANY);
        NEED_VALID(i == 0 ? firsts[i] == 0 : firsts[i] > firsts[i - 1] && firsts[i] < count);
        *complete = *complete || order == ORDER_DURING_API_CALL;
    }
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuMemcpyBatchAsync(CUdeviceptr *to, CUdeviceptr *from, size_t *bytes, size_t count,
                                     CUmemcpyAttributes *attributes, size_t *firsts, size_t attribute_count,
                                     size_t *failed, CUstream stream) {
    ENTER(cuMemcpyBatchAsync);
    bool complete = false;
    CUresult code = CUDA_SUCCESS;
    size_t i, ignored;
    failed = failed == NULL ? &ignored : failed;
    *failed = SIZE_MAX;
    /* The driver takes no batches on the legacy default stream. */
    NEED_VALID(to != NULL && from != NULL && bytes != NULL && count > 0 && (uintptr_t)stream > 1);
    TRY(check_attributes(attributes, firsts, attribute_count, count, &complete));
    LANE(lane, stream);
    TRY(check_lane(lane));
    struct work *work = make_work(WORK_COPIES, count);
    for (i = 0; i < count && code == CUDA_SUCCESS; i++) {
        struct copy *copy = &work->copies[i];
        *copy = (struct copy){.to = to[i], .from = from[i], .bytes = bytes[i]};
        code = bytes[i] == 0 ? CUDA_ERROR_INVALID_VALUE : check_copy(copy, SIDE_EITHER, SIDE_EITHER, lane->context);
        complete = complete || copy->to_pageable || copy->from_pageable;
    }
    if (code == CUDA_SUCCESS)
        return enqueue_copies(lane, work, complete);
    *failed = i - 1;
    free(work);
    return code;
}
#endif

/* Bytes that copies have moved since the reset. */
EXPORTED uint64_t standin_copied_bytes(void) {
    LOCKED;
    return copied_bytes;
}

/* Copies done since the reset: of a batch each one. */
EXPORTED uint64_t standin_copies(void) {
    LOCKED;
    return copies_done;
}
