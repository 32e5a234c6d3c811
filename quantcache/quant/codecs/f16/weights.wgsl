// Two bytes a weight: 32 weights are 64 bytes. qc_values: array<u32>, pairs, as pair_f16.wgsl or pair_bf16.wgsl read them.

fn qc_init(local_index: u32) {}

fn qc_four(at: u32) -> vec4<f32> {
  return vec4<f32>(qc_pair(qc_values[at]), qc_pair(qc_values[at + 1u]));
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = (row * (width / 32u) + unit) * 16u;
  return array<vec4<f32>, 8>(
    qc_four(at), qc_four(at + 2u), qc_four(at + 4u), qc_four(at + 6u),
    qc_four(at + 8u), qc_four(at + 10u), qc_four(at + 12u), qc_four(at + 14u));
}

fn qc_weight(row: u32, column: u32, width: u32) -> f32 {
  let at = row * width + column;
  let both = qc_pair(qc_values[at >> 1u]);
  return select(both.x, both.y, (at & 1u) == 1u);
}
