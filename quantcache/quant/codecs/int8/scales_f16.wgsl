fn qc_half(pair: u32, group: u32) -> f32 {
  let both = unpack2x16float(pair);
  return select(both.x, both.y, (group & 1u) == 1u);
}
fn qc_scale(group: u32) -> f32 { return qc_half(qc_scales[group >> 1u], group); }
fn qc_bias(group: u32) -> f32 { return qc_half(qc_biases[group >> 1u], group); }
