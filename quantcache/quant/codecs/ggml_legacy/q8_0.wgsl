// Q8_0: a float16 and 32 signed bytes, 34 bytes a block.

fn qc_four(word: u32, scale: f32) -> vec4<f32> {
  let w = bitcast<i32>(word);
  return vec4<f32>(vec4<i32>((w << 24u) >> 24u, (w << 16u) >> 24u, (w << 8u) >> 24u, w >> 24u)) * scale;
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = (row * (width / 32u) + unit) * 34u;
  let d = qc_half_at(at);
  return array<vec4<f32>, 8>(
    qc_four(qc_word(at + 2u), d), qc_four(qc_word(at + 6u), d), qc_four(qc_word(at + 10u), d), qc_four(qc_word(at + 14u), d),
    qc_four(qc_word(at + 18u), d), qc_four(qc_word(at + 22u), d), qc_four(qc_word(at + 26u), d), qc_four(qc_word(at + 30u), d));
}
