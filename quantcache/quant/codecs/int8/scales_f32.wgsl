fn qc_scale(group: u32) -> f32 { return qc_scales[group]; }
fn qc_bias(group: u32) -> f32 { return qc_biases[group]; }
