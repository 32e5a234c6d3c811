// Q5_K: d, dmin, the sixes, 32 bytes with the fifth bits of eight runs, 128 bytes of nibbles; 176 bytes for 256 weights.

fn qc_four(word: u32, fifth: u32, shift: u32, run: u32, scale: f32, minimum: f32) -> vec4<f32> {
  let codes = ((word >> shift) & 0x0f0f0f0fu) | (((fifth >> run) & 0x01010101u) << 4u);
  return vec4<f32>(qc_bytes(codes)) * scale - vec4<f32>(minimum);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let flat = row * (width / 32u) + unit;
  let at = (flat >> 3u) * 176u;
  let j = flat & 7u;
  let both = qc_scaled_six(at, j);
  let s = both.x;
  let m = both.y;
  let f = (at >> 2u) + 4u;
  let w = f + 8u + (j >> 1u) * 8u;
  let h = (j & 1u) * 4u;
  return array<vec4<f32>, 8>(
    qc_four(qc_blocks[w], qc_blocks[f], h, j, s, m), qc_four(qc_blocks[w + 1u], qc_blocks[f + 1u], h, j, s, m),
    qc_four(qc_blocks[w + 2u], qc_blocks[f + 2u], h, j, s, m), qc_four(qc_blocks[w + 3u], qc_blocks[f + 3u], h, j, s, m),
    qc_four(qc_blocks[w + 4u], qc_blocks[f + 4u], h, j, s, m), qc_four(qc_blocks[w + 5u], qc_blocks[f + 5u], h, j, s, m),
    qc_four(qc_blocks[w + 6u], qc_blocks[f + 6u], h, j, s, m), qc_four(qc_blocks[w + 7u], qc_blocks[f + 7u], h, j, s, m));
}
