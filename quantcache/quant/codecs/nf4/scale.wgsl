// One float32 absmax for 64 weights. qc_absmax: array<f32>.

fn qc_scale(at: u32) -> f32 {
  return qc_absmax[at >> 3u];
}

