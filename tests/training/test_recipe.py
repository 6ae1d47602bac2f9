"""A recipe is refused before any work, with the option's name."""

import pytest

from normrewrite import NormRewriteError
from normrewrite.training.recipe import Recipe, recipe

BAD = {
    "precision": ({"precision": "fp8"}, "--precision fp8: one of fp32, bf16, fp16, fp16-pure"),
    "schedule": ({"schedule": "step"}, "--schedule step: one of cosine"),
    "epochs": ({"epochs": 0}, "--epochs 0: a number above zero"),
    "lr": ({"lr": float("nan")}, "--lr nan"),
    "batch size": ({"batch_size": -1}, "--batch-size -1"),
    "ema": ({"ema": 1.0}, "--ema 1.0: a number from 0 up to"),
    "distill": ({"labels": True, "distill": 1.5}, "--distill 1.5: a number from 0 to 1"),
    "distill alone": ({"distill": 0.5}, "add --labels"),
    "both": ({"epochs": 1, "steps": 1}, "give one of the two"),
    "weight decay as": ({"weight_decay_as": "lr", "weight_decay": 0.1}, "got --optimizer adamw --weight-decay 0.1"),
    "no weight decay": ({"weight_decay_as": "lr", "optimizer": "sgd"}, "--weight-decay 0. Give --optimizer sgd"),
    "unknown": ({"learning_rate": 1}, "there is no option 'learning_rate'"),
    "accumulator": ({"precision": "fp16-pure", "accumulator": "half:x"}, "accumulator 'half:x': write fp32, half"),
    "accumulator alone": (
        {"precision": "fp16", "accumulator": "half"},
        "--accumulator half: .*Add --precision fp16-pure",
    ),
    "near": ({"epoch": 1}, "Did you mean 'epochs'"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(NormRewriteError, match=message):
        recipe(options)


def test_the_length_is_steps_or_epochs() -> None:
    assert Recipe(steps=7).total(100) == 7 and Recipe(epochs=2).total(100) == 200 and Recipe().total(10) == 60
