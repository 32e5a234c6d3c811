// Q4_K: d, dmin, the sixes, 128 bytes of nibbles; 144 bytes for 256 weights, so that words are aligned.
// A run of 32 weights has the low nibbles of 32 bytes, the next run the high ones of the same bytes.

fn qc_codes(word: u32) -> vec4<f32> { return vec4<f32>(qc_low_nibbles(word)); }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let w = (at >> 2u) + 4u + (j >> 1u) * 8u + 2u * (flat & 3u);
  return vec2<u32>(qc_blocks[w], qc_blocks[w + 1u]) >> vec2<u32>((j & 1u) * 4u);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 144u;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * both.x - vec4<f32>(both.y), qc_codes(words.y) * both.x - vec4<f32>(both.y));
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 144u;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return both.x * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y)) - both.y * dot(x + y, vec4<f32>(1.0));
}
