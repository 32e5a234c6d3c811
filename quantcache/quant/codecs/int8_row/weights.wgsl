// LLM.int8(): a signed byte a weight, a float32 a row. qc_codes: array<u32>, qc_scales: array<f32>.

fn qc_init(local_index: u32) {}

// f32(code * scale) / 127, corrected by its own remainder: WGSL's division may be off by more
fn qc_divided(product: vec4<f32>) -> vec4<f32> {
  let inverse = 1.0 / 127.0;
  let quotient = product * inverse;
  return fma(fma(-quotient, vec4<f32>(127.0), product), vec4<f32>(inverse), quotient);
}

fn qc_four(word: u32, scale: f32) -> vec4<f32> {
  let w = bitcast<i32>(word);
  let codes = vec4<f32>(vec4<i32>((w << 24u) >> 24u, (w << 16u) >> 24u, (w << 8u) >> 24u, w >> 24u));
  return qc_divided(codes * scale);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = (row * (width / 32u) + unit) * 8u;
  let s = qc_scales[row];
  return array<vec4<f32>, 8>(
    qc_four(qc_codes[at], s), qc_four(qc_codes[at + 1u], s), qc_four(qc_codes[at + 2u], s), qc_four(qc_codes[at + 3u], s),
    qc_four(qc_codes[at + 4u], s), qc_four(qc_codes[at + 5u], s), qc_four(qc_codes[at + 6u], s), qc_four(qc_codes[at + 7u], s));
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  let at = row * width + column;
  return qc_four(qc_codes[at >> 2u] >> (8u * (at & 3u)), qc_scales[row]).x;
}
