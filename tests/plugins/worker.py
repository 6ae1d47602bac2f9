"""Kernels of plugins compiled ahead of time, and what ptxas says of them, as JSON; in a process that interprets none.

python -m tests.plugins.worker METRIC:CAPABILITY ...
"""

import json
import re
import sys
from typing import Any

from normrewrite.backends import onnx as nodes
from normrewrite.norms import metric
from normrewrite.plugins import OPS, ahead
from tests.ptxas import assembled


def told_of(spec: str, capability: int) -> dict[str, Any]:
    op = OPS[nodes.operator(metric(spec))]
    given = op.parse(nodes.attributes(metric(spec), 1024, eps=1e-5))
    kernel = ahead.kernel(op, given, (64, 1, 1024, 1), "float16", capability)
    done = assembled(kernel.ptx, capability)
    rc, report = done.returncode, done.stderr
    spoilt = assembled(
        kernel.ptx.replace("row_once_param_4", "row_once_param_5", 1), capability
    ).returncode  # it can refuse
    entry = kernel.ptx[kernel.ptx.index(".entry") :]
    return {
        "rc": rc,
        "report": report,
        "rc of a spoilt one": spoilt,
        "parameters": len(re.findall(r"\.param", entry[: entry.index(")")])),
        "head": kernel.ptx[:200],
    }


if __name__ == "__main__":
    asked = [argument.rpartition(":") for argument in sys.argv[1:]]
    json.dump([told_of(spec, int(capability)) for spec, _, capability in asked], sys.stdout)
