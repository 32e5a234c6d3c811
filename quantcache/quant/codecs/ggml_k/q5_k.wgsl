// Q5_K: d, dmin, the sixes, 32 bytes with the fifth bits of eight runs, 128 bytes of nibbles; 176 bytes for 256 weights.

fn qc_codes(word: u32) -> vec4<f32> { return vec4<f32>(qc_bytes(word)); }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let f = (at >> 2u) + 4u + 2u * (flat & 3u);
  let w = f + 8u + (j >> 1u) * 8u;
  let low = (vec2<u32>(qc_blocks[w], qc_blocks[w + 1u]) >> vec2<u32>((j & 1u) * 4u)) & vec2<u32>(0x0f0f0f0fu);
  let fifth = (vec2<u32>(qc_blocks[f], qc_blocks[f + 1u]) >> vec2<u32>(j)) & vec2<u32>(0x01010101u);
  return low | (fifth << vec2<u32>(4u));
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 176u;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * both.x - vec4<f32>(both.y), qc_codes(words.y) * both.x - vec4<f32>(both.y));
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 176u;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return both.x * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y)) - both.y * dot(x + y, vec4<f32>(1.0));
}
