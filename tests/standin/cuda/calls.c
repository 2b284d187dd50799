/*
 * How calls begin: one at a time, counted, and stalled or failing where a test wants it.
 */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALL_NAME(name) #name,
static const char *const call_names[] = {CALLS(CALL_NAME)};

enum { MAX_FAULTS = 64 };

struct fault {
    bool armed, sticky;
    enum call call;
    uint64_t at;
    CUresult code;
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t moved = PTHREAD_COND_INITIALIZER;
uint32_t jammed;

static struct fault faults[MAX_FAULTS];
static uint64_t calls_ever[CALL_COUNT], calls_at_reset[CALL_COUNT];
static bool stalled[CALL_COUNT];

int lock(void) {
    pthread_mutex_lock(&mutex);
    return 0;
}

void unlock(int *unused) {
    (void)unused;
    pthread_mutex_unlock(&mutex);
}

void die(const char *what, const char *name) {
    fprintf(stderr, "standin: %s: %s\n", what, name);
    abort();
}

void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL)
        die("out of memory", "calloc");
    return memory;
}

CUresult enter(enum call call) {
    uint64_t now = ++calls_ever[call];
    while (stalled[call] || jammed > 0)
        pthread_cond_wait(&moved, &mutex);
    for (struct fault *fault = faults; fault < faults + MAX_FAULTS; fault++) {
        if (fault->armed && fault->call == call && now >= fault->at) {
            fault->armed = fault->sticky;
            return fault->code;
        }
    }
    return CUDA_SUCCESS;
}

static enum call call_named(const char *name) {
    int call = 0;
    while (call < CALL_COUNT && strcmp(call_names[call], name) != 0)
        call++;
    if (call == CALL_COUNT)
        die("there is no such call", name);
    return (enum call)call;
}

/* Takes back what is set below, and counts anew. */
void reset_calls(void) {
    memset(faults, 0, sizeof faults);
    memset(stalled, 0, sizeof stalled);
    pthread_cond_broadcast(&moved);
    memcpy(calls_at_reset, calls_ever, sizeof calls_at_reset);
}

/* The nth call from now on, and with sticky all after it, does nothing and returns the code. */
EXPORTED void standin_fail(const char *call, uint64_t nth, int32_t code, uint32_t sticky) {
    LOCKED;
    struct fault *fault = faults;
    while (fault < faults + MAX_FAULTS && fault->armed)
        fault++;
    if (fault == faults + MAX_FAULTS)
        die("too many faults", call);
    enum call number = call_named(call);
    *fault = (struct fault){true, sticky != 0, number, calls_ever[number] + nth, code};
}

/* Until it is off again, the call does not return. */
EXPORTED void standin_stall(const char *call, uint32_t on) {
    LOCKED;
    stalled[call_named(call)] = on != 0;
    pthread_cond_broadcast(&moved);
}

/* Calls since the reset. */
EXPORTED uint64_t standin_calls(const char *call) {
    LOCKED;
    enum call number = call_named(call);
    return calls_ever[number] - calls_at_reset[number];
}
