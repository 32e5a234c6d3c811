// What Q4_K and Q5_K share: d and dmin, then twelve bytes that hold eight scales and eight minima of six bits. Whole words.
// Each has QC_BLOCK, the bytes of 256 weights, and qc_pair(), a unit's codes as eight bytes; `flat` is the number of the unit.

// the scale and the minimum of run j, times d and dmin; `at` is the first byte of the block
fn qc_scaled_six(at: u32, j: u32) -> vec2<f32> {
  let w = at >> 2u;
  let shift = 8u * (j & 3u);
  let a = qc_blocks[w + 1u] >> shift;
  let b = qc_blocks[w + 2u] >> shift;
  let c = qc_blocks[w + 3u] >> shift;
  let low = vec2<u32>(a & 63u, b & 63u);
  let high = vec2<u32>((c & 15u) | ((a >> 2u) & 48u), ((c >> 4u) & 15u) | ((b >> 2u) & 48u));
  return vec2<f32>(qc_half_at(at), qc_half_at(at + 2u)) * vec2<f32>(select(high, low, j < 4u));
}

fn qc_codes(word: u32) -> vec4<f32> { return vec4<f32>(qc_bytes(word)); }

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * QC_BLOCK;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * both.x - vec4<f32>(both.y), qc_codes(words.y) * both.x - vec4<f32>(both.y));
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * QC_BLOCK;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return both.x * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y)) - both.y * dot(x + y, vec4<f32>(1.0));
}
