/* GGML's K blocks: 256 weights, scales of scales. Norm: reference.py beside this file; bytes: README.md. */
#include "../../blocks.h"

enum { Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K }; /* the numbers of __init__.py */

QC_INLINE void q2_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const float d = qc_half(block + 80), dmin = qc_half(block + 82);
    int8_t q[256];
    (void)tables;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 32; i++) q[half * 128 + k * 32 + i] = (int8_t)(block[16 + half * 32 + i] >> (2 * k) & 3);
    for (int s = 0; s < 16; s++)
        qc_put_affine(q + s * 16, 16, d * (float)(block[s] & 15), -(dmin * (float)(block[s] >> 4)), out, at + (size_t)s * 16, element);
}

/* 16 scales of 6 bits: bytes 0 to 7 have the low nibbles, bytes 8 to 11 the two high bits of every fourth */
QC_INLINE void q3_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint8_t *hmask = block, *qs = block + 32, *packed = block + 96;
    const float d = qc_half(block + 108);
    int8_t q[256];
    (void)tables;
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 4; k++)
            for (int i = 0; i < 32; i++)
                q[half * 128 + k * 32 + i] =
                    (int8_t)((qs[half * 32 + i] >> (2 * k) & 3) + ((hmask[i] >> (half * 4 + k) & 1) << 2) - 4);
    for (int s = 0; s < 16; s++) {
        const int low = s < 8 ? packed[s] & 15 : packed[s - 8] >> 4;
        const int scale = low | (packed[8 + s % 4] >> (s / 4 * 2) & 3) << 4;
        qc_put_scaled(q + s * 16, 16, d * (float)(scale - 32), out, at + (size_t)s * 16, element);
    }
}

/* 8 pairs of scale and minimum, 6 bits each, in 12 bytes */
QC_INLINE void pairs_of_six(const uint8_t *packed, uint8_t scale[8], uint8_t minimum[8]) {
    for (int i = 0; i < 4; i++) {
        scale[i] = packed[i] & 63;
        minimum[i] = packed[i + 4] & 63;
        scale[i + 4] = (uint8_t)((packed[i + 8] & 15) | (packed[i] >> 6) << 4);
        minimum[i + 4] = (uint8_t)((packed[i + 8] >> 4) | (packed[i + 4] >> 6) << 4);
    }
}

QC_INLINE void q4_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const float d = qc_half(block), dmin = qc_half(block + 2);
    uint8_t scale[8], minimum[8];
    int8_t q[256];
    (void)tables;
    pairs_of_six(block + 4, scale, minimum);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) {
            q[j * 64 + i] = (int8_t)(block[16 + j * 32 + i] & 15);
            q[j * 64 + 32 + i] = (int8_t)(block[16 + j * 32 + i] >> 4);
        }
    for (int s = 0; s < 8; s++)
        qc_put_affine(q + s * 32, 32, d * (float)scale[s], -(dmin * (float)minimum[s]), out, at + (size_t)s * 32, element);
}

QC_INLINE void q5_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const float d = qc_half(block), dmin = qc_half(block + 2);
    const uint8_t *qh = block + 16, *qs = block + 48;
    uint8_t scale[8], minimum[8];
    int8_t q[256];
    (void)tables;
    pairs_of_six(block + 4, scale, minimum);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) {
            q[j * 64 + i] = (int8_t)((qs[j * 32 + i] & 15) | (qh[i] >> (2 * j) & 1) << 4);
            q[j * 64 + 32 + i] = (int8_t)((qs[j * 32 + i] >> 4) | (qh[i] >> (2 * j + 1) & 1) << 4);
        }
    for (int s = 0; s < 8; s++)
        qc_put_affine(q + s * 32, 32, d * (float)scale[s], -(dmin * (float)minimum[s]), out, at + (size_t)s * 32, element);
}

QC_INLINE void q6_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const float d = qc_half(block + 208);
    int8_t q[256];
    (void)tables;
    for (int half = 0; half < 2; half++) {
        const uint8_t *ql = block + half * 64, *qh = block + 128 + half * 32;
        int8_t *to = q + half * 128;
        for (int i = 0; i < 32; i++) {
            to[i] = (int8_t)(((ql[i] & 15) | (qh[i] & 3) << 4) - 32);
            to[i + 32] = (int8_t)(((ql[i + 32] & 15) | (qh[i] >> 2 & 3) << 4) - 32);
            to[i + 64] = (int8_t)(((ql[i] >> 4) | (qh[i] >> 4 & 3) << 4) - 32);
            to[i + 96] = (int8_t)(((ql[i + 32] >> 4) | (qh[i] >> 6) << 4) - 32);
        }
    }
    for (int s = 0; s < 16; s++)
        qc_put_scaled(q + s * 16, 16, d * (float)(int8_t)block[192 + s], out, at + (size_t)s * 16, element);
}

QC_INLINE void q8_k(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    (void)tables;
    qc_put_scaled((const int8_t *)(block + 4), 256, qc_float(qc_u32(block)), out, at, element);
}

QC_INLINE int decode(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int element) {
    switch (type) {
    case Q2_K: QC_EACH_BLOCK(q2_k, 256, 84);
    case Q3_K: QC_EACH_BLOCK(q3_k, 256, 110);
    case Q4_K: QC_EACH_BLOCK(q4_k, 256, 144);
    case Q5_K: QC_EACH_BLOCK(q5_k, 256, 176);
    case Q6_K: QC_EACH_BLOCK(q6_k, 256, 210);
    case Q8_K: QC_EACH_BLOCK(q8_k, 256, 292);
    default: return QC_BAD_CALL;
    }
}

QC_EXPORT_DECODER(qc_ggml_k_decode, decode)
