"""GPU kernels in Triton, the torch formulas that judge them, and the operators that stand before both.

Only the files named `*_kernels.py` and weight_tiles.py import Triton; nothing imports them before a CUDA tensor asks
for a kernel, so everything else works on machines without Triton.
"""
