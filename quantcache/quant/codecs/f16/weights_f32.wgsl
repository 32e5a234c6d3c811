// float32 that stayed as it was. qc_values: array<vec4<f32>>.

fn qc_init(local_index: u32) {}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let at = (row * (width / 8u) + unit) * 2u;
  return array<vec4<f32>, 2>(qc_values[at], qc_values[at + 1u]);
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  let at = row * width + column;
  return qc_values[at >> 2u][at & 3u];
}
