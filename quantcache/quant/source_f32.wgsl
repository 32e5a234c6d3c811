// Weight number i of float32 source, as the bits of a float32.
fn qc_bits(i: u32) -> u32 { return qc_source[i]; }
