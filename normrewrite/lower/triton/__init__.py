"""Triton: one source for every row of the table, both memory formats and all scopes. lower/kernels.py says when it is used.

geometry.py   how a tensor is cut: lanes, groups, tiles          launch.py   the same from Python
fixed.py      the same into few sizes, for kernels compiled beforehand
tiles.py      what kernels share                                 ahead.py    compiled without a GPU
forward.py    statistics by part, settled, applied
backward.py   two reductions by part, three coefficients a group, dx
rows.py       rows that fit into registers: layer and RMS norms
"""
