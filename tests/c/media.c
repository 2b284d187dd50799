/*
 * What scripts/sanitizers runs under ASan, LSan and valgrind: saves of named tensors and of a raw stream, of odd sizes, by one
 * medium; restored, verified, and everything given back. It prints "ok" and ends with 0, or says which line failed.
 *
 *   media FILE direct-uring|direct-threads|mmap|striped [FAULT]
 *
 * A FAULT is a mistake of a program that the checker must report, which proves the checker:
 *
 *   leak    a save that is never freed
 *   freed   a tensor whose memory was freed before the save
 *   unset   a tensor of which one byte was never set, and which reaches the medium so
 */
#include <pccheck.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK (64u << 10)
#define LARGE (5u * CHUNK + 12345u)
#define SMALL 1001u

static void fail(int line, const char *what) {
    char text[1024];
    pcc_last_error(text, sizeof text);
    printf("line %d: %s: %s\n", line, what, text);
    exit(1);
}

#define CHECK(condition)               \
    do {                               \
        if (!(condition))              \
            fail(__LINE__, #condition); \
    } while (0)

static pcc_tensor tensor_of(const char *name, const uint64_t *shape, void *data) {
    pcc_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.struct_bytes = sizeof tensor;
    tensor.name = name;
    tensor.dtype = PCC_DTYPE_U8;
    tensor.shape = shape;
    tensor.rank = 1;
    tensor.data = data;
    tensor.bytes = *shape;
    return tensor;
}

static void fill(unsigned char *data, size_t bytes, unsigned seed) {
    for (size_t i = 0; i < bytes; i++)
        data[i] = (unsigned char)(i * 7 + seed);
}

/* A stream in pieces that are not in order, so that half-filled chunks are put aside. */
static void save_raw(const pcc_store *store, const unsigned char *data) {
    pcc_raw *raw;
    pcc_save *save;
    CHECK(pcc_raw_begin(store, 100, LARGE, NULL, 0, NULL, &raw) == PCC_OK);
    for (int half = 1; half >= 0; half--)
        for (uint64_t at = (uint64_t)half * CHUNK / 2; at < LARGE; at += CHUNK) {
            uint64_t bytes = LARGE - at < CHUNK / 2 ? LARGE - at : CHUNK / 2;
            CHECK(pcc_raw_write(raw, at, data + at, bytes) == PCC_OK);
        }
    CHECK(pcc_raw_commit(raw, &save) == PCC_OK);
    pcc_raw_free(raw);
    CHECK(pcc_save_wait_durable(save, -1, NULL) == PCC_OK);
    pcc_save_free(save);
}

int main(int argc, char **argv) {
    static unsigned char small[SMALL];
    const uint64_t large_shape[1] = {LARGE}, small_shape[1] = {SMALL}, no_shape[1] = {0};
    const pcc_pair metadata[1] = {{"schedule", "cosine"}};
    const char *fault = argc > 3 ? argv[3] : "";
    int leak = strcmp(fault, "leak") == 0, freed = strcmp(fault, "freed") == 0, unset = strcmp(fault, "unset") == 0;
    CHECK(argc >= 3 && (*fault == 0 || leak || freed || unset));
    int direct = strncmp(argv[2], "direct", 6) == 0, striped = strcmp(argv[2], "striped") == 0;

    unsigned char *large = malloc(LARGE);
    CHECK(large != NULL);
    if (unset)
        fill(large, LARGE - 1, 1);
    else
        fill(large, LARGE, 1);
    fill(small, SMALL, 2);
    pcc_tensor tensors[3] = {tensor_of("large", large_shape, large), tensor_of("small", small_shape, small),
                             tensor_of("none", no_shape, NULL)};

    char member[1024];
    const char *members[1] = {member};
    snprintf(member, sizeof member, "%s.1", argv[1]);
    pcc_format_options format;
    CHECK(pcc_format_options_init(&format, sizeof format) == PCC_OK);
    format.force = 1;
    format.medium = direct || striped ? PCC_MEDIUM_DIRECT : PCC_MEDIUM_MMAP;
    if (striped) {
        format.stripe_paths = members;
        format.stripe_count = 1;
    }
    CHECK(pcc_format(argv[1], 4, 1 << 20, &format) == PCC_OK);

    pcc_open_options options;
    CHECK(pcc_open_options_init(&options, sizeof options) == PCC_OK);
    options.medium = format.medium;
    options.backend = strcmp(argv[2], "direct-uring") == 0 ? PCC_BACKEND_URING : PCC_BACKEND_AUTO;
    if (strcmp(argv[2], "direct-threads") == 0)
        options.backend = PCC_BACKEND_THREADS;
    options.required_durability = PCC_DURABILITY_PROCESS;
    options.keep = 2;
    options.chunk_bytes = CHUNK;
    options.staging_bytes = 8 * CHUNK;
    pcc_store *store;
    CHECK(pcc_open(argv[1], &options, &store) == PCC_OK);

    if (freed)
        free(large);
    for (uint64_t step = 1; step <= 3; step++) {
        pcc_save *save;
        CHECK(pcc_save_begin(store, step, tensors, 3, metadata, 1, NULL, &save) == PCC_OK);
        CHECK(pcc_save_wait_copied(save, -1) == PCC_OK);
        CHECK(pcc_save_wait_durable(save, -1, NULL) == PCC_OK);
        if (!leak)
            pcc_save_free(save);
    }
    if (freed)
        return 0; /* It was not noticed. */
    save_raw(store, large);

    pcc_checkpoint *checkpoint;
    pcc_select_options select;
    CHECK(pcc_select_options_init(&select, sizeof select) == PCC_OK);
    select.select = PCC_SELECT_STEP;
    select.value = 3;
    memset(small, 0, SMALL);
    CHECK(pcc_restore(store, &select, tensors, 3, &checkpoint) == PCC_OK);
    for (size_t i = 0; i < SMALL; i++)
        CHECK(small[i] == (unsigned char)(i * 7 + 2));
    CHECK(pcc_checkpoint_verify(checkpoint) == PCC_OK);
    pcc_checkpoint_close(checkpoint);
    select.value = 77;
    CHECK(pcc_restore(store, &select, tensors, 3, &checkpoint) == PCC_NOT_FOUND && checkpoint == NULL);
    CHECK(pcc_pin(store, 77) == PCC_NOT_FOUND);
    CHECK(pcc_open(argv[1], &options, NULL) != PCC_OK);
    CHECK(pcc_drain(store, -1) == PCC_OK);
    pcc_close(store);
    free(large);
    puts("ok");
    return 0;
}
