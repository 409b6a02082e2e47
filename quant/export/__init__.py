"""Models for other programs: GGUF files (llama.cpp) and pack-quantized checkpoints. docs/export.md.

source.py           what is exported: a checkpoint, or a store whose rows are read as those of one
block_types.py      formats of blocks
block_reference.py  weights into blocks, in plain NumPy
block_kernels.py    the same bytes, by kernels; blocks.py calls them
transfer.py         blocks from a store's codes
targets.py          which piece of which tensor goes where
encoder.py          what a piece becomes
gguf.py             a GGUF file, of what gguf_tensors.py, gguf_fields.py and gguf_tokenizer.py say,
gguf_file.py        in this layout
checkpoint.py       a pack-quantized checkpoint, of what compressed_tensors.py says
report.py           what an export is, for its journal, and what was written
"""
