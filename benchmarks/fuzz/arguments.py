"""Command lines of likely and unlikely values, for any command with any of its options."""

from pathlib import Path
from random import Random
from typing import Any

import click

from benchmarks.fuzz.inputs import ARCH
from benchmarks.fuzz.material import DATA, MODELS

TARGETS = (
    "l1",
    "linf",
    "topk",
    "topk:",
    "topk:0",
    "topk:10",
    "topk:1%",
    "topk:101%",
    "topk:1e99",
    f"topk:{'9' * 5000}",
    f"group:{'9' * 5000}",
    "group:3",
    "bwn:strict:l1",
)
RULES = ("layer", "none", "L1", "l-1", "*", "**", "1", "1=l1", "re:(", "re:.*=l1", "=", "a=b=c", f"re:{'(a+)+' * 9}$")
LONG = ("", " ", "x" * 4000, "é", "\u202e", "../..", "/", "-1", "0", "nan", "auto", "off", "batch,layer", "all")
SHAPES = (
    "1,3,8,8",
    "2,3,8,8",
    "0,3,8,8",
    "2,3",
    "2,3,-1,8",
    "2,3,8,8;2,3",
    "x=2,3,8,8",
    "1e3",
    "cuda",
    "cuda:99",
    "meta",
    "mps",
)
CODES = (
    "models.py:small",
    "models.py:nothing",
    "models.py",
    "nothing.py:f",
    "json:loads",
    "width=3",
    "width=x",
    "width",
    "timm:",
)
TEXTS = (*TARGETS, *RULES, *LONG, *SHAPES, *CODES)
PATHS = (
    *MODELS,
    *DATA,
    "twin.json",
    "model.onnx",
    "models.py",
    "nothing.pt",
    "",
    ".",
    "/",
    "/dev/null",
    "out.pt",
    "out.html",
    "nowhere/out.pt",
    "x" * 300,
)
NUMBERS = ("-1", "0", "1", "2", "3", "x", "", "1e9", "nan", "0.5", "99999999999999999999", "9" * 5000, "1e999")
_NOT_ASKED = {"trust", "help"}  # trust runs code, as it says


def arguments(random: Random, folder: Path) -> list[str]:
    """Any command with any of its options, values from lists of likely and unlikely ones."""
    from normrewrite.cli import app

    name = random.choices(
        list(app.commands), [1 if each in ("build", "finetune", "bench") else 8 for each in app.commands]
    )[0]
    command = app.commands[name]
    words = [name]
    if isinstance(command, click.Group):
        return [name, *random.choice((["list"], [], ["--json"], ["list", "--json"], ["x"]))]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            words.append(random.choice(MODELS) if random.random() < 0.7 else random.choice(PATHS))
        elif parameter.name not in _NOT_ASKED and random.random() < 0.15:
            words += _option(random, parameter)
    if name in ("finetune", "bench"):
        words += ["--steps", "1", "--epochs", "1"] if name == "finetune" else ["--rounds", "1"]
    return words + ARCH if random.random() < 0.6 and name not in ("build", "diff") else words


def _option(random: Random, parameter: Any) -> list[str]:
    flag, kind = random.choice([*parameter.opts, *parameter.secondary_opts]), parameter.type
    if parameter.is_flag:
        return [flag]
    if isinstance(kind, click.Path):
        return [flag, random.choice(PATHS)]
    if isinstance(kind, click.Choice) and random.random() < 0.8:
        return [flag, str(random.choice(list(kind.choices)))]
    numeric = isinstance(kind, click.types.IntParamType | click.types.FloatParamType)
    return [flag, random.choice(NUMBERS if numeric else (*TEXTS, *PATHS))]
