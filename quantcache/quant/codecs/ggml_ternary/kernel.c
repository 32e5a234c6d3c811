/* GGML's ternary blocks. Norm: reference.py beside this file; bytes: README.md. */
#include "../../blocks.h"

enum { TQ1_0, TQ2_0 }; /* the numbers of __init__.py */

/* Digit k of a byte of five base-3 digits, most significant first: the byte times 3^k wraps, and the
 * product's three highest thirds are the digit. */
QC_INLINE int8_t digit(uint8_t byte, unsigned power) {
    const uint8_t shifted = (uint8_t)(byte * power);
    return (int8_t)((((unsigned)shifted * 3) >> 8) - 1u);
}

QC_INLINE void tq1_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    static const unsigned power[5] = {1, 3, 9, 27, 81};
    int8_t q[256];
    (void)tables;
    for (int k = 0; k < 5; k++) {
        for (int i = 0; i < 32; i++) q[k * 32 + i] = digit(block[i], power[k]);
        for (int i = 0; i < 16; i++) q[160 + k * 16 + i] = digit(block[32 + i], power[k]);
    }
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < 4; i++) q[240 + k * 4 + i] = digit(block[48 + i], power[k]);
    qc_put_scaled(q, 256, qc_half(block + 52), out, at, element);
}

QC_INLINE void tq2_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    int8_t q[256];
    (void)tables;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 32; i++)
                q[half * 128 + k * 32 + i] = (int8_t)((block[half * 32 + i] >> (2 * k) & 3) - 1);
    qc_put_scaled(q, 256, qc_half(block + 64), out, at, element);
}

QC_INLINE int decode(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int element) {
    switch (type) {
    case TQ1_0: QC_EACH_BLOCK(tq1_0, 256, 54);
    case TQ2_0: QC_EACH_BLOCK(tq2_0, 256, 66);
    default: return QC_BAD_CALL;
    }
}

QC_EXPORT_DECODER(qc_ggml_ternary_decode, decode)
