/* Int8, one scale a row: LLM.int8(). Norm: reference.py beside this file.
 * Shapes: rows x columns weights; codes int8[rows * columns]; scales float32[rows]. */
#include "../../kernel.h"

/* The value as float16 has it: rounded once, whatever the source type was. */
QC_INLINE float rounded(const void *x, size_t i, int element) {
    if (element == QC_F16) return qc_element(x, i, QC_F16);
    return qc_f32_from_f16(qc_f16_from_f32(qc_element(x, i, element)));
}

#if defined(QC_LANES)
QC_INLINE qf qf_rounded(const void *x, size_t i, int element) {
    const qf value = qf_element(x, i, element);
    return element == QC_F16 ? value : qf_round_f16(value);
}
#endif

QC_INLINE uint32_t row_magnitude(const void *x, size_t start, size_t columns, int element) {
    uint32_t top = 0;
    size_t i = 0;
#if defined(QC_LANES)
    qi run[2] = {qi_set(0), qi_set(0)};
    for (; i + 2 * QC_LANES <= columns; i += 2 * QC_LANES)
        for (size_t j = 0; j < 2; j++)
            run[j] = qi_max(run[j], qi_magnitude(qf_rounded(x, start + i + j * QC_LANES, element)));
    top = qi_hmax(qi_max(run[0], run[1]));
#endif
    for (; i < columns; i++) {
        const uint32_t magnitude = qc_bits(rounded(x, start + i, element)) & 0x7fffffffu;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

QC_INLINE int quantize(const void *x, size_t rows, size_t columns, int8_t *codes, float *scales, int element) {
    for (size_t row = 0; row < rows; row++) {
        const size_t start = row * columns;
        const uint32_t top = row_magnitude(x, start, columns, element);
        if (top >= 0x7f800000u)
            return qc_any_nonfinite(x, 0, rows * columns, element) ? QC_NONFINITE | QC_F16_RANGE : QC_F16_RANGE;
        scales[row] = qc_float(top);
        if (top == 0) {
            memset(codes + start, 0, columns);
            continue;
        }
        const float factor = (1.0f / scales[row]) * 127.0f;
        size_t i = 0;
#if defined(QC_LANES)
        for (; i + 4 * QC_LANES <= columns; i += 4 * QC_LANES) {
            qc_prefetch(x, start + columns + i, 4 * QC_LANES, element); /* of the next row, while this one is coded */
            qi q[4];
            for (size_t j = 0; j < 4; j++)
                q[j] = qi_round(qf_mul(qf_rounded(x, start + i + j * QC_LANES, element), qf_set(factor)));
            qi_store_s8(codes + start + i, q);
        }
#endif
        for (; i < columns; i++) {
            const float nearest = (rounded(x, start + i, element) * factor + 12582912.0f) - 12582912.0f;
            codes[start + i] = (int8_t)nearest;
        }
    }
    return QC_OK;
}

/* x: element[rows * columns]. F16_RANGE if float16 cannot hold a value, NONFINITE too if any is NaN or Inf. */
QC_EXPORT(qc_int8_row_quantize)(const void *x, size_t rows, size_t columns, int64_t element, int8_t *codes, float *scales) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, quantize, x, rows, columns, codes, scales);
    QC_FP_LEAVE;
    return status;
}

/* f32(f32(code * scale) / 127): a true division, as the norm has it */
QC_INLINE int dequantize(const int8_t *codes, const float *scales, size_t rows, size_t columns, void *out, int fresh, int element) {
    const int past = qc_past_caches(out, rows * columns, columns, fresh, element);
    for (size_t row = 0; row < rows; row++) {
        const size_t start = row * columns;
        const float scale = scales[row];
        size_t i = 0;
#if defined(QC_LANES)
        for (; i + QC_LANES <= columns; i += QC_LANES) {
            const qf value = qf_div(qf_mul(qf_from_s8(codes + start + i), qf_set(scale)), qf_set(127.0f));
            qf_put_element(out, start + i, value, element, past);
        }
#endif
        for (; i < columns; i++)
            qc_store_element(out, start + i, ((float)codes[start + i] * scale) / 127.0f, element);
    }
    QC_WRITTEN(past);
    return QC_OK;
}

/* out: element[rows * columns]; fresh: 1 if nobody has touched it yet */
QC_EXPORT(qc_int8_row_dequantize)(const int8_t *codes, const float *scales, size_t rows, size_t columns, void *out, int64_t element,
                                  int64_t fresh) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, dequantize, codes, scales, rows, columns, out, fresh != 0);
    QC_FP_LEAVE;
    return status;
}
