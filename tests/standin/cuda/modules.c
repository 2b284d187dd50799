/*
 * Code that runs on devices: there is one kernel, that of kernel.c, whose PTX is taken on trust.
 */
#include "standin.h"

#include <stdlib.h>
#include <string.h>

struct module *modules;

#ifndef STANDIN_WITHOUT_KERNELS
static const char entry[] = "pccheck_hash_chunks";

/* A module and its function have the same handle. */
static struct module *find_module(const struct module *handle) {
    struct module *module = modules;
    while (module != NULL && module != handle)
        module = module->next;
    return module;
}

static bool is_ptx(const char *image) {
    return strstr(image, "\n.version ") != NULL && strstr(image, "\n.target ") != NULL;
}

EXPORTED CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    ENTER(cuModuleLoadData);
    NEED_VALID(module != NULL && image != NULL);
    CURRENT(context);
    TRY(check_no_capture());
    TRY(context->failed);
    drain_to_allocate();
    NEED(is_ptx(image), CUDA_ERROR_INVALID_PTX);
    *module = allocate(sizeof **module);
    **module = (struct module){.next = modules, .context = context, .has_entry = strstr(image, entry) != NULL};
    modules = *module;
    return CUDA_SUCCESS;
}

/* The driver loads the kernel itself here. */
EXPORTED CUresult cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
    ENTER(cuModuleGetFunction);
    NEED_VALID(function != NULL && name != NULL);
    CURRENT(context);
    struct module *module = find_module(handle);
    NEED(module != NULL && module->context == context, CUDA_ERROR_INVALID_HANDLE);
    NEED(module->has_entry && strcmp(name, entry) == 0, CUDA_ERROR_NOT_FOUND);
    TRY(check_no_capture());
    TRY(context->failed);
    drain_to_allocate();
    *function = module;
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuModuleUnload(CUmodule handle) {
    ENTER(cuModuleUnload);
    CURRENT(context);
    struct module *module = find_module(handle);
    NEED(module != NULL && module->context == context, CUDA_ERROR_INVALID_HANDLE);
    TRY(check_no_capture());
    drain(context);
    struct module **link = &modules;
    /* Another thread may have unloaded it meanwhile. */
    while (*link != NULL && *link != module)
        link = &(*link)->next;
    NEED(*link != NULL, CUDA_ERROR_INVALID_HANDLE);
    *link = module->next;
    free(module);
    return CUDA_SUCCESS;
}

EXPORTED CUresult cuLaunchKernel(CUfunction function, uint32_t blocks, uint32_t blocks_y, uint32_t blocks_z,
                                 uint32_t threads, uint32_t threads_y, uint32_t threads_z, uint32_t dynamic_bytes,
                                 CUstream stream, void **parameters, void **extra) {
    enum { MOST_BLOCKS = INT32_MAX, MOST_THREADS = 1024, BASE = 0, CHUNK_BYTES, COUNT, OUT };
    ENTER(cuLaunchKernel);
    LANE(lane, stream);
    struct module *module = find_module(function);
    NEED(module != NULL && module->context == lane->context, CUDA_ERROR_INVALID_HANDLE);
    NEED_VALID(blocks > 0 && blocks <= MOST_BLOCKS && threads > 0 && threads <= MOST_THREADS);
    NEED_VALID(blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1 && dynamic_bytes == 0);
    NEED_VALID(parameters != NULL && extra == NULL);
    TRY(check_lane(lane));
    uint64_t values[4];
    for (int i = 0; i < 4; i++)
        memcpy(&values[i], parameters[i], sizeof values[i]);
    struct work *work = make_work(WORK_KERNEL, 0);
    work->launch = (struct launch){blocks, threads, values[BASE], values[CHUNK_BYTES], values[COUNT], values[OUT]};
    enqueue(lane, work);
    return CUDA_SUCCESS;
}
#endif
