/*
 * Writing.
 */
#define _GNU_SOURCE
#include "standin.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static uint64_t most_bytes, delay_us, unaligned, unregistered;

void reset_writes(void) {
    most_bytes = delay_us = unaligned = unregistered = 0;
}

/* No call writes more; 0 is no limit. */
EXPORTED void cufile_most_bytes(uint64_t bytes) {
    LOCKED;
    most_bytes = bytes;
}

/* How long a write waits before it reads the memory, and how long opening the driver takes. */
EXPORTED void cufile_delay_us(uint64_t us) {
    LOCKED;
    delay_us = us;
}

/* Calls since the reset whose bytes did not begin and end at multiples of 4096, in the file or in memory. */
EXPORTED uint64_t cufile_unaligned(void) {
    LOCKED;
    return unaligned;
}

/* Calls since the reset on memory that was not registered. */
EXPORTED uint64_t cufile_unregistered(void) {
    LOCKED;
    return unregistered;
}

static void sleep_us(uint64_t us) {
    struct timespec left = {.tv_sec = (time_t)(us / 1000000), .tv_nsec = (long)(us % 1000000) * 1000};
    while (us > 0 && nanosleep(&left, &left) != 0)
        continue;
}

static uint64_t delay_now(void) {
    LOCKED;
    return delay_us;
}

void be_slow(void) {
    sleep_us(delay_now());
}

static bool is_aligned(uint64_t number) {
    return number % ALIGNMENT == 0;
}

/* As in compatibility mode: by host memory, and past O_DIRECT where the bytes are not aligned for it. */
static ssize_t write_bytes(int fd, const void *from, size_t bytes, off_t offset) {
    void *host = NULL;
    bool apart = (fcntl(fd, F_GETFL) & O_DIRECT) != 0 && !(is_aligned(bytes) && is_aligned((uint64_t)offset));
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int target = apart ? open(path, O_WRONLY | O_CLOEXEC) : fd;
    if (target < 0 || posix_memalign(&host, ALIGNMENT, bytes + 1) != 0)
        die("no way to write", path);
    memcpy(host, from, bytes);
    ssize_t written = pwrite(target, host, bytes, offset);
    int error = errno;
    free(host);
    if (apart)
        close(target);
    errno = error;
    return written;
}

/* What is to be written, or why not: the lock is held. */
static int prepare(CUfileHandle_t handle, uint64_t base, size_t bytes, off_t to, off_t from, int *fd) {
    struct file *file = find_file(handle);
    if (file == NULL)
        return HANDLE_NOT_REGISTERED;
    if (!is_open(file)) {
        misuse("a file was closed before it is written to");
        return HANDLE_NOT_REGISTERED;
    }
    if (base == 0 || to < 0 || from < 0)
        return INVALID_VALUE;
    struct buffer *buffer = find_buffer(base);
    if (buffer != NULL && ((uint64_t)from > buffer->bytes || bytes > buffer->bytes - (uint64_t)from))
        return INVALID_MAPPING_RANGE;
    unregistered += buffer == NULL;
    unaligned += !is_aligned(bytes) || !is_aligned((uint64_t)to) || !is_aligned(base + (uint64_t)from);
    *fd = file->fd;
    return check_memory(base + (uint64_t)from, bytes);
}

EXPORTED ssize_t cuFileWrite(CUfileHandle_t handle, const void *base, size_t bytes, off_t to, off_t from) {
    int fd = -1;
    uint64_t first = (uintptr_t)base + (uint64_t)from;
    {
        LOCKED;
        CUfileError_t failed = enter(CALL_cuFileWrite);
        if (failed.err == SUCCESS)
            failed.err = prepare(handle, (uintptr_t)base, bytes, to, from, &fd);
        if (failed.err != SUCCESS) {
            errno = failed.cu_err;
            return -failed.err;
        }
        bytes = most_bytes > 0 && bytes > most_bytes ? most_bytes : bytes;
    }
    be_slow();
    return write_bytes(fd, standin_shadow(first), bytes, to);
}
