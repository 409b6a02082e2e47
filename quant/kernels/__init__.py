"""CPU kernels, compiled by Numba on the user's machine. quant/ops.py offers them as torch operators.

vector.py   16 lanes of decoding and multiplying, in LLVM IR
tiles.py    a few weight rows times a few tokens
linear.py   a matrix times tokens
moe.py      all routed experts of a layer
routing.py  the tokens of each expert
silu.py     between an expert's matrices
activations.py    8-bit activations for packed weights
packed_dot.py     tiles of 16 packed rows times a few tokens, in LLVM IR
packed_tiles.py   the same times many tokens, with AMX
tile_unit.py      AMX's unit on and off
packed_rows.py    which of the two
packed_linear.py  a packed matrix times tokens
packed_moe.py     all routed experts of a layer, packed
plain.py    activations as the model keeps them, float32 or bfloat16
norm.py, rope.py, router.py   what their names say
absorbed.py       attention of few queries to a cache of latents
decompressed.py   attention of many queries to a block of keys and values
online_softmax.py what both have in common
encode.py   weights into packed formats
lanes.py    16 float32 values as one Numba value, for encode.py
decode.py   a packed matrix as plain float32
bandwidth.py      the machine's own limits, for dsr1 bench
jit.py      compiling
leaf.py     long functions that kernels call, compiled by themselves
ahead.py    compiling before kernels are wanted
cache.py    machine code on disk
threads.py  the threads that run kernels
team.py     such a thread inside a kernel: barriers, sharing out
atomics.py  atomic words and sleeping on them, in LLVM IR
reference.py  the same results in plain NumPy, for tests
"""

from quant.kernels.threads import set_threads, thread_count

__all__ = ["set_threads", "thread_count"]
