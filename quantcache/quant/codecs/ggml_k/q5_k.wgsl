// Q5_K: d, dmin, the sixes, 32 bytes with the fifth bits of eight runs, 128 bytes of nibbles; 176 bytes for 256 weights.

const QC_BLOCK = 176u;

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let f = (at >> 2u) + 4u + 2u * (flat & 3u);
  let w = f + 8u + (j >> 1u) * 8u;
  let low = (vec2<u32>(qc_word(w), qc_word(w + 1u)) >> vec2<u32>((j & 1u) * 4u)) & vec2<u32>(0x0f0f0f0fu);
  let fifth = (vec2<u32>(qc_word(f), qc_word(f + 1u)) >> vec2<u32>(j)) & vec2<u32>(0x01010101u);
  return low | (fifth << vec2<u32>(4u));
}

// sixteen weights of a run, and those 32 further on: the two nibbles of sixteen bytes, and two bits of sixteen others
fn qc_dots(row: u32, unit: u32, width: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, e: vec4<f32>, f: vec4<f32>, g: vec4<f32>, h: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 11u;
  let half = (flat >> 1u) & 1u;
  let pair = (flat >> 3u) & 3u;
  let q = qc_blocks[at + 3u + 2u * pair + half];
  let bits = qc_blocks[at + 1u + half] >> vec4<u32>(2u * pair);
  let l = (q & vec4<u32>(0x0f0f0f0fu)) | ((bits << vec4<u32>(4u)) & vec4<u32>(0x10101010u));
  let m = ((q >> vec4<u32>(4u)) & vec4<u32>(0x0f0f0f0fu)) | ((bits << vec4<u32>(3u)) & vec4<u32>(0x10101010u));
  return qc_two_runs(qc_blocks[at], pair, qc_dot7(l, 31u, 0.0, a, b, c, d), qc_dot7(m, 31u, 0.0, e, f, g, h), a + b + c + d, e + f + g + h);
}
