"""Losses against what they are by definition, features by site, and functions of the user's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normrewrite import NormRewriteError
from normrewrite.data import Batch
from normrewrite.training.losses import DISTANCES, Objective
from normrewrite.training.recipe import Recipe

X, LABELS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1, 2])


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).eval()


def _loss(recipe: Recipe, labels: Tensor | None = LABELS) -> tuple[float, Tensor, Tensor]:
    torch.manual_seed(0)
    model, teacher = _net(), _net()
    outcome = Objective(recipe, model, teacher)(model, Batch({"input": X}, labels))
    return float(outcome.loss.detach()), model(X).detach(), teacher(X).detach()


def test_distances_are_what_their_names_say() -> None:
    for name in DISTANCES:
        found, mine, goal = _loss(Recipe(loss=name))
        p, log_q = goal.double().softmax(1), mine.double().softmax(1).log()
        expected = {
            "mse": ((mine - goal) ** 2).mean(),
            "kl": (p * (p.log() - log_q)).sum(1).mean(),
            "cross-entropy": -(p * log_q).sum(1).mean(),
        }[name]
        assert found == pytest.approx(float(expected), rel=1e-5) and found != pytest.approx(
            1.01 * float(expected), rel=1e-5
        )


def test_labels_alone_and_beside_the_teacher() -> None:
    found, mine, goal = _loss(Recipe(labels=True))
    own = float(F.cross_entropy(mine, LABELS))
    assert found == pytest.approx(own, rel=1e-6)
    both, _, _ = _loss(Recipe(labels=True, distill=0.25))
    assert both == pytest.approx(0.75 * own + 0.25 * float(F.mse_loss(mine, goal)), rel=1e-6)


def test_features_count_in_units_of_the_teachers_variance() -> None:
    torch.manual_seed(0)
    model, teacher = _net(), _net()
    plain, _, _ = _loss(Recipe())
    found, _, _ = _loss(Recipe(features=("0", "1"), feature_weight=2.0))
    hidden, goal = model[0](X).detach(), teacher[0](X).detach()  # before the ReLU that works in place
    errors = [F.mse_loss(f(hidden), f(goal)) / f(goal).var() for f in (lambda x: x, F.relu)]
    assert found == pytest.approx(plain + 2 * float(sum(errors)) / 2, rel=1e-5)


def test_features_that_the_teacher_has_otherwise_are_refused() -> None:
    model, teacher = _net(), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(NormRewriteError, match=r"--features: outputs \[\(6, 5\)\], the teacher's \[\(6, 6\)\]"):
        Objective(Recipe(features=("0",)), model, teacher)(model, Batch({"input": X}))


def test_right_is_told_by_labels_or_by_the_teacher() -> None:
    model = _net()
    batch = Batch({"input": X}, model(X).argmax(1))
    assert Objective(Recipe(labels=True), model, None)(model, batch).right == 6
    assert Objective(Recipe(), model, model)(model, Batch({"input": X})).right == 6


def test_a_function_of_the_users_is_the_whole_loss(tmp_path: Path) -> None:
    code = tmp_path / "mine.py"
    code.write_text(
        "def l1(outputs, teacher, labels): return (outputs - teacher).abs().mean() + labels.float().mean()\n"
        "def table(outputs, teacher, labels): return outputs\n"
        "def fails(outputs, teacher, labels): raise KeyError('gone')\n"
    )
    found, mine, goal = _loss(Recipe(loss=f"{code}:l1"))
    assert found == pytest.approx(float((mine - goal).abs().mean()) + 1, rel=1e-6)
    for name, message in {"table": r"gave shape \(6, 3\); one number", "fails": "raised KeyError: 'gone'"}.items():
        with pytest.raises(NormRewriteError, match=message):
            _loss(Recipe(loss=f"{code}:{name}"))


BAD = {
    "no such loss": (Recipe(loss="msee"), "there is no such loss. Did you mean 'mse'"),
    "no such function": (Recipe(loss="nosuch:loss"), "--loss nosuch:loss: can't import nosuch"),
    "no such feature": (Recipe(features=("layer*",)), r"--features layer\*: matches no module"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_there_is_not_is_told(case: str) -> None:
    recipe, message = BAD[case]
    with pytest.raises(NormRewriteError, match=message):
        _loss(recipe)


def test_a_teacher_of_other_classes_is_refused() -> None:
    model = _net()
    with pytest.raises(NormRewriteError, match=r"\(6, 3\).* can't be compared to the teacher's .*\(6, 2\)"):
        Objective(Recipe(), model, nn.Linear(4, 2))(model, Batch({"input": X}))
