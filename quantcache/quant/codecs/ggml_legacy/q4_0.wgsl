// Q4_0: a float16 and 16 bytes, 18 bytes a block: 16 low nibbles, then the 16 high ones; 8 is zero.

fn qc_codes(word: u32) -> vec4<f32> { return vec4<f32>(qc_low_nibbles(word)) - vec4<f32>(8.0); }

fn qc_pair(block: u32, flat: u32) -> vec2<u32> {
  return qc_words(block + 2u + 8u * (flat & 1u)) >> vec2<u32>(2u * (flat & 2u));
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let block = (flat >> 2u) * 18u;
  let d = qc_half_at(block);
  let words = qc_pair(block, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * d, qc_codes(words.y) * d);
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let block = (flat >> 2u) * 18u;
  let words = qc_pair(block, flat);
  return qc_half_at(block) * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y));
}
