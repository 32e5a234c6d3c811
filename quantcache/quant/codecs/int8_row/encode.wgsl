// Row-wise Int8: a workgroup codes a row of QC_WIDTH weights, a multiple of four, and finds its largest magnitude.
// A weight is rounded to float16 first; its code is that times (the reciprocal, times 127), to the nearest, half to even.

var<workgroup> qc_largest: array<u32, 256>;

// float16 of a float32, to nearest even, as the bits of a float32 again; what is beyond float16 becomes Inf
fn qc_rounded(bits: u32) -> u32 {
  let magnitude = qc_magnitude(bits);
  var wide = (magnitude + 0xfffu + ((magnitude >> 13u) & 1u)) & 0xffffe000u;
  if (magnitude < 0x38800000u) {  // in units of 2^-24
    let shift = 126u - (magnitude >> 23u);
    let m = (magnitude & 0x7fffffu) | 0x800000u;
    var units = 0u;
    if (shift <= 24u) { units = (m + (1u << (shift - 1u)) - 1u + ((m >> shift) & 1u)) >> shift; }
    wide = bitcast<u32>(f32(units) * 5.9604644775390625e-8);
  }
  if (wide >= 0x47800000u) { wide = 0x7f800000u; }
  return (bits & 0x80000000u) | wide;
}

fn qc_encode(number: u32, lane: u32) {
  let row = number;
  let words = QC_WIDTH / 4u;
  var largest = 0u;
  if (row * QC_WIDTH < qc_weights()) {
    for (var i = lane; i < QC_WIDTH; i += 256u) { largest = max(largest, qc_magnitude(qc_rounded(qc_bits(row * QC_WIDTH + i)))); }
  }
  qc_largest[lane] = largest;
  workgroupBarrier();
  for (var step = 128u; step > 0u; step >>= 1u) {
    if (lane < step) { qc_largest[lane] = max(qc_largest[lane], qc_largest[lane + step]); }
    workgroupBarrier();
  }
  largest = qc_largest[0];
  if (row * QC_WIDTH >= qc_weights()) { return; }
  if (largest >= 0x7f800000u) {
    qc_give_up();
    return;
  }
  var factor = 0.0;
  if (largest != 0u) { factor = qc_reciprocal(largest) * 127.0; }
  for (var word = lane; word < words; word += 256u) {
    var packed = 0u;
    for (var i = 0u; i < 4u; i += 1u) {
      let code = i32(round(bitcast<f32>(qc_rounded(qc_bits(row * QC_WIDTH + word * 4u + i))) * factor));
      packed |= (bitcast<u32>(code) & 255u) << (8u * i);
    }
    qc_codes[qc_codes_base() + row * words + word] = packed;
  }
  if (lane == 0u) { qc_scales[qc_scales_base() + row] = largest; }
}
