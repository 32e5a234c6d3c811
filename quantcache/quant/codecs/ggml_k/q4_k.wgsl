// Q4_K: d, dmin, the sixes, 128 bytes of nibbles; 144 bytes for 256 weights.
// A run of 32 weights has the low nibbles of 32 bytes, the next run the high ones of the same bytes.

const QC_BLOCK = 144u;

fn qc_pair(at: u32, flat: u32) -> vec2<u32> {
  let j = (flat >> 2u) & 7u;
  let w = (at >> 2u) + 4u + (j >> 1u) * 8u + 2u * (flat & 3u);
  return (vec2<u32>(qc_word(w), qc_word(w + 1u)) >> vec2<u32>((j & 1u) * 4u)) & vec2<u32>(0x0f0f0f0fu);
}

// sixteen weights of a run, and those 32 further on: the two nibbles of sixteen bytes
fn qc_dots(row: u32, unit: u32, width: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>, e: vec4<f32>, f: vec4<f32>, g: vec4<f32>, h: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * 9u;
  let q = qc_blocks[at + 1u + ((flat >> 2u) & 6u) + ((flat >> 1u) & 1u)];
  let low = qc_dot7(q, 15u, 0.0, a, b, c, d);
  let high = dot(qc_high_codes(q.x, 0.0), e) + dot(qc_high_codes(q.y, 0.0), f) + dot(qc_high_codes(q.z, 0.0), g) + dot(qc_high_codes(q.w, 0.0), h);
  return qc_two_runs(qc_blocks[at], (flat >> 3u) & 3u, low, high, a + b + c + d, e + f + g + h);
}
