/*
 * The driver itself, its devices and their contexts.
 */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>

#define CODE_ROW(name, number, text) {number, #name, text},
static const struct code {
    CUresult number;
    const char *name, *text;
} codes[] = {CODES(CODE_ROW)};
enum { CODE_COUNT = sizeof codes / sizeof codes[0] };

enum { MAX_PUSHED = 64 };

int device_count;
uint64_t device_bytes;
struct context contexts[MAX_DEVICES];

static __thread struct context *pushed[MAX_PUSHED];
static __thread int pushed_count;

static uint64_t number_from(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text == NULL || *text == 0 ? otherwise : strtoull(text, NULL, 0);
}

EXPORTED CUresult cuInit(uint32_t flags) {
    ENTER_ALWAYS(cuInit);
    NEED_VALID(flags == 0);
    uint64_t count = number_from("STANDIN_DEVICES", 2);
    NEED(count > 0, CUDA_ERROR_NO_DEVICE);
    if (device_count == 0) {
        device_count = count > MAX_DEVICES ? MAX_DEVICES : (int)count;
        device_bytes = number_from("STANDIN_MEMORY_BYTES", 1 << 30);
        for (int i = 0; i < device_count; i++)
            contexts[i].device = i;
    }
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDriverGetVersion(int *version) {
    ENTER_ALWAYS(cuDriverGetVersion);
    NEED_VALID(version != NULL);
    *version = 12080;
    return CUDA_SUCCESS;
}

static const struct code *find_code(CUresult number) {
    for (const struct code *code = codes; code < codes + CODE_COUNT; code++)
        if (code->number == number)
            return code;
    return NULL;
}

EXPORTED CUresult cuGetErrorName(CUresult error, const char **name) {
    ENTER_ALWAYS(cuGetErrorName);
    const struct code *code = find_code(error);
    *name = code == NULL ? NULL : code->name;
    return code == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORTED CUresult cuGetErrorString(CUresult error, const char **text) {
    ENTER_ALWAYS(cuGetErrorString);
    const struct code *code = find_code(error);
    *text = code == NULL ? NULL : code->text;
    return code == NULL ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* ---- Devices ---- */

#define NEED_DEVICE(device) NEED((device) >= 0 && (device) < device_count, CUDA_ERROR_INVALID_DEVICE)

EXPORTED CUresult cuDeviceGetCount(int *count) {
    ENTER(cuDeviceGetCount);
    NEED_VALID(count != NULL);
    *count = device_count;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet);
    NEED_VALID(device != NULL);
    NEED_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetName(char *name, int room, CUdevice device) {
    ENTER(cuDeviceGetName);
    NEED_VALID(name != NULL && room > 0);
    NEED_DEVICE(device);
    snprintf(name, (size_t)room, "Stand-in %d", (int)device);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    /* CAN_MAP_HOST_MEMORY, UNIFIED_ADDRESSING, CAN_USE_STREAM_MEM_OPS_V1, HOST_REGISTER_SUPPORTED */
    enum { MAPS = 19, UNIFIED = 41, WAITS_FOR_VALUES = 92, REGISTERS = 99 };
    ENTER(cuDeviceGetAttribute);
    NEED_VALID(value != NULL && attribute > 0);
    NEED_DEVICE(device);
    *value = attribute == MAPS || attribute == UNIFIED || attribute == WAITS_FOR_VALUES || attribute == REGISTERS;
    return CUDA_SUCCESS;
}

/* ---- Contexts ---- */

/* The calling thread's context. */
CUresult current(struct context **context) {
    NEED(pushed_count > 0, CUDA_ERROR_INVALID_CONTEXT);
    *context = pushed[pushed_count - 1];
    NEED((*context)->retains > 0, CUDA_ERROR_CONTEXT_IS_DESTROYED);
    return CUDA_SUCCESS;
}

static bool is_context(const struct context *context) {
    for (int i = 0; i < device_count; i++)
        if (context == &contexts[i])
            return context->retains > 0;
    return false;
}

/* From now on nothing runs in the context, and every call that may report it says why. */
void fail_context(struct context *context, CUresult code) {
    while (context->moving > 0)
        pthread_cond_wait(&moved, &mutex);
    context->failed = code;
    /* Its lanes may be waiting for points on any. */
    for (int i = 0; i < device_count; i++)
        for (struct lane *lane = contexts[i].lanes; lane != NULL; lane = lane->next)
            pthread_cond_broadcast(&lane->progress);
}

EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    ENTER(cuDevicePrimaryCtxRetain);
    NEED_VALID(context != NULL);
    NEED_DEVICE(device);
    *context = &contexts[device];
    (*context)->retains++;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    ENTER(cuDevicePrimaryCtxRelease_v2);
    NEED_DEVICE(device);
    NEED(contexts[device].retains > 0, CUDA_ERROR_INVALID_CONTEXT);
    contexts[device].retains--;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxPushCurrent_v2(CUcontext context) {
    ENTER(cuCtxPushCurrent_v2);
    NEED(is_context(context), CUDA_ERROR_INVALID_CONTEXT);
    if (pushed_count == MAX_PUSHED)
        die("contexts pushed without being popped", "cuCtxPushCurrent_v2");
    pushed[pushed_count++] = context;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    ENTER(cuCtxPopCurrent_v2);
    NEED(pushed_count > 0, CUDA_ERROR_INVALID_CONTEXT);
    pushed_count--;
    if (context != NULL)
        *context = pushed[pushed_count];
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxGetCurrent(CUcontext *context) {
    ENTER(cuCtxGetCurrent);
    NEED_VALID(context != NULL);
    *context = pushed_count == 0 ? NULL : pushed[pushed_count - 1];
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxSetCurrent(CUcontext context) {
    ENTER(cuCtxSetCurrent);
    NEED(context == NULL || is_context(context), CUDA_ERROR_INVALID_CONTEXT);
    pushed_count -= pushed_count > 0;
    if (context != NULL)
        pushed[pushed_count++] = context;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER(cuCtxGetDevice);
    NEED_VALID(device != NULL);
    CURRENT(context);
    *device = context->device;
    return CUDA_SUCCESS;
}
