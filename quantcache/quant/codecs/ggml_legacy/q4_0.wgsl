// Q4_0: a float16 and 16 bytes, 18 bytes a block: 16 low nibbles, then the 16 high ones; 8 is zero.

fn qc_four(nibbles: vec4<u32>, scale: f32) -> vec4<f32> {
  return (vec4<f32>(nibbles) - vec4<f32>(8.0)) * scale;
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let at = (row * (width / 32u) + unit) * 18u;
  let d = qc_half_at(at);
  let a = qc_word(at + 2u);
  let b = qc_word(at + 6u);
  let c = qc_word(at + 10u);
  let e = qc_word(at + 14u);
  return array<vec4<f32>, 8>(
    qc_four(qc_low_nibbles(a), d), qc_four(qc_low_nibbles(b), d), qc_four(qc_low_nibbles(c), d), qc_four(qc_low_nibbles(e), d),
    qc_four(qc_high_nibbles(a), d), qc_four(qc_high_nibbles(b), d), qc_four(qc_high_nibbles(c), d), qc_four(qc_high_nibbles(e), d));
}
