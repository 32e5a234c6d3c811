// Codes of few bits as numbers, without a conversion, which has a quarter of the rate of other operations: the bits of a code
// become the last ones of a significand whose exponent makes them units, and what the leading one stands for is taken off.
// Every result is exact. `zero` is the code of zero.

// the low bits, at most seven, of the four bytes of a word
fn qc_codes7(word: u32, mask: u32, zero: f32) -> vec4<f32> {
  let fields = vec4<u32>(word, word, word, word >> 8u) & vec4<u32>(mask, mask << 8u, mask << 16u, mask << 16u);
  let wide = bitcast<vec4<f32>>(fields | vec4<u32>(0x4b000000u, 0x47000000u, 0x43000000u, 0x43000000u));
  return wide - vec4<f32>(8388608.0 + zero, 32768.0 + zero, 128.0 + zero, 128.0 + zero);
}

// the sum of sixteen such codes times a, b, c and d
fn qc_dot7(words: vec4<u32>, mask: u32, zero: f32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> f32 {
  let low = dot(qc_codes7(words.x, mask, zero), a) + dot(qc_codes7(words.y, mask, zero), b);
  return low + dot(qc_codes7(words.z, mask, zero), c) + dot(qc_codes7(words.w, mask, zero), d);
}

// the high nibbles of the four bytes of a word
fn qc_high_codes(word: u32, zero: f32) -> vec4<f32> {
  let fields = vec4<u32>(word, word, word >> 8u, word >> 16u) & vec4<u32>(0xf0u, 0xf000u, 0xf000u, 0xf000u);
  let wide = bitcast<vec4<f32>>(fields | vec4<u32>(0x49000000u, 0x45000000u, 0x45000000u, 0x45000000u));
  return wide - vec4<f32>(524288.0 + zero, 2048.0 + zero, 2048.0 + zero, 2048.0 + zero);
}

// the four bytes of a word
fn qc_codes8(word: u32, zero: f32) -> vec4<f32> {
  let fields = vec4<u32>(word, word, word >> 16u, word >> 16u) & vec4<u32>(0xffu, 0xff00u, 0xffu, 0xff00u);
  let wide = bitcast<vec4<f32>>(fields | vec4<u32>(0x4b000000u, 0x47000000u, 0x4b000000u, 0x47000000u));
  return wide - vec4<f32>(8388608.0 + zero, 32768.0 + zero, 8388608.0 + zero, 32768.0 + zero);
}

// the same of signed bytes
fn qc_signed_codes(word: u32) -> vec4<f32> { return qc_codes8(word ^ 0x80808080u, 128.0); }
