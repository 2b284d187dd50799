/*
 * XXH3-128 (seed 0) of chunks in a GPU's memory.
 *
 * The algorithm is Y. Collet's XXH3 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md), as in src/persist/hasher.rs. Its
 * eight sums are mixed after each block of 16 stripes of 64 bytes. What a block adds to them does not depend on them, so a
 * chunk's thread block has most of its threads add up the stripes of a tile of blocks, each those of 2 of a block's sums, while
 * 8 threads mix what the tile before has come to: the only part that goes from block to block.
 *
 * scripts/kernels makes hash.ptx of it. Tests compile it as C, too, one thread after the other (tests/standin/cuda/kernel.c):
 * nothing here may need more of CUDA than that file makes up for.
 */

typedef unsigned long long u64;

enum {
    SUMS = 8,
    STRIPE_BYTES = 64,
    STRIPES = 16,
    BLOCK_BYTES = STRIPES * STRIPE_BYTES,
    /* Blocks that are added up at a time: two sums of one are a thread's. */
    TILE = 64,
    ADDERS = TILE * SUMS / 2,
    /* A warp more, for the threads that mix. */
    THREADS = ADDERS + 32,
    /* Loads that a thread has under way at once. */
    AHEAD = 8,
    SECRET_WORDS = 24,
    /* Where the secret for mixing begins, in words, and others, in bytes, none a multiple of 8. */
    MIX_SECRET = 16,
    LAST_STRIPE_SECRET = 121,
    LOW_SECRET = 11,
    HIGH_SECRET = 117
};

#define PRIME32_1 0x9e3779b1ull
#define PRIME32_2 0x85ebca77ull
#define PRIME32_3 0xc2b2ae3dull
#define PRIME64_1 0x9e3779b185ebca87ull
#define PRIME64_2 0xc2b2ae3d27d4eb4full
#define PRIME64_3 0x165667b19e3779f9ull
#define PRIME64_4 0x85ebca77c2b2ae63ull
#define PRIME64_5 0x27d4eb2f165667c5ull
#define PRIME_MX1 0x165667919e3779f9ull

static __constant__ u64 START[SUMS] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3,
                                       PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};

/* The default secret, in words. */
static __constant__ u64 SECRET[SECRET_WORDS] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af,
};

/* What is loaded at a time: two words of a stripe, each of which is added to the other's sum. */
struct __align__(16) pair {
    u64 even, odd;
};

struct shared {
    u64 secret[SECRET_WORDS];
    u64 sums[SUMS];
    /* What each block adds: of the tile that is being added up, and of the one before. */
    struct pair added[2][TILE][SUMS / 2];
};

/* Of what a thread does between two barriers, no other thread uses anything before the second. */
#ifndef EVERY_THREAD
#define EVERY_THREAD(phase)                \
    do {                                   \
        unsigned int thread = threadIdx.x; \
        phase;                             \
        __syncthreads();                   \
    } while (0)
#endif

/* 8 bytes of the secret, from a byte on that is not the first of a word. */
static __device__ u64 secret_at(const u64 *secret, unsigned int byte) {
    unsigned int shift = byte % 8 * 8;
    return secret[byte / 8] >> shift | secret[byte / 8 + 1] << (64 - shift);
}

static __device__ u64 low_times_high(u64 word) {
    return (word & 0xffffffffull) * (word >> 32);
}

static __device__ void begin(struct shared *shared, unsigned int thread) {
    if (thread < SECRET_WORDS)
        shared->secret[thread] = SECRET[thread];
    if (thread < SUMS)
        shared->sums[thread] = START[thread];
}

/* What the stripes of a block add to two of the sums. The last stripe of a chunk has its own secret. */
static __device__ struct pair add_stripes(const u64 *secret, const struct pair *words, unsigned int at, int is_last) {
    struct pair sums = {0, 0}, ahead[AHEAD];
#pragma unroll
    for (unsigned int first = 0; first < STRIPES; first += AHEAD) {
#pragma unroll
        for (unsigned int i = 0; i < AHEAD; i++)
            ahead[i] = words[(first + i) * (SUMS / 2)];
#pragma unroll
        for (unsigned int i = 0; i < AHEAD; i++) {
            u64 even = secret[first + i + at], odd = secret[first + i + at + 1];
            if (first + i == STRIPES - 1 && is_last) {
                even = secret_at(secret, LAST_STRIPE_SECRET + 8 * at);
                odd = secret_at(secret, LAST_STRIPE_SECRET + 8 * at + 8);
            }
            sums.even += low_times_high(ahead[i].even ^ even) + ahead[i].odd;
            sums.odd += low_times_high(ahead[i].odd ^ odd) + ahead[i].even;
        }
    }
    return sums;
}

/* Mixes one of the sums with what the blocks of a tile have added. After the last block of a chunk nothing is mixed. */
static __device__ void mix(struct shared *shared, unsigned int lane, u64 tile, u64 blocks) {
    const u64 *added = (const u64 *)shared->added[tile % 2] + lane;
    u64 left = blocks - tile * TILE, sum = shared->sums[lane], secret = shared->secret[MIX_SECRET + lane];
    unsigned int mixed = left > TILE ? TILE : (unsigned int)left - 1;
#pragma unroll 8
    for (unsigned int block = 0; block < mixed; block++) {
        sum += added[block * SUMS];
        sum = (sum ^ sum >> 47 ^ secret) * PRIME32_1;
    }
    if (mixed < TILE)
        sum += added[mixed * SUMS];
    shared->sums[lane] = sum;
}

/* A tile is added up while the one before is mixed. */
static __device__ void step(struct shared *shared, unsigned int thread, const unsigned char *chunk, u64 tile, u64 blocks) {
    if (thread < ADDERS) {
        unsigned int in_tile = thread / (SUMS / 2), pair = thread % (SUMS / 2);
        u64 block = tile * TILE + in_tile;
        if (block < blocks) {
            const struct pair *words = (const struct pair *)(chunk + block * BLOCK_BYTES) + pair;
            shared->added[tile % 2][in_tile][pair] = add_stripes(shared->secret, words, 2 * pair, block == blocks - 1);
        }
    } else if (thread < ADDERS + SUMS && tile > 0) {
        mix(shared, thread - ADDERS, tile - 1, blocks);
    }
}

/* One half of a chunk's hash. */
static __device__ u64 merge(const struct shared *shared, unsigned int secret, u64 hash) {
#pragma unroll
    for (unsigned int at = 0; at < SUMS; at += 2) {
        u64 left = shared->sums[at] ^ secret_at(shared->secret, secret + 8 * at);
        u64 right = shared->sums[at + 1] ^ secret_at(shared->secret, secret + 8 * at + 8);
        hash += left * right ^ __umul64hi(left, right);
    }
    hash ^= hash >> 37;
    hash *= PRIME_MX1;
    return hash ^ hash >> 32;
}

static __device__ void end(const struct shared *shared, unsigned int thread, u64 bytes, u64 *out) {
    if (thread == 0)
        out[0] = merge(shared, LOW_SECRET, bytes * PRIME64_1);
    if (thread == 1)
        out[1] = merge(shared, HIGH_SECRET, ~(bytes * PRIME64_2));
}

/*
 * Writes the hashes of `count` chunks of `chunk_bytes` (a multiple of 1024) that lie one behind the other to `out`, 16 bytes
 * each, the low half first. A thread block of THREADS for each chunk. Both addresses are multiples of 16.
 */
#ifdef __cplusplus
extern "C"
#endif
__global__ void __launch_bounds__(THREADS, 3)
pccheck_hash_chunks(const unsigned char *base, u64 chunk_bytes, u64 count, u64 *out) {
    __shared__ struct shared shared;
    u64 number = blockIdx.x, blocks = chunk_bytes / BLOCK_BYTES, tiles = (blocks + TILE - 1) / TILE;
    if (number >= count)
        return;
    const unsigned char *chunk = base + number * chunk_bytes;
    EVERY_THREAD(begin(&shared, thread));
    for (u64 tile = 0; tile <= tiles; tile++)
        EVERY_THREAD(step(&shared, thread, chunk, tile, blocks));
    EVERY_THREAD(end(&shared, thread, chunk_bytes, out + 2 * number));
}
