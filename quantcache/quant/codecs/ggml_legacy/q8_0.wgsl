// Q8_0: a float16 and 32 signed bytes, 34 bytes a block.

fn qc_codes(word: u32) -> vec4<f32> {
  let w = bitcast<i32>(word);
  return vec4<f32>(vec4<i32>((w << 24u) >> 24u, (w << 16u) >> 24u, (w << 8u) >> 24u, w >> 24u));
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let block = (flat >> 2u) * 34u;
  let d = qc_half_at(block);
  let at = block + 2u + 8u * (flat & 3u);
  let words = qc_words(at);
  return array<vec4<f32>, 2>(qc_codes(words.x) * d, qc_codes(words.y) * d);
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let block = (flat >> 2u) * 34u;
  let words = qc_words(block + 2u + 8u * (flat & 3u));
  return qc_half_at(block) * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y));
}
