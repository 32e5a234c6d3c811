// Q6_K: 128 bytes of low nibbles, 64 of upper bit pairs, sixteen signed scales, d; 210 bytes for 256 weights.
// Each half of a block: runs 0 and 1 have the low nibbles of 64 bytes, 2 and 3 the high ones; run r the bit pair r.

fn qc_four(nibbles: u32, pairs: u32, scale: f32) -> vec4<f32> {
  let codes = (nibbles & 0x0f0f0f0fu) | ((pairs & 0x03030303u) << 4u);
  return (vec4<f32>(qc_bytes(codes)) - vec4<f32>(32.0)) * scale;
}

fn qc_signed(byte: u32) -> f32 {
  let word = bitcast<i32>(qc_blocks[byte >> 2u] << (24u - 8u * (byte & 3u)));
  return f32(word >> 24u);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 8> {
  let flat = row * (width / 32u) + unit;
  let at = (flat >> 3u) * 210u;
  let half = (flat >> 2u) & 1u;
  let run = flat & 3u;
  let d = qc_half_at(at + 208u);
  let first = at + 192u + 8u * half + 2u * run;
  let s = d * qc_signed(first);
  let t = d * qc_signed(first + 1u);
  let w = at + 64u * half + 32u * (run & 1u);
  let p = at + 128u + 32u * half;
  let h = 4u * (run >> 1u);
  let r = 2u * run;
  return array<vec4<f32>, 8>(
    qc_four(qc_word(w) >> h, qc_word(p) >> r, s), qc_four(qc_word(w + 4u) >> h, qc_word(p + 4u) >> r, s),
    qc_four(qc_word(w + 8u) >> h, qc_word(p + 8u) >> r, s), qc_four(qc_word(w + 12u) >> h, qc_word(p + 12u) >> r, s),
    qc_four(qc_word(w + 16u) >> h, qc_word(p + 16u) >> r, t), qc_four(qc_word(w + 20u) >> h, qc_word(p + 20u) >> r, t),
    qc_four(qc_word(w + 24u) >> h, qc_word(p + 24u) >> r, t), qc_four(qc_word(w + 28u) >> h, qc_word(p + 28u) >> r, t));
}
