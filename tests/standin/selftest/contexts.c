/*
 * Checks of the driver itself, its devices and contexts.
 */
#include "selftest.h"

#include <string.h>

/* Before anything is initialised. */
void initialisation(void) {
    int number;
    CUevent event;
    SAME(cuDeviceGetCount(&number), NOT_INITIALIZED);
    SAME(cuEventCreate(&event, 0), NOT_INITIALIZED);
    OK(cuDriverGetVersion(&number));
    SAME(number, 12080);
    SAME(cuInit(1), INVALID_VALUE);
    standin_fail("cuInit", 1, 100, 0);
    SAME(cuInit(0), 100);
    OK(cuInit(0));
    OK(cuInit(0));
}

void devices(void) {
    int number;
    char name[64];
    OK(cuDeviceGetCount(&number));
    SAME(number, 2);
    OK(cuDeviceGet(&number, 1));
    SAME(number, 1);
    SAME(cuDeviceGet(&number, 2), INVALID_DEVICE);
    SAME(cuDeviceGet(&number, -1), INVALID_DEVICE);
    OK(cuDeviceGetName(name, sizeof name, 1));
    CHECK(strchr(name, '1') != NULL);
    OK(cuDeviceGetAttribute(&number, 41, 0));
    SAME(number, 1);
    OK(cuDeviceGetAttribute(&number, 115, 0));
    SAME(number, 0);
}

void contexts(void) {
    CUcontext found;
    CUstream made;
    int device;
    size_t free_bytes, total;
    SAME(cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRetain(&context[0], 0));
    OK(cuDevicePrimaryCtxRetain(&context[1], 1));
    OK(cuDevicePrimaryCtxRetain(&found, 1));
    CHECK(found == context[1] && found != context[0]);
    SAME(standin_live("context"), 3);
    SAME(cuCtxPopCurrent_v2(&found), INVALID_CONTEXT);
    SAME(cuCtxGetDevice(&device), INVALID_CONTEXT);
    SAME(cuStreamCreate(&made, 0), INVALID_CONTEXT);
    SAME(cuMemGetInfo_v2(&free_bytes, &total), INVALID_CONTEXT);
    SAME(cuStreamSynchronize(NULL), INVALID_CONTEXT);
    SAME(cuCtxPushCurrent_v2((CUcontext)&device), INVALID_CONTEXT);
    OK(cuCtxGetCurrent(&found));
    CHECK(found == NULL);
    enter(0);
    enter(1);
    OK(cuCtxGetDevice(&device));
    SAME(device, 1);
    OK(cuCtxSetCurrent(context[0]));
    OK(cuCtxGetDevice(&device));
    SAME(device, 0);
    OK(cuCtxPopCurrent_v2(&found));
    CHECK(found == context[0]);
    OK(cuCtxSetCurrent(NULL));
    SAME(cuCtxPopCurrent_v2(&found), INVALID_CONTEXT);
    /* A context that nobody retains is not used. */
    enter(1);
    OK(cuDevicePrimaryCtxRelease_v2(1));
    OK(cuMemGetInfo_v2(&free_bytes, &total));
    OK(cuDevicePrimaryCtxRelease_v2(1));
    SAME(cuMemGetInfo_v2(&free_bytes, &total), CONTEXT_IS_DESTROYED);
    leave();
    SAME(cuCtxPushCurrent_v2(context[1]), INVALID_CONTEXT);
    OK(cuDevicePrimaryCtxRetain(&context[1], 1));
}

void texts(void) {
    const char *text;
    OK(cuGetErrorName(700, &text));
    CHECK(strcmp(text, "CUDA_ERROR_ILLEGAL_ADDRESS") == 0);
    OK(cuGetErrorString(2, &text));
    CHECK(strcmp(text, "out of memory") == 0);
    SAME(cuGetErrorName(12345, &text), INVALID_VALUE);
    CHECK(text == NULL);
}
