/* Low-rank updates: weights + scale * (left @ right), in float32. Norm: reference.py beside this file.
 * Every sum runs over the rank in order, a product and an addition rounded each (no fused multiply-add, whatever the
 * CPU has): the bytes that are stored must not depend on the machine, as a BLAS's would. */
#include "../kernel.h"

/* A panel is PANEL columns of `right` for DEPTH of the rank, packed: its rows lie a power of two apart in memory and
 * would throw each other out of the cache. Panel and sums fill half of a 32 KiB L1 each. */
enum { PANEL = 64, DEPTH = 64, ROWS = 64 };

/* sums[i][j] += left[i][k] * panel[k][j] for k in order; rows up to ROWS */
QC_INLINE void accumulate(float (*sums)[PANEL], const float (*panel)[PANEL], const float *left, size_t rank, size_t rows, size_t depth) {
#if defined(QC_LANES)
    /* a block of sums stays in registers for the whole depth: 4 rows of 4 (AVX-512) or 2 vectors */
    enum { WIDE = QC_LANES == 16 ? 4 : 2, HIGH = 4 };
    for (size_t i = 0; i < rows; i += HIGH) {
        for (size_t j = 0; j < PANEL; j += WIDE * QC_LANES) {
            qf sum[HIGH][WIDE];
            for (int r = 0; r < HIGH; r++)
                for (int v = 0; v < WIDE; v++) sum[r][v] = qf_load(sums[i + (size_t)r] + j + v * QC_LANES);
            for (size_t k = 0; k < depth; k++) {
                qf right[WIDE];
                for (int v = 0; v < WIDE; v++) right[v] = qf_load(panel[k] + j + v * QC_LANES);
                for (int r = 0; r < HIGH; r++) {
                    const size_t row = i + (size_t)r < rows ? i + (size_t)r : rows - 1; /* sums of no row are not used */
                    const qf factor = qf_set(left[row * rank + k]);
                    for (int v = 0; v < WIDE; v++) sum[r][v] = qf_add(sum[r][v], qf_mul(factor, right[v]));
                }
            }
            for (int r = 0; r < HIGH; r++)
                for (int v = 0; v < WIDE; v++) qf_store(sums[i + (size_t)r] + j + v * QC_LANES, sum[r][v]);
        }
    }
#else
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < depth; k++) {
            const float factor = left[i * rank + k];
            for (size_t j = 0; j < PANEL; j++) sums[i][j] += factor * panel[k][j];
        }
#endif
}

/* weights: float32[rows, columns], rows `stride` apart, changed; left: float32[rows, rank];
 * right: float32[rank, columns]; scale: float32[1]. */
QC_EXPORT(qc_merge_add_product)(float *weights, size_t stride, size_t rows, size_t columns, const float *left, const float *right, size_t rank, const float *scale) {
    QC_FP_ENTER;
    float panel[DEPTH][PANEL], sums[ROWS][PANEL];
    for (size_t column = 0; column < columns; column += PANEL) {
        const size_t width = columns - column < PANEL ? columns - column : PANEL;
        for (size_t row = 0; row < rows; row += ROWS) {
            const size_t count = rows - row < ROWS ? rows - row : ROWS;
            memset(sums, 0, sizeof sums);
            /* rows lie far apart, so that no hardware prefetcher sees them come: they are fetched while sums are made */
            for (size_t i = 0; i < count; i++)
                for (size_t j = 0; j < width; j += 16) QC_PREFETCH(weights + (row + i) * stride + column + j);
            for (size_t k = 0; k < rank; k += DEPTH) {
                const size_t depth = rank - k < DEPTH ? rank - k : DEPTH;
                if (row == 0 || rank > DEPTH) {
                    if (width < PANEL) memset(panel, 0, sizeof panel);
                    for (size_t d = 0; d < depth; d++) memcpy(panel[d], right + (k + d) * columns + column, width * sizeof(float));
                }
                accumulate(sums, (const float(*)[PANEL])panel, left + row * rank + k, rank, count, depth);
            }
            for (size_t i = 0; i < count; i++) {
                float *to = weights + (row + i) * stride + column;
                for (size_t j = 0; j < width; j++) to[j] += *scale * sums[i][j];
            }
        }
    }
    QC_FP_LEAVE;
    return QC_OK;
}

QC_INLINE int widen(const void *x, size_t n, float *out, int element) {
    size_t i = 0;
#if defined(QC_LANES)
    for (; i + QC_LANES <= n; i += QC_LANES) qf_store(out + i, qf_element(x, i, element));
#endif
    qc_load_f32(out + i, x, i, n - i, element);
    return QC_OK;
}

/* x: element[n]; out: float32[n] */
QC_EXPORT(qc_merge_widen)(const void *x, size_t n, int64_t element, float *out) {
    QC_FP_ENTER;
    const int status = QC_FOR_ELEMENT(element, widen, x, n, out);
    QC_FP_LEAVE;
    return status;
}
