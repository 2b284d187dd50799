/*
 * A stand-in for NVIDIA cuFile (libcufile.so.0), beside that for the driver, which must be loaded before and whose
 * memory it reads: the calls that the engine makes, with their real signatures, and further ones (cufile_...) by which
 * tests control and watch it.
 *
 * It is as strict as cuFile may be: a file and a buffer are registered once, calls on memory of a GPU are made in that
 * GPU's context, and nothing is read beyond what was registered or, of what was not, beyond its allocation. Like cuFile
 * it demands no alignment, but counts what has none. What the engine must never do is a misuse, which is counted, too.
 *
 * One lock guards everything; only delays and writing run outside of it.
 */
#ifndef STANDIN_H
#define STANDIN_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define EXPORTED __attribute__((visibility("default")))

/* ---- cuFile's types and codes ---- */

typedef struct {
    int err, cu_err;
} CUfileError_t;

typedef struct {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *fs_ops;
} CUfileDescr_t;

typedef void *CUfileHandle_t;

typedef struct {
    struct {
        unsigned int major_version, minor_version;
        size_t poll_thresh_size, max_direct_io_size;
        unsigned int dstatusflags, dcontrolflags;
    } nvfs;
    unsigned int fflags, max_device_cache_size, per_buffer_cache_size, max_device_pinned_mem_size, max_batch_io_size,
        max_batch_io_timeout_msecs;
} CUfileDrvProps_t;

enum {
    SUCCESS = 0, DRIVER_NOT_INITIALIZED = 5001, CUDA_MEMORY_TYPE_INVALID = 5013, CUDA_POINTER_RANGE_ERROR = 5014,
    CUDA_CONTEXT_MISMATCH = 5015, INVALID_MAPPING_RANGE = 5017, INVALID_FILE_TYPE = 5018,
    INVALID_FILE_OPEN_FLAG = 5019, INVALID_VALUE = 5022,
    MEMORY_ALREADY_REGISTERED = 5023, MEMORY_NOT_REGISTERED = 5024, HANDLE_NOT_REGISTERED = 5027,
    HANDLE_ALREADY_REGISTERED = 5028
};
enum { TYPE_FD = 1, ALIGNMENT = 4096 };

#define CALLS(X)                                                                                    \
    X(cuFileDriverOpen) X(cuFileDriverGetProperties) X(cuFileHandleRegister) X(cuFileHandleDeregister) \
    X(cuFileBufRegister) X(cuFileBufDeregister) X(cuFileWrite)

#define CALL_NUMBER(name) CALL_##name,
enum call { CALLS(CALL_NUMBER) CALL_COUNT };

/* ---- Of the stand-in for the driver ---- */

extern int cuCtxGetCurrent(void **context);
extern int cuPointerGetAttributes(unsigned int count, int *attributes, void **values, unsigned long long address);
extern void *standin_shadow(uint64_t address);

/* ---- How calls begin and return ---- */

/* Holds the lock until the end of the block. */
#define LOCKED __attribute__((cleanup(unlock), unused)) int locked = lock()

#define NEED(condition, code)               \
    do {                                    \
        if (!(condition))                   \
            return (CUfileError_t){code, 0}; \
    } while (0)
/* Every call begins with this: it is counted, and fails where a test wants it to. */
#define ENTER(name)                          \
    LOCKED;                                  \
    CUfileError_t failed = enter(CALL_##name); \
    if (failed.err != SUCCESS)               \
        return failed

/* ---- calls.c ---- */

extern bool driver_open;
int lock(void);
void unlock(int *unused);
void die(const char *what, const char *name);
void misuse(const char *what);
CUfileError_t enter(enum call call);

/* ---- files.c ---- */

struct file {
    int fd;
    dev_t device;
    ino_t inode;
};

struct file *find_file(CUfileHandle_t handle);
bool is_open(const struct file *file);
uint64_t files_live(void);

/* ---- buffers.c ---- */

struct buffer {
    uint64_t start;
    size_t bytes;
};

int check_memory(uint64_t address, size_t bytes);
struct buffer *find_buffer(uint64_t start);
uint64_t buffers_live(void);

/* ---- write.c ---- */

void reset_writes(void);
void be_slow(void);

#endif
