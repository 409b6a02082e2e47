"""dsr1 beside llama.cpp and kt-kernel, the same work in one run: docs/benchmarks.md.

environments.py  a virtual environment for each peer
protocol.py      a worker's side of its pipe: commands in, results out
workers.py       the driver's side: one worker runs while the others stand still
rounds.py        how long and how often is measured, and what else ran meanwhile
tables.py        Markdown, and what machine it was
layer.py         one MoE layer of R1's shape beside kt-kernel; workers: ours_layer.py, kt_layer.py
model.py         a whole model beside llama.cpp; workers: ours_model.py, llama_model.py
random_store.py  a model of a known shape with random weights, as a store
random_gguf.py   the same as GGUF; gguf_layout.py has its tensors
bandwidth.py     the read bandwidth beside what stress-ng and mbw find
"""
