// The head of Q4_K and Q5_K: d and dmin, then twelve bytes that hold eight scales and eight minima of six bits. Whole words.

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
