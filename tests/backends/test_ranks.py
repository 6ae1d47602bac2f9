"""Statistics over 2 and 4 ranks, each a process of its own, against one process on the joined batch.

A case describes what each rank does; `run` does it, on a rank with that rank's part of the batch, and here with all of it.
All cases of a world size run in the same few processes: starting them is what takes the time.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import normrewrite as nr
from normrewrite.backends import ranks as backend
from normrewrite.backends.ranks import largest_of_all
from normrewrite.errors import NormRewriteError
from normrewrite.nn import BatchNorm, BatchRenorm, MeanOnlyBatchNorm
from normrewrite.norms import METRICS
from normrewrite.tolerances import worst
from tests.backends.tolerances import TOLERANCES
from tests.ranks import on_ranks

SPECS = (*map(str, METRICS.values()), "topk:3", "topk:20%")
SAME = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: TOLERANCES[torch.bfloat16].y}
STEPS = 3
SIZES = {2: ((5, 3), (7, 1), (0, 6)), 4: ((3, 4, 3, 1), (1, 2, 0, 5))}  # samples a rank, three channels of 2x2 each


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    spec: str = "l1"
    cls: type[nn.Module] = BatchNorm
    dtype: torch.dtype = torch.float64
    data: str = "lognormal"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind, dtype = self.cls.__name__, str(self.dtype).removeprefix("torch.")
        return " ".join(map(str, (kind, self.spec, self.sizes, dtype, self.data, *self.options)))

    def norm(self, **options: Any) -> Any:
        """Three channels whose tensors no initialiser would give."""
        spec = {} if self.cls is MeanOnlyBatchNorm else {"metric": self.spec}
        norm: Any = self.cls(3, **spec, **self.options, **options, dtype=torch.promote_types(self.dtype, torch.float32))
        for parameter, start in zip(norm.parameters(), (0.5, -1.0), strict=False):
            parameter.data += start + torch.arange(3)
        if isinstance(norm, BatchRenorm):
            norm.trained.fill_(True)
        return norm

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """(x, upstream gradient) of the joined batch of every step, (N, 3, 2, 2)."""
        generator = torch.Generator().manual_seed(0)
        shape = (STEPS, sum(self.sizes), 3, 2, 2)
        x, g = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        x = torch.randint(-3, 4, shape, generator=generator).double() if self.data == "ties" else x.exp()
        if self.data == "nan":
            x[1, -1, 1, 0, 0] = torch.nan
        if self.data == "channels last":
            x = x.movedim(2, -1).contiguous().movedim(-1, 2)
        return list(zip(x.to(self.dtype), g.to(self.dtype), strict=True))


def cases(size: int) -> dict[str, Case]:
    first, *further = SIZES[size]
    found = [Case(first, spec, cls, dtype) for spec in SPECS for cls in (BatchNorm, BatchRenorm) for dtype in SAME]
    found += [Case(sizes, spec) for spec in SPECS for sizes in further]
    found += [Case(first, spec, data=data) for spec in SPECS for data in ("nan", "channels last")]
    found += [Case(first, spec, data="ties") for spec in ("l1", "linf", "range")]
    found += [Case(first, data="nan", options={"momentum": None}), Case(first, options={"affine": False})]
    found += [Case(first, options={"track_running_stats": False}), Case(first, "topk:3", options={"gain": "paper"})]
    found += [Case(first, cls=MeanOnlyBatchNorm, dtype=dtype) for dtype in SAME]
    return {str(case): case for case in found}


Result = dict[str, Tensor]


def run(case: Case, norm: Any, part: slice = slice(None)) -> Result:
    """What `part` of every batch gives: outputs, all gradients, and the running statistics at the end."""
    found: dict[str, list[Tensor]] = {"y": [], "dx": []}
    for batch, g in case.batches():
        x = batch[part].requires_grad_()
        y = norm(x)
        y.backward(g[part])
        assert x.grad is not None and y.dtype == x.grad.dtype == x.dtype and y.stride() == x.stride()
        found["y"].append(y.detach())
        found["dx"].append(x.grad)
    gradients = {f"d{name}": parameter.grad for name, parameter in norm.named_parameters()}
    return {name: torch.stack(value) for name, value in found.items()} | gradients | dict(norm.named_buffers())


def check(found: list[Result], wanted: Result, tolerance: float) -> None:
    """Parts of the batch put together, terms of a gradient added, statistics alike on all ranks to the bit."""
    for name, value in wanted.items():
        parts = [result[name] for result in found]
        if name in ("y", "dx"):
            joined = torch.cat(parts, 1)
        elif name.startswith("d"):
            joined = torch.stack(parts).sum(0)
        else:
            joined = parts[0]
            assert all(torch.equal(part, joined) for part in parts), f"{name} differs from rank to rank"
        assert worst(joined, value) <= tolerance, f"{name}: off by {worst(joined, value):.3g}, {tolerance:g} allowed"


# --- what every rank does --------------------------------------------------------------------------------------------


def _mine(sizes: tuple[int, ...], rank: int) -> slice:
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def messages(spec: str) -> tuple[int, int]:
    """How many messages a forward and a backward send."""
    sent = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather"):
            send = getattr(distributed, name)
            patch.setattr(distributed, name, lambda *a, send=send, **k: sent.append(1) or send(*a, **k))
        y = BatchNorm(3, metric=spec, synchronised=True)(torch.randn(8, 3, requires_grad=True))
        forward = len(sent)
        y.sum().backward()
    return forward, len(sent) - forward


def job() -> dict[str, Any]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    pairs = [distributed.new_group([first, first + 1]) for first in range(0, size, 2)]
    found: dict[str, Any] = {
        name: run(case, case.norm(synchronised=True), _mine(case.sizes, rank)) for name, case in cases(size).items()
    }
    pair = PAIR.norm(synchronised=True, process_group=pairs[rank // 2])
    found["pair"] = run(PAIR, pair, _mine(PAIR.sizes, rank % 2))
    found["alone"] = run(PAIR, PAIR.norm())
    found["messages"] = [messages(spec) for spec in FAMILIES]
    found["refused"] = [_refusal("topk:20", 4), _refusal("l1", 1 if rank == 0 else 0)]
    for to in NETWORKS:
        found[to] = trained(network(to, pairs[0] if size == 2 else None), SIZES[size][0], rank)
        found[f"{to} autocast"] = under_autocast(network(to), _mine(SIZES[size][0], rank))
    return found


PAIR = Case((5, 3))
FAMILIES = {"l2": (2, 1), "l1": (2, 1), "linf": (2, 1), "topk:20%": (2, 1), "range": (1, 1)}


def _refusal(spec: str, samples: int) -> str:
    with pytest.raises(nr.NormRewriteError) as error:
        BatchNorm(3, metric=spec, synchronised=True)(torch.ones(samples, 3))
    return str(error.value)


NETWORKS = ("l1", "topk:10", "range", "renorm", "bwn:mean-bn")


def network(to: str, group: Any = None) -> nn.Module:
    """What a network with torch's SyncBatchNorm becomes, ready to train."""
    torch.manual_seed(0)
    norms = nn.SyncBatchNorm(4), nn.SyncBatchNorm(5, process_group=group)
    body = (nn.Conv2d(3, 4, 3), norms[0], nn.ReLU(), nn.Conv2d(4, 5, 1), norms[1], nn.ReLU())
    twin = nr.convert(nn.Sequential(*body, nn.Flatten(), nn.Linear(20, 3)), to).train()
    assert group is None or sum(getattr(module, "process_group", None) is group for module in twin.modules()) == 1
    return twin


def images(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 4, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def trained(model: nn.Module, sizes: tuple[int, ...], rank: int | None = None) -> Result:
    """All tensors after a few steps of SGD on the mean loss of all samples, by DDP on a rank."""
    model = model.double()
    stepped = model if rank is None else DistributedDataParallel(model)
    part, ranks = (slice(None), 1) if rank is None else (_mine(sizes, rank), len(sizes))
    x, labels = images(sum(sizes))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss = F.cross_entropy(stepped(x.double()[part]), labels[part], reduction="sum") / sum(sizes)
        (loss * ranks).backward()  # DDP averages over ranks
        optimiser.step()
    return dict(model.state_dict())


def under_autocast(model: nn.Module, part: slice = slice(None)) -> Result:
    x = images(sum(SIZES[4][0]))[0][part].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.dtype is torch.bfloat16 and x.grad is not None
    gradients = {f"d{name}": parameter.grad for name, parameter in model.named_parameters()}
    return {"y": y.detach()[None], "dx": x.grad[None], **gradients, **dict(model.named_buffers())}


# --- what comes out --------------------------------------------------------------------------------------------------


def test_what_is_beyond_first_derivatives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "summed", lambda values, group: values.double())  # a rank that is alone
    x = torch.randn(6, 3, requires_grad=True)
    for norm in (
        lambda x: backend.normalise(x, None, None, "l1", "exact", 1e-5, None)[0],
        lambda x: x - backend.mean(x, None),
    ):
        with pytest.raises(NormRewriteError, match=r"a synchronised norm is neither for torch\.func nor"):
            torch.func.grad(lambda x, norm=norm: norm(x).sum())(x)
        (first,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        once = r"a synchronised norm has first derivatives alone.*synchronised=False"
        with pytest.raises(NormRewriteError, match=once):
            torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        with pytest.raises(NormRewriteError, match=once):
            first.square().sum().backward()


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size} ranks")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(request.param, job, tmp_path_factory.mktemp("ranks") / "job")


def test_every_metric_equals_one_process_on_the_joined_batch(ranks: list[dict[str, Any]]) -> None:
    for name, case in cases(len(ranks)).items():
        try:
            check([rank[name] for rank in ranks], run(case, case.norm()), SAME[case.dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def test_a_group_of_its_own(ranks: list[dict[str, Any]]) -> None:
    wanted = run(PAIR, PAIR.norm())
    for first in range(0, len(ranks), 2):
        check([rank["pair"] for rank in ranks[first : first + 2]], wanted, 1e-10)


def test_what_is_not_synchronised_measures_its_own_batch(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        check([rank["alone"]], run(PAIR, PAIR.norm()), 0.0)


def test_too_few_elements_are_refused_on_all_ranks_alike(ranks: list[dict[str, Any]]) -> None:
    topk, l1 = ranks[0]["refused"]
    assert all(rank["refused"] == [topk, l1] for rank in ranks)
    assert f"topk:20 needs at least 20 elements that share statistics, got {4 * len(ranks)}" in topk
    assert "l1 needs at least 2 elements that share statistics, got 1" in l1


def test_messages_are_as_few_as_a_family_needs(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert dict(zip(FAMILIES, rank["messages"], strict=True)) == FAMILIES


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_of_equal_extremes_the_lowest_ranks_count(ranks: int, k: int, seed: int) -> None:
    candidates = torch.randint(0, 3, (ranks, 2, k), generator=torch.Generator().manual_seed(seed)).float()
    found = [largest_of_all(candidates, rank) for rank in range(ranks)]
    won = torch.stack([ours for _, ours in found])
    assert bool((won.sum((0, 2)) == k).all())
    for row in range(2):
        values = sorted((-float(value), rank) for rank in range(ranks) for value in candidates[rank, row])
        wanted = [sum(rank == mine for _, rank in values[:k]) for mine in range(ranks)]
        assert won[:, row].sum(1).tolist() == wanted
        assert all(
            sorted(winners[row].tolist(), reverse=True) == [-value for value, _ in values[:k]] for winners, _ in found
        )


@pytest.mark.parametrize("to", NETWORKS)
def test_converted_networks_train_under_ddp(ranks: list[dict[str, Any]], to: str) -> None:
    wanted = trained(network(to), SIZES[len(ranks)][0])
    for rank in ranks:
        assert rank[to].keys() == wanted.keys()
        for name, value in wanted.items():
            assert worst(rank[to][name], value) <= 1e-10, f"{name}: off by {worst(rank[to][name], value):.3g}"


@pytest.mark.parametrize("to", NETWORKS)
def test_autocast(ranks: list[dict[str, Any]], to: str) -> None:
    """Outputs are rounded to bfloat16 at every layer, and the last bit of one may fall either way."""
    sizes = SIZES[len(ranks)][0]
    found = [rank[f"{to} autocast"] for rank in ranks]
    check(found, under_autocast(network(to), slice(sum(sizes))), 4 * TOLERANCES[torch.bfloat16].y)


# --- the check is able to fail ---------------------------------------------------------------------------------------


def averaged(case: Case) -> list[Result]:
    """The biased way: each rank's own statistics, and their average for the running ones."""
    parts = [run(case, case.norm(), _mine(case.sizes, rank)) for rank in range(len(case.sizes))]
    for name in ("running_mean", "running_scale"):
        mean = torch.stack([part[name] for part in parts]).mean(0)
        parts = [part | {name: mean} for part in parts]
    return parts


@pytest.mark.parametrize("spec", SPECS)
def test_averages_of_local_statistics_are_caught(spec: str) -> None:
    case = Case((4, 4), spec, options={"momentum": 1.0})
    wanted = run(case, case.norm())
    for name in ("y", "dx", "running_scale"):
        with pytest.raises(AssertionError, match=f"{name}: off by"):
            check(averaged(case), {name: wanted[name]}, 1e-2)
    check(averaged(case), {"running_mean": wanted["running_mean"]}, 1e-10)  # of equal parts, means do average


@pytest.mark.parametrize("name", ["y", "dx", "dweight", "dbias", "running_mean", "running_scale"])
def test_one_percent_on_one_rank_is_caught(name: str) -> None:
    case = Case((5, 3))
    whole = run(case, case.norm())
    halves = [
        {key: value[:, _mine(case.sizes, rank)] for key, value in whole.items() if key in ("y", "dx")}
        for rank in (0, 1)
    ]
    shares = {key: value / 2 for key, value in whole.items() if key in ("dweight", "dbias")}
    found = [whole | half | shares for half in halves]
    check(found, whole, 1e-12)
    found[1] = found[1] | {name: found[1][name] * 1.01}
    with pytest.raises(AssertionError, match=name):
        check(found, whole, SAME[torch.float32])


# --- in one process --------------------------------------------------------------------------------------------------


def test_without_other_ranks_nothing_changes() -> None:
    check([run(PAIR, PAIR.norm(synchronised=True))], run(PAIR, PAIR.norm()), 0.0)


def test_sync_batch_norms_become_synchronised_and_come_back() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4))
    twin = nr.convert(model, "linf")
    assert twin[1].synchronised and "synchronised=True" in repr(twin[1])
    assert type(nr.revert(twin)[1]) is nn.SyncBatchNorm


def test_synchronise() -> None:
    model = nn.Sequential(BatchNorm(3), nn.Sequential(MeanOnlyBatchNorm(3), BatchRenorm(3)), nn.BatchNorm1d(3))
    assert nr.nn.synchronise_(model) is model
    norms = [module for module in model.modules() if getattr(module, "synchronised", False)]
    assert [type(norm) for norm in norms] == [BatchNorm, MeanOnlyBatchNorm, BatchRenorm]
    nr.nn.synchronise_(model, synchronised=False)
    assert not any(norm.synchronised for norm in norms)
    with pytest.raises(nr.NormRewriteError, match="Sequential holds no batch norm of normrewrite that measures"):
        nr.nn.synchronise_(nn.Sequential(nn.BatchNorm1d(3)))
