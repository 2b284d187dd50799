/*
 * How calls begin, and how tests control and watch them; the driver.
 */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALL_NAME(name) #name,
static const char *const call_names[] = {CALLS(CALL_NAME)};

enum { MAX_FAULTS = 16 };

struct fault {
    bool armed, sticky;
    enum call call;
    uint64_t at;
    CUfileError_t code;
};

bool driver_open;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static struct fault faults[MAX_FAULTS];
static uint64_t calls[CALL_COUNT], misuses;
static CUfileDrvProps_t properties;

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

void misuse(const char *what) {
    fprintf(stderr, "standin: misuse of cuFile: %s\n", what);
    misuses++;
}

CUfileError_t enter(enum call call) {
    uint64_t now = ++calls[call];
    for (struct fault *fault = faults; fault < faults + MAX_FAULTS; fault++) {
        if (fault->armed && fault->call == call && now >= fault->at) {
            fault->armed = fault->sticky;
            return fault->code;
        }
    }
    NEED(driver_open || call == CALL_cuFileDriverOpen || call == CALL_cuFileDriverGetProperties, DRIVER_NOT_INITIALIZED);
    return (CUfileError_t){SUCCESS, 0};
}

static enum call call_named(const char *name) {
    int call = 0;
    while (call < CALL_COUNT && strcmp(call_names[call], name) != 0)
        call++;
    if (call == CALL_COUNT)
        die("there is no such call", name);
    return (enum call)call;
}

/* Takes back what is set below, and counts anew. What is registered stays. */
EXPORTED void cufile_reset(void) {
    LOCKED;
    memset(faults, 0, sizeof faults);
    memset(calls, 0, sizeof calls);
    memset(&properties, 0, sizeof properties);
    misuses = 0;
    reset_writes();
}

/* The nth call from now on, and with sticky all after it, does nothing and returns the code, with the driver's beside it;
 * cuFileWrite returns -code, or -1 with the errno that is the driver's where the code is 1. */
EXPORTED void cufile_fail(const char *call, uint64_t nth, int code, int driver, uint32_t sticky) {
    LOCKED;
    struct fault *fault = faults;
    while (fault < faults + MAX_FAULTS && fault->armed)
        fault++;
    if (fault == faults + MAX_FAULTS)
        die("too many faults", call);
    enum call number = call_named(call);
    *fault = (struct fault){true, sticky != 0, number, calls[number] + nth, {code, driver}};
}

/* Calls since the reset. */
EXPORTED uint64_t cufile_calls(const char *call) {
    LOCKED;
    return calls[call_named(call)];
}

EXPORTED uint64_t cufile_misuses(void) {
    LOCKED;
    return misuses;
}

/* How many are registered: "file", "buffer". */
EXPORTED uint64_t cufile_live(const char *kind) {
    LOCKED;
    if (strcmp(kind, "file") == 0)
        return files_live();
    if (strcmp(kind, "buffer") != 0)
        die("there is no such kind", kind);
    return buffers_live();
}

EXPORTED void cufile_set_properties(uint32_t nvfs_major, uint32_t feature_flags) {
    LOCKED;
    properties.nvfs.major_version = nvfs_major;
    properties.fflags = feature_flags;
}

/* ---- The driver ---- */

EXPORTED CUfileError_t cuFileDriverOpen(void) {
    be_slow();
    ENTER(cuFileDriverOpen);
    if (driver_open)
        misuse("the driver is opened twice");
    driver_open = true;
    return (CUfileError_t){SUCCESS, 0};
}

EXPORTED CUfileError_t cuFileDriverGetProperties(CUfileDrvProps_t *found) {
    ENTER(cuFileDriverGetProperties);
    NEED(found != NULL, INVALID_VALUE);
    *found = properties;
    return (CUfileError_t){SUCCESS, 0};
}
