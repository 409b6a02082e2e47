"""Models for other programs: GGUF files (llama.cpp) and pack-quantized checkpoints (vLLM, SGLang). docs/export.md.

source.py           the rows of a checkpoint or a store
block_types.py      formats of blocks
block_reference.py  weights into blocks, in plain NumPy
block_kernels.py    the same bytes, by kernels; blocks.py calls them
transfer.py         blocks from a store's codes
gguf.py             writing a GGUF file, of what gguf_tensors.py, gguf_fields.py and gguf_tokenizer.py say,
gguf_file.py        in this layout
checkpoint.py       writing a pack-quantized checkpoint, of what compressed_tensors.py says
report.py           what was written
"""
