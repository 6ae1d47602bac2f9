"""Several processes that share a gloo group, for tests: each does one job and hands its result back."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

# Ranks are forked from one fresh process that has torch imported: five seconds a rank otherwise.
forkserver.set_forkserver_preload(["torch", "torch._dynamo", "torch.nn.parallel"])


def on_ranks(size: int, job: Callable[[], Any], folder: Path) -> list[Any]:
    """What `job()`, a module's own function, returns on each of `size` ranks; tensors travel through files in `folder`."""
    folder.mkdir()
    start_processes(_rank, (size, job, folder), nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, job: Callable[[], Any], folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(job(), folder / f"{rank}.pt")
    distributed.destroy_process_group()
