"""Codecs and their kernels: numbers in, stored parts out, and back. Knows no file and no store."""
