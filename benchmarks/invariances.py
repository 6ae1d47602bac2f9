"""What training with each target is invariant to, measured, and the page that says so.

    python -m benchmarks.invariances          # a second; writes docs/invariances.md from the registry

One layer without bias and the norm behind it, in training mode, float64, with weights and statistics that no two channels share.
Weights or inputs are changed as the property says; the target is invariant to it if no output moves.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normrewrite as nr
from benchmarks.stamp import markdown
from normrewrite.nn.weights import weight_norm_of
from normrewrite.targets import PROPERTIES, TARGETS

PAGE = Path(__file__).parent.parent / "docs" / "invariances.md"
SPELT = {"group": "group:2", "topk": "topk:3"}  # of the eight channels and few values here; others by their names
_SHAPES = {"maps": (6, 3, 5, 5), "vectors": (12, 3)}
_EPS = 1e-12  # which no invariance includes


def pair(form: str, kind: str) -> tuple[Any, nn.Module]:
    """A layer and the norm behind it in a form, in training. kind: `maps`, a convolution; `vectors`, a linear layer."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3, bias=False) if kind == "maps" else nn.Linear(3, 8, bias=False)
    norm: Any = (nn.BatchNorm2d if kind == "maps" else nn.BatchNorm1d)(8, eps=_EPS)
    model = nn.Sequential(layer, norm).double()
    with torch.no_grad():
        for tensor in (norm.weight, norm.running_var):
            tensor.uniform_(0.5, 2)
        for tensor in (norm.bias, norm.running_mean):
            tensor.uniform_(-1, 1)
    model = nr.convert(model, "l1") if form == "l2" else model
    twin = nr.convert(model, form, offset=0, example_inputs=[inputs(kind)])
    return twin.get_submodule("0"), twin


def inputs(kind: str) -> Tensor:
    return torch.randn(_SHAPES[kind], generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3


@torch.no_grad()
def holds(form: str, what: str, kind: str = "maps", prepare: Any = lambda twin: None) -> bool:
    """Whether the outputs stay. prepare: may set up the twin first."""
    outputs = []
    for changed in (False, True):
        layer, twin = pair(form, kind)
        prepare(twin)
        x = inputs(kind)
        if changed:
            _change(what, layer, x)
        outputs.append(twin(x))
    before, after = outputs
    return bool(((after - before).abs() < 1e-8).all())


def _change(what: str, layer: Any, x: Tensor) -> None:
    """In place. Of a weight norm, the weights are the directions v: its own parameters."""
    weight = layer.weight if weight_norm_of(layer) is None else layer.parametrizations.weight.original0
    generator = torch.Generator().manual_seed(2)
    if what == "weight matrix scaled":
        weight.mul_(1.7)
    elif what == "weight vector scaled":
        weight[2].mul_(1.7)
    elif what == "weight matrix shifted":
        weight.add_(torch.randn(weight.shape[1:], generator=generator, dtype=weight.dtype))
    elif what == "data set scaled":
        x.mul_(1.7)
    elif what == "data set shifted":
        x.add_(torch.randn(3, generator=generator, dtype=x.dtype).view(1, 3, *(1,) * (x.dim() - 2)))
    elif what == "one input scaled":
        x[1].mul_(1.7)
    else:
        raise KeyError(what)


def page() -> str:
    """docs/invariances.md, from the registry."""
    rows = [
        [f"`{name}`", *("yes" if what in target.invariant else "" for what in PROPERTIES)]
        for name, target in TARGETS.items()
    ]
    meanings = "\n".join(f"- **{name}**: {meaning}" for name, meaning in PROPERTIES.items())
    return _PAGE.format(table=markdown(["target", *PROPERTIES], rows), meanings=meanings)


_PAGE = """# What training is invariant to

After Ba, Kiros and Hinton 2016 (arXiv:1607.06450, table 1): does the output of a norm stay, in training, when the weights of the
layer in front or its inputs change so? Where it does, the size of those weights only sets the size of their steps.

{table}

{meanings}

Each yes and each empty cell is measured by `tests/benchmarks/test_invariances.py`: a layer without bias, the norm
alone, float64, maps.

- The table of the paper is for vectors. There (one position) `layer` and `group` are also invariant to a shifted weight matrix;
  on feature maps the shift differs from position to position, and no statistic takes it out.
- `renorm` follows the running statistics as far as its limits let it, so nothing is taken out of one batch; with the
  limits closed (r 1, d 0), as its schedule begins, it is batch norm, and so are its invariances.
- `bwn` and `wn`: the weights are the directions v. With `mean-bn` the mean of a batch is taken out as well, and training
  is invariant to a shifted data set.
- `group`, `layer` and `rms` are the norms alone, as `--offset 0` gives them; behind an offset none of it holds, as the
  offset doesn't scale with the input.
- `frozen` and `none` are affines of what comes in.

Written by `python -m benchmarks.invariances`.
"""


def main() -> None:
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
