// What the shaders that quantize share. They say 1 in qc_status where they do not know the answer for sure: values that are
// not finite, or that a device may flush to zero on the way. Such a step is quantized on the CPU.

const QC_TINY = 0x0d800000u;  // 2^-100
const QC_HUGE = 0x7b800000u;  // 2^120

fn qc_give_up() { qc_status[0] = 1u; }

fn qc_magnitude(bits: u32) -> u32 { return bits & 0x7fffffffu; }

// Whether results with this largest magnitude stay normal numbers: it is zero, or neither tiny nor huge, Inf nor NaN.
fn qc_safe(largest: u32) -> bool { return largest == 0u || (largest >= QC_TINY && largest <= QC_HUGE); }

// The correctly rounded reciprocal of a normal number 2^-100 <= a <= 2^120, which a device's own division is not: with
// m the significand as an integer, the nearest integer to 2^47 / m, found from an estimate and its remainder modulo 2^32.
fn qc_reciprocal(a: u32) -> f32 {
  let m = (a & 0x7fffffu) | 0x800000u;
  var q = u32(140737488355328.0 / f32(m));
  var r = bitcast<i32>(0u - q * m);
  let n = bitcast<i32>(m);
  for (var k = 0; k < 16 && 2 * r > n; k += 1) { q += 1u; r -= n; }
  for (var k = 0; k < 16 && 2 * r < -n; k += 1) { q -= 1u; r += n; }
  return bitcast<f32>(((253u - (a >> 23u)) << 23u) + (q - 0x800000u));
}
