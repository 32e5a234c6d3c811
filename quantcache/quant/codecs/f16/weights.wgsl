// Two bytes a weight: eight are 16 bytes. qc_values: array<vec4<u32>>, pairs, as pair_f16.wgsl or pair_bf16.wgsl read them.

fn qc_init(local_index: u32) {}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let pairs = qc_values[row * (width / 8u) + unit];
  return array<vec4<f32>, 2>(vec4<f32>(qc_pair(pairs.x), qc_pair(pairs.y)), vec4<f32>(qc_pair(pairs.z), qc_pair(pairs.w)));
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  let at = row * width + column;
  let both = qc_pair(qc_values[at >> 3u][(at >> 1u) & 3u]);
  return select(both.x, both.y, (at & 1u) == 1u);
}
