// NF4: a block of 64 weights to eight words of codes, the first of a byte in its high nibble, and its largest magnitude.
// A code is the number of middles below the weight times the reciprocal: a product that every device rounds correctly.

fn qc_encode(number: u32, lane: u32) {
  let block = number * 64u + lane;
  if (block * 64u >= qc_weights()) { return; }
  var largest = 0u;
  for (var i = 0u; i < 64u; i += 1u) { largest = max(largest, qc_magnitude(qc_bits(block * 64u + i))); }
  if (!qc_safe(largest)) {
    qc_give_up();
    return;
  }
  var inverse = 0.0;
  if (largest != 0u) { inverse = qc_reciprocal(largest); }
  for (var word = 0u; word < 8u; word += 1u) {
    var packed = 0u;
    for (var i = 0u; i < 8u; i += 1u) {
      let scaled = bitcast<f32>(qc_bits(block * 64u + word * 8u + i)) * inverse;
      packed |= qc_middles_below(scaled) << (8u * (i >> 1u) + 4u * (1u - (i & 1u)));
    }
    qc_codes[qc_codes_base() + block * 8u + word] = packed;
  }
  qc_absmax[qc_absmax_base() + block] = largest;
}
