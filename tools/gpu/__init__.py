"""Compiles the GPU kernels for chips that are not there, and counts what they take."""
