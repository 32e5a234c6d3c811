/* GGML's blocks with one scale (and offset) each. Norm: reference.py beside this file; bytes: README.md. */
#include "../../blocks.h"

enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1, Q1_0, Q2_0 }; /* the numbers of __init__.py */

/* 16 bytes to 32 integers: low nibbles first, then high ones; a fifth bit from `fifth`, if it is 32 bits of them */
QC_INLINE void unpack(const uint8_t *qs, const uint8_t *fifth, unsigned lift, uint64_t word[4]) {
    for (int k = 0; k < 4; k++) {
        word[k] = qc_u64(qs + 8 * (k & 1)) >> (k < 2 ? 0 : 4) & QC_EVERY(15);
        if (fifth) word[k] |= qc_spread(fifth[k]) << 4;
        if (lift) word[k] = qc_lower(word[k], lift);
    }
}

QC_INLINE void q4_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[4];
    (void)tables;
    unpack(block + 2, NULL, 8, q);
    qc_put_words(q, 4, qc_half(block), 0, 0, out, at, element);
}

QC_INLINE void q4_1(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[4];
    (void)tables;
    unpack(block + 4, NULL, 0, q);
    qc_put_words(q, 4, qc_half(block), 1, qc_half(block + 2), out, at, element);
}

QC_INLINE void q5_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[4];
    (void)tables;
    unpack(block + 6, block + 2, 16, q);
    qc_put_words(q, 4, qc_half(block), 0, 0, out, at, element);
}

QC_INLINE void q5_1(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[4];
    (void)tables;
    unpack(block + 8, block + 4, 0, q);
    qc_put_words(q, 4, qc_half(block), 1, qc_half(block + 2), out, at, element);
}

QC_INLINE void q8_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    (void)tables;
    qc_put_scaled((const int8_t *)(block + 2), 32, qc_half(block), out, at, element);
}

QC_INLINE void q8_1(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    (void)tables;
    qc_put_scaled((const int8_t *)(block + 4), 32, qc_half(block), out, at, element);
}

QC_INLINE void q1_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[16];
    (void)tables;
    for (int k = 0; k < 16; k++) q[k] = qc_lower(qc_spread(block[2 + k]) << 1, 1);
    qc_put_words(q, 16, qc_half(block), 0, 0, out, at, element);
}

QC_INLINE void q2_0(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    uint64_t q[8];
    (void)tables;
    for (int k = 0; k < 8; k++) { /* two bytes of four codes: halves of a byte go apart, then pairs of bits */
        uint64_t word = block[2 + 2 * k] | (uint64_t)block[3 + 2 * k] << 32;
        word = (word | word << 12) & UINT64_C(0x000f000f000f000f);
        word = (word | word << 6) & QC_EVERY(3);
        q[k] = qc_lower(word, 1);
    }
    qc_put_words(q, 8, qc_half(block), 0, 0, out, at, element);
}

QC_INLINE int decode(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int element) {
    switch (type) {
    case Q4_0: QC_EACH_BLOCK(q4_0, 32, 18);
    case Q4_1: QC_EACH_BLOCK(q4_1, 32, 20);
    case Q5_0: QC_EACH_BLOCK(q5_0, 32, 22);
    case Q5_1: QC_EACH_BLOCK(q5_1, 32, 24);
    case Q8_0: QC_EACH_BLOCK(q8_0, 32, 34);
    case Q8_1: QC_EACH_BLOCK(q8_1, 32, 36);
    case Q1_0: QC_EACH_BLOCK(q1_0, 128, 18);
    case Q2_0: QC_EACH_BLOCK(q2_0, 64, 18);
    default: return QC_BAD_CALL;
    }
}

QC_EXPORT_DECODER(qc_ggml_legacy_decode, decode)
