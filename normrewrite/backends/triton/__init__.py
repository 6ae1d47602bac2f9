"""Triton: one source for every row of the table, both memory formats and all scopes. backends/dispatch.py says when it is used.

geometry.py   how a tensor is cut: lanes, groups, tiles
fixed.py      the same into few sizes, for kernels compiled beforehand
tiles.py      what kernels share
forward.py    statistics by part, settled, applied
backward.py   two reductions by part, three coefficients a group, dx
resident.py   rows that fit into registers: layer and RMS norms
launch.py     a norm forward and backward from Python, by these kernels
ahead.py      the kernels compiled without a GPU
"""
