/* Calls one kernel of a library with a request from stdin, so that an emulator can run what was cross-compiled.
 *
 * Request: u32 length of the library's path, path; u32 length of the symbol, symbol; u32 number of arguments (<= 8);
 * for each: u8 kind (0 integer, 1 input, 2 output, 3 both), u64 value or size, then the bytes of an input.
 * Answer: i32 status, then the bytes of every output. All little-endian.
 *
 * Every array ends where a forbidden page begins, so that one byte read or written past it is a crash, under an
 * emulator as well. Outputs start as 0xa5: a kernel that counts on zeroed memory is found out. */
#define _DEFAULT_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void take(void *to, size_t n) {
    if (n && fread(to, 1, n, stdin) != n) exit(3);
}

static char *text(void) {
    uint32_t n;
    take(&n, 4);
    char *s = calloc(n + 1u, 1);
    take(s, n);
    return s;
}

static uint8_t *guarded(uint64_t n) {
    const uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), room = (n + page - 1) / page * page;
    uint8_t *start = mmap(NULL, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + room, page, PROT_NONE)) exit(6);
    return (uint8_t *)memset(start + room - n, 0xa5, n);
}

int main(void) {
    void *library = dlopen(text(), RTLD_NOW);
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 4;
    }
    typedef int (*kernel_t)(uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
    kernel_t kernel;
    *(void **)&kernel = dlsym(library, text());
    if (!kernel) return 5;
    uint32_t count;
    take(&count, 4);
    uint64_t word[8] = {0}, size[8] = {0};
    uint8_t kind[8] = {0};
    for (uint32_t i = 0; i < count && i < 8; i++) {
        take(&kind[i], 1);
        take(&word[i], 8);
        if (!kind[i]) continue;
        size[i] = word[i];
        uint8_t *memory = guarded(size[i]);
        if (kind[i] & 1) take(memory, size[i]);
        word[i] = (uint64_t)(uintptr_t)memory;
    }
    const int32_t status = kernel(word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]);
    fwrite(&status, 4, 1, stdout);
    for (uint32_t i = 0; i < 8; i++)
        if (kind[i] & 2) fwrite((void *)(uintptr_t)word[i], 1, size[i], stdout);
    return 0;
}
