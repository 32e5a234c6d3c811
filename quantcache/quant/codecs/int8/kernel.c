/* Int8, affine, groups of 128. Norm: reference.py beside this file.
 * Shapes: n weights (n % 128 == 0); codes uint8[n]; scales, biases S[n / 128], S float16 or float32. */
#include "../../kernel.h"

enum { GROUP = 128 };

/* The definition itself: the number of i in 1..255 with d > (i - 0.5) * scale, by halving. */
QC_INLINE uint8_t code_of(float d, float scale) {
    if (scale == 0.0f) return 0;
    unsigned code = 0;
    for (unsigned step = 128; step; step >>= 1)
        if (d > ((float)(code + step) - 0.5f) * scale) code += step;
    return (uint8_t)code;
}

/* Below this 1 / scale may overflow or lose bits: those groups take the definition. */
#define SMALLEST_FAST_SCALE 1e-30f

#if defined(QC_LANES)
enum { VECTORS = GROUP / QC_LANES, BATCH = QC_LANES };

typedef struct { float scale[BATCH], bias[BATCH], inverse[BATCH]; int status; } batch_t;

/* Finds the ranges of up to BATCH groups, all at once in the lanes of vectors, and widens them into `x` unless they are
 * float32 already. */
QC_INLINE batch_t measure_batch(const void *src, size_t start, size_t count, int element, float *x, int scales_f16) {
    qf lo[BATCH], hi[BATCH], hint = qf_set(0.0f);
    for (size_t g = 0; g < BATCH; g++) {
        if (g >= count) { /* lanes of no group: a range of 0 */
            lo[g] = hi[g] = qf_set(0.0f);
            continue;
        }
        qf least[2], most[2], sum[2];
        for (int j = 0; j < VECTORS; j++) {
            const size_t i = g * GROUP + (size_t)j * QC_LANES;
            const qf value = qf_element(src, start + i, element);
            if (element != QC_F32) qf_store(x + i, value);
            least[j & 1] = j < 2 ? value : qf_min(least[j & 1], value);
            most[j & 1] = j < 2 ? value : qf_max(most[j & 1], value);
            sum[j & 1] = j < 2 ? value : qf_add(sum[j & 1], value);
        }
        lo[g] = qf_min(least[0], least[1]);
        hi[g] = qf_max(most[0], most[1]);
        /* min and max drop a NaN, a sum keeps it; times 0, an Inf becomes one too. A finite sum that overflowed does as
         * well, so the batch is then looked at exactly. */
        hint = qf_fma(qf_add(sum[0], sum[1]), qf_set(0.0f), hint);
    }
    batch_t batch;
    batch.status = QC_OK;
    if (qf_any_nan(hint) && qc_any_nonfinite(src, start, count * GROUP, element)) {
        batch.status = QC_NONFINITE;
        return batch;
    }
    const qf bottom = qf_reduce_min(lo), top = qf_reduce_max(hi);
    qf scale = qf_mul(qf_sub(top, bottom), qf_set(1.0f / 255.0f));
    qf bias = qf_add(bottom, qf_set(0.0f)); /* + 0: of -0 and 0 either may be the minimum */
    if (qf_where_le(scale, qf_set(3.4028234663852886e38f)) != QC_ALL_LANES) batch.status = QC_NONFINITE; /* a range overflows */
    if (scales_f16) { /* both must be 0, or normal and finite after rounding */
        const qf values[2] = {scale, bias};
        for (int k = 0; k < 2; k++) {
            const qf rounded = qf_magnitude(qf_round_f16(values[k]));
            const uint32_t normal = qf_where_le(qf_set(6.103515625e-05f), rounded) & qf_where_le(rounded, qf_set(65504.0f));
            if ((normal | qf_where_eq(values[k], qf_set(0.0f))) != QC_ALL_LANES) batch.status |= QC_F32_SCALES;
        }
        scale = qf_round_f16(scale);
        bias = qf_round_f16(bias);
    }
    if (batch.status & QC_NONFINITE) batch.status = QC_NONFINITE;
    qf_store(batch.scale, scale);
    qf_store(batch.bias, bias);
    qf_store(batch.inverse, qf_div(qf_set(1.0f), scale)); /* of 0: Inf, and not used */
    return batch;
}

/* The guess is the answer or one less: a quotient lowered by more than all its rounding errors
 * (at most 1.1e-4 at 256) and rounded to the nearest integer. One of the comparisons that define
 * the code puts it right. |d / scale| stays below 2^22: float16 biases are off by at most 2^-11 of
 * lo, and a range that is not 0 is at least 2^-24 of it. */
QC_INLINE void code_group(const float *x, float bias_, float scale_, float inverse, uint8_t *codes) {
    if (scale_ < SMALLEST_FAST_SCALE) {
        for (int i = 0; i < GROUP; i++) codes[i] = code_of(x[i] - bias_, scale_);
        return;
    }
    const qf bias = qf_set(bias_), scale = qf_set(scale_), half_scale = qf_set(0.5f * scale_);
    const qf inv = qf_set(inverse), lower = qf_set(-1.0f / 4096.0f), to_integer = qf_set(12582912.0f);
    for (int j = 0; j < VECTORS; j += 4) {
        qi q[4];
        for (int k = 0; k < 4; k++) {
            const qf d = qf_sub(qf_load(x + (j + k) * QC_LANES), bias);
            const qf shifted = qf_add(qf_fma(d, inv, lower), to_integer); /* the integer in the low bits */
            const qf guess = qf_sub(shifted, to_integer);
            /* halving is exact, so the fused sum is f32((guess + 0.5) * scale), rounded once */
            const qm above = qf_gt(d, qf_fma(guess, scale, half_scale));
            q[k] = qi_add_if(qi_sub(qi_bits(shifted), qi_bits(to_integer)), above);
        }
        qi_store_u8(codes + j * QC_LANES, q);
    }
}

#else
typedef struct { float scale, bias; int status; } affine_t;

/* A stored number must be 0 or normal and finite in S; `half` is the f16 it was rounded to. */
QC_INLINE int fits_f16(float value, uint16_t half) {
    const unsigned exponent = half & 0x7c00u;
    return value == 0.0f || (exponent != 0 && exponent != 0x7c00u);
}

QC_INLINE affine_t affine(float lo, float hi, int scales_f16) {
    affine_t a = {(hi - lo) * (1.0f / 255.0f), lo + 0.0f, QC_OK}; /* + 0: of -0 and 0 either may be the minimum */
    if (!(a.scale <= 3.4028234663852886e38f)) { /* the range itself overflows */
        a.status = QC_NONFINITE;
    } else if (scales_f16) {
        const uint16_t scale = qc_f16_from_f32(a.scale), bias = qc_f16_from_f32(a.bias);
        if (!fits_f16(a.scale, scale) || !fits_f16(a.bias, bias)) a.status = QC_F32_SCALES;
        a.scale = qc_f32_from_f16(scale);
        a.bias = qc_f32_from_f16(bias);
    }
    return a;
}

QC_INLINE int quantize_group(const void *src, size_t start, int element, uint8_t *codes, affine_t *out, int scales_f16) {
    float x[GROUP];
    qc_load_f32(x, src, start, GROUP, element);
    uint32_t top = 0;
    float lo = x[0], hi = x[0];
    for (int i = 0; i < GROUP; i++) {
        const uint32_t magnitude = qc_bits(x[i]) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    if (top >= 0x7f800000u) return QC_NONFINITE;
    _Pragma("omp simd reduction(min : lo) reduction(max : hi)")
    for (int i = 0; i < GROUP; i++) {
        lo = x[i] < lo ? x[i] : lo;
        hi = x[i] > hi ? x[i] : hi;
    }
    *out = affine(lo, hi, scales_f16);
    if (out->status) return out->status;
    const float bias = out->bias, scale = out->scale;
    if (scale < SMALLEST_FAST_SCALE) {
        for (int i = 0; i < GROUP; i++) codes[i] = code_of(x[i] - bias, scale);
        return QC_OK;
    }
    const float inv = 1.0f / scale;
    for (int i = 0; i < GROUP; i++) {
        /* a guess within one of the answer, put right by the comparisons that define it */
        const float d = x[i] - bias;
        const float guess = (d * inv + 12582912.0f) - 12582912.0f; /* to the nearest integer */
        int q = (int)guess;
        q -= d <= (guess - 0.5f) * scale;
        q += d > (guess + 0.5f) * scale;
        q = q < 0 ? 0 : q;
        codes[i] = (uint8_t)(q > 255 ? 255 : q);
    }
    return QC_OK;
}
#endif

QC_INLINE int quantize(const void *x, size_t n, uint8_t *codes, void *scales, void *biases, int scales_f16, int element) {
    if (n % GROUP) return QC_BAD_CALL;
    const size_t groups = n / GROUP;
    const int stored = scales_f16 ? QC_F16 : QC_F32;
    int refused = QC_OK; /* the rest is still looked at: a later group may not be finite, which weighs more */
#if defined(QC_LANES)
    for (size_t first = 0; first < groups; first += BATCH) {
        const size_t count = groups - first < BATCH ? groups - first : BATCH;
        float widened[BATCH * GROUP];
        const batch_t batch = measure_batch(x, first * GROUP, count, element, widened, scales_f16);
        if (batch.status == QC_NONFINITE) return QC_NONFINITE;
        refused |= batch.status;
        if (refused) continue;
        const float *wide = element == QC_F32 ? (const float *)x + first * GROUP : widened;
        for (size_t g = 0; g < count; g++) {
            qc_store_element(scales, first + g, batch.scale[g], stored);
            qc_store_element(biases, first + g, batch.bias[g], stored);
            qc_prefetch(x, (first + g + BATCH) * GROUP, GROUP, element); /* of the next batch, while this one is coded */
            code_group(wide + g * GROUP, batch.bias[g], batch.scale[g], batch.inverse[g], codes + (first + g) * GROUP);
        }
    }
#else
    for (size_t g = 0; g < groups; g++) {
        affine_t a;
        const int status = quantize_group(x, g * GROUP, element, codes + g * GROUP, &a, scales_f16);
        if (status == QC_NONFINITE) return status;
        refused |= status;
        qc_store_element(scales, g, a.scale, stored);
        qc_store_element(biases, g, a.bias, stored);
    }
#endif
    return refused;
}

/* x: element[n]; scales_f16: 1 if S is float16. NONFINITE if any group is not finite or its range is not;
 * else F32_SCALES if S cannot hold a group's numbers; what was written is of no use then. */
QC_EXPORT(qc_int8_quantize)(const void *x, size_t n, int64_t element, int64_t scales_f16, uint8_t *codes, void *scales, void *biases) {
    QC_FP_ENTER;
    const int status = scales_f16 ? QC_FOR_ELEMENT(element, quantize, x, n, codes, scales, biases, 1)
                                  : QC_FOR_ELEMENT(element, quantize, x, n, codes, scales, biases, 0);
    QC_FP_LEAVE;
    return status;
}

QC_INLINE int dequantize(const uint8_t *codes, const void *scales, const void *biases, size_t n, int scales_f16, void *out, int fresh,
                         int element) {
    if (n % GROUP) return QC_BAD_CALL;
    const int past = qc_past_caches(out, n, GROUP, fresh, element);
    for (size_t g = 0; g < n / GROUP; g++) {
        const float scale = qc_element(scales, g, scales_f16 ? QC_F16 : QC_F32);
        const float bias = qc_element(biases, g, scales_f16 ? QC_F16 : QC_F32);
#if defined(QC_LANES)
        for (size_t i = g * GROUP; i < (g + 1) * GROUP; i += QC_LANES) {
            const qf value = qf_add(qf_mul(qf_from_u8(codes + i), qf_set(scale)), qf_set(bias));
            qf_put_element(out, i, value, element, past);
        }
#else
        for (size_t i = g * GROUP; i < (g + 1) * GROUP; i++)
            qc_store_element(out, i, (float)codes[i] * scale + bias, element);
#endif
    }
    QC_WRITTEN(past);
    return QC_OK;
}

/* out: element[n] = f32(f32(code * scale) + bias), rounded to the element type; fresh: 1 if nobody has touched it yet */
QC_EXPORT(qc_int8_dequantize)(const uint8_t *codes, const void *scales, const void *biases, size_t n, int64_t scales_f16, void *out,
                              int64_t element, int64_t fresh) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, dequantize, codes, scales, biases, n, (int)scales_f16, out, fresh != 0);
    QC_FP_LEAVE;
    return status;
}
