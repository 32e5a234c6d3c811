// One byte for 64 weights, a number of a map of 256; one float32 for 256 of these, and an offset for all.
// qc_absmax: array<u32>, qc_nested_absmax, qc_nested_quant_map, qc_nested_offset: array<f32>.

fn qc_scale(at: u32) -> f32 {
  let block = at >> 3u;
  let code = (qc_absmax[block >> 2u] >> (8u * (block & 3u))) & 255u;
  let product = qc_nested_quant_map[code] * qc_nested_absmax[block >> 8u];
  // nothing is changed (at is below 2^31), and no compiler knows: fused with the addition, the product would not be rounded
  return bitcast<f32>(bitcast<u32>(product) ^ (at >> 31u)) + qc_nested_offset[0];
}

