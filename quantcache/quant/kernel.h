/* Shared by every kernel: level names, exports, element loads, a thin vector layer.
 *
 * Each codec's kernel.c is compiled once per CPU level, with -DQC_LEVEL=<name> and one of
 * QC_AVX2, QC_AVX512, QC_NEON (none for the portable level). An exported function is called
 * qc_<codec>_<operation>__<level>; native.py finds it by that name, so that a new codec needs
 * no table to be edited. Arguments are pointers and 64-bit integers only, so that one generic
 * caller (ctypes, or the emulator check for arm64) serves all of them.
 *
 * A kernel allocates nothing, reads and writes only inside the arrays it was given, and returns
 * a status: 0, or the QC_* bits below. What it computes is defined by the codec's reference.py.
 */
#ifndef QUANTCACHE_KERNEL_H
#define QUANTCACHE_KERNEL_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(QC_AVX2) || defined(QC_AVX512) || defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(QC_NEON)
#include <arm_neon.h>
#endif

#ifndef QC_LEVEL
#define QC_LEVEL scalar
#endif

#define QC_JOIN_(name, level) name##__##level
#define QC_JOIN(name, level) QC_JOIN_(name, level)
#if defined(_WIN32)
#define QC_EXPORT(name) __declspec(dllexport) int QC_JOIN(name, QC_LEVEL)
#else
#define QC_EXPORT(name) __attribute__((visibility("default"))) int QC_JOIN(name, QC_LEVEL)
#endif
#define QC_INLINE static inline __attribute__((always_inline, unused))

#if defined(__GNUC__)
#define QC_PREFETCH(address) __builtin_prefetch((address), 1)
#define QC_PREFETCH_READ(address) __builtin_prefetch((address), 0)
#define QC_PREFETCH_FAR(address) __builtin_prefetch((address), 0, 2) /* into the second-level cache, which waits for more lines at a time */
#else
#define QC_PREFETCH(address) ((void)0)
#define QC_PREFETCH_READ(address) ((void)0)
#define QC_PREFETCH_FAR(address) ((void)0)
#endif

/* Status bits: the same numbers as quantcache.quant.codec.Status. */
enum { QC_OK = 0, QC_NONFINITE = 1, QC_F16_RANGE = 2, QC_F32_SCALES = 4, QC_BAD_CALL = 8 };

/* Element types of inputs and outputs: the same numbers as quantcache.quant.native.ELEMENT. */
enum { QC_F32 = 0, QC_F16 = 1, QC_BF16 = 2 };

/* Bytes that memory is asked for before what is fetched into the first-level cache. */
enum { QC_FAR = 2048 };

/* Fetches `count` elements from number i of x on, and has as many that stand further on brought nearer; both may lie behind the end.
 * The processor's own prefetchers stop at the end of a page, and do not see what is computed on meanwhile. */
QC_INLINE void qc_prefetch(const void *x, size_t i, size_t count, int element) {
    const size_t size = element == QC_F32 ? 4 : 2;
    const uintptr_t first = (uintptr_t)x + i * size;
    for (size_t k = 0; k < count * size; k += 64) {
        QC_PREFETCH_READ((const void *)(first + k));
        QC_PREFETCH_FAR((const void *)(first + k + QC_FAR));
    }
}

/* ---- floating-point environment -------------------------------------------------------------
 * Another library of the process may have switched to flush-to-zero or another rounding mode
 * (a shared object linked with -ffast-math does so when it is loaded). The bytes would then
 * differ under the same key, so every exported kernel runs between ENTER and LEAVE. */
#if defined(__SSE2__)
#define QC_FP_ENTER                              \
    const unsigned int qc_fp_saved = _mm_getcsr(); \
    _mm_setcsr(0x1f80u)
#define QC_FP_LEAVE _mm_setcsr(qc_fp_saved)
#elif defined(__aarch64__)
#define QC_FP_ENTER                                              \
    uint64_t qc_fp_saved;                                        \
    __asm__ volatile("mrs %0, fpcr" : "=r"(qc_fp_saved));        \
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0) : "memory")
#define QC_FP_LEAVE __asm__ volatile("msr fpcr, %0" : : "r"(qc_fp_saved) : "memory")
#else
#define QC_FP_ENTER ((void)0)
#define QC_FP_LEAVE ((void)0)
#endif

/* ---- bits ---------------------------------------------------------------------------------- */

QC_INLINE uint32_t qc_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

QC_INLINE float qc_float(uint32_t u) {
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

/* float32 <-> float16, to nearest even. NaN keeps its sign and upper payload and becomes quiet, as F16C
 * and NEON do. In portable C without branches, so that any compiler can vectorise it. */
#if defined(QC_AVX2) || defined(QC_AVX512)
QC_INLINE uint16_t qc_f16_from_f32(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
QC_INLINE float qc_f32_from_f16(uint16_t half) { return _cvtsh_ss(half); }
#else
QC_INLINE uint16_t qc_f16_from_f32(float value) {
    const uint32_t bits = qc_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t mag = bits & 0x7fffffffu;
    /* normal: rebias the exponent by -112 and round the 13 dropped bits; may carry into Inf */
    const uint32_t normal = (mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13;
    /* below 2^-14: adding 0.5 shifts the value to where one unit is 2^-24, rounding in hardware */
    const uint32_t small = qc_bits(qc_float(mag) + 0.5f) - 0x3f000000u;
    const uint32_t special = mag > 0x7f800000u ? (0x7e00u | ((mag >> 13) & 0x3ffu)) : 0x7c00u;
    uint32_t half = mag < 0x38800000u ? small : normal;
    half = mag >= 0x47800000u ? special : half;
    return (uint16_t)(sign | half);
}

QC_INLINE float qc_f32_from_f16(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t mag = (uint32_t)(half & 0x7fffu) << 13;
    const uint32_t exponent = half & 0x7c00u;
    const uint32_t normal = mag + (exponent == 0x7c00u ? 0x70000000u : 0x38000000u);
    /* subnormal: 2^-14 with the fraction set, less 2^-14, leaves fraction * 2^-24 exactly */
    const uint32_t small = qc_bits(qc_float(mag + 0x38800000u) - qc_float(0x38800000u));
    return qc_float(sign | (exponent == 0 ? small : normal));
}
#endif

QC_INLINE float qc_f32_from_bf16(uint16_t b) { return qc_float((uint32_t)b << 16); }

QC_INLINE uint16_t qc_bf16_from_f32(float value) {
    const uint32_t bits = qc_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t nan = (bits >> 16) | 0x40u;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

QC_INLINE float qc_element(const void *src, size_t i, int element) {
    if (element == QC_F32) return ((const float *)src)[i];
    const uint16_t u = ((const uint16_t *)src)[i];
    return element == QC_F16 ? qc_f32_from_f16(u) : qc_f32_from_bf16(u);
}

QC_INLINE void qc_store_element(void *dst, size_t i, float value, int element) {
    if (element == QC_F32)
        ((float *)dst)[i] = value;
    else
        ((uint16_t *)dst)[i] = element == QC_F16 ? qc_f16_from_f32(value) : qc_bf16_from_f32(value);
}

/* True if any of n elements is NaN or Inf: the slow, exact check behind the fast hints. */
QC_INLINE int qc_any_nonfinite(const void *src, size_t start, size_t n, int element) {
    for (size_t i = start; i < start + n; i++)
        if ((qc_bits(qc_element(src, i, element)) & 0x7fffffffu) >= 0x7f800000u) return 1;
    return 0;
}

/* ---- vector layer: AVX2 (8 lanes) and AVX-512 (16 lanes) ------------------------------------
 * Only what the kernels need. qm is a lane mask; qi_add_if adds 1 where it is set. qh has as many elements of two bytes. */
#if defined(QC_AVX512)
#define QC_LANES 16
typedef __m512 qf;
typedef __m512i qi;
typedef __m256i qh;
typedef __mmask16 qm;
QC_INLINE qf qf_load(const float *p) { return _mm512_loadu_ps(p); }
QC_INLINE void qf_store(float *p, qf a) { _mm512_storeu_ps(p, a); }
QC_INLINE qf qf_set(float a) { return _mm512_set1_ps(a); }
QC_INLINE qf qf_add(qf a, qf b) { return _mm512_add_ps(a, b); }
QC_INLINE qf qf_sub(qf a, qf b) { return _mm512_sub_ps(a, b); }
QC_INLINE qf qf_mul(qf a, qf b) { return _mm512_mul_ps(a, b); }
QC_INLINE qf qf_div(qf a, qf b) { return _mm512_div_ps(a, b); }
QC_INLINE qf qf_min(qf a, qf b) { return _mm512_min_ps(a, b); }
QC_INLINE qf qf_max(qf a, qf b) { return _mm512_max_ps(a, b); }
QC_INLINE qf qf_fma(qf a, qf b, qf c) { return _mm512_fmadd_ps(a, b, c); }
QC_INLINE qm qf_gt(qf a, qf b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
QC_INLINE int qf_any_nan(qf a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q) != 0; }
QC_INLINE qi qi_round(qf a) { return _mm512_cvtps_epi32(a); }
QC_INLINE qi qi_bits(qf a) { return _mm512_castps_si512(a); }
QC_INLINE qi qi_sub(qi a, qi b) { return _mm512_sub_epi32(a, b); }
QC_INLINE qi qi_add_if(qi a, qm m) { return _mm512_mask_add_epi32(a, m, a, _mm512_set1_epi32(1)); }
QC_INLINE qi qi_max(qi a, qi b) { return _mm512_max_epi32(a, b); }
QC_INLINE qi qi_set(int32_t a) { return _mm512_set1_epi32(a); }
QC_INLINE qi qi_magnitude(qf a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
QC_INLINE float qf_hmin(qf a) { return _mm512_reduce_min_ps(a); }
QC_INLINE float qf_hmax(qf a) { return _mm512_reduce_max_ps(a); }
QC_INLINE uint32_t qi_hmax(qi a) { return (uint32_t)_mm512_reduce_max_epi32(a); }
QC_INLINE qf qf_from_halves(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
QC_INLINE qf qf_round_f16(qf a) { return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
QC_INLINE qh qf_to_halves(qf a) { return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
QC_INLINE qf qf_from_bf16(const uint16_t *p) {
    const __m256i raw = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}
QC_INLINE qh qf_to_bf16(qf a) {
    const __m512i bits = _mm512_castps_si512(a), high = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_or_epi32(_mm512_srli_epi32(rounded, 16), nan, high, _mm512_set1_epi32(0x40));
    return _mm512_cvtepi32_epi16(words);
}
QC_INLINE void qh_store(uint16_t *p, qh a) { _mm256_storeu_si256((__m256i *)p, a); }
QC_INLINE void qh_stream(uint16_t *p, qh a) { _mm256_stream_si256((__m256i *)p, a); }
QC_INLINE void qf_stream(float *p, qf a) { _mm512_stream_ps(p, a); }
QC_INLINE qf qf_from_u8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
QC_INLINE qf qf_from_s8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
QC_INLINE qf qf_from_words(const uint64_t *w) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_set_epi64x((int64_t)w[1], (int64_t)w[0])));
}
/* 64 integers to bytes, saturating; the packs work per 128-bit lane, the permute puts it right */
QC_INLINE __m512i qi_lane_order(void) {
    return _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
QC_INLINE void qi_store_u8(uint8_t *p, const qi v[4]) {
    const __m512i bytes = _mm512_packus_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(qi_lane_order(), bytes));
}
QC_INLINE void qi_store_s8(int8_t *p, const qi v[4]) {
    const __m512i bytes = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    _mm512_storeu_si512(p, _mm512_permutexvar_epi32(qi_lane_order(), bytes));
}

#elif defined(QC_AVX2)
#define QC_LANES 8
typedef __m256 qf;
typedef __m256i qi;
typedef __m128i qh;
typedef __m256i qm;
QC_INLINE qf qf_load(const float *p) { return _mm256_loadu_ps(p); }
QC_INLINE void qf_store(float *p, qf a) { _mm256_storeu_ps(p, a); }
QC_INLINE qf qf_set(float a) { return _mm256_set1_ps(a); }
QC_INLINE qf qf_add(qf a, qf b) { return _mm256_add_ps(a, b); }
QC_INLINE qf qf_sub(qf a, qf b) { return _mm256_sub_ps(a, b); }
QC_INLINE qf qf_mul(qf a, qf b) { return _mm256_mul_ps(a, b); }
QC_INLINE qf qf_div(qf a, qf b) { return _mm256_div_ps(a, b); }
QC_INLINE qf qf_min(qf a, qf b) { return _mm256_min_ps(a, b); }
QC_INLINE qf qf_max(qf a, qf b) { return _mm256_max_ps(a, b); }
QC_INLINE qf qf_fma(qf a, qf b, qf c) { return _mm256_fmadd_ps(a, b, c); }
QC_INLINE qm qf_gt(qf a, qf b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
QC_INLINE int qf_any_nan(qf a) { return _mm256_movemask_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)) != 0; }
QC_INLINE qi qi_round(qf a) { return _mm256_cvtps_epi32(a); }
QC_INLINE qi qi_bits(qf a) { return _mm256_castps_si256(a); }
QC_INLINE qi qi_sub(qi a, qi b) { return _mm256_sub_epi32(a, b); }
QC_INLINE qi qi_add_if(qi a, qm m) { return _mm256_sub_epi32(a, m); }
QC_INLINE qi qi_max(qi a, qi b) { return _mm256_max_epi32(a, b); }
QC_INLINE qi qi_set(int32_t a) { return _mm256_set1_epi32(a); }
QC_INLINE qi qi_magnitude(qf a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
QC_INLINE float qf_hmin(qf a) {
    __m128 r = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_min_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_min_ss(r, _mm_movehdup_ps(r)));
}
QC_INLINE float qf_hmax(qf a) {
    __m128 r = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    r = _mm_max_ps(r, _mm_movehl_ps(r, r));
    return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
QC_INLINE uint32_t qi_hmax(qi a) {
    __m128i r = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0x4e));
    r = _mm_max_epi32(r, _mm_shuffle_epi32(r, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(r);
}
QC_INLINE qf qf_from_halves(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
QC_INLINE qf qf_round_f16(qf a) { return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
QC_INLINE qh qf_to_halves(qf a) { return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT); }
QC_INLINE qf qf_from_bf16(const uint16_t *p) {
    const __m128i raw = _mm_loadu_si128((const __m128i *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
QC_INLINE qh qf_to_bf16(qf a) {
    const __m256i bits = _mm256_castps_si256(a), high = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), quiet, nan);
    const __m128i low = _mm256_castsi256_si128(words);
    return _mm_packus_epi32(low, _mm256_extracti128_si256(words, 1));
}
QC_INLINE void qh_store(uint16_t *p, qh a) { _mm_storeu_si128((__m128i *)p, a); }
QC_INLINE void qh_stream(uint16_t *p, qh a) { _mm_stream_si128((__m128i *)p, a); }
QC_INLINE void qf_stream(float *p, qf a) { _mm256_stream_ps(p, a); }
QC_INLINE qf qf_from_u8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
QC_INLINE qf qf_from_s8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
QC_INLINE qf qf_from_words(const uint64_t *w) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)w[0])));
}
/* 32 integers to bytes, saturating; the packs work per 128-bit half, the permute puts it right */
QC_INLINE void qi_store_u8(uint8_t *p, const qi v[4]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(bytes, order));
}
QC_INLINE void qi_store_s8(int8_t *p, const qi v[4]) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    _mm256_storeu_si256((__m256i *)p, _mm256_permutevar8x32_epi32(bytes, order));
}
#endif

#if defined(QC_LANES)
/* One result for each of QC_LANES vectors: lane g of the result is v[g] reduced. A tree of shuffles does all of them in
 * a quarter of the instructions that reducing one after the other takes, and without the latter's chains. */
#if defined(QC_AVX512)
#define QC_REDUCE_PAIR(OP, TO_PS, TO_PD, FROM_PS, FROM_PD, v, r)                                                     \
    for (int g = 0; g < 16; g += 4) {                                                                              \
        const __m512 a = TO_PS(v[g]), b = TO_PS(v[g + 1]), c = TO_PS(v[g + 2]), d = TO_PS(v[g + 3]);               \
        const __m512d ab = TO_PD(OP(FROM_PS(_mm512_unpacklo_ps(a, b)), FROM_PS(_mm512_unpackhi_ps(a, b))));        \
        const __m512d cd = TO_PD(OP(FROM_PS(_mm512_unpacklo_ps(c, d)), FROM_PS(_mm512_unpackhi_ps(c, d))));        \
        r[g / 4] = OP(FROM_PD(_mm512_unpacklo_pd(ab, cd)), FROM_PD(_mm512_unpackhi_pd(ab, cd)));                   \
    }
#define QC_SAME(x) (x)
QC_INLINE qf qf_reduce_min(const qf v[QC_LANES]) {
    qf r[4];
    QC_REDUCE_PAIR(_mm512_min_ps, QC_SAME, _mm512_castps_pd, QC_SAME, _mm512_castpd_ps, v, r)
    const qf w = _mm512_min_ps(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
    const qf x = _mm512_min_ps(_mm512_shuffle_f32x4(r[2], r[3], 0x88), _mm512_shuffle_f32x4(r[2], r[3], 0xdd));
    return _mm512_min_ps(_mm512_shuffle_f32x4(w, x, 0x88), _mm512_shuffle_f32x4(w, x, 0xdd));
}
QC_INLINE qf qf_reduce_max(const qf v[QC_LANES]) {
    qf r[4];
    QC_REDUCE_PAIR(_mm512_max_ps, QC_SAME, _mm512_castps_pd, QC_SAME, _mm512_castpd_ps, v, r)
    const qf w = _mm512_max_ps(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
    const qf x = _mm512_max_ps(_mm512_shuffle_f32x4(r[2], r[3], 0x88), _mm512_shuffle_f32x4(r[2], r[3], 0xdd));
    return _mm512_max_ps(_mm512_shuffle_f32x4(w, x, 0x88), _mm512_shuffle_f32x4(w, x, 0xdd));
}
QC_INLINE qi qi_reduce_max(const qi v[QC_LANES]) {
    qi r[4];
    QC_REDUCE_PAIR(_mm512_max_epi32, _mm512_castsi512_ps, _mm512_castsi512_pd, _mm512_castps_si512, _mm512_castpd_si512, v, r)
    const qi w = _mm512_max_epi32(_mm512_shuffle_i32x4(r[0], r[1], 0x88), _mm512_shuffle_i32x4(r[0], r[1], 0xdd));
    const qi x = _mm512_max_epi32(_mm512_shuffle_i32x4(r[2], r[3], 0x88), _mm512_shuffle_i32x4(r[2], r[3], 0xdd));
    return _mm512_max_epi32(_mm512_shuffle_i32x4(w, x, 0x88), _mm512_shuffle_i32x4(w, x, 0xdd));
}
QC_INLINE qf qf_from_bits(qi a) { return _mm512_castsi512_ps(a); }
QC_INLINE qf qf_magnitude(qf a) { return _mm512_abs_ps(a); }
/* lanes, as bits, in which a condition on floats is true; false for NaN */
QC_INLINE uint32_t qf_where_le(qf a, qf b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
QC_INLINE uint32_t qf_where_eq(qf a, qf b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
#else
#define QC_REDUCE_PAIR(OP, TO_PS, TO_PD, FROM_PS, FROM_PD, v, r)                                                     \
    for (int g = 0; g < 8; g += 4) {                                                                               \
        const __m256 a = TO_PS(v[g]), b = TO_PS(v[g + 1]), c = TO_PS(v[g + 2]), d = TO_PS(v[g + 3]);               \
        const __m256d ab = TO_PD(OP(FROM_PS(_mm256_unpacklo_ps(a, b)), FROM_PS(_mm256_unpackhi_ps(a, b))));        \
        const __m256d cd = TO_PD(OP(FROM_PS(_mm256_unpacklo_ps(c, d)), FROM_PS(_mm256_unpackhi_ps(c, d))));        \
        r[g / 4] = OP(FROM_PD(_mm256_unpacklo_pd(ab, cd)), FROM_PD(_mm256_unpackhi_pd(ab, cd)));                   \
    }
#define QC_SAME(x) (x)
QC_INLINE qf qf_reduce_min(const qf v[QC_LANES]) {
    qf r[2];
    QC_REDUCE_PAIR(_mm256_min_ps, QC_SAME, _mm256_castps_pd, QC_SAME, _mm256_castpd_ps, v, r)
    return _mm256_min_ps(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}
QC_INLINE qf qf_reduce_max(const qf v[QC_LANES]) {
    qf r[2];
    QC_REDUCE_PAIR(_mm256_max_ps, QC_SAME, _mm256_castps_pd, QC_SAME, _mm256_castpd_ps, v, r)
    return _mm256_max_ps(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}
QC_INLINE qi qi_reduce_max(const qi v[QC_LANES]) {
    qi r[2];
    QC_REDUCE_PAIR(_mm256_max_epi32, _mm256_castsi256_ps, _mm256_castsi256_pd, _mm256_castps_si256, _mm256_castpd_si256, v, r)
    return _mm256_max_epi32(_mm256_permute2x128_si256(r[0], r[1], 0x20), _mm256_permute2x128_si256(r[0], r[1], 0x31));
}
QC_INLINE qf qf_from_bits(qi a) { return _mm256_castsi256_ps(a); }
QC_INLINE qf qf_magnitude(qf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
QC_INLINE uint32_t qf_where_le(qf a, qf b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
QC_INLINE uint32_t qf_where_eq(qf a, qf b) { return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
#endif
enum { QC_ALL_LANES = (1 << QC_LANES) - 1 };
#endif

#if defined(QC_LANES)
QC_INLINE qf qf_element(const void *src, size_t i, int element) {
    if (element == QC_F32) return qf_load((const float *)src + i);
    if (element == QC_F16) return qf_from_halves((const uint16_t *)src + i);
    return qf_from_bf16((const uint16_t *)src + i);
}
/* past: past the caches; see qc_past_caches */
QC_INLINE void qf_put(float *p, qf value, int past) {
    if (past)
        qf_stream(p, value);
    else
        qf_store(p, value);
}
QC_INLINE void qf_put_element(void *dst, size_t i, qf value, int element, int past) {
    if (element == QC_F32) {
        qf_put((float *)dst + i, value, past);
        return;
    }
    const qh halves = element == QC_F16 ? qf_to_halves(value) : qf_to_bf16(value);
    if (past)
        qh_stream((uint16_t *)dst + i, halves);
    else
        qh_store((uint16_t *)dst + i, halves);
}
QC_INLINE void qf_store_element(void *dst, size_t i, qf value, int element) { qf_put_element(dst, i, value, element, 0); }
#endif

/* Whether n elements, in runs of `width` of which vectors are written from the first on, are to be written past the caches: none holds so many, and
 * memory is then not read before it is overwritten. A fresh page is in a cache, since the system has just filled it with zeros, and would
 * have to leave it line by line. QC_WRITTEN comes last. */
QC_INLINE int qc_past_caches(const void *out, size_t n, size_t width, int fresh, int element) {
#if defined(QC_LANES)
    return !fresh && n >= (size_t)1 << (element == QC_F32 ? 23 : 24) && width % QC_LANES == 0 && ((uintptr_t)out & 63) == 0;
#else
    (void)out, (void)n, (void)width, (void)fresh, (void)element;
    return 0;
#endif
}
#if defined(QC_LANES)
#define QC_WRITTEN(past) do { if (past) _mm_sfence(); } while (0)
#else
#define QC_WRITTEN(past) ((void)(past))
#endif

/* n elements to float32, for the tails and for levels without the vector layer */
QC_INLINE void qc_load_f32(float *restrict dst, const void *restrict src, size_t start, size_t n, int element) {
#if defined(QC_NEON)
    if (element == QC_F16) {
        size_t i = 0;
        for (; i + 4 <= n; i += 4) {
            const uint16x4_t raw = vld1_u16((const uint16_t *)src + start + i);
            vst1q_f32(dst + i, vcvt_f32_f16(vreinterpret_f16_u16(raw)));
        }
        for (; i < n; i++) dst[i] = qc_element(src, start + i, element);
        return;
    }
#endif
    for (size_t i = 0; i < n; i++) dst[i] = qc_element(src, start + i, element);
}

/* Makes three specialised bodies of one generic kernel: BODY(..., element) is always inlined. */
#define QC_FOR_ELEMENT(element, BODY, ...)                        \
    ((element) == QC_F32    ? BODY(__VA_ARGS__, QC_F32)           \
     : (element) == QC_F16  ? BODY(__VA_ARGS__, QC_F16)           \
     : (element) == QC_BF16 ? BODY(__VA_ARGS__, QC_BF16)          \
                            : QC_BAD_CALL)

#endif
