// Q4_0: a float16 and 16 bytes, 18 bytes a block: 16 low nibbles, then the 16 high ones; 8 is zero.

const QC_BLOCK = 18u;
const QC_SHIFT = 2u;

fn qc_codes(word: u32) -> vec4<f32> { return vec4<f32>(qc_low_nibbles(word)) - vec4<f32>(8.0); }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  return qc_words(at + 2u + 8u * (flat & 1u)) >> vec2<u32>(2u * (flat & 2u));
}

fn qc_scale(at: u32, flat: u32) -> f32 { return qc_half_at(at); }
