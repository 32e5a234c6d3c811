"""Readers, recipes, the pipeline and the Model: from a checkpoint's path to tensors."""
