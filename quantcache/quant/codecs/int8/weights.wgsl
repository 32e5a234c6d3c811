// Affine Int8: 32 weights are 32 bytes; a scale and a bias for 128 weights.
// qc_codes: array<vec4<u32>>. qc_scale and qc_bias stand in scales_f32.wgsl (array<f32>) and scales_f16.wgsl (array<u32>, pairs).

fn qc_init(local_index: u32) {}

fn qc_four(word: u32, scale: f32, bias: f32) -> vec4<f32> {
  return vec4<f32>(vec4<u32>(word & 255u, (word >> 8u) & 255u, (word >> 16u) & 255u, word >> 24u)) * scale + vec4<f32>(bias);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = row * (width / 32u) + unit;
  let group = at >> 2u;
  let s = qc_scale(group);
  let b = qc_bias(group);
  let p = qc_codes[2u * at];
  let q = qc_codes[2u * at + 1u];
  return array<vec4<f32>, 8>(
    qc_four(p.x, s, b), qc_four(p.y, s, b), qc_four(p.z, s, b), qc_four(p.w, s, b),
    qc_four(q.x, s, b), qc_four(q.y, s, b), qc_four(q.z, s, b), qc_four(q.w, s, b));
}
