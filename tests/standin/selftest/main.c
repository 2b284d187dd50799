/*
 * Runs the checks.
 */
#include "selftest.h"

#include <dlfcn.h>

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (library == NULL) {
        printf("usage: selftest LIBRARY\n%s\n", count == 2 ? dlerror() : "");
        return 2;
    }
    load(library);
    setvbuf(stdout, NULL, _IOLBF, 0);
    setenv("STANDIN_DEVICES", "2", 1);
    setenv("STANDIN_MEMORY_BYTES", "1048576", 1);
#define RUN(check)                 \
    do {                           \
        check();                   \
        printf("ok %s\n", #check); \
    } while (0)
    RUN(initialisation);
    RUN(devices);
    RUN(contexts);
    RUN(set_up);
    RUN(streams);
    RUN(legacy_stream);
    RUN(events);
    RUN(events_recorded_anew);
    RUN(memory_of_devices);
    RUN(registered_memory);
    RUN(pointers);
    RUN(copies);
    RUN(copies_that_are_refused);
    RUN(giving_back_waits);
    RUN(batches);
    RUN(modules);
    RUN(hashes);
    RUN(launches_that_are_refused);
    RUN(waits_for_values);
    RUN(writes_of_values);
    RUN(full_queues);
    RUN(faults);
    RUN(failing_work);
    RUN(memory_that_is_gone);
    RUN(delays_and_holds);
    RUN(captures);
    RUN(texts);
    RUN(many_threads);
    RUN(tear_down);
    return 0;
}
