// LLM.int8(): a signed byte a weight, a float32 a row. qc_codes: array<vec2<u32>>, qc_scales: array<f32>.

fn qc_init(local_index: u32) {}

// f32(code * scale) / 127, corrected by its own remainder: WGSL's division may be off by more
fn qc_divided(product: vec4<f32>) -> vec4<f32> {
  let inverse = 1.0 / 127.0;
  let quotient = product * inverse;
  return fma(fma(-quotient, vec4<f32>(127.0), product), vec4<f32>(inverse), quotient);
}

fn qc_four(word: u32, scale: f32) -> vec4<f32> { return qc_divided(qc_signed_codes(word) * scale); }

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let codes = qc_codes[row * (width / 8u) + unit];
  return array<vec4<f32>, 2>(qc_four(codes.x, qc_scales[row]), qc_four(codes.y, qc_scales[row]));
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  let at = row * width + column;
  return qc_four(qc_codes[at >> 3u][(at >> 2u) & 1u] >> (8u * (at & 3u)), qc_scales[row]).x;
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let codes = qc_codes[row * (width / 8u) + unit];
  return (dot(qc_signed_codes(codes.x), x) + dot(qc_signed_codes(codes.y), y)) * qc_divided(vec4<f32>(qc_scales[row])).x;
}
