/*
 * The ABI from the other side: a program that is valid C11 and C++11, and uses nothing but the header. It prints "ok"
 * and ends with 0, or says which line failed.
 */
#include <pccheck.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 1000

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

static void set_tensor(pcc_tensor *tensor, const char *name, const uint64_t *shape, void *data) {
    memset(tensor, 0, sizeof *tensor);
    tensor->struct_bytes = sizeof *tensor;
    tensor->name = name;
    tensor->shape = shape;
    tensor->rank = 1;
    tensor->dtype = PCC_DTYPE_F64;
    tensor->data = data;
    tensor->bytes = COUNT * sizeof(double);
}

static void note_end(void *user) {
    *(volatile int *)user = 1;
}

int main(void) {
    static double weights[COUNT], moments[COUNT], before[COUNT];
    const uint64_t shape[1] = {COUNT};
    pcc_tensor tensors[2];
    pcc_pair pair;
    pcc_open_options options;
    pcc_store *store = NULL;
    pcc_save *save = NULL;
    pcc_checkpoint *checkpoint = NULL;
    pcc_durable durable;
    pcc_checkpoint_info info;
    const char *value = NULL;
    uint64_t payload_bytes = 0, count = 0;
    volatile int ended = 0;
    int i;

    CHECK(pcc_abi_version() / 65536u == PCC_ABI_MAJOR);
    CHECK(pcc_abi_version() >= PCC_ABI_MAJOR * 65536u + PCC_ABI_MINOR);
    CHECK(strcmp(pcc_status_name(PCC_CORRUPT), "PCC_CORRUPT") == 0);

    set_tensor(&tensors[0], "weights", shape, weights);
    set_tensor(&tensors[1], "moments", shape, moments);
    for (i = 0; i < COUNT; i++) {
        weights[i] = before[i] = i * 0.5;
        moments[i] = -i;
    }
    pair.key = "schedule";
    pair.value = "cosine";

    CHECK(pcc_payload_bytes(tensors, 2, &pair, 1, &payload_bytes) == PCC_OK);
    CHECK(pcc_format("region", 4, payload_bytes, NULL) == PCC_OK);
    CHECK(pcc_open_options_init(&options, sizeof options) == PCC_OK);
    CHECK(options.struct_bytes == sizeof options && options.keep == 1 && options.max_in_flight == 2);
    options.required_durability = PCC_DURABILITY_PROCESS;
    options.max_in_flight = 3;
    CHECK(pcc_open("region", &options, &store) == PCC_OK);

    CHECK(pcc_save_begin(store, 17, tensors, 2, &pair, 1, NULL, &save) == PCC_OK);
    CHECK(pcc_save_wait_copied(save, -1) == PCC_OK);
    memset(weights, 0xFF, sizeof weights);
    memset(&durable, 0, sizeof durable);
    durable.struct_bytes = sizeof durable;
    CHECK(pcc_save_wait_durable(save, -1, &durable) == PCC_OK);
    CHECK(durable.generation == 1 && durable.superseded_by == 0);
    CHECK(pcc_save_error(save, NULL, 0) == 0);
    CHECK(pcc_save_on_end(save, note_end, (void *)&ended) == PCC_OK && ended == 1);
    pcc_save_free(save);

    CHECK(pcc_list(store, NULL, 0, 0, &count) == PCC_OK && count == 1);
    CHECK(pcc_restore(store, NULL, tensors, 2, &checkpoint) == PCC_OK);
    CHECK(memcmp(weights, before, sizeof weights) == 0);
    memset(&info, 0, sizeof info);
    info.struct_bytes = sizeof info;
    CHECK(pcc_checkpoint_get_info(checkpoint, &info) == PCC_OK);
    CHECK(info.step == 17 && info.generation == 1 && info.payload_bytes == payload_bytes);
    CHECK(pcc_checkpoint_metadata_find(checkpoint, "schedule", &value, NULL) == PCC_OK);
    CHECK(strcmp(value, "cosine") == 0);
    CHECK(pcc_checkpoint_metadata_find(checkpoint, "nothing", &value, NULL) == PCC_NOT_FOUND && value == NULL);
    pcc_checkpoint_close(checkpoint);
    pcc_close(store);

    puts("ok");
    return 0;
}
