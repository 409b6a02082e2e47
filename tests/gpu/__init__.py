"""Tests that need an NVIDIA GPU: `pytest tests/gpu`."""
