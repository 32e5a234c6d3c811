/* Stands between a process and the C library (LD_PRELOAD), for one folder: records what changes it, fails the Nth call that
 * touches it, or takes its locks away. SQLite's calls come through here like Python's.
 *
 * A record: u8 what, u64 inode, i64 offset, u64 length, u32 length of path, of the second path; then path, second path, bytes.
 *   C open (offset: flags)   W write   T truncate (offset: size)   A allocate (offset: end)   F sync a file   S sync a folder
 *   R rename   U unlink   M mkdir   D rmdir
 * Shared memory of SQLite is mapped and not recorded: it is made anew from the log. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define FDS 4096
#define REAL(name) ((__typeof__(name) *)real(#name))

static char root[4096];
static size_t root_length;
static char *paths[FDS];
static int log_fd = -1, fail_errno, fail_on, locks; /* locks: 0 real, 1 fail, 2 succeed, 3 real and never the call that fails */
static long fail_at, count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

static int inside(const char *path) {
    return root_length && path && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

static const char *path_of(int fd) { return fd >= 0 && fd < FDS ? paths[fd] : NULL; }

static void remember(int fd, const char *path) {
    if (fd < 0 || fd >= FDS) return;
    free(paths[fd]);
    paths[fd] = inside(path) ? strdup(path) : NULL;
}

/* Whether this call is the one to fail: one call in all, or every one from it on. */
static int fails(const char *path) {
    if (!inside(path)) return 0;
    const long mine = __sync_add_and_fetch(&count, 1);
    if (!fail_at || (fail_on ? mine < fail_at : mine != fail_at)) return 0;
    errno = fail_errno;
    return 1;
}

static void put(const void *bytes, size_t n) {
    ssize_t (*out)(int, const void *, size_t) = (ssize_t(*)(int, const void *, size_t))real("write");
    while (n) {
        const ssize_t done = out(log_fd, bytes, n);
        if (done <= 0) abort();
        bytes = (const char *)bytes + done;
        n -= (size_t)done;
    }
}

static void note(char what, int fd, const char *path, const char *second, int64_t offset, const void *bytes, uint64_t length) {
    if (log_fd < 0 || !inside(path)) return;
    const int kept = errno;
    struct stat found = {0};
    if (fd >= 0) REAL(fstat)(fd, &found);
    const uint64_t inode = found.st_ino;
    const uint32_t sizes[2] = {(uint32_t)strlen(path), second ? (uint32_t)strlen(second) : 0};
    put(&what, 1), put(&inode, 8), put(&offset, 8), put(&length, 8), put(sizes, 8);
    put(path, sizes[0]), put(second ? second : "", sizes[1]);
    if (bytes) put(bytes, length);
    errno = kept;
}

/* Begin anew: count from 0. errno_ 0 fails nothing; `on` fails every call from the Nth. */
void qc_shim(const char *folder, const char *log, long at, int errno_, int on, int lock_mode) {
    if (log_fd >= 0) close(log_fd);
    log_fd = -1;
    root_length = 0;
    if (!folder) return;
    snprintf(root, sizeof root, "%s", folder);
    if (log) log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    count = 0, fail_at = errno_ ? at : 0, fail_errno = errno_, fail_on = on, locks = lock_mode;
    root_length = strlen(root);
}

long qc_shim_count(void) { return count; }

__attribute__((constructor)) static void start(void) {
    const char *folder = getenv("QC_SHIM_ROOT"), *mode = getenv("QC_SHIM_LOCKS");
    if (folder) qc_shim(folder, getenv("QC_SHIM_LOG"), 0, 0, 0, !mode ? 0 : !strcmp(mode, "fail") ? 1 : 2);
}

/* ---- opening ---- */

static int opened(int fd, const char *path, int flags) {
    if (fd >= 0) {
        remember(fd, path);
        if (flags & (O_CREAT | O_TRUNC)) note('C', fd, path, NULL, flags & O_TRUNC, NULL, 0);
    }
    return fd;
}

#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        mode_t mode = 0;                                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                                    \
            va_list more;                                                       \
            va_start(more, flags);                                              \
            mode = va_arg(more, mode_t);                                        \
            va_end(more);                                                       \
        }                                                                       \
        if (fails(path)) return -1;                                             \
        pthread_mutex_lock(&mutex);                                             \
        const int fd = opened(REAL(name)(path, flags, mode), path, flags);      \
        pthread_mutex_unlock(&mutex);                                           \
        return fd;                                                              \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                            \
    int name(int folder, const char *path, int flags, ...) {                    \
        mode_t mode = 0;                                                        \
        if (flags & (O_CREAT | O_TMPFILE)) {                                    \
            va_list more;                                                       \
            va_start(more, flags);                                              \
            mode = va_arg(more, mode_t);                                        \
            va_end(more);                                                       \
        }                                                                       \
        if (fails(path)) return -1;                                             \
        pthread_mutex_lock(&mutex);                                             \
        const int fd = opened(REAL(name)(folder, path, flags, mode), path, flags); \
        pthread_mutex_unlock(&mutex);                                           \
        return fd;                                                              \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int fd) {
    if (path_of(fd)) remember(fd, NULL);
    return REAL(close)(fd);
}

DIR *opendir(const char *path) { return fails(path) ? NULL : REAL(opendir)(path); }

/* ---- reading ---- */

#define STAT(name, type)                                                                                  \
    int name(const char *path, type *found) { return fails(path) ? -1 : REAL(name)(path, found); }
STAT(stat, struct stat)
STAT(lstat, struct stat)
STAT(stat64, struct stat64)
STAT(lstat64, struct stat64)

int fstatat(int folder, const char *path, struct stat *found, int flags) { return fails(path) ? -1 : REAL(fstatat)(folder, path, found, flags); }
int fstatat64(int folder, const char *path, struct stat64 *found, int flags) { return fails(path) ? -1 : REAL(fstatat64)(folder, path, found, flags); }
int fstat(int fd, struct stat *found) { return fails(path_of(fd)) ? -1 : REAL(fstat)(fd, found); }
int fstat64(int fd, struct stat64 *found) { return fails(path_of(fd)) ? -1 : REAL(fstat64)(fd, found); }
int access(const char *path, int mode) { return fails(path) ? -1 : REAL(access)(path, mode); }
ssize_t read(int fd, void *to, size_t n) { return fails(path_of(fd)) ? -1 : REAL(read)(fd, to, n); }
ssize_t pread(int fd, void *to, size_t n, off_t at) { return fails(path_of(fd)) ? -1 : REAL(pread)(fd, to, n, at); }
ssize_t pread64(int fd, void *to, size_t n, off64_t at) { return fails(path_of(fd)) ? -1 : REAL(pread64)(fd, to, n, at); }

/* ---- changing ---- */

#define LOGGED(result, call, done, ...)                                         \
    pthread_mutex_lock(&mutex);                                                 \
    result = call;                                                              \
    if (done) note(__VA_ARGS__);                                                \
    pthread_mutex_unlock(&mutex);                                               \
    return result

ssize_t write(int fd, const void *bytes, size_t n) {
    const char *path = path_of(fd);
    if (!path) return REAL(write)(fd, bytes, n);
    if (fails(path)) return -1;
    ssize_t done;
    const off_t at = lseek(fd, 0, SEEK_CUR);
    LOGGED(done, REAL(write)(fd, bytes, n), done > 0, 'W', fd, path, NULL, at, bytes, (uint64_t)done);
}

ssize_t pwrite(int fd, const void *bytes, size_t n, off_t at) {
    const char *path = path_of(fd);
    if (fails(path)) return -1;
    ssize_t done;
    LOGGED(done, REAL(pwrite)(fd, bytes, n, at), done > 0 && path, 'W', fd, path, NULL, at, bytes, (uint64_t)done);
}

ssize_t pwrite64(int fd, const void *bytes, size_t n, off64_t at) { return pwrite(fd, bytes, n, at); }

/* Piece by piece: each is seen, and may fail, so that what comes before it is written and what follows is not. */
ssize_t pwritev(int fd, const struct iovec *pieces, int count, off_t at) {
    if (!path_of(fd)) return REAL(pwritev)(fd, pieces, count, at);
    ssize_t written = 0;
    for (int i = 0; i < count; i++) {
        if (!pieces[i].iov_len) continue;
        const ssize_t done = pwrite(fd, pieces[i].iov_base, pieces[i].iov_len, at + written);
        if (done < 0) return written ? written : done;
        written += done;
        if ((size_t)done < pieces[i].iov_len) break;
    }
    return written;
}

ssize_t pwritev64(int fd, const struct iovec *pieces, int count, off64_t at) { return pwritev(fd, pieces, count, at); }

ssize_t copy_file_range(int from, off64_t *start, int to, off64_t *at, size_t n, unsigned flags) {
    const char *path = path_of(to);
    if (fails(path)) return -1;
    const off64_t where = at ? *at : 0;
    const ssize_t done = REAL(copy_file_range)(from, start, to, at, n, flags);
    if (done > 0 && path) {
        void *copy = malloc((size_t)done);
        REAL(pread)(to, copy, (size_t)done, where);
        note('W', to, path, NULL, where, copy, (uint64_t)done);
        free(copy);
    }
    return done;
}

int ftruncate(int fd, off_t size) {
    const char *path = path_of(fd);
    if (fails(path)) return -1;
    int done;
    LOGGED(done, REAL(ftruncate)(fd, size), !done && path, 'T', fd, path, NULL, size, NULL, 0);
}

int ftruncate64(int fd, off64_t size) { return ftruncate(fd, size); }

int posix_fallocate(int fd, off_t at, off_t n) {
    const char *path = path_of(fd);
    if (fails(path)) return errno;
    int done;
    LOGGED(done, REAL(posix_fallocate)(fd, at, n), !done && path, 'A', fd, path, NULL, at + n, NULL, 0);
}

int posix_fallocate64(int fd, off64_t at, off64_t n) { return posix_fallocate(fd, at, n); }

static char sync_of(int fd) {
    struct stat found;
    return !REAL(fstat)(fd, &found) && S_ISDIR(found.st_mode) ? 'S' : 'F';
}

int fsync(int fd) {
    const char *path = path_of(fd);
    if (fails(path)) return -1;
    int done;
    LOGGED(done, path ? 0 : REAL(fsync)(fd), !done && path, sync_of(fd), fd, path, NULL, 0, NULL, 0); /* the log is what counts */
}

int fdatasync(int fd) { return fsync(fd); }

int rename(const char *from, const char *to) {
    if (fails(from)) return -1;
    int done;
    LOGGED(done, REAL(rename)(from, to), !done, 'R', -1, from, to, 0, NULL, 0);
}

int unlink(const char *path) {
    if (fails(path)) return -1;
    int done;
    LOGGED(done, REAL(unlink)(path), !done, 'U', -1, path, NULL, 0, NULL, 0);
}

int mkdir(const char *path, mode_t mode) {
    if (fails(path)) return -1;
    int done;
    LOGGED(done, REAL(mkdir)(path, mode), !done, 'M', -1, path, NULL, 0, NULL, 0);
}

int rmdir(const char *path) {
    if (fails(path)) return -1;
    int done;
    LOGGED(done, REAL(rmdir)(path), !done, 'D', -1, path, NULL, 0, NULL, 0);
}

int chmod(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(chmod)(path, mode); }
int fchmod(int fd, mode_t mode) { return fails(path_of(fd)) ? -1 : REAL(fchmod)(fd, mode); }

/* ---- locks ---- */

int flock(int fd, int operation) {
    const char *path = path_of(fd);
    if (path && locks == 2) return 0;
    if (path && locks == 1 && !(operation & LOCK_UN)) {
        errno = ENOLCK;
        return -1;
    }
    return locks != 3 && fails(path) ? -1 : REAL(flock)(fd, operation);
}

static int control(int fd, int command, void *argument, const char *name) {
    const char *path = path_of(fd);
    const int locking = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
    if (locking && path) {
        if (locks == 2) return 0;
        if (locks == 1 && ((struct flock *)argument)->l_type != F_UNLCK) {
            errno = ENOLCK;
            return -1;
        }
        if (locks != 3 && fails(path)) return -1;
    }
    const int done = ((int (*)(int, int, ...))real(name))(fd, command, argument);
    if ((command == F_DUPFD || command == F_DUPFD_CLOEXEC) && path) remember(done, path);
    return done;
}

int fcntl(int fd, int command, ...) {
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    return control(fd, command, argument, "fcntl");
}

int fcntl64(int fd, int command, ...) {
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    return control(fd, command, argument, "fcntl64");
}
