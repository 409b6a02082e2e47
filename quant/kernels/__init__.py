"""CPU kernels, compiled by Numba on the user's machine. quant/ops.py offers them as torch operators.

vector.py   16 lanes of decoding and multiplying, in LLVM IR
tiles.py    a few weight rows times a few tokens
linear.py   a matrix times tokens
moe.py      all routed experts of a layer
routing.py  the tokens of each expert
silu.py     between an expert's matrices
activations.py    8-bit activations for packed weights
packed_dot.py     a tile of 16 packed rows times a few tokens, in LLVM IR
packed_linear.py  a packed matrix times tokens
packed_moe.py     all routed experts of a layer, packed
encode.py   weights into packed formats
lanes.py    16 float32 values as one Numba value, for encode.py
decode.py   a packed matrix as plain float32
bandwidth.py      the machine's own limits, for dsr1 bench
jit.py      compiling
cache.py    machine code on disk
threads.py  how many threads
reference.py  the same results in plain NumPy, for tests
"""

from quant.kernels.threads import set_threads, thread_count

__all__ = ["set_threads", "thread_count"]
