"""Processes for tests: ranks that share a gloo group, and the command line, alone or as ranks, to be killed."""

import os
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import start_processes

# All are forked from one fresh process that has this imported: five seconds each otherwise.
forkserver.set_forkserver_preload(
    ["torch", "torch._dynamo", "torch.nn.parallel", "accelerate", "normrewrite.commands.finetune", "tests.ranks"]
)


# --- a function on several ranks --------------------------------------------------------------------------------------


def on_ranks(size: int, job: Callable[[], Any], folder: Path) -> list[Any]:
    """What `job()`, a module's own function, returns on each of `size` ranks; tensors travel through files in `folder`."""
    folder.mkdir()
    start_processes(_rank, (size, job, folder), nprocs=size, start_method="forkserver")  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, job: Callable[[], Any], folder: Path) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ.update(_of_rank(rank, size))
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    torch.save(job(), folder / f"{rank}.pt")
    distributed.destroy_process_group()


def _of_rank(rank: int, size: int) -> dict[str, str]:
    """What torchrun says to a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
    }


# --- the command line -------------------------------------------------------------------------------------------------


@dataclass
class Started:
    """A command in a process of its own. log: what it prints, to stdout and stderr."""

    process: Any
    log: Path

    def send(self, which: signal.Signals) -> None:
        os.kill(self.process.pid, which)

    def end(self, seconds: float = 150) -> int:
        """Its exit code (negative: the signal that ended it); after `seconds` it is killed, and the test fails."""
        self.process.join(seconds)
        hangs = self.process.is_alive()
        self.process.kill()
        self.process.join()
        assert not hangs, f"still running after {seconds} s: {self.said}"
        return int(self.process.exitcode)

    @property
    def said(self) -> str:
        return self.log.read_text()


def start(line: str, log: Path, before: Callable[[], object] | None = None, **environment: str) -> Started:
    """`normrewrite LINE`. before: called in that process first, a module's own function."""
    process = get_context("forkserver").Process(target=_command, args=(line, log, before, environment), daemon=True)
    process.start()
    return Started(process, log)


def start_ranks(line: str, size: int, folder: Path, **environment: str) -> list[Started]:
    """`normrewrite LINE` on ranks that nobody watches: where one dies, the others have to see to themselves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(line, folder / f"rank{rank}.log", **_of_rank(rank, size), **environment) for rank in range(size)]


def _command(line: str, log: Path, before: Callable[[], object] | None, environment: dict[str, str]) -> None:
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if before is not None:
        before()
    from normrewrite import cli

    sys.argv = ["normrewrite", *shlex.split(line)]
    cli.main()
