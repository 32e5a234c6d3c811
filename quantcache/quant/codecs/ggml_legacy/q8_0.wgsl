// Q8_0: a float16 and 32 signed bytes, 34 bytes a block.

const QC_BLOCK = 34u;
const QC_SHIFT = 2u;

fn qc_codes(word: u32) -> vec4<f32> { return qc_signed_codes(word); }

fn qc_scale(at: u32, flat: u32) -> f32 { return qc_half_at(at); }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> { return qc_words(at + 2u + 8u * (flat & 3u)); }
