"""One file a format: bounds-checked headers, and which files make up a checkpoint. Nothing else."""
