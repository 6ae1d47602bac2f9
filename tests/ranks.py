"""Several processes that share a gloo group, for tests: each is spawned, does one job and hands its result back."""

import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def on_ranks(size: int, job: Callable[[], Any], folder: Path) -> list[Any]:
    """What `job()`, a module's own function, returns on each of `size` ranks; tensors travel through files in `folder`."""
    folder.mkdir()
    multiprocessing.spawn(_rank, (size, job, folder), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, job: Callable[[], Any], folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(job(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
    sys.stdout.flush()
