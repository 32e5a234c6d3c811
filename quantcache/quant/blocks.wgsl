// What the shaders of GGML's blocks share. qc_blocks: array<u32>; a block starts at any even byte.

fn qc_init(local_index: u32) {}

// eight bytes from an even byte on
fn qc_words(byte: u32) -> vec2<u32> {
  let at = byte >> 2u;
  let low = qc_blocks[at];
  let middle = qc_blocks[at + 1u];
  if ((byte & 2u) == 0u) { return vec2<u32>(low, middle); }
  return vec2<u32>((low >> 16u) | (middle << 16u), (middle >> 16u) | (qc_blocks[at + 2u] << 16u));
}

// a float16 at an even byte
fn qc_half_at(byte: u32) -> f32 {
  return bitcast<f32>(qc_wide((qc_blocks[byte >> 2u] >> (8u * (byte & 2u))) & 0xffffu));
}

fn qc_bytes(word: u32) -> vec4<u32> {
  return vec4<u32>(word & 255u, (word >> 8u) & 255u, (word >> 16u) & 255u, word >> 24u);
}

fn qc_low_nibbles(word: u32) -> vec4<u32> { return qc_bytes(word & 0x0f0f0f0fu); }
