/* GGML's IQ blocks: indices into grids of points, or into a table of 16. Norm: reference.py beside this file;
 * bytes: README.md. tables: uint64, each 8 bytes of int8: [0, 256) the signs of 8 bits as 0 or -1, then the type's grid
 * (for IQ1 its points p as 8 (p + 1)); for IQ4 int8[16]. */
#include "../../blocks.h"

enum { IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS }; /* the numbers of __init__.py */

enum { GRID = 256 };

/* Seven bits name eight signs: the eighth makes their number even. */
QC_INLINE unsigned even_signs(unsigned seven) {
    unsigned parity = seven ^ seven >> 4;
    parity ^= parity >> 2;
    return seven | ((parity ^ parity >> 1) & 1) << 7;
}

/* 8 points with signs: no point is 0, so a byte's two's complement carries nothing into the next byte. */
QC_INLINE uint64_t with_signs(uint64_t points, unsigned signs, const uint64_t *tables) {
    const uint64_t minus = tables[signs];
    return (points ^ minus) + (minus & QC_EVERY(1));
}

/* 8 points p in {-1, 0, 1}, given as 8 (p + 1), moved by an eighth up or down: in eighths */
QC_INLINE uint64_t moved(uint64_t points, int down) { return qc_lower(points + QC_EVERY(down ? 0 : 2), 9); }

QC_INLINE void iq1_s(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *grid = (const uint64_t *)tables + GRID;
    const float d = qc_half(block);
    uint64_t q[4];
    for (int s = 0; s < 8; s++) {
        const unsigned high = qc_u16(block + 34 + 2 * s);
        for (int l = 0; l < 4; l++) q[l] = moved(grid[block[2 + 4 * s + l] | (high >> (3 * l) & 7) << 8], high & 0x8000);
        const float scale = d * (float)(2 * (high >> 12 & 7) + 1); /* an eighth of it is exact */
        qc_put_words(q, 4, scale * 0.125f, 0, 0, out, at + (size_t)s * 32, element);
    }
}

QC_INLINE void iq1_m(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *grid = (const uint64_t *)tables + GRID;
    const uint8_t *qh = block + 32, *packed = block + 48;
    unsigned half = 0; /* the float16 scale stands in the high nibbles of the four words */
    for (int k = 0; k < 4; k++) half |= (unsigned)(qc_u16(packed + 2 * k) >> 12) << (4 * k);
    const float d = qc_f32_from_f16((uint16_t)half);
    uint64_t q[2];
    for (int s = 0; s < 16; s++) {
        for (int l = 0; l < 2; l++) {
            const unsigned high = qh[s] >> (4 * l);
            q[l] = moved(grid[block[2 * s + l] | (high & 7) << 8], high & 8);
        }
        const unsigned word = qc_u16(packed + 2 * (s / 4));
        const float scale = d * (float)(2 * (word >> (3 * (s % 4)) & 7) + 1);
        qc_put_words(q, 2, scale * 0.125f, 0, 0, out, at + (size_t)s * 16, element);
    }
}

QC_INLINE void iq2_xxs(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *table = tables;
    const float d = qc_half(block);
    uint64_t q[4];
    for (int s = 0; s < 8; s++) {
        const uint8_t *index = block + 2 + 8 * s;
        const uint32_t packed = qc_u32(index + 4);
        for (int l = 0; l < 4; l++)
            q[l] = with_signs(table[GRID + index[l]], even_signs(packed >> (7 * l) & 127), table);
        qc_put_words(q, 4, d * (0.5f + (float)(packed >> 28)) * 0.25f, 0, 0, out, at + (size_t)s * 32, element);
    }
}

QC_INLINE void iq2_xs(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *table = tables;
    const float d = qc_half(block);
    uint64_t q[2];
    for (int s = 0; s < 16; s++) {
        for (int l = 0; l < 2; l++) {
            const unsigned word = qc_u16(block + 2 + 4 * s + 2 * l);
            q[l] = with_signs(table[GRID + (word & 511)], even_signs(word >> 9), table);
        }
        const unsigned scale = block[66 + s / 2] >> (s % 2 * 4) & 15;
        qc_put_words(q, 2, d * (0.5f + (float)scale) * 0.25f, 0, 0, out, at + (size_t)s * 16, element);
    }
}

QC_INLINE void iq2_s(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *table = tables;
    const uint8_t *index = block + 2, *signs = block + 34, *qh = block + 66, *scales = block + 74;
    const float d = qc_half(block);
    uint64_t q[2];
    for (int s = 0; s < 16; s++) {
        for (int l = 0; l < 2; l++) {
            const int i = 2 * s + l;
            q[l] = with_signs(table[GRID + (index[i] | (qh[i / 4] >> (i % 4 * 2) & 3) << 8)], signs[i], table);
        }
        const unsigned scale = scales[s / 2] >> (s % 2 * 4) & 15;
        qc_put_words(q, 2, d * (0.5f + (float)scale) * 0.25f, 0, 0, out, at + (size_t)s * 16, element);
    }
}

QC_INLINE void iq3_xxs(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *table = tables;
    const float d = qc_half(block);
    uint64_t q[4];
    for (int s = 0; s < 8; s++) {
        const uint8_t *index = block + 2 + 8 * s;
        const uint32_t packed = qc_u32(block + 66 + 4 * s);
        for (int l = 0; l < 4; l++)
            q[l] = with_signs(table[GRID + index[2 * l]] | table[GRID + index[2 * l + 1]] << 32,
                       even_signs(packed >> (7 * l) & 127), table);
        qc_put_words(q, 4, d * (0.5f + (float)(packed >> 28)) * 0.5f, 0, 0, out, at + (size_t)s * 32, element);
    }
}

QC_INLINE void iq3_s(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const uint64_t *table = tables;
    const uint8_t *qh = block + 66, *signs = block + 74, *scales = block + 106;
    const float d = qc_half(block);
    uint64_t q[4];
    for (int s = 0; s < 8; s++) {
        const uint8_t *index = block + 2 + 8 * s;
        const unsigned high = qh[s];
        for (int l = 0; l < 4; l++) {
            const unsigned first = index[2 * l] | (high >> (2 * l) & 1) << 8;
            const unsigned second = index[2 * l + 1] | (high >> (2 * l + 1) & 1) << 8;
            q[l] = with_signs(table[GRID + first] | table[GRID + second] << 32, signs[4 * s + l], table);
        }
        const unsigned scale = scales[s / 2] >> (s % 2 * 4) & 15;
        qc_put_words(q, 4, d * (float)(1 + 2 * scale), 0, 0, out, at + (size_t)s * 32, element);
    }
}

QC_INLINE void iq4_nl(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    int8_t q[32];
    qc_sixteen_values(block + 2, tables, q);
    qc_put_scaled(q, 32, qc_half(block), out, at, element);
}

QC_INLINE void iq4_xs(const uint8_t *block, const void *tables, void *out, size_t at, int element) {
    const float d = qc_half(block);
    const unsigned high = qc_u16(block + 2);
    int8_t q[32];
    for (int s = 0; s < 8; s++) {
        const unsigned scale = (block[4 + s / 2] >> (s % 2 * 4) & 15) | (high >> (2 * s) & 3) << 4;
        qc_sixteen_values(block + 8 + 16 * s, tables, q);
        qc_put_scaled(q, 32, d * (float)((int)scale - 32), out, at + (size_t)s * 32, element);
    }
}

QC_INLINE int decode(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int element) {
    switch (type) {
    case IQ1_S: QC_EACH_BLOCK(iq1_s, 256, 50);
    case IQ1_M: QC_EACH_BLOCK(iq1_m, 256, 56);
    case IQ2_XXS: QC_EACH_BLOCK(iq2_xxs, 256, 66);
    case IQ2_XS: QC_EACH_BLOCK(iq2_xs, 256, 74);
    case IQ2_S: QC_EACH_BLOCK(iq2_s, 256, 82);
    case IQ3_XXS: QC_EACH_BLOCK(iq3_xxs, 256, 98);
    case IQ3_S: QC_EACH_BLOCK(iq3_s, 256, 110);
    case IQ4_NL: QC_EACH_BLOCK(iq4_nl, 32, 18);
    case IQ4_XS: QC_EACH_BLOCK(iq4_xs, 256, 136);
    default: return QC_BAD_CALL;
    }
}

QC_EXPORT_DECODER(qc_ggml_iq_decode, decode)
