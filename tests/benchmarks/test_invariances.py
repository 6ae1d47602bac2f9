"""Every target × every property: what the registry declares is what is measured, the yes and the no."""

from typing import Any

import pytest
import torch

from benchmarks.invariances import PAGE, SPELT, holds, page
from normrewrite.nn import BatchRenorm
from normrewrite.targets import PROPERTIES, TARGETS

every_property = pytest.mark.parametrize("what", PROPERTIES)


@every_property
@pytest.mark.parametrize("name", TARGETS)
def test_declared_is_measured(name: str, what: str) -> None:
    assert holds(SPELT.get(name, name), what) == (what in TARGETS[name].invariant)


@every_property
@pytest.mark.parametrize("name", [name for name in TARGETS if name not in ("instance", "layer", "group")])
def test_vectors_as_maps(name: str, what: str) -> None:
    assert holds(SPELT.get(name, name), what, "vectors") == (what in TARGETS[name].invariant)


@every_property
@pytest.mark.parametrize("name", ["layer", "group"])
def test_on_vectors_a_shifted_weight_matrix_leaves_layer_and_group_norm(name: str, what: str) -> None:
    """Table 1 of the paper, where all units of a layer share one statistic."""
    expected = TARGETS[name].invariant | {"weight matrix shifted"}
    assert holds(SPELT.get(name, name), what, "vectors") == (what in expected)


@every_property
def test_renorm_with_its_limits_closed_is_batch_norm(what: str) -> None:
    def closed(twin: Any) -> None:
        for module in twin.modules():
            if isinstance(module, BatchRenorm):
                module.r_max, module.d_max = 1.0, 0.0

    assert holds("renorm", what, prepare=closed) == (what in TARGETS["l2"].invariant)


@every_property
@pytest.mark.parametrize("form", ["wn:mean-bn", "bwn:mean-bn", "bwn:strict", "wn:l1"])
def test_forms_of_weight_norm(form: str, what: str) -> None:
    row = TARGETS[form.partition(":")[0]].invariant
    assert holds(form, what) == (what in (row | {"data set shifted"} if "mean" in form else row))


def test_a_hundredth_is_no_invariance() -> None:
    """The measure can say no to a small change: a norm that keeps a hundredth of the mean."""

    def leaky(twin: Any) -> None:
        twin[1].register_forward_hook(lambda _, args, output: output + 0.01 * args[0].mean((0, 2, 3), keepdim=True))

    assert holds("l1", "data set shifted") and not holds("l1", "data set shifted", prepare=leaky)


def test_the_page_is_what_the_registry_gives() -> None:
    assert PAGE.read_text() == page(), "run python -m benchmarks.invariances"
    assert torch.get_default_dtype() is torch.float32
