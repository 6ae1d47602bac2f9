"""TensorRT plugins for norms whose statistics live at inference: one spec an operator, and what is made from it.

spec.py       what a node takes, its attributes and their ranges, its reference
compute.py    the project's Triton kernels on memory of TensorRT's
v3.py         IPluginV3 in Python, for TensorRT and TensorRT-RTX
ahead.py      one kernel in PTX; quick.py   plugins made of it that live inside an engine, for full TensorRT
cpp/          IPluginV3 in C++, a library to be built by CMake; embedded.py   the kernels it holds; built.py   where it is
registry.py   registered once, on request
placed.py     which norm of a file a plugin takes, and which its function body
"""

from normrewrite.plugins.registry import KINDS, check_library, register
from normrewrite.plugins.spec import OPS, Attribute, Op

__all__ = ["KINDS", "OPS", "Attribute", "Op", "check_library", "register"]
