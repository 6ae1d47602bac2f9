"""Worker processes that may hang, crash or swallow memory without taking the run along."""

import gc
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo_libraries import library, offline
from benchmarks.zoo_trial import Options, Row, trial

GIB = 1 << 30
JOBS_A_WORKER = 150  # networks leave caches behind: a fresh process now and then keeps memory and speed


@dataclass(frozen=True)
class Job:
    library: str
    name: str
    options: Options

    @property
    def key(self) -> tuple[str, str, str]:
        return self.library, self.name, self.options.to


@dataclass(frozen=True)
class Limits:
    seconds: float = 120
    export_seconds: float = 240
    memory_gib: float = 6


def serve(connection: Connection) -> None:
    """A worker: takes jobs, sends ("stage", name, row so far) and ("done", row)."""
    _quiet()
    torch.set_num_threads(1)
    offline()
    while (job := connection.recv()) is not None:
        library_name, name, options = job
        try:
            of_name = library(library_name)
        except Exception:
            connection.send(("done", {"outcome": "could_not_run", "reason": traceback.format_exc()[-300:]}))
            continue
        connection.send(("done", _row(of_name, name, options, connection)))


def _row(of_name: Any, name: str, options: Options, connection: Connection) -> Row:
    row = trial(lambda: of_name.build(name), options, lambda stage, row: connection.send(("stage", stage, dict(row))))
    gc.collect()  # cycles in modules keep hundreds of megabytes alive until the collector runs
    return row


def names(library_name: str) -> list[str]:
    """A library's architectures, listed in a process of its own: importing all of them takes a minute and a gigabyte."""
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_send_names, args=(library_name, sending), daemon=True)
    process.start()
    sending.close()
    try:
        return list(receiving.recv())
    except EOFError:
        print(f"{library_name}: can't be listed; is it installed?", file=sys.stderr)
        return []
    finally:
        process.join()


def _send_names(library_name: str, connection: Connection) -> None:
    _quiet()
    offline()
    connection.send(library(library_name).names())


def _quiet() -> None:
    """Libraries print as they build; what matters is in the row."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    warnings.simplefilter("ignore")


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None
    stage: str = "start"
    row: Row = field(default_factory=dict)
    started: float = 0.0
    deadline: float = 0.0
    done: int = 0

    @classmethod
    def start(cls) -> "_Worker":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def take(self, job: Job, limits: Limits) -> None:
        self.job, self.stage, self.row, self.started = job, "start", {}, time.monotonic()
        self.deadline = self.started + limits.seconds + (60 if not self.done else 0)  # imports
        self.connection.send((job.library, job.name, job.options))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def message(self, limits: Limits) -> Row | None:
        """What there is to read; a row once the job is done."""
        kind, *rest = self.connection.recv()
        if kind == "done":
            return dict(rest[0])
        self.stage, self.row = rest
        if self.stage in ("convert", "export"):  # a slow original is to leave conversion its full time
            self.deadline = time.monotonic() + (limits.export_seconds if self.stage == "export" else limits.seconds)
        return None

    def trouble(self, limits: Limits) -> str | None:
        if not self.process.is_alive():
            return f"the process died (exit code {self.process.exitcode})"
        if time.monotonic() > self.deadline:
            return "time limit"
        if _resident(self.process.pid) > limits.memory_gib * GIB:
            return "memory limit"
        return None

    def lost(self, reason: str) -> Row:
        """The row of a job whose process is gone: an original that can't be run, a fault, or an export only."""
        row = {**self.row, "stage": self.stage, "seconds": round(time.monotonic() - self.started, 1)}
        if self.stage in ("control", "export"):
            return row | {self.stage: {"outcome": "failed", "reason": reason}}
        original = self.stage in ("start", "build", "run")
        return row | {"outcome": "could_not_run" if original else "failed", "reason": reason}


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it is gone, or this is no Linux
        return 0


def run_jobs(jobs: list[Job], count: int, limits: Limits) -> Iterator[tuple[Job, Row]]:
    """Every job with its row, as they come in."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    left = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        while left or any(worker.job for worker in workers):
            workers = [worker for worker in workers if worker.job or not _retired(worker)]
            while left and len(workers) < count:
                workers.append(_Worker.start())
            for worker in workers:
                if worker.job is None and left:
                    worker.take(left.pop(), limits)
            yield from _collect(workers, limits)
    finally:
        for worker in workers:
            worker.stop()


def _retired(worker: _Worker) -> bool:
    if worker.done < JOBS_A_WORKER and worker.process.is_alive():
        return False
    worker.stop()
    return True


def _collect(workers: list[_Worker], limits: Limits) -> Iterator[tuple[Job, Row]]:
    ready = wait([worker.connection for worker in workers], timeout=0.5)
    for worker in workers:
        job = worker.job
        if job is None:
            continue
        row = None
        try:
            if worker.connection in ready:
                row = worker.message(limits)
        except (EOFError, ConnectionError):
            worker.process.join()
        reason = None if row else worker.trouble(limits)
        if reason:
            worker.stop()
            row = worker.lost(reason)
        if row is not None:
            worker.job, worker.done = None, worker.done + 1
            yield job, row
