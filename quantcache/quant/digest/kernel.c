/* XXH3-128, seed 0, the default secret: what xxhash computes, for whole runs of pieces in one call, of what several threads
 * bring in any order, and compared with what it should be.
 *
 * Source: the specification of XXH3 in xxHash's doc/xxhash_spec.md; checked against the xxhash package. */
#include "../kernel.h"

#define LANES 8
#define SHORT 240 /* up to here there are other rules */
#define AHEAD 1024 /* bytes that are fetched before they are needed, */
#define FAR 4096   /* and that memory is asked for */
#define STRIPE 64
#define SECRET 192
#define STRIPES ((SECRET - STRIPE) / 8) /* of a block: each uses the secret from 8 bytes further on */
#define BLOCK ((uint64_t)STRIPE * STRIPES)

static const uint64_t P32_1 = 0x9E3779B1u, P32_2 = 0x85EBCA77u, P32_3 = 0xC2B2AE3Du;
static const uint64_t P64_1 = 0x9E3779B185EBCA87u, P64_2 = 0xC2B2AE3D27D4EB4Fu, P64_3 = 0x165667B19E3779F9u;
static const uint64_t P64_4 = 0x85EBCA77C2B2AE63u, P64_5 = 0x27D4EB2F165667C5u;

/* the secret as little-endian words, so that it is the same memory on every machine that the kernels run on */
static const uint64_t SECRET_WORDS[SECRET / 8] = {
    0xbe4ba423396cfeb8u, 0x1cad21f72c81017cu, 0xdb979083e96dd4deu, 0x1f67b3b7a4a44072u, 0x78e5c0cc4ee679cbu, 0x2172ffcc7dd05a82u,
    0x8e2443f7744608b8u, 0x4c263a81e69035e0u, 0xcb00c391bb52283cu, 0xa32e531b8b65d088u, 0x4ef90da297486471u, 0xd8acdea946ef1938u,
    0x3f349ce33f76faa8u, 0x1d4f0bc7c7bbdcf9u, 0x3159b4cd4be0518au, 0x647378d9c97e9fc8u, 0xc3ebd33483acc5eau, 0xeb6313faffa081c5u,
    0x49daf0b751dd0d17u, 0x9e68d429265516d3u, 0xfca1477d58be162bu, 0xce31d07ad1b8f88fu, 0x280416958f3acb45u, 0x7e404bbbcafbd7afu};

QC_INLINE uint64_t read64(const uint8_t *p) {
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* ---- W lanes of 64 bits. mix: sum + swapped neighbours + low half * high half of data ^ secret; scrambled: what follows a block,
 * (sum ^ sum >> 47 ^ secret) * a factor of 32 bits, by halves, since multiplying lanes of 64 bits takes three times as long ---- */
#if defined(QC_AVX512)
#define W 8
typedef __m512i qd;
QC_INLINE qd qd_load(const void *p) { return _mm512_loadu_si512(p); }
QC_INLINE void qd_store(void *p, qd a) { _mm512_storeu_si512(p, a); }
QC_INLINE qd qd_add(qd a, qd b) { return _mm512_add_epi64(a, b); }
QC_INLINE qd qd_mix(qd sum, qd data, qd secret) {
    const qd k = _mm512_xor_si512(data, secret), product = _mm512_mul_epu32(k, _mm512_srli_epi64(k, 32));
    return _mm512_add_epi64(sum, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, _MM_PERM_BADC)));
}
QC_INLINE qd qd_scrambled(qd sum, qd secret) {
    const qd k = _mm512_ternarylogic_epi64(sum, _mm512_srli_epi64(sum, 47), secret, 0x96), factor = _mm512_set1_epi64((int64_t)P32_1);
    return _mm512_add_epi64(_mm512_mul_epu32(k, factor), _mm512_slli_epi64(_mm512_mul_epu32(_mm512_srli_epi64(k, 32), factor), 32));
}
#elif defined(QC_AVX2)
#define W 4
typedef __m256i qd;
QC_INLINE qd qd_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
QC_INLINE void qd_store(void *p, qd a) { _mm256_storeu_si256((__m256i *)p, a); }
QC_INLINE qd qd_add(qd a, qd b) { return _mm256_add_epi64(a, b); }
QC_INLINE qd qd_mix(qd sum, qd data, qd secret) {
    const qd k = _mm256_xor_si256(data, secret), product = _mm256_mul_epu32(k, _mm256_srli_epi64(k, 32));
    return _mm256_add_epi64(sum, _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4e)));
}
QC_INLINE qd qd_scrambled(qd sum, qd secret) {
    const qd k = _mm256_xor_si256(_mm256_xor_si256(sum, _mm256_srli_epi64(sum, 47)), secret), factor = _mm256_set1_epi64x((int64_t)P32_1);
    return _mm256_add_epi64(_mm256_mul_epu32(k, factor), _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(k, 32), factor), 32));
}
#elif defined(QC_NEON)
#define W 2
typedef uint64x2_t qd;
QC_INLINE qd qd_load(const void *p) { return vreinterpretq_u64_u8(vld1q_u8((const uint8_t *)p)); }
QC_INLINE void qd_store(void *p, qd a) { vst1q_u8((uint8_t *)p, vreinterpretq_u8_u64(a)); }
QC_INLINE qd qd_add(qd a, qd b) { return vaddq_u64(a, b); }
QC_INLINE qd qd_mix(qd sum, qd data, qd secret) {
    const qd k = veorq_u64(data, secret);
    return vmlal_u32(vaddq_u64(sum, vextq_u64(data, data, 1)), vmovn_u64(k), vshrn_n_u64(k, 32));
}
QC_INLINE qd qd_scrambled(qd sum, qd secret) {
    const qd k = veorq_u64(veorq_u64(sum, vshrq_n_u64(sum, 47)), secret);
    const uint32x2_t factor = vdup_n_u32((uint32_t)P32_1);
    return vmlal_u32(vshlq_n_u64(vmull_u32(vshrn_n_u64(k, 32), factor), 32), vmovn_u64(k), factor);
}
#elif defined(__SSE2__)
#define W 2
typedef __m128i qd;
QC_INLINE qd qd_load(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
QC_INLINE void qd_store(void *p, qd a) { _mm_storeu_si128((__m128i *)p, a); }
QC_INLINE qd qd_add(qd a, qd b) { return _mm_add_epi64(a, b); }
QC_INLINE qd qd_mix(qd sum, qd data, qd secret) {
    const qd k = _mm_xor_si128(data, secret), product = _mm_mul_epu32(k, _mm_srli_epi64(k, 32));
    return _mm_add_epi64(sum, _mm_add_epi64(product, _mm_shuffle_epi32(data, 0x4e)));
}
QC_INLINE qd qd_scrambled(qd sum, qd secret) {
    const qd k = _mm_xor_si128(_mm_xor_si128(sum, _mm_srli_epi64(sum, 47)), secret), factor = _mm_set1_epi64x((int64_t)P32_1);
    return _mm_add_epi64(_mm_mul_epu32(k, factor), _mm_slli_epi64(_mm_mul_epu32(_mm_srli_epi64(k, 32), factor), 32));
}
#else
#define W 2
typedef struct {
    uint64_t lane[W];
} qd;
QC_INLINE qd qd_load(const void *p) {
    qd a;
    memcpy(&a, p, sizeof a);
    return a;
}
QC_INLINE void qd_store(void *p, qd a) { memcpy(p, &a, sizeof a); }
QC_INLINE qd qd_add(qd a, qd b) {
    for (int i = 0; i < W; i++) a.lane[i] += b.lane[i];
    return a;
}
QC_INLINE qd qd_mix(qd sum, qd data, qd secret) {
    for (int i = 0; i < W; i++) {
        const uint64_t k = data.lane[i] ^ secret.lane[i];
        sum.lane[i] += data.lane[i ^ 1] + (k & 0xffffffffu) * (k >> 32);
    }
    return sum;
}
QC_INLINE qd qd_scrambled(qd sum, qd secret) {
    for (int i = 0; i < W; i++) sum.lane[i] = (sum.lane[i] ^ sum.lane[i] >> 47 ^ secret.lane[i]) * P32_1;
    return sum;
}
#endif

QC_INLINE void accumulate(qd *acc, const uint8_t *data, const uint8_t *secret) {
    for (int i = 0; i < LANES / W; i++) acc[i] = qd_mix(acc[i], qd_load(data + 8 * W * i), qd_load(secret + 8 * W * i));
}

QC_INLINE void ahead(const uint8_t *stripe) {
    QC_PREFETCH_READ(stripe + AHEAD);
    QC_PREFETCH_FAR(stripe + FAR);
}

QC_INLINE void scramble(qd *acc) {
    for (int i = 0; i < LANES / W; i++) acc[i] = qd_scrambled(acc[i], qd_load(SECRET_WORDS + (SECRET - STRIPE) / 8 + W * i));
}

/* whole blocks; the sums stay in registers */
static void blocks_of(uint64_t *sums, const uint8_t *data, uint64_t blocks) {
    const uint8_t *secret = (const uint8_t *)SECRET_WORDS;
    qd acc[LANES / W];
    for (int i = 0; i < LANES / W; i++) acc[i] = qd_load(sums + W * i);
    for (uint64_t b = 0; b < blocks; b++, data += BLOCK) {
        for (int s = 0; s < STRIPES; s++) {
            ahead(data + s * STRIPE);
            accumulate(acc, data + s * STRIPE, secret + 8 * s);
        }
        scramble(acc);
    }
    for (int i = 0; i < LANES / W; i++) qd_store(sums + W * i, acc[i]);
}

typedef struct {
    uint64_t low, high;
} pair_t;

QC_INLINE pair_t product(uint64_t a, uint64_t b) {
    const uint64_t al = a & 0xffffffffu, ah = a >> 32, bl = b & 0xffffffffu, bh = b >> 32;
    const uint64_t ll = al * bl, hl = ah * bl, lh = al * bh, hh = ah * bh;
    const uint64_t cross = (ll >> 32) + (hl & 0xffffffffu) + lh;
    return (pair_t){(cross << 32) | (ll & 0xffffffffu), (hl >> 32) + (cross >> 32) + hh};
}

QC_INLINE uint64_t folded(uint64_t a, uint64_t b) {
    const pair_t p = product(a, b);
    return p.low ^ p.high;
}

QC_INLINE uint64_t stirred(uint64_t h) {
    h ^= h >> 37;
    h *= 0x165667919E3779F9u;
    return h ^ h >> 32;
}

static uint64_t merged(const uint64_t *acc, const uint8_t *secret, uint64_t start) {
    uint64_t h = start;
    for (int i = 0; i < LANES; i += 2) h += folded(acc[i] ^ read64(secret + 8 * i), acc[i + 1] ^ read64(secret + 8 * i + 8));
    return stirred(h);
}

static void put64(uint8_t *out, uint64_t v) {
    for (int i = 0; i < 8; i++) out[i] = (uint8_t)(v >> (56 - 8 * i));
}

QC_INLINE void start(uint64_t *sums) {
    const uint64_t seeds[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    memcpy(sums, seeds, sizeof seeds);
}

/* Adds what stands behind the last whole block, `rest` > 0 bytes with at least a stripe before their end; n bytes in all. */
static void finish(uint64_t *sums, const uint8_t *last, uint64_t rest, uint64_t n, uint8_t *out) {
    const uint8_t *secret = (const uint8_t *)SECRET_WORDS;
    qd acc[LANES / W];
    for (int i = 0; i < LANES / W; i++) acc[i] = qd_load(sums + W * i);
    for (uint64_t s = 0; s < (rest - 1) / STRIPE; s++) accumulate(acc, last + s * STRIPE, secret + 8 * s);
    accumulate(acc, last + rest - STRIPE, secret + SECRET - STRIPE - 7);
    for (int i = 0; i < LANES / W; i++) qd_store(sums + W * i, acc[i]);
    put64(out, merged(sums, secret + SECRET - STRIPE - 11, ~(n * P64_2)));
    put64(out + 8, merged(sums, secret + 11, n * P64_1));
}

QC_INLINE uint32_t read32(const uint8_t *p) {
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return v;
}

QC_INLINE uint32_t swapped32(uint32_t v) { return v << 24 | (v & 0xff00u) << 8 | (v >> 8 & 0xff00u) | v >> 24; }
QC_INLINE uint64_t swapped64(uint64_t v) { return (uint64_t)swapped32((uint32_t)v) << 32 | swapped32((uint32_t)(v >> 32)); }

/* what XXH64 ends with */
QC_INLINE uint64_t stirred64(uint64_t h) {
    h = (h ^ h >> 33) * P64_2;
    h = (h ^ h >> 29) * P64_3;
    return h ^ h >> 32;
}

static pair_t up_to_16(const uint8_t *data, uint64_t n) {
    const uint64_t *const s = SECRET_WORDS;
    if (n > 8) {
        const uint64_t flipped = read64(data + n - 8) ^ s[6] ^ s[7];
        pair_t p = product(read64(data) ^ read64(data + n - 8) ^ s[4] ^ s[5], P64_1);
        p.low += (n - 1) << 54;
        p.high += flipped + (flipped & 0xffffffffu) * (P32_2 - 1);
        p.low ^= swapped64(p.high);
        const pair_t q = product(p.low, P64_2);
        return (pair_t){stirred(q.low), stirred(q.high + p.high * P64_2)};
    }
    if (n > 3) {
        pair_t p = product((read32(data) | (uint64_t)read32(data + n - 4) << 32) ^ s[2] ^ s[3], P64_1 + (n << 2));
        p.high += p.low << 1;
        p.low ^= p.high >> 3;
        p.low = (p.low ^ p.low >> 35) * 0x9FB21C651E98DF25u;
        return (pair_t){p.low ^ p.low >> 28, stirred(p.high)};
    }
    if (n) {
        const uint32_t low = (uint32_t)data[0] << 16 | (uint32_t)data[n >> 1] << 24 | data[n - 1] | (uint32_t)n << 8;
        const uint32_t turned = swapped32(low), high = turned << 13 | turned >> 19;
        return (pair_t){stirred64(low ^ ((s[0] ^ s[0] >> 32) & 0xffffffffu)), stirred64(high ^ ((s[1] ^ s[1] >> 32) & 0xffffffffu))};
    }
    return (pair_t){stirred64(s[8] ^ s[9]), stirred64(s[10] ^ s[11])};
}

/* Adds 16 bytes at a and as many at b to two sums. */
QC_INLINE void mix(pair_t *sum, const uint8_t *a, const uint8_t *b, const uint8_t *secret) {
    sum->low += folded(read64(a) ^ read64(secret), read64(a + 8) ^ read64(secret + 8));
    sum->low ^= read64(b) + read64(b + 8);
    sum->high += folded(read64(b) ^ read64(secret + 16), read64(b + 8) ^ read64(secret + 24));
    sum->high ^= read64(a) + read64(a + 8);
}

static pair_t up_to_240(const uint8_t *data, uint64_t n) {
    const uint8_t *secret = (const uint8_t *)SECRET_WORDS, *end = data + n;
    pair_t sum = {n * P64_1, 0};
    if (n <= 128) { /* from both ends inwards, the innermost first */
        for (uint64_t i = (n - 1) / 32 + 1; i-- > 0;) mix(&sum, data + 16 * i, end - 16 * (i + 1), secret + 32 * i);
    } else {
        for (uint64_t i = 0; i < 4; i++) mix(&sum, data + 32 * i, data + 32 * i + 16, secret + 32 * i);
        sum = (pair_t){stirred(sum.low), stirred(sum.high)};
        for (uint64_t i = 4; i < n / 32; i++) mix(&sum, data + 32 * i, data + 32 * i + 16, secret + 3 + 32 * (i - 4));
        mix(&sum, end - 16, end - 32, secret + 136 - 17 - 16);
    }
    const uint64_t high = sum.low * P64_1 + sum.high * P64_4 + n * P64_2;
    return (pair_t){stirred(sum.low + sum.high), 0 - stirred(high)};
}

static void xxh3_128(const uint8_t *data, uint64_t n, uint8_t *out) {
    if (n <= SHORT) {
        const pair_t found = n <= 16 ? up_to_16(data, n) : up_to_240(data, n);
        put64(out, found.high);
        put64(out + 8, found.low);
        return;
    }
    uint64_t sums[LANES];
    const uint64_t blocks = (n - 1) / BLOCK;
    start(sums);
    blocks_of(sums, data, blocks);
    finish(sums, data + blocks * BLOCK, n - blocks * BLOCK, n, out);
}

/* Digests of the pieces of n bytes at data, each of `piece` > 0 bytes but for the last.
 * out: 16 bytes a piece, as xxhash's canonical form. */
QC_EXPORT(qc_digest_pieces)(const uint8_t *data, uint64_t n, uint64_t piece, uint8_t *out) {
    if (!piece) return QC_BAD_CALL;
    for (uint64_t start = 0; start < n; start += piece, out += 16) xxh3_128(data + start, n - start < piece ? n - start : piece, out);
    return QC_OK;
}

/* The sums of blocks: of each, what its stripes add, whatever stands before it. Additions may come in any order, so that blocks can
 * be read in any order, too, while they are in a cache; what depends on all before is `qc_digest_of_sums`, a sixteenth of the bytes.
 * data: `blocks` blocks; sums: 8 a block, written. */
QC_EXPORT(qc_digest_sums)(const uint8_t *data, uint64_t blocks, uint64_t *sums) {
    const uint8_t *secret = (const uint8_t *)SECRET_WORDS;
    for (uint64_t b = 0; b < blocks; b++, data += BLOCK, sums += LANES) {
        qd even[LANES / W], odd[LANES / W]; /* an addition waits for the one before it: two chains */
        memset(even, 0, sizeof even);
        memset(odd, 0, sizeof odd);
        for (int s = 0; s < STRIPES; s += 2) {
            ahead(data + s * STRIPE);
            ahead(data + (s + 1) * STRIPE);
            accumulate(even, data + s * STRIPE, secret + 8 * s);
            accumulate(odd, data + (s + 1) * STRIPE, secret + 8 * s + 8);
        }
        for (int i = 0; i < LANES / W; i++) qd_store(sums + W * i, qd_add(even[i], odd[i]));
    }
    return QC_OK;
}

/* The digest of n bytes, of which the whole blocks before the last byte have been added up already.
 * data: of them what stands behind those blocks is read, and the stripe before it; sums: 8 for each of (n - 1) / 1024 blocks; out: 16 bytes. */
QC_EXPORT(qc_digest_of_sums)(const uint8_t *data, uint64_t n, const uint64_t *sums, uint8_t *out) {
    if (n <= SHORT) {
        xxh3_128(data, n, out);
        return QC_OK;
    }
    uint64_t all[LANES];
    qd acc[LANES / W];
    const uint64_t blocks = (n - 1) / BLOCK;
    start(all);
    for (int i = 0; i < LANES / W; i++) acc[i] = qd_load(all + W * i);
    for (uint64_t b = 0; b < blocks; b++, sums += LANES) {
        for (int i = 0; i < LANES / W; i++) acc[i] = qd_add(acc[i], qd_load(sums + W * i));
        scramble(acc);
    }
    for (int i = 0; i < LANES / W; i++) qd_store(all + W * i, acc[i]);
    finish(all, data + blocks * BLOCK, n - blocks * BLOCK, n, out);
    return QC_OK;
}

/* A digest of digests, whose 16 bytes come one after the other. The last block is kept until more follows; before it, the stripe
 * that a short one needs. */
typedef struct {
    uint64_t n; /* added so far */
    uint64_t sums[LANES];
    uint8_t before[STRIPE], last[STRIPE * STRIPES];
} stream_t;

static void add(stream_t *s, const uint8_t *data, uint64_t n) {
    if (!n) return;
    if (!s->n) start(s->sums);
    const uint64_t held = s->n ? (s->n - 1) % BLOCK + 1 : 0;
    s->n += n;
    if (held + n <= BLOCK) {
        memcpy(s->last + held, data, n);
        return;
    }
    memcpy(s->last + held, data, BLOCK - held);
    blocks_of(s->sums, s->last, 1);
    memcpy(s->before, s->last + BLOCK - STRIPE, STRIPE);
    memcpy(s->last, data + BLOCK - held, n - (BLOCK - held));
}

static void digest_of(const stream_t *s, uint8_t *out) {
    if (s->n <= SHORT) {
        xxh3_128(s->last, s->n, out);
        return;
    }
    const uint64_t held = (s->n - 1) % BLOCK + 1;
    uint64_t sums[LANES];
    uint8_t last[STRIPE + STRIPE * STRIPES];
    memcpy(sums, s->sums, sizeof sums);
    memcpy(last, s->before, STRIPE);
    memcpy(last + STRIPE, s->last, held);
    finish(sums, last + STRIPE, held, s->n, out);
}

/* A stored tensor: its first byte, bytes, bytes of a piece (not 0), and the digest of the digests of its pieces. */
typedef struct {
    uint64_t place, n, piece;
    uint8_t wanted[16];
} stored_t;

/* Compares tensors with their digests; which: numbers of them. Returns the first place in `which` of one that differs, or count. */
QC_EXPORT(qc_digest_differs)(const uint8_t *base, const stored_t *stored, const uint64_t *which, uint64_t count) {
    uint8_t found[16];
    for (uint64_t i = 0; i < count; i++) {
        const stored_t *t = stored + which[i];
        stream_t whole = {0};
        for (uint64_t start = 0; start < t->n; start += t->piece) {
            xxh3_128(base + t->place + start, t->n - start < t->piece ? t->n - start : t->piece, found);
            add(&whole, found, sizeof found);
        }
        digest_of(&whole, found);
        if (memcmp(found, t->wanted, sizeof found) != 0) return (int)i;
    }
    return (int)count;
}
