// float32 that stayed as it was. qc_values: array<f32>.

fn qc_init(local_index: u32) {}

fn qc_four(at: u32) -> vec4<f32> {
  return vec4<f32>(qc_values[at], qc_values[at + 1u], qc_values[at + 2u], qc_values[at + 3u]);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = (row * (width / 32u) + unit) * 32u;
  return array<vec4<f32>, 8>(
    qc_four(at), qc_four(at + 4u), qc_four(at + 8u), qc_four(at + 12u),
    qc_four(at + 16u), qc_four(at + 20u), qc_four(at + 24u), qc_four(at + 28u));
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  return qc_values[row * width + column];
}
