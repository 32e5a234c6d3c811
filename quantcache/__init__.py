"""Quantize a model once, load it at the speed of the machine ever after."""
