/*
 * Save, crash, restore.
 *
 *   save_restore run FILE       formats FILE, saves steps 1 to 5, and kills itself in the middle of saving step 6
 *   save_restore restore FILE   opens FILE as after any crash, restores the newest checkpoint and checks every byte
 *
 * Build: cc save_restore.c $(pkg-config --cflags --libs pccheck)
 */
#include <pccheck.h>

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WEIGHTS = 4 << 20, BIASES = 1000, DURABLE_STEPS = 5 };

/* The state of the training run: 16 MiB of weights and a few odd bytes. */
static float weights[WEIGHTS];
static uint8_t biases[BIASES];

/* One training step, for this example: every byte of the state depends on the step. */
static void train(uint64_t step)
{
    for (size_t i = 0; i < WEIGHTS; i++)
        weights[i] = (float)(i % 1000 + step * 1000);
    for (size_t i = 0; i < BIASES; i++)
        biases[i] = (uint8_t)(i * 7 + step);
}

/* Every failed call leaves its reason in pcc_last_error: operation, path, what was expected and found, what to do. */
static void check(pcc_status status, const char *what)
{
    if (status == PCC_OK)
        return;
    char reason[1024];
    pcc_last_error(reason, sizeof reason);
    fprintf(stderr, "save_restore: %s: %s: %s\n", what, pcc_status_name(status), reason);
    exit(1);
}

/* Describes the state to the library. The same array serves saving, restoring, and asking for the size. */
static void describe(pcc_tensor tensors[2])
{
    static const uint64_t weights_shape[2] = {WEIGHTS / 1024, 1024};
    static const uint64_t biases_shape[1] = {BIASES};

    memset(tensors, 0, 2 * sizeof tensors[0]);
    tensors[0] = (pcc_tensor){
        .struct_bytes = sizeof tensors[0],
        .name = "weights",
        .dtype = PCC_DTYPE_F32,
        .shape = weights_shape,
        .rank = 2,
        .data = weights,
        .bytes = sizeof weights,
    };
    tensors[1] = (pcc_tensor){
        .struct_bytes = sizeof tensors[1],
        .name = "biases",
        .dtype = PCC_DTYPE_U8,
        .shape = biases_shape,
        .rank = 1,
        .data = biases,
        .bytes = sizeof biases,
    };
}

static int run(const char *path)
{
    pcc_tensor tensors[2];
    describe(tensors);

    /* Metadata is anything that is not a tensor: text to text. It takes part in the size of a checkpoint. */
    const pcc_pair metadata[] = {{"schedule", "cosine"}, {"seed", "42"}};
    uint64_t payload_bytes;
    check(pcc_payload_bytes(tensors, 2, metadata, 2, &payload_bytes), "compute the size of a checkpoint");

    /* Three slots: two saves in flight and one checkpoint that is kept. All space is allocated here, once. */
    check(pcc_format(path, 3, payload_bytes, NULL), "format");

    /* The pool bounds the memory that the library takes: here it is a quarter of the state, which passes through it. */
    pcc_open_options options;
    check(pcc_open_options_init(&options, sizeof options), "set options");
    options.max_in_flight = 2;
    options.keep = 1;
    options.chunk_bytes = 1 << 20;
    options.staging_bytes = 4 << 20;
    pcc_store *store;
    check(pcc_open(path, &options, &store), "open");

    for (uint64_t step = 1; step <= DURABLE_STEPS; step++) {
        train(step);
        pcc_save *save;
        check(pcc_save_begin(store, step, tensors, 2, metadata, 2, NULL, &save), "begin a save");
        /*
         * From here to `copied` the state must not change; computing what does not change it may go on. Here we go
         * further and wait until the save is durable, so that we know what a crash must not take away. A trainer would
         * only wait for `copied`: see train.cpp.
         */
        check(pcc_save_wait_copied(save, -1), "copy");
        pcc_durable durable = {.struct_bytes = sizeof durable};
        check(pcc_save_wait_durable(save, -1, &durable), "make durable");
        printf("step %" PRIu64 " is durable: generation %" PRIu64 " in slot %" PRIu32 "\n", step, durable.generation,
               durable.slot);
        pcc_save_free(save);
    }

    /* Die with step 6 half written: no destructor, no handler, nothing flushed. */
    train(DURABLE_STEPS + 1);
    pcc_save *save;
    check(pcc_save_begin(store, DURABLE_STEPS + 1, tensors, 2, metadata, 2, NULL, &save), "begin a save");
    pcc_progress progress = {.struct_bytes = sizeof progress};
    do
        check(pcc_save_progress(save, &progress), "ask for progress");
    while (progress.written_bytes == 0 && !progress.ended);
    printf("killed with %" PRIu64 " of %" PRIu64 " bytes of step %" PRIu64 " written\n", progress.written_bytes,
           progress.total_bytes, progress.step);
    fflush(stdout);
    raise(SIGKILL);
    return 1;
}

static int restore(const char *path)
{
    pcc_store *store;
    check(pcc_open(path, NULL, &store), "open");

    /* Reads into the memory that the tensors name, verifies all of it on the way, and falls back where it must. */
    pcc_tensor tensors[2];
    describe(tensors);
    pcc_checkpoint *checkpoint;
    check(pcc_restore(store, NULL, tensors, 2, &checkpoint), "restore");

    pcc_checkpoint_info info = {.struct_bytes = sizeof info};
    check(pcc_checkpoint_get_info(checkpoint, &info), "describe the checkpoint");
    const char *schedule;
    check(pcc_checkpoint_metadata_find(checkpoint, "schedule", &schedule, NULL), "find the schedule");
    printf("restored step %" PRIu64 ", generation %" PRIu64 ", schedule %s\n", info.step, info.generation, schedule);
    pcc_checkpoint_close(checkpoint); /* `schedule` ends here, too */
    pcc_close(store);

    /* What was restored must be the state of its step, and no durable step may be lost. */
    uint64_t step = info.step;
    if (step < DURABLE_STEPS) {
        fprintf(stderr, "save_restore: step %d was durable, but %" PRIu64 " is the newest\n", DURABLE_STEPS, step);
        return 1;
    }
    float *restored_weights = malloc(sizeof weights);
    if (restored_weights == NULL) {
        fprintf(stderr, "save_restore: no memory to compare %zu bytes\n", sizeof weights);
        return 1;
    }
    uint8_t restored_biases[BIASES];
    memcpy(restored_weights, weights, sizeof weights);
    memcpy(restored_biases, biases, sizeof biases);
    train(step);
    int differs = memcmp(restored_weights, weights, sizeof weights) || memcmp(restored_biases, biases, sizeof biases);
    free(restored_weights);
    if (differs) {
        fprintf(stderr, "save_restore: the restored bytes are not those of step %" PRIu64 "\n", step);
        return 1;
    }
    printf("every byte is that of step %" PRIu64 "\n", step);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "run") == 0)
        return run(argv[2]);
    if (argc == 3 && strcmp(argv[1], "restore") == 0)
        return restore(argv[2]);
    fprintf(stderr, "usage: save_restore run FILE | save_restore restore FILE\n");
    return 2;
}
