"""Randomness that a step's number decides: a resumed run draws what the unbroken one drew, with nothing to restore.

>>> seed(recipe.seed, step)                 # torch, numpy and random, from here on
"""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number(*parts: int) -> int:
    """One 32-bit seed from several numbers; neighbours have nothing in common."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def seed(*parts: int) -> None:
    """Every generator that user code may draw from: torch's on all devices, numpy's and Python's."""
    value = number(*parts)
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def generator(*parts: int) -> torch.Generator:
    return torch.Generator().manual_seed(number(*parts))


@contextmanager
def kept() -> Iterator[None]:
    """The caller's generators come back as they were."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Torch's deterministic kernels alone, where wanted; one without such a kernel raises."""
    if not wanted:
        yield
        return
    before, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
