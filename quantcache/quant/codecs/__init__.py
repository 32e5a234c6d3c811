"""One folder a codec, or a family of them: __init__.py, reference.py, kernel.c, README.md."""
