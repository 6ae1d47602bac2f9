"""What a block chooses holds in its own context: not in other threads and tasks, nested, after errors, in compiled networks."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normrewrite as nr
from normrewrite.backends import half
from normrewrite.backends.accumulate import Accumulator
from normrewrite.backends.context import State, here, setting
from normrewrite.backends.dispatch import choice_here
from normrewrite.backends.watch import told, watching

X = (50 * torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(5))).half()
OURS, THEIRS = nr.nn.LayerNorm(6), lambda x: F.layer_norm(x, (6,))
NORMS: tuple[Callable[[Tensor], Tensor], ...] = (OURS, THEIRS, nr.nn.BatchNorm2d(4, track_running_stats=False))


def outcome() -> list[Tensor]:
    """y and dx of each norm, ours and torch's."""
    results = []
    for norm in NORMS:
        x = X.clone().requires_grad_()
        y = norm(x)
        results += [y.detach(), *torch.autograd.grad(y, x, X.flip(0))]
    return results


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.fixture(scope="module")
def wanted() -> dict[str, list[Tensor]]:
    """By accumulator; `` is outside of any block. No two are alike."""
    results = {"": outcome()}
    for sums in ("fp32", "half:1"):
        with nr.half_arithmetic(sums):
            results[sums] = outcome()
    pairs = (("", "fp32"), ("", "half:1"), ("fp32", "half:1"))
    assert not any(torch.equal(x, y) for a, b in pairs for x, y in list(zip(results[a], results[b], strict=True))[::2])
    return results


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert here.now is here and half.chosen(X) is None


def test_threads_that_take_turns_have_their_own(wanted: dict[str, list[Tensor]]) -> None:
    """All enter their block, compute, and leave it in step, so that each computes while the others' are open."""
    step, choices = threading.Barrier(3, timeout=60), ("", "fp32", "half:1")

    def run(sums: str) -> list[list[Tensor]]:
        results = []
        for _ in range(3):
            with nr.half_arithmetic(sums) if sums else nullcontext():
                step.wait()
                results += [outcome()]
                step.wait()
            results += [outcome()]
            step.wait()
        return results

    with ThreadPoolExecutor(3) as pool:
        for sums, results in zip(choices, pool.map(run, choices), strict=True):
            assert all(same(each, wanted[sums]) for each in results[::2]), sums
            assert all(same(each, wanted[""]) for each in results[1::2]), sums


def test_a_thread_started_inside_is_outside(wanted: dict[str, list[Tensor]]) -> None:
    """Even in a copy of the context: torch's own norms would not follow there, so ours don't."""
    with nr.half_arithmetic("half:1"), nr.kernels("torch"), watching() as watch, ThreadPoolExecutor(1) as pool:
        context = contextvars.copy_context()
        assert same(pool.submit(outcome).result(), wanted[""]) and pool.submit(choice_here).result() == "auto"
        assert same(pool.submit(context.run, outcome).result(), wanted[""])
        assert pool.submit(context.run, choice_here).result() == "torch" and watch.told == []


def test_a_copy_of_the_context_is_the_block(wanted: dict[str, list[Tensor]]) -> None:
    before = contextvars.copy_context()
    with nr.half_arithmetic("half:1"):
        inside = contextvars.copy_context()
        assert same(inside.run(outcome), wanted["half:1"]) and same(before.run(outcome), wanted[""])
    assert same(inside.run(outcome), wanted[""])  # the block has ended


def test_tasks_that_take_turns_have_their_own(wanted: dict[str, list[Tensor]]) -> None:
    """Blocks end in another order than they began."""

    async def run(sums: str, length: int) -> None:
        with nr.half_arithmetic(sums) if sums else nullcontext():
            for _ in range(length):
                await asyncio.sleep(0)
                assert same(outcome(), wanted[sums]), sums
        await asyncio.sleep(0)
        assert same(outcome(), wanted[""]), sums

    async def all_of_them() -> None:
        await asyncio.gather(run("half:1", 2), run("", 4), run("fp32", 3), run("half:1", 1))
        with nr.half_arithmetic("half:1"):  # and one that is started inside
            child = asyncio.create_task(run("", 0))
            await asyncio.sleep(0)
            assert same(outcome(), wanted["half:1"])
        await child

    asyncio.run(all_of_them())


def test_products_of_other_tasks_are_left_alone() -> None:
    x, weight = torch.randn(16, 600).half(), torch.randn(8, 600).half()
    calls: list[str] = []

    async def inside(ready: asyncio.Event, done: asyncio.Event) -> None:
        with nr.half_arithmetic():
            ready.set()
            await done.wait()

    async def outside(ready: asyncio.Event, done: asyncio.Event) -> None:
        await ready.wait()
        with torch.profiler.profile() as profile:
            F.linear(x, weight)
        calls.extend(event.key for event in profile.key_averages())
        done.set()

    async def both() -> None:
        events = asyncio.Event(), asyncio.Event()
        await asyncio.gather(inside(*events), outside(*events))

    asyncio.run(both())
    assert "aten::linear" in calls and "aten::to" not in calls  # no cast to fp32


def test_fields_end_on_their_own_whatever_the_order() -> None:
    """As two generators may leave them."""
    first, second = setting(kernels="torch"), setting(finite=[])
    first.__enter__(), second.__enter__()
    assert here.now == State(kernels="torch", finite=[])
    first.__exit__(None, None, None)
    assert here.now == State(finite=[])
    with pytest.raises(KeyError), setting(kernels="triton"):
        raise KeyError
    assert here.now == State(finite=[])
    second.__exit__(None, None, None)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # dynamo's, at a break
@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize("spec", ["l1", "topk:3"])
def test_compiled_networks_follow_the_block(spec: str, inside_first: bool) -> None:
    """Compiled inside or outside, called on either side, nested, in another thread: never what it was compiled by."""
    torch._dynamo.reset()
    norm = nn.Sequential(nr.nn.LayerNorm(6, metric=spec))
    compiled = torch.compile(norm, backend="eager")
    expected = {"": norm(X)}
    for sums in ("fp32", "half:1"):
        with nr.half_arithmetic(sums):
            expected[sums] = norm(X)
    assert not torch.equal(expected["fp32"], expected["half:1"]) and not torch.equal(expected["fp32"], expected[""])

    def inside() -> None:
        with nr.half_arithmetic("half:1"):
            assert torch.equal(compiled(X), expected["half:1"])
            with nr.half_arithmetic("fp32"):
                assert torch.equal(compiled(X), expected["fp32"])
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(compiled, X).result(), expected[""])
            assert torch.equal(compiled(X), expected["half:1"])

    def outside() -> None:
        assert torch.equal(compiled(X), expected[""])

    for step in (inside, outside, inside, outside) if inside_first else (outside, inside, outside):
        step()


def test_compiled_code_reads_the_state_without_a_break_and_is_kept() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    def function(x: Tensor) -> Tensor:
        accumulator = here.now.accumulator
        return x if accumulator is None else -x * (accumulator.chunk or 1)

    which = torch.compile(function, backend=counter, fullgraph=True)
    x = torch.ones(2)
    with setting(accumulator=Accumulator(3)):
        inside = contextvars.copy_context()
    for _ in range(3):
        assert which(x).tolist() == [1, 1] and inside.run(which, x).tolist() == [-3, -3]
        with setting(accumulator=Accumulator(3)):
            assert which(x).tolist() == [-3, -3]
    assert counter.frame_count == 2


def test_compiled_norms_tell_who_watches() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(nr.nn.BatchNorm2d(4), backend="eager", fullgraph=True)
    x = X.float()
    compiled(x)
    for count in (1, 2):
        with watching() as watch:
            compiled(x)
            assert told() == len(watch.told) == 1 and not watch.spoilt, count
    with watching() as watch:
        compiled(x * torch.inf)
    assert watch.spoilt and told() == 0
