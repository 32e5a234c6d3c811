// Int8: two groups of 128 weights to 64 words of codes, two scales and two biases. A code is the number of i in 1..255 with
// d > (i - 0.5) * scale, found by halving: comparisons of correctly rounded values, no division.
// QC_HALVES: whether scales and biases are float16.

// float16 of a value that rounds to a normal one, or of zero; anything else is given up
fn qc_half(value: f32) -> u32 {
  let bits = bitcast<u32>(value);
  let magnitude = qc_magnitude(bits);
  if (magnitude == 0u) { return 0u; }
  // from 2^-14 less half a unit on: what is below 2^-14 becomes 2^-14
  let half = select((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13u) & 1u)) >> 13u, 0x400u, magnitude < 0x38800000u);
  if (magnitude < 0x387fe000u || half >= 0x7c00u) { qc_give_up(); }
  return ((bits >> 16u) & 0x8000u) | half;
}

// integers in the order of the numbers that they are the bits of
fn qc_ordered(bits: u32) -> u32 { return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u); }
fn qc_unordered(key: u32) -> u32 { return select(~key, key & 0x7fffffffu, (key & 0x80000000u) != 0u); }

// scale and bias of a group, as they are stored
fn qc_group(group: u32) -> vec2<u32> {
  var low = 0xffffffffu;
  var high = 0u;
  for (var i = 0u; i < 128u; i += 1u) {
    let key = qc_ordered(qc_bits(group * 128u + i));
    low = min(low, key);
    high = max(high, key);
  }
  low = qc_unordered(low);
  high = qc_unordered(high);
  let largest = max(qc_magnitude(low), qc_magnitude(high));
  let smallest = min(qc_magnitude(low), qc_magnitude(high));
  if (qc_magnitude(low) == 0u) { low = 0u; }  // of -0 and 0 either may be it
  if (qc_magnitude(high) == 0u) { high = 0u; }
  let lo = bitcast<f32>(low);
  let spread = bitcast<f32>(high) - lo;
  let scale = spread * QC_255TH;
  if (!qc_safe(largest) || (smallest != 0u && smallest < 0x800000u)) { qc_give_up(); }
  if (QC_HALVES) {
    let stored = vec2<u32>(qc_half(scale), qc_half(lo));
    qc_code(group, bitcast<f32>(qc_wide(stored.x)), bitcast<f32>(qc_wide(stored.y)));
    return stored;
  }
  if (largest != 0u && high != low && qc_magnitude(bitcast<u32>(spread)) < QC_TINY) { qc_give_up(); }
  qc_code(group, scale, lo);
  return vec2<u32>(bitcast<u32>(scale), low);
}

fn qc_code(group: u32, scale: f32, bias: f32) {
  for (var word = 0u; word < 32u; word += 1u) {
    var packed = 0u;
    for (var i = 0u; i < 4u; i += 1u) {
      let d = bitcast<f32>(qc_bits(group * 128u + word * 4u + i)) - bias;
      var code = 0u;
      for (var step = 128u; step > 0u; step >>= 1u) {
        if (d > (f32(code + step) - 0.5) * scale) { code += step; }
      }
      packed |= select(code, 0u, scale == 0.0) << (8u * i);
    }
    qc_codes[qc_codes_base() + group * 32u + word] = packed;
  }
}

fn qc_encode(number: u32, lane: u32) {
  let pair = number * 64u + lane;
  let group = pair * 2u;
  if (group * 128u >= qc_weights()) { return; }
  let first = qc_group(group);
  var second = vec2<u32>(0u);
  if ((group + 1u) * 128u < qc_weights()) { second = qc_group(group + 1u); }
  if (QC_HALVES) {
    qc_scales[qc_scales_base() + pair] = first.x | (second.x << 16u);
    qc_biases[qc_biases_base() + pair] = first.y | (second.y << 16u);
    return;
  }
  qc_scales[qc_scales_base() + group] = first.x;
  qc_biases[qc_biases_base() + group] = first.y;
  if ((group + 1u) * 128u < qc_weights()) {
    qc_scales[qc_scales_base() + group + 1u] = second.x;
    qc_biases[qc_biases_base() + group + 1u] = second.y;
  }
}
