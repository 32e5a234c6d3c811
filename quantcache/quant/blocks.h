/* Shared by the decoders of GGML's block types: a block becomes small integers, and these become weights.
 *
 * Every type but the ones with a table of floats has the form w = d * q or w = d * q + m with an integer q of 8 bits
 * and one d, and m, for a run of weights. So a type's own code only unpacks integers into L1, in plain C that
 * compilers vectorise; the conversion, which is where the time goes, stands here once. One multiplication and one
 * addition, each rounded, as ggml and gguf-py do it.
 *
 * Blocks are bytes at any address: fields are fetched with memcpy. Little-endian, as everything in the file. */
#ifndef QUANTCACHE_BLOCKS_H
#define QUANTCACHE_BLOCKS_H

#include "kernel.h"

QC_INLINE uint16_t qc_u16(const uint8_t *p) {
    uint16_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

QC_INLINE uint32_t qc_u32(const uint8_t *p) {
    uint32_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

QC_INLINE float qc_half(const uint8_t *p) { return qc_f32_from_f16(qc_u16(p)); }

/* ---- eight integers in a word ------------------------------------------------------------------
 * Where a run is too short for the compiler's own vectors, or comes from a table of eight. */
#define QC_EVERY(byte) ((uint64_t)(byte) * UINT64_C(0x0101010101010101))

QC_INLINE uint64_t qc_u64(const uint8_t *p) {
    uint64_t u;
    memcpy(&u, p, sizeof u);
    return u;
}

/* every byte less `lift`, as int8; bytes below 128 */
QC_INLINE uint64_t qc_lower(uint64_t word, unsigned lift) {
    return ((word | QC_EVERY(0x80)) - QC_EVERY(lift)) ^ QC_EVERY(0x80);
}

/* 1 in byte i where bit i is set */
QC_INLINE uint64_t qc_spread(unsigned bits) {
    const uint64_t own = QC_EVERY(bits) & UINT64_C(0x8040201008040201);
    return (own + QC_EVERY(0x7f)) >> 7 & QC_EVERY(1);
}

/* out[at + i] = d * q[i] (+ m if `affine`) for 8 n integers in n words; n even. From registers: a wide load of what two
 * narrow stores just wrote would wait for them. */
QC_INLINE void qc_put_words(const uint64_t *words, size_t n, float d, int affine, float m, void *out, size_t at, int element) {
#if defined(QC_LANES)
    const qf scale = qf_set(d), offset = qf_set(m);
    for (size_t k = 0; k < n; k += QC_LANES / 8) {
        const qf scaled = qf_mul(scale, qf_from_words(words + k));
        qf_store_element(out, at + 8 * k, affine ? qf_add(scaled, offset) : scaled, element);
    }
#else
    for (size_t k = 0; k < n; k++) {
        int8_t q[8];
        memcpy(q, words + k, 8);
        for (size_t i = 0; i < 8; i++)
            qc_store_element(out, at + 8 * k + i, affine ? d * (float)q[i] + m : d * (float)q[i], element);
    }
#endif
}

/* ---- integers in memory ------------------------------------------------------------------------ */

/* out[at + i] = d * q[i] for i < n; n a multiple of 16 */
QC_INLINE void qc_put_scaled(const int8_t *q, size_t n, float d, void *out, size_t at, int element) {
#if defined(QC_LANES)
    const qf scale = qf_set(d);
    for (size_t i = 0; i < n; i += QC_LANES) qf_store_element(out, at + i, qf_mul(scale, qf_from_s8(q + i)), element);
#else
    for (size_t i = 0; i < n; i++) qc_store_element(out, at + i, d * (float)q[i], element);
#endif
}

/* out[at + i] = d * q[i] + m for i < n; n a multiple of 16 */
QC_INLINE void qc_put_affine(const int8_t *q, size_t n, float d, float m, void *out, size_t at, int element) {
#if defined(QC_LANES)
    const qf scale = qf_set(d), offset = qf_set(m);
    for (size_t i = 0; i < n; i += QC_LANES)
        qf_store_element(out, at + i, qf_add(qf_mul(scale, qf_from_s8(q + i)), offset), element);
#else
    for (size_t i = 0; i < n; i++) qc_store_element(out, at + i, d * (float)q[i] + m, element);
#endif
}

/* 16 bytes to 32 values of the table: low nibbles first, then high ones */
QC_INLINE void qc_sixteen_values(const uint8_t *qs, const int8_t *values, int8_t q[32]) {
#if defined(QC_AVX2) || defined(QC_AVX512)
    const __m128i table = _mm_loadu_si128((const __m128i *)values), low = _mm_set1_epi8(15);
    const __m128i bytes = _mm_loadu_si128((const __m128i *)qs);
    _mm_storeu_si128((__m128i *)q, _mm_shuffle_epi8(table, _mm_and_si128(bytes, low)));
    _mm_storeu_si128((__m128i *)(q + 16), _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low)));
#elif defined(QC_NEON)
    const int8x16_t table = vld1q_s8(values);
    const uint8x16_t bytes = vld1q_u8(qs);
    vst1q_s8(q, vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))));
    vst1q_s8(q + 16, vqtbl1q_s8(table, vshrq_n_u8(bytes, 4)));
#else
    for (int i = 0; i < 16; i++) {
        q[i] = values[qs[i] & 15];
        q[i + 16] = values[qs[i] >> 4];
    }
#endif
}

/* One specialised loop over blocks for a type: DECODE(block, tables, out, at, element) writes one block's weights. */
#define QC_EACH_BLOCK(DECODE, weights, nbytes)                                                     \
    for (size_t b = 0; b < count; b++) DECODE(blocks + b * (nbytes), tables, out, b * (weights), element); \
    return QC_OK

/* The exported decoder of a family. blocks: count blocks; tables: what the type's folder gives, or null;
 * out: element[count * weights]. */
#define QC_EXPORT_DECODER(name, DECODE_TYPE)                                                                     \
    QC_EXPORT(name)(int64_t type, const uint8_t *blocks, size_t count, const void *tables, void *out, int64_t element) { \
        QC_FP_ENTER;                                                                                             \
        const int status = QC_FOR_ELEMENT(element, DECODE_TYPE, type, blocks, count, tables, out);                \
        QC_FP_LEAVE;                                                                                             \
        return status;                                                                                           \
    }

#endif
