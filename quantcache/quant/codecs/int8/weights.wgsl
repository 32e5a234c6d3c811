// Affine Int8: eight weights are two words; a scale and a bias for 128 weights.
// qc_codes: array<vec2<u32>>. qc_scale and qc_bias stand in scales_f32.wgsl (array<f32>) and scales_f16.wgsl (array<u32>, pairs).

fn qc_init(local_index: u32) {}

fn qc_four(word: u32, scale: f32, bias: f32) -> vec4<f32> { return qc_codes8(word, 0.0) * scale + vec4<f32>(bias); }

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let at = row * (width / 8u) + unit;
  let s = qc_scale(at >> 4u);
  let b = qc_bias(at >> 4u);
  let codes = qc_codes[at];
  return array<vec4<f32>, 2>(qc_four(codes.x, s, b), qc_four(codes.y, s, b));
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let at = row * (width / 8u) + unit;
  let codes = qc_codes[at];
  let sum = dot(x + y, vec4<f32>(1.0));
  return qc_scale(at >> 4u) * (dot(qc_codes8(codes.x, 0.0), x) + dot(qc_codes8(codes.y, 0.0), y)) + qc_bias(at >> 4u) * sum;
}
