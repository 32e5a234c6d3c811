/* NF4 with and without double quantization. Norm: reference.py beside this file.
 * Shapes: n weights, flat; codes uint8[(n + 1) / 2]; absmax float32[(n + 63) / 64]. */
#include "../../kernel.h"

enum { BLOCK = 64, NESTED = 256 };

/* ---- quantize ------------------------------------------------------------------------------- */

QC_INLINE float inverse(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

/* Any length up to BLOCK, any level: counts the middles below s. Returns a status. */
QC_INLINE int quantize_plain(const float *x, size_t n, const float *middles, uint8_t *codes, float *absmax) {
    uint32_t top = 0;
    for (size_t i = 0; i < n; i++) {
        const uint32_t m = qc_bits(x[i]) & 0x7fffffffu;
        top = m > top ? m : top;
    }
    if (top >= 0x7f800000u) return QC_NONFINITE;
    *absmax = qc_float(top);
    const float inv = inverse(*absmax);
    int32_t code[BLOCK + 1];
    for (size_t i = 0; i < n; i++) {
        const float s = x[i] * inv;
        int32_t c = 0;
        for (int k = 0; k < 15; k++) c += s > middles[k];
        code[i] = c;
    }
    if (n & 1) code[n] = 7; /* the pad weight is 0, and 0 is value 7 of the table */
    for (size_t i = 0; i < (n + 1) / 2; i++) codes[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
    return QC_OK;
}

#if defined(QC_AVX512)
/* [-1, 1] in 32 bins of 1/16. No bin holds two middles and no middle lies within rounding of a
 * bin's edge, so one compare against the bin's own middle decides. A tree of four compares, each
 * with its threshold fetched by a permute, took 1.3 times as long. */
typedef struct { __m512 lower, upper; __m512i base_lower, base_upper; } search_t;

QC_INLINE search_t search_table(const float *middles) {
    float threshold[32];
    int32_t base[32];
    for (int bin = 0; bin < 32; bin++) {
        const float left = (float)(bin - 16) / 16.0f, right = (float)(bin - 15) / 16.0f;
        int below = 0;
        while (below < 15 && middles[below] < left) below++;
        base[bin] = below;
        threshold[bin] = below < 15 && middles[below] < right ? middles[below] : INFINITY;
    }
    return (search_t){_mm512_loadu_ps(threshold), _mm512_loadu_ps(threshold + 16),
                      _mm512_loadu_si512(base), _mm512_loadu_si512(base + 16)};
}

QC_INLINE __m128i search(__m512 s, search_t t) {
    const __m512 sixteen = _mm512_set1_ps(16.0f);
    __m512i bin = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(s, sixteen), sixteen));
    bin = _mm512_min_epi32(bin, _mm512_set1_epi32(31)); /* s = 1 falls off the last bin */
    const __m512 threshold = _mm512_permutex2var_ps(t.lower, bin, t.upper);
    const __m512i base = _mm512_permutex2var_epi32(t.base_lower, bin, t.base_upper);
    return _mm512_cvtepi32_epi8(qi_add_if(base, qf_gt(s, threshold)));
}

QC_INLINE void store_block(uint8_t *codes, const qf s[4], search_t t) {
    const __m256i high_first = _mm256_set1_epi16(0x0110); /* even byte * 16 + odd byte */
    for (int j = 0; j < 2; j++) {
        const __m256i pair = _mm256_set_m128i(search(s[2 * j + 1], t), search(s[2 * j], t));
        _mm_storeu_si128((__m128i *)(codes + 16 * j), _mm256_cvtepi16_epi8(_mm256_maddubs_epi16(pair, high_first)));
    }
}

#elif defined(QC_AVX2)
/* A tree of four compares. 8 lanes hold the middles of one half; a blend picks the half. */
typedef struct { __m256 negative, positive, root, third, eleventh; } search_t;

QC_INLINE search_t search_table(const float *middles) {
    float half[2][8];
    for (int k = 0; k < 7; k++) {
        half[0][k] = middles[k];
        half[1][k] = middles[k + 8];
    }
    half[0][7] = half[1][7] = INFINITY;
    return (search_t){_mm256_loadu_ps(half[0]), _mm256_loadu_ps(half[1]), _mm256_set1_ps(middles[7]),
                      _mm256_set1_ps(middles[3]), _mm256_set1_ps(middles[11])};
}

QC_INLINE __m256i search(__m256 s, search_t t) {
    const __m256 upper = _mm256_cmp_ps(s, t.root, _CMP_GT_OQ);
    __m256i code = _mm256_and_si256(qf_gt(s, _mm256_blendv_ps(t.third, t.eleventh, upper)), _mm256_set1_epi32(4));
    const __m256i next = _mm256_add_epi32(code, _mm256_set1_epi32(1));
    __m256 middle = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.negative, next),
                                     _mm256_permutevar8x32_ps(t.positive, next), upper);
    code = _mm256_add_epi32(code, _mm256_and_si256(qf_gt(s, middle), _mm256_set1_epi32(2)));
    middle = _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.negative, code),
                              _mm256_permutevar8x32_ps(t.positive, code), upper);
    code = qi_add_if(code, qf_gt(s, middle));
    return _mm256_or_si256(code, _mm256_and_si256(_mm256_castps_si256(upper), _mm256_set1_epi32(8)));
}

QC_INLINE void store_block(uint8_t *codes, const qf s[8], search_t t) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i high_first = _mm256_set1_epi16(0x0110);
    __m256i pairs[2];
    for (int j = 0; j < 2; j++) {
        const qf *q = s + 4 * j;
        const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(search(q[0], t), search(q[1], t)),
                                                  _mm256_packs_epi32(search(q[2], t), search(q[3], t)));
        pairs[j] = _mm256_maddubs_epi16(_mm256_permutevar8x32_epi32(bytes, order), high_first);
    }
    _mm256_storeu_si256((__m256i *)codes, _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs[0], pairs[1]), 0xd8));
}
#endif

QC_INLINE int quantize(const void *x, size_t n, const float *middles, uint8_t *codes, float *absmax, int element) {
    size_t start = 0, block = 0;
#if defined(QC_LANES)
    const search_t table = search_table(middles);
    /* QC_LANES blocks at a time: their absmax and its inverse are found in the lanes of one vector */
    for (; start + QC_LANES * BLOCK <= n; start += QC_LANES * BLOCK, block += QC_LANES) {
        qi top[QC_LANES];
        for (int b = 0; b < QC_LANES; b++) {
            const size_t first = start + (size_t)b * BLOCK;
            top[b] = qi_magnitude(qf_element(x, first, element));
            for (size_t j = 1; j < BLOCK / QC_LANES; j++) top[b] = qi_max(top[b], qi_magnitude(qf_element(x, first + j * QC_LANES, element)));
        }
        const qi bits = qi_reduce_max(top);
        if (qi_hmax(bits) >= 0x7f800000u) return QC_NONFINITE;
        const qf most = qf_from_bits(bits);
        float inverses[QC_LANES];
        qf_store(absmax + block, most);
        qf_store(inverses, qf_div(qf_set(1.0f), qf_max(most, qf_set(1e-38f))));
        for (int b = 0; b < QC_LANES; b++) {
            const size_t first = start + (size_t)b * BLOCK;
            const qf inv = qf_set(inverses[b]);
            qc_prefetch(x, first + QC_LANES * BLOCK, BLOCK, element); /* of the next blocks, while these are coded */
            qf s[BLOCK / QC_LANES];
            for (size_t j = 0; j < BLOCK / QC_LANES; j++) s[j] = qf_mul(qf_element(x, first + j * QC_LANES, element), inv);
            store_block(codes + first / 2, s, table);
        }
    }
#endif
    for (; start < n; start += BLOCK, block++) {
        float plain[BLOCK];
        const size_t length = n - start < BLOCK ? n - start : BLOCK;
        int status;
        if (length == BLOCK) { /* a constant length lets the compiler vectorise */
            qc_load_f32(plain, x, start, BLOCK, element);
            status = quantize_plain(plain, BLOCK, middles, codes + start / 2, absmax + block);
        } else {
            qc_load_f32(plain, x, start, length, element);
            status = quantize_plain(plain, length, middles, codes + start / 2, absmax + block);
        }
        if (status) return status;
    }
    return QC_OK;
}

/* x: element[n]; middles: float32[15], rising; codes, absmax: written. Stops at the first NaN or Inf. */
QC_EXPORT(qc_nf4_quantize)(const void *x, size_t n, int64_t element, const float *middles, uint8_t *codes, float *absmax) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, quantize, x, n, middles, codes, absmax);
    QC_FP_LEAVE;
    return status;
}

/* ---- dequantize ----------------------------------------------------------------------------- */

QC_INLINE int dequantize(const uint8_t *codes, const float *absmax, size_t n, const float *table, void *out, int fresh, int element) {
    const int past = qc_past_caches(out, n, BLOCK, fresh, element);
    for (size_t start = 0, block = 0; start < n; start += BLOCK, block++) {
        const size_t length = n - start < BLOCK ? n - start : BLOCK;
        const uint8_t *packed = codes + start / 2;
        if (element == QC_F32) {
            float value[16];
            for (int k = 0; k < 16; k++) value[k] = table[k] * absmax[block];
            float *y = (float *)out + start;
            size_t i = 0;
#if defined(QC_AVX512)
            const __m512 values = _mm512_loadu_ps(value);
            for (; i + 32 <= length; i += 32) {
                const __m128i b = _mm_loadu_si128((const __m128i *)(packed + i / 2));
                const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15));
                const __m128i low = _mm_and_si128(b, _mm_set1_epi8(15));
                qf_put(y + i, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low)), values), past);
                qf_put(y + i + 16, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low)), values), past);
            }
#elif defined(QC_AVX2)
            const __m256 first = _mm256_loadu_ps(value), second = _mm256_loadu_ps(value + 8);
            for (; i + 16 <= length; i += 16) {
                const __m128i b = _mm_loadl_epi64((const __m128i *)(packed + i / 2));
                const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15));
                const __m128i code = _mm_unpacklo_epi8(high, _mm_and_si128(b, _mm_set1_epi8(15)));
                for (int j = 0; j < 2; j++) {
                    const __m256i c = _mm256_cvtepu8_epi32(j ? _mm_srli_si128(code, 8) : code);
                    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)); /* bit 3 to the sign */
                    qf_put(y + i + 8 * j, _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, c), _mm256_permutevar8x32_ps(second, c), upper), past);
                }
            }
#endif
            for (; i < length; i++) y[i] = value[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
        } else {
            uint16_t value[16];
            uint16_t *y = (uint16_t *)out + start;
            size_t i = 0;
#if defined(QC_LANES)
            const qf scale = qf_set(absmax[block]);
            for (int k = 0; k < 16; k += QC_LANES) qf_store_element(value, (size_t)k, qf_mul(qf_load(table + k), scale), element);
#else
            for (int k = 0; k < 16; k++) qc_store_element(value, (size_t)k, table[k] * absmax[block], element);
#endif
#if defined(QC_AVX512)
            /* 16 two-byte values, twice, so that the permute does not mind bit 4 of an index; a byte widened
             * to 32 bits gives two indices: its high nibble below, its low nibble above */
            const __m256i once = _mm256_loadu_si256((const __m256i *)value);
            const __m512i values = _mm512_broadcast_i64x4(once);
            for (; i + 32 <= length; i += 32) {
                const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(packed + i / 2)));
                const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
                const __m512i halves = _mm512_permutexvar_epi16(index, values);
                if (past)
                    _mm512_stream_si512((__m512i *)(y + i), halves);
                else
                    _mm512_storeu_si512(y + i, halves);
            }
#elif defined(QC_AVX2)
            /* 16 values of 2 bytes are two 16-byte tables: one shuffle gives 16 low bytes, one 16 high bytes */
            const __m128i even = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1);
            const __m128i odd = _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1);
            const __m128i v0 = _mm_loadu_si128((const __m128i *)value), v1 = _mm_loadu_si128((const __m128i *)(value + 8));
            const __m256i low_bytes = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(_mm_shuffle_epi8(v0, even), _mm_shuffle_epi8(v1, even)));
            const __m256i high_bytes = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(_mm_shuffle_epi8(v0, odd), _mm_shuffle_epi8(v1, odd)));
            for (; i + 32 <= length; i += 32) {
                const __m128i b = _mm_loadu_si128((const __m128i *)(packed + i / 2));
                const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15));
                const __m128i low = _mm_and_si128(b, _mm_set1_epi8(15));
                const __m256i code = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
                const __m256i lows = _mm256_shuffle_epi8(low_bytes, code), highs = _mm256_shuffle_epi8(high_bytes, code);
                const __m256i left = _mm256_unpacklo_epi8(lows, highs), right = _mm256_unpackhi_epi8(lows, highs);
                const __m256i front = _mm256_permute2x128_si256(left, right, 0x20), back = _mm256_permute2x128_si256(left, right, 0x31);
                if (past) {
                    _mm256_stream_si256((__m256i *)(y + i), front);
                    _mm256_stream_si256((__m256i *)(y + i + 16), back);
                } else {
                    _mm256_storeu_si256((__m256i *)(y + i), front);
                    _mm256_storeu_si256((__m256i *)(y + i + 16), back);
                }
            }
#elif defined(QC_NEON)
            const uint8x16x2_t split = vld2q_u8((const uint8_t *)value);
            for (; i + 32 <= length; i += 32) {
                const uint8x16_t b = vld1q_u8(packed + i / 2);
                const uint8x16x2_t code = vzipq_u8(vshrq_n_u8(b, 4), vandq_u8(b, vdupq_n_u8(15)));
                for (int j = 0; j < 2; j++) {
                    const uint8x16x2_t bytes = {{vqtbl1q_u8(split.val[0], code.val[j]), vqtbl1q_u8(split.val[1], code.val[j])}};
                    vst2q_u8((uint8_t *)(y + i + 16 * (size_t)j), bytes);
                }
            }
#endif
            for (; i < length; i++) y[i] = value[i & 1 ? packed[i / 2] & 15 : packed[i / 2] >> 4];
        }
    }
    QC_WRITTEN(past);
    return QC_OK;
}

/* table: float32[16]; out: element[n] = f32(table[code] * absmax), rounded to the element type; fresh: 1 if nobody has touched it yet */
QC_EXPORT(qc_nf4_dequantize)(const uint8_t *codes, const float *absmax, size_t n, const float *table, void *out, int64_t element,
                             int64_t fresh) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, dequantize, codes, absmax, n, table, out, fresh != 0);
    QC_FP_LEAVE;
    return status;
}

/* ---- double quantization of absmax ---------------------------------------------------------- */

/* The mean passes as float64 that holds a float32: a denormal one is then normal to whoever prints or parses it,
 * also in a process that flushes denormals.
 * mean: float64[1] of float32[n], summed in eight float64 lanes, lanes added in order */
QC_EXPORT(qc_nf4_mean_absmax)(const float *absmax, size_t n, double *mean) {
    QC_FP_ENTER;
    double lane[8] = {0}, total = 0;
    for (size_t i = 0; i < n; i++) lane[i & 7] += (double)absmax[i];
    for (int k = 0; k < 8; k++) total += lane[k];
    *mean = (double)(float)(total / (double)n);
    QC_FP_LEAVE;
    return QC_OK;
}

/* absmax: float32[n]; offset: float64[1]; middles: float32[255], rising;
 * codes: uint8[n]; nested: float32[(n + 255) / 256] */
QC_EXPORT(qc_nf4_encode_absmax)(const float *absmax, size_t n, const double *offset, const float *middles, uint8_t *codes, float *nested) {
    QC_FP_ENTER;
    const float centre = (float)*offset;
    int status = QC_OK;
    for (size_t start = 0, block = 0; start < n && !status; start += NESTED, block++) {
        const size_t length = n - start < NESTED ? n - start : NESTED;
        float centred[NESTED], top = 0.0f;
        for (size_t i = 0; i < length; i++) {
            centred[i] = absmax[start + i] - centre;
            top = fabsf(centred[i]) > top ? fabsf(centred[i]) : top;
        }
        nested[block] = top;
        const float inv = inverse(top);
        for (size_t i = 0; i < length; i++) {
            const float s = centred[i] * inv;
            unsigned code = 0; /* the number of middles below s, by halving */
            for (unsigned step = 128; step; step >>= 1)
                if (s > middles[code + step - 1]) code += step;
            codes[start + i] = (uint8_t)code;
        }
    }
    QC_FP_LEAVE;
    return status;
}

/* out: float32[n] = f32(f32(map[code] * nested) + offset); map: float32[256] */
QC_EXPORT(qc_nf4_decode_absmax)(const uint8_t *codes, const float *nested, size_t n, const double *offset, const float *map, float *out) {
    QC_FP_ENTER;
    const float centre = (float)*offset;
    for (size_t i = 0; i < n; i++) out[i] = map[codes[i]] * nested[i / NESTED] + centre;
    QC_FP_LEAVE;
    return QC_OK;
}
