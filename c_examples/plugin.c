/*
 * What a framework does that must run with and without pccheck: load it at run time with dlopen, and give it bytes that
 * the framework has serialised itself, as a raw save. Only the header is needed to build this, for its types.
 *
 *   plugin FILE [LIBRARY]       LIBRARY is libpccheck.so.1 unless given
 *
 * Build: cc plugin.c $(pkg-config --cflags pccheck) -ldl
 */
#include <pccheck.h>

#include <dlfcn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Every function that the program uses. Its type comes from the header, its address from dlsym. */
#define FUNCTIONS(USE)                                                                                                \
    USE(pcc_abi_version)                                                                                              \
    USE(pcc_version)                                                                                                  \
    USE(pcc_status_name)                                                                                              \
    USE(pcc_last_error)                                                                                               \
    USE(pcc_format)                                                                                                   \
    USE(pcc_open)                                                                                                     \
    USE(pcc_close)                                                                                                    \
    USE(pcc_raw_payload_bytes)                                                                                        \
    USE(pcc_raw_begin)                                                                                                \
    USE(pcc_raw_write)                                                                                                \
    USE(pcc_raw_commit)                                                                                               \
    USE(pcc_raw_free)                                                                                                 \
    USE(pcc_save_wait_durable)                                                                                        \
    USE(pcc_save_free)                                                                                                \
    USE(pcc_checkpoint_open)                                                                                          \
    USE(pcc_checkpoint_get_info)                                                                                      \
    USE(pcc_checkpoint_read)                                                                                          \
    USE(pcc_checkpoint_close)

struct library {
#define MEMBER(name) __typeof__(name) *name;
    FUNCTIONS(MEMBER)
#undef MEMBER
};

static struct library pcc;

/* Returns 0 and fills `pcc`, or says why checkpointing is not available and returns -1. */
static int load(const char *file)
{
    void *handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        fprintf(stderr, "plugin: no checkpointing: %s\n", dlerror());
        return -1;
    }
    /* POSIX lets a function's address pass through `void *`; assigning it this way keeps ISO C content, too. */
#define LOOK_UP(name)                                                                                                 \
    *(void **)&pcc.name = dlsym(handle, #name);                                                                       \
    if (pcc.name == NULL) {                                                                                           \
        fprintf(stderr, "plugin: no checkpointing: %s has no %s\n", file, #name);                                     \
        return -1;                                                                                                    \
    }
    FUNCTIONS(LOOK_UP)
#undef LOOK_UP

    /* The same major: what was there when this was compiled means the same. At least our minor: it is there. */
    uint32_t abi = pcc.pcc_abi_version();
    if (abi / 65536u != PCC_ABI_MAJOR || abi < PCC_ABI_MAJOR * 65536u + PCC_ABI_MINOR) {
        fprintf(stderr, "plugin: no checkpointing: %s has ABI %" PRIu32 ".%" PRIu32 ", expected %d.%d or a later %d\n",
                file, abi >> 16, abi & 0xffff, PCC_ABI_MAJOR, PCC_ABI_MINOR, PCC_ABI_MAJOR);
        return -1;
    }
    return 0;
}

static void check(pcc_status status, const char *what)
{
    if (status == PCC_OK)
        return;
    char reason[1024];
    pcc.pcc_last_error(reason, sizeof reason);
    fprintf(stderr, "plugin: %s: %s: %s\n", what, pcc.pcc_status_name(status), reason);
    exit(1);
}

int main(int argc, char **argv)
{
    if (argc < 2 || argc > 3) {
        fprintf(stderr, "usage: plugin FILE [LIBRARY]\n");
        return 2;
    }
    if (load(argc == 3 ? argv[2] : "libpccheck.so.1") != 0)
        return 3; /* a framework would go on without checkpoints */
    printf("loaded pccheck %s\n", pcc.pcc_version());

    /* The bytes that the framework made of its state, in pieces as they come out of its serialiser. */
    enum { PIECES = 100, PIECE_BYTES = 10007 };
    uint8_t piece[PIECE_BYTES];
    const uint64_t data_bytes = (uint64_t)PIECES * PIECE_BYTES;
    /* What a slot must hold: the bytes and the header of the file that they become. */
    uint64_t payload_bytes;
    check(pcc.pcc_raw_payload_bytes(data_bytes, NULL, 0, &payload_bytes), "ask for the size of a raw save");

    pcc_status status = pcc.pcc_format(argv[1], 3, payload_bytes, NULL);
    if (status != PCC_ALREADY_EXISTS) /* left by an earlier run: use it */
        check(status, "format");
    pcc_store *store;
    check(pcc.pcc_open(argv[1], NULL, &store), "open");

    pcc_raw *raw;
    check(pcc.pcc_raw_begin(store, 7, data_bytes, NULL, 0, NULL, &raw), "begin a raw save");
    for (int i = 0; i < PIECES; i++) {
        memset(piece, i, sizeof piece);
        check(pcc.pcc_raw_write(raw, (uint64_t)i * PIECE_BYTES, piece, sizeof piece), "write a piece");
    }
    pcc_save *save;
    check(pcc.pcc_raw_commit(raw, &save), "commit");
    pcc.pcc_raw_free(raw);
    check(pcc.pcc_save_wait_durable(save, -1, NULL), "make durable");
    pcc.pcc_save_free(save);

    /* And back: a raw save is one tensor of bytes, called "raw". */
    pcc_checkpoint *checkpoint;
    check(pcc.pcc_checkpoint_open(store, NULL, &checkpoint), "open the newest checkpoint");
    pcc_checkpoint_info info = {.struct_bytes = sizeof info};
    check(pcc.pcc_checkpoint_get_info(checkpoint, &info), "describe the checkpoint");
    uint8_t *bytes = malloc(data_bytes);
    if (bytes == NULL) {
        fprintf(stderr, "plugin: no memory for %" PRIu64 " bytes\n", data_bytes);
        return 1;
    }
    pcc_read read = {.struct_bytes = sizeof read, .name = "raw", .bytes = data_bytes, .dst = bytes};
    check(pcc.pcc_checkpoint_read(checkpoint, &read, 1), "read");
    pcc.pcc_checkpoint_close(checkpoint);
    pcc.pcc_close(store); /* dlclose would not unload the library: its fork handler stays */

    int differs = 0;
    for (uint64_t i = 0; i < data_bytes; i++)
        differs |= bytes[i] != i / PIECE_BYTES;
    free(bytes);
    if (differs) {
        fprintf(stderr, "plugin: what was read is not what was saved\n");
        return 1;
    }
    printf("saved and read %" PRIu64 " bytes of step %" PRIu64 "\n", data_bytes, info.step);
    return 0;
}
