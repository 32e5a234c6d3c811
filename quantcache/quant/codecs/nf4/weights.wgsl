// NF4: eight weights are a word, the first of a byte in its high nibble; qc_scale() is what unit `at` of 8 weights is multiplied with.
// qc_codes: array<vec2<u32>>. The table lies in workgroup memory: sixteen words in sixteen banks.

const QC_TABLE = array<f32, 16>(
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
  -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
  0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
  0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0);
var<workgroup> qc_table: array<f32, 16>;

fn qc_init(local_index: u32) {
  if (local_index < 16u) {
    var table = QC_TABLE;
    qc_table[local_index] = table[local_index];
  }
}

fn qc_low(word: u32) -> vec4<f32> {
  return vec4<f32>(qc_table[(word >> 4u) & 15u], qc_table[word & 15u], qc_table[(word >> 12u) & 15u], qc_table[(word >> 8u) & 15u]);
}

fn qc_unit(row: u32, unit: u32, width: u32) -> array<vec4<f32>, 2> {
  let at = row * (width / 8u) + unit;
  let codes = qc_codes[at >> 1u][at & 1u];
  let scale = qc_scale(at);
  return array<vec4<f32>, 2>(qc_low(codes) * scale, qc_low(codes >> 16u) * scale);
}

// two units, the first one even
fn qc_dots(row: u32, unit: u32, width: u32, a: vec4<f32>, b: vec4<f32>, c: vec4<f32>, d: vec4<f32>) -> f32 {
  let at = row * (width / 8u) + unit;
  let codes = qc_codes[at >> 1u];
  let low = dot(qc_low(codes.x), a) + dot(qc_low(codes.x >> 16u), b);
  return qc_scale(at) * (low + dot(qc_low(codes.y), c) + dot(qc_low(codes.y >> 16u), d));
}
