// Q5_K: d, dmin, the sixes, 32 bytes with the fifth bits of eight runs, 128 bytes of nibbles; 176 bytes for 256 weights.

const QC_BLOCK = 176u;

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let f = (at >> 2u) + 4u + 2u * (flat & 3u);
  let w = f + 8u + (j >> 1u) * 8u;
  let low = (vec2<u32>(qc_blocks[w], qc_blocks[w + 1u]) >> vec2<u32>((j & 1u) * 4u)) & vec2<u32>(0x0f0f0f0fu);
  let fifth = (vec2<u32>(qc_blocks[f], qc_blocks[f + 1u]) >> vec2<u32>(j)) & vec2<u32>(0x01010101u);
  return low | (fifth << vec2<u32>(4u));
}
