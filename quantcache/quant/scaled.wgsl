// Blocks of codes with a scale and no minimum. Each type has QC_BLOCK, the bytes of a block, QC_SHIFT, of whose power of two
// units a block is, and for unit number `flat` of the block at byte `at`: qc_scale(), qc_pair(), its codes as two words, qc_codes().

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> QC_SHIFT) * QC_BLOCK;
  let scale = qc_scale(at, flat);
  let words = qc_pair(at, flat);
  return array<vec4<f32>, 2>(qc_codes(words.x) * scale, qc_codes(words.y) * scale);
}

fn qc_dot(row: u32, unit: u32, width: u32, x: vec4<f32>, y: vec4<f32>) -> f32 {
  let flat = row * (width / 8u) + unit;
  let at = (flat >> QC_SHIFT) * QC_BLOCK;
  let words = qc_pair(at, flat);
  return qc_scale(at, flat) * (dot(qc_codes(words.x), x) + dot(qc_codes(words.y), y));
}
