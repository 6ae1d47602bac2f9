"""normrewrite: batch normalisation rewritten to L1, L-infinity and Top-k norms, with the same function.

>>> import normrewrite as nr
>>> twin = nr.convert(model, to="l1")
"""

from normrewrite import nn, norms, passes, weight_decay
from normrewrite._version import __version__
from normrewrite.advise import Advice, advise
from normrewrite.arithmetic import half_arithmetic
from normrewrite.bake import bake, bake_
from normrewrite.calibrate import calibrate, calibrate_
from normrewrite.convert import Plan, convert, convert_, plan
from normrewrite.errors import NormRewriteError
from normrewrite.export import export
from normrewrite.files import load, save
from normrewrite.finetune import finetune, finetune_
from normrewrite.initialise import initialise_
from normrewrite.invariance import param_groups, scale_invariant
from normrewrite.lower.kernels import kernels
from normrewrite.ranges import LearnedRanges
from normrewrite.report import Report
from normrewrite.revert import revert, revert_
from normrewrite.training.int8 import int8
from normrewrite.verify import verify

__all__ = [
    "Advice",
    "LearnedRanges",
    "NormRewriteError",
    "Plan",
    "Report",
    "__version__",
    "advise",
    "bake",
    "bake_",
    "calibrate",
    "calibrate_",
    "convert",
    "convert_",
    "export",
    "finetune",
    "finetune_",
    "half_arithmetic",
    "initialise_",
    "int8",
    "kernels",
    "load",
    "nn",
    "norms",
    "param_groups",
    "passes",
    "plan",
    "revert",
    "revert_",
    "save",
    "scale_invariant",
    "verify",
    "weight_decay",
]
