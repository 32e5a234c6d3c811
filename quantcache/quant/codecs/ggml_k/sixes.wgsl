// What Q4_K and Q5_K share: d and dmin, then twelve bytes that hold eight scales and eight minima of six bits. Whole sixteens.
// Each has QC_BLOCK, the bytes of 256 weights, and qc_pair(), a unit's codes as eight bytes; `flat` is the number of the unit.

// the scale and the minimum of run j, times d and dmin; `at` is the first byte of the block
fn qc_scaled_six(at: u32, j: u32) -> vec2<f32> {
  let w = at >> 2u;
  let shift = 8u * (j & 3u);
  let a = qc_word(w + 1u) >> shift;
  let b = qc_word(w + 2u) >> shift;
  let c = qc_word(w + 3u) >> shift;
  let low = vec2<u32>(a & 63u, b & 63u);
  let high = vec2<u32>((c & 15u) | ((a >> 2u) & 48u), ((c >> 4u) & 15u) | ((b >> 2u) & 48u));
  return vec2<f32>(qc_half_at(at), qc_half_at(at + 2u)) * vec2<f32>(select(high, low, j < 4u));
}

fn qc_codes(word: u32) -> vec4<f32> { return qc_codes7(word, 31u, 0.0); }

// what two runs, 2 * pair and the next, add to a product
// `head`: the first sixteen bytes of the block; `low`, `high`: sums of codes times x; `x`, `y`: vectors whose sums are those of x
fn qc_two_runs(head: vec4<u32>, pair: u32, low: f32, high: f32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let words = head.yzw >> vec3<u32>(16u * (pair & 1u));
  var scales = words.x & 0x3f3fu;
  var minima = words.y & 0x3f3fu;
  if (pair > 1u) {
    scales = (words.z & 0x0f0fu) | ((words.x >> 2u) & 0x3030u);
    minima = ((words.z >> 4u) & 0x0f0fu) | ((words.y >> 2u) & 0x3030u);
  }
  let s = qc_codes7(scales, 63u, 0.0).xy;
  let m = qc_codes7(minima, 63u, 0.0).xy;
  let sums = vec2<f32>(dot(x, vec4<f32>(1.0)), dot(y, vec4<f32>(1.0)));
  return qc_half(head.x) * dot(s, vec2<f32>(low, high)) - qc_half(head.x >> 16u) * dot(m, sums);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> 5u) * QC_BLOCK;
  let both = qc_scaled_six(at, (flat >> 2u) & 7u);
  let words = qc_pair(at, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * both.x - vec4<f32>(both.y), qc_codes(words.y) * both.x - vec4<f32>(both.y));
}
