"""How fast one layer of routed experts is, beside what the machine can do: docs/performance.md.

weights.py  a layer's records, random
draw.py     which experts a token asks for
layer.py    layers of random experts, run as they are served
limits.py   the machine's read bandwidth and its peak in multiplying bytes
measure.py  runs that alternate, their medians and quartiles
report.py   all figures of a shape
plot.py     the same as a roofline
"""
