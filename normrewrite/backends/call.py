"""What is to be computed: one norm of one tensor, as each backend is asked whether it can, and then to.

>>> call = Call(x, "l1", "exact", 1e-5)                    # x: (N, C, *), statistics by channel
>>> call = Call(x, "l1", "exact", 1e-5, sample=True)       # x: (B, G, K, S), statistics by (B, G)
>>> call.row.family, call.n
('mean', 1024)
"""

from typing import Any, NamedTuple

from torch import Tensor

from normrewrite.backends.accumulate import Accumulator
from normrewrite.norms import Gain, Metric
from normrewrite.norms import metric as row_of


class Call(NamedTuple):
    """metric: a row of the table, or how it is written. centred: False leaves the mean in. relu: relu(norm(x) + residual).

    group: the ranks whose batches are one, or None. accumulator: what half arithmetic sums by, or None. transformed: torch.func
    or forward mode is at work. int8: x may be int8, as plugins have it.
    """

    x: Tensor
    metric: Metric | str
    gain: Gain = "exact"
    eps: float = 1e-5
    sample: bool = False
    centred: bool = True
    relu: bool = False
    group: Any = None
    accumulator: Accumulator | None = None
    transformed: bool = False
    int8: bool = False

    @property
    def row(self) -> Metric:
        return row_of(self.metric) if isinstance(self.metric, str) else self.metric

    @property
    def n(self) -> int:
        """How many elements share statistics."""
        x = self.x
        return x.shape[2] * x.shape[3] if self.sample else x.numel() // x.shape[1]

    @property
    def constant(self) -> float:
        """C(n); refuses too few elements."""
        return self.row.gain(self.n, self.gain)
