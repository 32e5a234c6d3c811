/* Several calls in one, so that a thread waits for no interpreter between them; and the calls of the system that stand among
 * kernels: pages are faulted in before them, and bytes are copied or written after them. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if !defined(_WIN32)
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>
#endif

#if defined(_WIN32)
#define QC_API __declspec(dllexport)
#else
#define QC_API __attribute__((visibility("default")))
#endif
/* the types of the arguments are the callee's own: pointers and integers of 64 bits, which are passed alike */
#if defined(__clang__)
#define QC_ANY_FUNCTION __attribute__((no_sanitize("function")))
#else
#define QC_ANY_FUNCTION
#endif

enum { ARGUMENTS = 8, PHASES = 3, UNDECODED = 1 << 16 };

/* One call, as quantcache.quant.native.Calls lays it out. */
typedef struct {
    uint64_t function, count; /* of arguments; no function: how often to do what the first argument says, with the others as bases */
    int64_t status, done_ns;  /* written: what it returned, and when, since the first began */
    int64_t phase_ns[PHASES]; /* written: of what the first argument says, how long each phase took */
    uint64_t a[ARGUMENTS];
} call_t;

/* Calls of which arguments count from bases, as quantcache.quant.native.Template lays them out. */
typedef struct {
    uint64_t function, count;
    uint64_t phase; /* 0: decodes, which nothing else is called after if it fails; 1, 2: others */
    struct {
        uint64_t base, offset;
    } a[ARGUMENTS];
} repeated_t;

typedef struct {
    uint64_t count, calls;    /* how many, and the address of the first */
    uint64_t many;            /* number of the base that is no address, but how many there are; 0: none is */
    uint64_t step[ARGUMENTS]; /* how much further each base is the next time; of what is `many`, how many each time but the last has */
} template_t;

typedef uint64_t u;

QC_ANY_FUNCTION static int call(uint64_t function, uint64_t count, const u *a) {
    const uintptr_t f = (uintptr_t)function;
    switch (count) {
    case 2: return ((int (*)(u, u))f)(a[0], a[1]);
    case 3: return ((int (*)(u, u, u))f)(a[0], a[1], a[2]);
    case 4: return ((int (*)(u, u, u, u))f)(a[0], a[1], a[2], a[3]);
    case 5: return ((int (*)(u, u, u, u, u))f)(a[0], a[1], a[2], a[3], a[4]);
    case 6: return ((int (*)(u, u, u, u, u, u))f)(a[0], a[1], a[2], a[3], a[4], a[5]);
    case 7: return ((int (*)(u, u, u, u, u, u, u))f)(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    case 8: return ((int (*)(u, u, u, u, u, u, u, u))f)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]);
    default: return EINVAL;
    }
}

static int64_t now_ns(void) {
#if defined(_WIN32)
    return 0;
#else
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
#endif
}

/* Makes the calls of a template as often as is said; returns all that they returned, or UNDECODED. */
static int repeat(call_t *c) {
    const template_t *t = (const template_t *)(uintptr_t)c->a[0];
    const repeated_t *calls = (const repeated_t *)(uintptr_t)t->calls;
    int64_t begin = now_ns();
    int status = 0;
    u base[ARGUMENTS];
    memcpy(base, c->a, sizeof base);
    base[0] = 0; /* what counts from no base counts from this one */
    for (uint64_t time = 1; time <= c->count; time++) {
        const u left = base[t->many];
        if (time < c->count) base[t->many] = t->step[t->many];
        for (uint64_t i = 0; i < t->count; i++) {
            u a[ARGUMENTS];
            for (uint64_t k = 0; k < calls[i].count; k++) a[k] = base[calls[i].a[k].base] + calls[i].a[k].offset;
            const int found = call(calls[i].function, calls[i].count, a);
            const int64_t end = now_ns();
            c->phase_ns[calls[i].phase] += end - begin;
            begin = end;
            if (found && !calls[i].phase) return UNDECODED;
            status |= found;
        }
        for (uint64_t k = 1; k < ARGUMENTS; k++) base[k] += t->step[k];
        base[t->many] = left - t->step[t->many];
    }
    return status;
}

/* Makes the calls up to the first that does not return 0; returns how many did. */
QC_API int64_t qc_calls(call_t *calls, uint64_t count) {
    const int64_t begin = now_ns();
    for (uint64_t i = 0; i < count; i++) {
        calls[i].status = calls[i].function ? call(calls[i].function, calls[i].count, calls[i].a) : repeat(calls + i);
        calls[i].done_ns = now_ns() - begin;
        if (calls[i].status) return (int64_t)i;
    }
    return (int64_t)count;
}

/* Faults mapped pages in. Returns why they cannot be read; 0, too, where the system cannot be asked. */
QC_API int qc_populate(uint8_t *pages, uint64_t n) {
#if defined(__linux__)
    enum { POPULATE_READ = 22 }; /* Linux 5.14, which headers may not know */
    if (!n || !madvise(pages, n, POPULATE_READ)) return 0;
    const int code = errno;
#if defined(EHWPOISON)
    if (code == EHWPOISON) return code;
#endif
    return code == EFAULT || code == EIO ? code : 0;
#else
    (void)pages, (void)n;
    return 0;
#endif
}

/* Copies n bytes. */
QC_API int qc_copy(uint8_t *target, const uint8_t *data, uint64_t n) {
    memcpy(target, data, n);
    return 0;
}

/* Bytes that belong at a place of a file, or of memory, as quantcache.loader.build lays them out. */
typedef struct {
    uint64_t place, address, count;
} piece_t;

/* Copies pieces to where they belong in memory. */
QC_API int qc_copy_pieces(const piece_t *pieces, uint64_t count) {
    for (uint64_t i = 0; i < count; i++)
        memcpy((void *)(uintptr_t)pieces[i].place, (const void *)(uintptr_t)pieces[i].address, pieces[i].count);
    return 0;
}

#if !defined(_WIN32)
/* Writes pieces that follow each other in the file, of which `skip` bytes are written; returns what pwritev does. */
static ssize_t write_run(int descriptor, const piece_t *pieces, uint64_t count, uint64_t skip) {
#if defined(__linux__)
    enum { MOST = 64 };
    struct iovec run[MOST];
    if (count > MOST) count = MOST;
    for (uint64_t i = 0; i < count; i++) {
        run[i].iov_base = (void *)(uintptr_t)pieces[i].address;
        run[i].iov_len = pieces[i].count;
    }
    run[0].iov_base = (uint8_t *)run[0].iov_base + skip;
    run[0].iov_len -= skip;
    return pwritev(descriptor, run, (int)count, (off_t)(pieces[0].place + skip));
#else
    (void)count;
    return pwrite(descriptor, (const uint8_t *)(uintptr_t)pieces[0].address + skip, pieces[0].count - skip, (off_t)(pieces[0].place + skip));
#endif
}
#endif

/* Writes pieces to a file, those that follow each other there together; a quota or a signal may cut one call short. Returns errno. */
QC_API int qc_write(uint64_t descriptor, const piece_t *pieces, uint64_t count) {
#if defined(_WIN32)
    (void)descriptor, (void)pieces, (void)count;
    return ENOSYS;
#else
    uint64_t skip = 0; /* bytes of the first piece that are written */
    while (count) {
        uint64_t together = 1;
        while (together < count && pieces[together].place == pieces[together - 1].place + pieces[together - 1].count) together++;
        ssize_t done = pieces[0].count > skip ? write_run((int)descriptor, pieces, together, skip) : 0;
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (done == 0 && pieces[0].count > skip) return EIO;
        skip += (uint64_t)done;
        while (count && skip >= pieces[0].count) skip -= pieces[0].count, pieces++, count--;
    }
    return 0;
#endif
}
