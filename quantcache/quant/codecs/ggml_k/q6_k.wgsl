// Q6_K: 128 bytes of low nibbles, 64 of upper bit pairs, sixteen signed scales, d; 210 bytes for 256 weights.
// Each half of a block: runs 0 and 1 have the low nibbles of 64 bytes, 2 and 3 the high ones; run r the bit pair r.

const QC_BLOCK = 210u;
const QC_SHIFT = 5u;

fn qc_codes(word: u32) -> vec4<f32> { return qc_codes7(word, 63u, 32.0); }

fn qc_signed(byte: u32) -> f32 { return qc_signed_codes(qc_word(byte >> 2u) >> (8u * (byte & 3u))).x; }

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let half = (flat >> 4u) & 1u;
  let run = (flat >> 2u) & 3u;
  let e = 8u * (flat & 3u);
  let nibbles = qc_words(at + 64u * half + 32u * (run & 1u) + e) >> vec2<u32>(4u * (run >> 1u));
  let pairs = qc_words(at + 128u + 32u * half + e) >> vec2<u32>(2u * run);
  return (nibbles & vec2<u32>(0x0f0f0f0fu)) | ((pairs & vec2<u32>(0x03030303u)) << vec2<u32>(4u));
}

// the scale of a unit: half a run
fn qc_scale(at: u32, flat: u32) -> f32 {
  return qc_half_at(at + 208u) * qc_signed(at + 192u + ((flat & 31u) >> 1u));
}

// sixteen bytes from an even byte on
fn qc_sixteen(byte: u32) -> vec4<u32> {
  let at = byte >> 2u;
  let words = vec4<u32>(qc_word(at), qc_word(at + 1u), qc_word(at + 2u), qc_word(at + 3u));
  if ((byte & 2u) == 0u) { return words; }
  return (words >> vec4<u32>(16u)) | (vec4<u32>(words.yzw, qc_word(at + 4u)) << vec4<u32>(16u));
}

// sixteen weights, and those 64 further on: both nibbles of sixteen bytes, and two pairs of sixteen others
fn qc_dots(row: u32, unit: u32, width: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, e: vec4<f32>, f: vec4<f32>, g: vec4<f32>, h: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> QC_SHIFT) * QC_BLOCK;
  let half = (flat >> 4u) & 1u;
  let run = (flat >> 2u) & 1u;
  let first = 8u * (flat & 3u);
  let nibbles = qc_sixteen(at + 64u * half + 32u * run + first);
  let pairs = qc_sixteen(at + 128u + 32u * half + first) >> vec4<u32>(2u * run);
  let l = (nibbles & vec4<u32>(0x0f0f0f0fu)) | ((pairs << vec4<u32>(4u)) & vec4<u32>(0x30303030u));
  let m = ((nibbles >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | (pairs & vec4<u32>(0x30303030u));
  let scale = at + 192u + ((flat & 31u) >> 1u);
  let low = qc_signed(scale) * qc_dot7(l, 63u, 32.0, a, b, c, d);
  return qc_half_at(at + 208u) * (low + qc_signed(scale + 4u) * qc_dot7(m, 63u, 32.0, e, f, g, h));
}
