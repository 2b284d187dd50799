/*
 * Registered files.
 */
#include "standin.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

enum { MAX_FILES = 1024 };
static struct file *files[MAX_FILES];

uint64_t files_live(void) {
    uint64_t live = 0;
    for (int i = 0; i < MAX_FILES; i++)
        live += files[i] != NULL;
    return live;
}

/* Its place; NULL where it is not registered. */
static struct file **place_of(CUfileHandle_t handle) {
    for (int i = 0; i < MAX_FILES; i++)
        if (files[i] != NULL && files[i] == handle)
            return &files[i];
    return NULL;
}

struct file *find_file(CUfileHandle_t handle) {
    struct file **place = place_of(handle);
    return place == NULL ? NULL : *place;
}

/* Whether its descriptor is still that of the file that was registered. */
bool is_open(const struct file *file) {
    struct stat now;
    return fstat(file->fd, &now) == 0 && now.st_dev == file->device && now.st_ino == file->inode;
}

EXPORTED CUfileError_t cuFileHandleRegister(CUfileHandle_t *handle, CUfileDescr_t *description) {
    struct stat found;
    struct file **place = NULL;
    ENTER(cuFileHandleRegister);
    NEED(handle != NULL && description != NULL, INVALID_VALUE);
    NEED(description->type == TYPE_FD && description->fs_ops == NULL, INVALID_VALUE);
    int fd = description->handle.fd;
    NEED(fstat(fd, &found) == 0, INVALID_VALUE);
    NEED(S_ISREG(found.st_mode) || S_ISBLK(found.st_mode), INVALID_FILE_TYPE);
    /* As the real one does (1.15). */
    NEED((fcntl(fd, F_GETFL) & O_NOFOLLOW) == 0, INVALID_FILE_OPEN_FLAG);
    for (int i = 0; i < MAX_FILES; i++) {
        NEED(files[i] == NULL || files[i]->fd != fd, HANDLE_ALREADY_REGISTERED);
        place = place == NULL && files[i] == NULL ? &files[i] : place;
    }
    if (place == NULL || (*place = malloc(sizeof **place)) == NULL)
        die("too many files", "cuFileHandleRegister");
    **place = (struct file){fd, found.st_dev, found.st_ino};
    *handle = *place;
    return (CUfileError_t){SUCCESS, 0};
}

EXPORTED void cuFileHandleDeregister(CUfileHandle_t handle) {
    LOCKED;
    enter(CALL_cuFileHandleDeregister);
    struct file **place = place_of(handle);
    if (place == NULL) {
        misuse("a file is deregistered that is not registered");
        return;
    }
    if (!is_open(*place))
        misuse("a file was closed before it is deregistered");
    free(*place);
    *place = NULL;
}
