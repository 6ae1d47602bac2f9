"""All kinds of bad input, each with its share. A kind is a function that takes a random generator and a folder of sound files,
spoils some, and returns a command line. Everything follows from the seed.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from benchmarks.fuzz import arguments, attacks, bombs, inputs
from benchmarks.fuzz.judge import SIGNALS

Kind = Callable[[Random, Path], list[str]]
KINDS: dict[str, tuple[Kind, int]] = {
    "bytes of model files": (inputs.model_bytes, 20),
    "contents of model files": (inputs.odd_contents, 12),
    "attributes of pickled modules": (inputs.odd_module, 10),
    "hostile pickles": (attacks.hostile, 7),
    "constructors in pickles": (attacks.constructors, 4),
    "names": (attacks.names, 6),
    "bombs": (bombs.bombs, 5),
    "manifests": (inputs.manifests, 11),
    "ONNX files": (inputs.onnx_files, 5),
    "data": (inputs.data_files, 8),
    "arguments and rules": (arguments.arguments, 10),
    SIGNALS: (attacks.signals, 2),
}


def kind_of(random: Random) -> str:
    """The first draw of a seed."""
    return random.choices(list(KINDS), [share for _, share in KINDS.values()])[0]


def make(seed: int, folder: Path) -> tuple[str, list[str]]:
    """The kind and the command line of one input; its files are written to `folder`, which holds the material."""
    random = Random(seed)
    torch.manual_seed(seed)
    name = kind_of(random)
    return name, KINDS[name][0](random, folder)
