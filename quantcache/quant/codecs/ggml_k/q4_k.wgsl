// Q4_K: d, dmin, the sixes, 128 bytes of nibbles; 144 bytes for 256 weights, so that words are aligned.
// A run of 32 weights has the low nibbles of 32 bytes, the next run the high ones of the same bytes.

const QC_BLOCK = 144u;

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let w = (at >> 2u) + 4u + (j >> 1u) * 8u + 2u * (flat & 3u);
  return (vec2<u32>(qc_blocks[w], qc_blocks[w + 1u]) >> vec2<u32>((j & 1u) * 4u)) & vec2<u32>(0x0f0f0f0fu);
}
