// Q4_K: d, dmin, the sixes, 128 bytes of nibbles; 144 bytes for 256 weights, so that words are aligned.
// A run of 32 weights has the low nibbles of 32 bytes, the next run the high ones of the same bytes.

fn qc_four(word: u32, shift: u32, scale: f32, minimum: f32) -> vec4<f32> {
  return vec4<f32>(qc_low_nibbles(word >> shift)) * scale - vec4<f32>(minimum);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let flat = row * (width / 32u) + unit;
  let at = (flat >> 3u) * 144u;
  let j = flat & 7u;
  let both = qc_scaled_six(at, j);
  let s = both.x;
  let m = both.y;
  let w = (at >> 2u) + 4u + (j >> 1u) * 8u;
  let h = (j & 1u) * 4u;
  return array<vec4<f32>, 8>(
    qc_four(qc_blocks[w], h, s, m), qc_four(qc_blocks[w + 1u], h, s, m),
    qc_four(qc_blocks[w + 2u], h, s, m), qc_four(qc_blocks[w + 3u], h, s, m),
    qc_four(qc_blocks[w + 4u], h, s, m), qc_four(qc_blocks[w + 5u], h, s, m),
    qc_four(qc_blocks[w + 6u], h, s, m), qc_four(qc_blocks[w + 7u], h, s, m));
}
