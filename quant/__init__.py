"""Tensor formats, reading checkpoints, the inventory of a model's tensors, and CPU kernels.

The lowest layer: it knows weights and shapes, and nothing of the model that runs them.
"""
