// Weight number i of float16 source, as the bits of a float32.
fn qc_bits(i: u32) -> u32 { return qc_wide((qc_source[i >> 1u] >> (16u * (i & 1u))) & 0xffffu); }
