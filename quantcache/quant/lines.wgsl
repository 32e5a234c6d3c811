fn qc_word(i: u32) -> u32 { return qc_blocks[i >> 2u][i & 3u]; }
