// Q4_0: a float16 and 16 bytes, 18 bytes a block: 16 low nibbles, then the 16 high ones; 8 is zero.

const QC_BLOCK = 18u;
const QC_SHIFT = 2u;

fn qc_codes(word: u32) -> vec4<f32> { return qc_codes7(word, 15u, 8.0); }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  return qc_words(at + 2u + 8u * (flat & 1u)) >> vec2<u32>(2u * (flat & 2u));
}

fn qc_scale(at: u32, flat: u32) -> f32 { return qc_half_at(at); }

// the low nibbles of eight bytes, and the high ones
fn qc_dots(row: u32, unit: u32, width: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> QC_SHIFT) * QC_BLOCK;
  let words = qc_words(at + 2u + 8u * (flat & 1u));
  let low = dot(qc_codes7(words.x, 15u, 8.0), a) + dot(qc_codes7(words.y, 15u, 8.0), b);
  return qc_half_at(at) * (low + dot(qc_high_codes(words.x, 8.0), c) + dot(qc_high_codes(words.y, 8.0), d));
}
