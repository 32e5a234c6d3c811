// The bits of a float32 from those of a float16, with integers: subnormal ones, too, whatever the device does to them.
fn qc_wide(half: u32) -> u32 {
  let magnitude = half & 0x7fffu;
  var wide = (magnitude << 13u) + 0x38000000u;
  if (magnitude >= 0x7c00u) { wide = 0x7f800000u | ((magnitude & 0x3ffu) << 13u); }
  if (magnitude < 0x400u) { wide = bitcast<u32>(f32(magnitude) * 5.9604644775390625e-8); }
  return ((half & 0x8000u) << 16u) | wide;
}
