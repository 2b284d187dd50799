/*
 * The kernel that hashes chunks, out of the source that a GPU runs: one thread after the other, from barrier to barrier.
 */
#include "standin.h"

#include <string.h>
#include <sys/mman.h>

/* All that it uses of CUDA. Lanes run kernels at the same time; what a thread block finds in its memory is what the one before
 * has left there. */
#define __constant__ const
#define __device__
#define __global__
#define __launch_bounds__(threads, blocks)
#define __align__(bytes) __attribute__((aligned(bytes), may_alias))
#define __shared__ static __thread
#define __umul64hi(left, right) ((u64)((unsigned __int128)(left) * (right) >> 64))

static __thread struct {
    unsigned int x;
} blockIdx, blockDim;

/* Backwards in every other thread block: what one thread needs of another must not depend on who comes first. */
#define EVERY_THREAD(phase)                                                   \
    for (unsigned int turn = 0; turn < blockDim.x; turn++) {                  \
        unsigned int thread = number % 2 ? blockDim.x - 1 - turn : turn;      \
        phase;                                                                \
    }

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#include "../../../src/cuda/kernels/hash.cu"
#pragma GCC diagnostic pop

/* Memory right behind which, and less than a page before which, nobody can read. */
static uint8_t *fenced(size_t bytes, uint8_t **mapping, size_t *mapped) {
    enum { PAGE = 4096 };
    size_t whole = (bytes + PAGE - 1) / PAGE * PAGE;
    *mapped = whole + 2 * PAGE;
    *mapping = mmap(NULL, *mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*mapping == MAP_FAILED || mprotect(*mapping + PAGE, whole, PROT_READ | PROT_WRITE) != 0)
        die("no memory for chunks", "mmap");
    return *mapping + PAGE + whole - bytes;
}

/* The chunks are copied to where reading beside them shows. */
void run_kernel(const struct launch *launch, const uint8_t *chunks, size_t bytes, uint8_t *hashes) {
    size_t mapped;
    uint8_t *mapping, *fenced_chunks = fenced(bytes, &mapping, &mapped);
    memcpy(fenced_chunks, chunks, bytes);
    blockDim.x = launch->threads;
    for (uint32_t block = 0; block < launch->blocks; block++) {
        blockIdx.x = block;
        pccheck_hash_chunks(fenced_chunks, launch->chunk_bytes, launch->count, (u64 *)(void *)hashes);
    }
    munmap(mapping, mapped);
}
