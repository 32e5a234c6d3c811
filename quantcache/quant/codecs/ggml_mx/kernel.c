/* Blocks of 4-bit floats with tiny scales: MXFP4 and NVFP4. Norm: reference.py beside this file; bytes: README.md.
 * tables: float[256] of the scale byte, then int8[16] of the code. */
#include "../../blocks.h"

enum { MXFP4, NVFP4 }; /* the numbers of __init__.py */

QC_INLINE const int8_t *values(const void *tables) { return (const int8_t *)((const float *)tables + 256); }

QC_INLINE void mxfp4(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    int8_t q[32];
    qc_sixteen_values(block + 1, values(tables), q);
    qc_put_scaled(q, 32, ((const float *)tables)[block[0]], out, at, element);
}

QC_INLINE void nvfp4(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    /* two runs at once: 8 low nibbles of each, then 8 high ones of each */
    for (int s = 0; s < 4; s += 2) {
        int8_t mixed[32], q[32];
        qc_sixteen_values(block + 4 + s * 8, values(tables), mixed);
        for (int k = 0; k < 4; k++) memcpy(q + 8 * k, mixed + 16 * (k % 2) + 8 * (k / 2), 8);
        for (int k = 0; k < 2; k++)
            qc_put_scaled(q + 16 * k, 16, ((const float *)tables)[block[s + k]], out, at + (size_t)(s + k) * 16, element);
    }
}

QC_INLINE int decode(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int element) {
    switch (type) {
    case MXFP4: QC_EACH_BLOCK(mxfp4, 32, 17);
    case NVFP4: QC_EACH_BLOCK(nvfp4, 64, 36);
    default: return QC_BAD_CALL;
    }
}

QC_EXPORT_DECODER(qc_ggml_mx_decode, decode)
