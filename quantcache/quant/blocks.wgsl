// What the shaders of GGML's blocks share. A block starts at any even byte. qc_word(), word number i of the blocks, stands in
// words.wgsl (qc_blocks: array<u32>) and lines.wgsl (array<vec4<u32>>, of types whose blocks are whole sixteens).

fn qc_init(local_index: u32) {}

// eight bytes from an even byte on
fn qc_words(byte: u32) -> vec2<u32> {
  let at = byte >> 2u;
  let low = qc_word(at);
  let middle = qc_word(at + 1u);
  if ((byte & 2u) == 0u) { return vec2<u32>(low, middle); }
  return vec2<u32>((low >> 16u) | (middle << 16u), (middle >> 16u) | (qc_word(at + 2u) << 16u));
}

// a float16 in the lower half of a word; without a branch, so that what comes after it can be loaded meanwhile. Devices may
// flush subnormal ones: they become the end of a significand instead, unless QC_KEEPS_SUBNORMALS says that this one does not.
fn qc_half(word: u32) -> f32 {
  let least = bitcast<f32>(((word & 0x3ffu) << 13u) | 0x38800000u) - 6.103515625e-5;
  let small = bitcast<f32>(bitcast<u32>(least) | ((word & 0x8000u) << 16u));
  return select(small, unpack2x16float(word).x, QC_KEEPS_SUBNORMALS || (word & 0x7c00u) != 0u);
}

// a float16 at an even byte
fn qc_half_at(byte: u32) -> f32 { return qc_half(qc_word(byte >> 2u) >> (8u * (byte & 2u))); }
