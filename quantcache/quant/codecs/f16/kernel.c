/* float32 and bfloat16 to float16. Norm: reference.py beside this file. */
#include "../../kernel.h"

/* Elements that are fetched before they are read: 4 KB of float32. */
enum { AHEAD = 1024 };

/* The greatest magnitude of a run of halves tells overflow, Inf and NaN apart from the rest. */
QC_INLINE int cast(const void *x, size_t n, uint16_t *out, int element) {
    size_t i = 0;
    uint16_t top = 0;
#if defined(QC_AVX512)
    __m512i run = _mm512_setzero_si512();
    for (; i + 32 <= n; i += 32) {
        qc_prefetch(x, i + AHEAD, 32, element);
        const __m256i a = _mm512_cvtps_ph(qf_element(x, i, element), _MM_FROUND_TO_NEAREST_INT);
        const __m256i b = _mm512_cvtps_ph(qf_element(x, i + 16, element), _MM_FROUND_TO_NEAREST_INT);
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
        _mm512_storeu_si512(out + i, both);
        run = _mm512_max_epu16(run, _mm512_and_si512(both, _mm512_set1_epi16(0x7fff)));
    }
    uint16_t lanes[32];
    _mm512_storeu_si512(lanes, run);
    for (int j = 0; j < 32; j++) top = lanes[j] > top ? lanes[j] : top;
#elif defined(QC_AVX2)
    __m256i run = _mm256_setzero_si256();
    for (; i + 16 <= n; i += 16) {
        qc_prefetch(x, i + AHEAD, 16, element);
        const __m128i a = _mm256_cvtps_ph(qf_element(x, i, element), _MM_FROUND_TO_NEAREST_INT);
        const __m128i b = _mm256_cvtps_ph(qf_element(x, i + 8, element), _MM_FROUND_TO_NEAREST_INT);
        const __m256i both = _mm256_set_m128i(b, a);
        _mm256_storeu_si256((__m256i *)(out + i), both);
        run = _mm256_max_epu16(run, _mm256_and_si256(both, _mm256_set1_epi16(0x7fff)));
    }
    uint16_t lanes[16];
    _mm256_storeu_si256((__m256i *)lanes, run);
    for (int j = 0; j < 16; j++) top = lanes[j] > top ? lanes[j] : top;
#elif defined(QC_NEON)
    for (; element == QC_F32 && i + 4 <= n; i += 4) {
        const uint16x4_t half = vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32((const float *)x + i)));
        vst1_u16(out + i, half);
        const uint16_t run = vmaxv_u16(vand_u16(half, vdup_n_u16(0x7fff)));
        top = run > top ? run : top;
    }
#endif
    for (; i < n; i++) {
        out[i] = qc_f16_from_f32(qc_element(x, i, element));
        const uint16_t magnitude = out[i] & 0x7fffu;
        top = magnitude > top ? magnitude : top;
    }
    if (top < 0x7c00u) return QC_OK;
    return qc_any_nonfinite(x, 0, n, element) ? QC_NONFINITE | QC_F16_RANGE : QC_F16_RANGE;
}

/* x: float32[n] or bfloat16[n]; out: float16[n], to nearest even. All of out is written whatever
 * the status: F16_RANGE if a value became Inf, NONFINITE too if one was NaN or Inf already. */
QC_EXPORT(qc_f16_cast)(const void *x, size_t n, int64_t element, uint16_t *out) {
    QC_FP_ENTER;
    const int status = element == QC_F32    ? cast(x, n, out, QC_F32)
                       : element == QC_BF16 ? cast(x, n, out, QC_BF16)
                                            : QC_BAD_CALL;
    QC_FP_LEAVE;
    return status;
}
