/*
 * Checks of code that runs on devices: loading it, and the one kernel that there is.
 */
#include "selftest.h"

#include <string.h>

enum { CHUNK = 4096, CHUNKS = 2, THREADS = 288 };

static const char ptx[] = "//\n.version 8.0\n.target sm_75\n.visible .entry pccheck_hash_chunks(\n";
static const char name[] = "pccheck_hash_chunks";

static CUmodule load_module(void) {
    CUmodule module;
    OK(cuModuleLoadData(&module, ptx));
    return module;
}

static CUfunction find_function(CUmodule module) {
    CUfunction function;
    OK(cuModuleGetFunction(&function, module, name));
    return function;
}

void modules(void) {
    CUmodule module, other;
    CUfunction function;
    SAME(cuModuleLoadData(NULL, ptx), INVALID_VALUE);
    SAME(cuModuleLoadData(&module, "pccheck_hash_chunks"), INVALID_PTX);
    OK(cuModuleLoadData(&other, "//\n.version 8.0\n.target sm_75\n"));
    SAME(cuModuleGetFunction(&function, other, name), NOT_FOUND);
    OK(cuModuleUnload(other));
    SAME(cuModuleUnload(other), INVALID_HANDLE);
    module = load_module();
    SAME(standin_live("module"), 1);
    SAME(cuModuleGetFunction(&function, module, "another"), NOT_FOUND);
    function = find_function(module);
    enter(1);
    SAME(cuModuleGetFunction(&function, module, name), INVALID_HANDLE);
    SAME(cuModuleUnload(module), INVALID_HANDLE);
    leave();
    leave();
    SAME(cuModuleLoadData(&other, ptx), INVALID_CONTEXT);
    enter(0);
    standin_capture(alone, 1);
    SAME(cuModuleLoadData(&other, ptx), CAPTURE_UNSUPPORTED);
    standin_capture(alone, 0);
    OK(cuModuleUnload(module));
    SAME(standin_live("module"), 0);
}

static int launch(CUfunction function, CUstream on, uint32_t blocks, uint32_t threads, CUdeviceptr base, uint64_t count) {
    uint64_t chunk_bytes = CHUNK;
    CUdeviceptr out = spare;
    void *parameters[] = {&base, &chunk_bytes, &count, &out};
    return cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, on, parameters, NULL);
}

static bool is_hashed(void) {
    /* Another implementation's, of the bytes that `fill` makes of 1. */
    static const uint64_t right[2 * CHUNKS] = {0xb1250ed23647fdec, 0x46bcf44f706396cc, 0xafe220068f2715ef,
                                               0x948bac275b551011};
    return memcmp(standin_shadow(spare), right, sizeof right) == 0;
}

void hashes(void) {
    CUmodule module = load_module();
    CUfunction function = find_function(module);
    /* In the order of the stream. */
    standin_hold_stream(stream, 1);
    OK(standin_fill(stream, spare, BYTES, 9, 0));
    fill(stream, 1, 5000);
    OK(launch(function, stream, CHUNKS, THREADS, memory, CHUNKS));
    fill(stream, 2, 0);
    SAME(cuStreamQuery(stream), NOT_READY);
    CHECK(!is_hashed());
    standin_hold_stream(stream, 0);
    OK(cuStreamSynchronize(stream));
    CHECK(is_hashed());
    SAME(((uint8_t *)standin_shadow(spare))[16 * CHUNKS], standin_pattern(9, 16 * CHUNKS));
    /* Late, where all is. */
    fill(stream, 1, 0);
    double began = now();
    standin_delay_us(20000);
    OK(launch(function, stream, CHUNKS, THREADS, memory, CHUNKS));
    OK(cuStreamSynchronize(stream));
    CHECK(now() - began >= 0.02);
    standin_delay_us(0);
    /* As many as there are, and as many as are wanted. */
    OK(standin_fill(stream, spare, BYTES, 9, 0));
    OK(launch(function, stream, CHUNKS + 1, THREADS, memory, CHUNKS));
    OK(cuStreamSynchronize(stream));
    CHECK(is_hashed());
    OK(launch(function, stream, 1, THREADS, memory, 0));
    OK(launch(function, stream, 1, THREADS, memory + CHUNK, 9));
    OK(cuStreamSynchronize(stream));
    CHECK(!is_hashed() && ((uint64_t *)standin_shadow(spare))[3] == 0x948bac275b551011);
    /* Unloading waits. */
    fill(stream, 1, 5000);
    OK(launch(function, stream, CHUNKS, THREADS, memory, CHUNKS));
    OK(cuModuleUnload(module));
    CHECK(is_hashed());
    SAME(launch(function, stream, CHUNKS, THREADS, memory, CHUNKS), INVALID_HANDLE);
}

void launches_that_are_refused(void) {
    CUmodule module = load_module();
    CUfunction function = find_function(module);
    uint64_t value = 16;
    void *parameters[] = {&value, &value, &value, &value};
    SAME(launch(function, stream, 0, THREADS, memory, 1), INVALID_VALUE);
    SAME(launch(function, stream, 1, 0, memory, 1), INVALID_VALUE);
    SAME(launch(function, stream, 1, 1025, memory, 1), INVALID_VALUE);
    SAME(launch(function, stream, 1u << 31, THREADS, memory, 1), INVALID_VALUE);
    SAME(cuLaunchKernel(function, 1, 1, 1, THREADS, 1, 1, 1, stream, parameters, NULL), INVALID_VALUE);
    SAME(cuLaunchKernel(function, 1, 1, 1, THREADS, 1, 1, 0, stream, NULL, NULL), INVALID_VALUE);
    SAME(launch(function, (CUstream)plain, 1, THREADS, memory, 1), INVALID_HANDLE);
    standin_fail("cuLaunchKernel", 1, 719, 0);
    SAME(launch(function, stream, 1, THREADS, memory, 1), 719);
    OK(cuStreamSynchronize(stream));
    /* What it cannot reach shows when it runs. */
    for (int i = 0; i < 3; i++) {
        const CUdeviceptr bases[] = {memory + BYTES, (uintptr_t)plain + (-(uintptr_t)plain & 15), memory + 8};
        OK(launch(function, stream, 1, THREADS, bases[i], 1));
        SAME(cuStreamSynchronize(stream), 700);
        SAME(launch(function, stream, 1, THREADS, memory, 1), 700);
        standin_reset();
    }
    enter(1);
    CUdeviceptr there;
    OK(cuMemAlloc_v2(&there, CHUNK));
    leave();
    OK(launch(function, stream, 1, THREADS, there, 1));
    SAME(cuStreamSynchronize(stream), 700);
    standin_reset();
    OK(cuMemFree_v2(there));
    standin_fail_work(1, 719);
    OK(launch(function, stream, 1, THREADS, memory, 1));
    SAME(cuStreamSynchronize(stream), 719);
    standin_reset();
    OK(cuModuleUnload(module));
}
