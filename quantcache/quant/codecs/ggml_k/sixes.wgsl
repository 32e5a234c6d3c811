// The twelve bytes of Q4_K and Q5_K that hold eight scales and eight minima of six bits.

fn qc_byte(byte: u32) -> u32 { return (qc_blocks[byte >> 2u] >> (8u * (byte & 3u))) & 255u; }

// scale and minimum number j; `at` is the first of the twelve bytes
fn qc_six(at: u32, j: u32) -> vec2<f32> {
  if (j < 4u) { return vec2<f32>(f32(qc_byte(at + j) & 63u), f32(qc_byte(at + 4u + j) & 63u)); }
  let low = qc_byte(at + 4u + j);
  return vec2<f32>(
    f32((low & 15u) | ((qc_byte(at + j - 4u) >> 6u) << 4u)),
    f32((low >> 4u) | ((qc_byte(at + j) >> 6u) << 4u)));
}

// the scale and the minimum of run j; `at` is the first byte of the block: d, dmin, the twelve bytes
fn qc_scaled_six(at: u32, j: u32) -> vec2<f32> {
  return vec2<f32>(qc_half_at(at), qc_half_at(at + 2u)) * qc_six(at + 4u, j);
}
