"""The code that Triton compiles."""
