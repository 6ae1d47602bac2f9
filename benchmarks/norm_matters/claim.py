"""What a claim is: what the paper says, the arms that try it, the rules that judge them, a table and a picture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.norm_matters import table
from benchmarks.norm_matters.judge import Rule
from benchmarks.norm_matters.run import Arms, Budget, ByArm

Draw = Callable[[Any, ByArm], None]  # onto a matplotlib figure


@dataclass(frozen=True)
class Claim:
    """number: in the page; name: on the command line; says, paper: the claim and the paper's figures; notes: on ours.

    arms: by budget, in order; rules: what has to hold; draw: the picture; rows: head and lines of the table.
    remarks: what was found out about a budget's results afterwards; verdicts know nothing of them.
    """

    number: int
    name: str
    says: str
    paper: str
    arms: Callable[[Budget], Arms]
    rules: tuple[Rule, ...]
    draw: Draw
    rows: Callable[[ByArm], tuple[list[str], list[list[str]]]] = table.accuracies
    notes: str = ""
    remarks: Mapping[Budget, str] = field(default_factory=dict)
