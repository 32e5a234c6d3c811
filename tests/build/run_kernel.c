/* Calls one kernel of a library with a request from stdin, so that an emulator can run what was cross-compiled.
 *
 * Request: u32 length of the library's path, path; u32 length of the symbol, symbol; u32 number of arguments (<= 8);
 * for each: u8 kind (0 integer, 1 input, 2 output), u64 value or size, then the bytes of an input.
 * Answer: i32 status, then the bytes of every output. All little-endian. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

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
        uint8_t *memory = calloc(size[i] + 1, 1);
        if (kind[i] == 1) take(memory, size[i]);
        word[i] = (uint64_t)(uintptr_t)memory;
    }
    const int32_t status = kernel(word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]);
    fwrite(&status, 4, 1, stdout);
    for (uint32_t i = 0; i < 8; i++)
        if (kind[i] == 2) fwrite((void *)(uintptr_t)word[i], 1, size[i], stdout);
    return 0;
}
