/* Which of the compiled levels this CPU and operating system can run. Portable code only. */
#include <stdint.h>

#if defined(_WIN32)
#define QC_API __declspec(dllexport)
#else
#define QC_API __attribute__((visibility("default")))
#endif

/* The order of names in quantcache.quant.native.LEVELS. */
enum { QC_HAS_SCALAR = 1, QC_HAS_AVX2 = 2, QC_HAS_AVX512 = 4, QC_HAS_NEON = 8 };

#if defined(__x86_64__)
#include <cpuid.h>

static uint64_t enabled_state(void) {
    uint32_t low, high; /* xgetbv by its bytes: the intrinsic would need -mxsave */
    __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}
#endif

/* Bits of QC_HAS_*: built in, and supported by the CPU and the operating system. */
QC_API int64_t qc_cpu_levels(void) {
    int64_t levels = QC_HAS_SCALAR;
#if defined(__x86_64__)
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return levels;
    const int basic = (c >> 27 & 1) && (c >> 28 & 1) && (c >> 29 & 1) && (c >> 12 & 1); /* OSXSAVE AVX F16C FMA */
    if (!basic || (enabled_state() & 0x6) != 0x6) return levels;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return levels;
    const int v3 = (b >> 5 & 1) && (b >> 3 & 1) && (b >> 8 & 1); /* AVX2 BMI1 BMI2 */
    uint32_t ea, eb, ec, ed;
    if (!v3 || !__get_cpuid(0x80000001u, &ea, &eb, &ec, &ed) || !(ec >> 5 & 1)) return levels; /* LZCNT */
    levels |= QC_HAS_AVX2;
    /* AVX512 F DQ CD BW VL, and the operating system keeps the ZMM and mask registers */
    const int v4 = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 28 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    if (v4 && (enabled_state() & 0xe6) == 0xe6) levels |= QC_HAS_AVX512;
#elif defined(__aarch64__)
    levels |= QC_HAS_NEON;
#endif
    return levels;
}
