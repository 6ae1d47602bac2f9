"""The record of a rewrite: what it says, that it can be replayed, and that a false one is refused."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.provenance import manifest
from tests.conftest import TARGETS

Make = Callable[[], nn.Module]
Record = dict[str, Any]


def record_of(*entries: object, **fields: object) -> Record:
    return {"normrewrite": "0.1.0", "format": 1, "torch": "2.13.0", "sites": list(entries), **fields}


def entry(name: str = "1", to: str = "l1", **fields: object) -> Record:
    return {"names": [name], "was": "BatchNorm2d", "to": to, "gain": "exact", "difference": 0.0, **fields}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("gain", ["exact", "paper"])
def test_describe(small: Make, to: str, gain: str) -> None:
    twin, report = nr.plan(small(), to, gain=gain).apply()  # type: ignore[arg-type]
    record = manifest.describe(twin, report)
    assert [(e["names"], e["was"], e["to"], e["gain"]) for e in record["sites"]] == [
        (["1"], "BatchNorm2d", to, gain),
        (["4"], "BatchNorm2d", to, gain),
    ]
    assert [e["difference"] for e in record["sites"]] == [site.difference for site in report.rewritten]
    assert (record["normrewrite"], record["format"]) == (nr.__version__, manifest.FORMAT)
    assert record["torch"] == torch.__version__ and record["report"] == report.as_dict()


def test_describe_tells_all_names_of_a_shared_norm() -> None:
    norm = nn.BatchNorm1d(3)
    record = manifest.describe(nr.convert(nn.ModuleDict({"a": norm, "b": nn.Sequential(norm)}).eval()))
    assert [e["names"] for e in record["sites"]] == [["a", "b.0"]]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.BatchNorm1d(2), nr.nn.BatchNorm1d(2)])
def test_describe_of_what_was_never_rewritten(model: nn.Module) -> None:
    record = manifest.describe(model)
    assert record["sites"] == [] and "report" not in record
    assert manifest.check(record, "here") is record


@pytest.mark.parametrize("to", TARGETS)
def test_replay(small: Make, to: str) -> None:
    """Through JSON, on a fresh network: the same structure, so that the twin's tensors fit it and compute the same."""
    twin, report = nr.plan(small(), to, rules={"4": "range"}, gain="paper").apply()
    record = manifest.check(json.loads(json.dumps(manifest.describe(twin, report))), "here")
    fresh = manifest.replay(small(), record, "here")
    fresh.load_state_dict(twin.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fresh.eval()(x), twin.eval()(x), rtol=0, atol=0)
    torch.testing.assert_close(fresh.train()(x), twin.train()(x), rtol=0, atol=0)
    assert manifest.describe(fresh)["sites"] == [{**e, "difference": None, "error": None} for e in record["sites"]]


def test_replay_of_a_root_gives_the_new_root() -> None:
    record = manifest.describe(nr.convert(nn.BatchNorm1d(3).eval()))
    assert isinstance(manifest.replay(nn.BatchNorm1d(3), record, "here"), nr.nn.BatchNorm1d)


def test_replay_of_a_twin_of_a_twin(small: Make) -> None:
    twin = nr.convert(nr.convert(small(), "l1"), "linf")
    fresh = manifest.replay(small(), manifest.describe(twin), "here")
    fresh.load_state_dict(twin.state_dict())
    assert {module.metric for module in fresh.modules() if isinstance(module, nr.nn.BatchNorm)} == {"linf"}


ODD: tuple[Any, ...] = (None, 1, [], {}, [1], [None], [["1"]])  # where a text or a list of texts belongs
FALSE: dict[str, Sequence[object]] = {
    "is no record of sites": [
        None,
        "text",
        3,
        1.5,
        True,
        [],
        {},
        record_of() | {"sites": "all"},
        record_of() | {"sites": {}},
    ],
    "Update normrewrite": [record_of(format=odd) for odd in (*ODD[2:], None, 0, 2, "1", float("nan"))],
    "has no names": [record_of(odd) for odd in ODD]
    + [record_of(entry() | {"names": odd}) for odd in (*ODD, "1", {"1": "1"})],
    "no valid target or gain": [record_of(entry(**{key: odd})) for key in ("gain", "to") for odd in ODD]
    + [record_of(entry(gain="guess"))],
    "there is no such target": [record_of(entry(to=odd)) for odd in ("", "l3", "__class__", "os.system")],
    "is no count": [record_of(entry(to=f"topk:{odd}")) for odd in ("", "0", "x", "-1%", "9e9%", "nan%")],
    "takes no argument": [
        record_of(entry(to="l1:3")),
        record_of(entry(), entry(to="l1:3")),
    ],  # any site, not the first alone
}


@pytest.mark.parametrize(("record", "said"), [(record, said) for said, records in FALSE.items() for record in records])
def test_check_refuses(record: object, said: str) -> None:
    """Every message begins with the place: a manifest is not the user's request."""
    with pytest.raises(nr.NormRewriteError, match=f"^here: .*{said}"):
        manifest.check(record, "here")


def test_nests_without_end_and_names_that_are_code_are_refused() -> None:
    nest: list[object] = []
    for _ in range(40):
        nest = [nest, nest]
    for record, said in (
        (record_of(entry(), further=nest), "nested without end"),
        (record_of({**entry(), "was": nest}), "nested without end"),
        (record_of(entry('c"); pass\r')), "could be read as code"),
    ):
        with pytest.raises(nr.NormRewriteError, match=f"^here: its manifest .*{said}"):
            manifest.check(record, "here")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([entry("7")], "here: its manifest rewrites '7'.*Is --arch the one"),
        ([entry("0")], "rewrites '0', and the architecture has no norm of that name"),  # there, but no norm
        ([entry("")], "rewrites ''"),
        ([entry("1.weight")], "rewrites '1.weight'"),
        ([entry("1"), entry("7")], "rewrites '7'"),
        ([entry("1"), entry("1")], "here: 1 can't be rewritten as its manifest says: it is rewritten already"),
        ([entry("1", "l2")], "here: 1 can't be rewritten as its manifest says"),
    ],
)
def test_replay_refuses(small: Make, entries: list[Record], said: str) -> None:
    with pytest.raises(nr.NormRewriteError, match=said):
        manifest.replay(small(), manifest.check(record_of(*entries), "here"), "here")


def test_replay_refuses_a_norm_that_may_do_more() -> None:
    class Activated(nn.BatchNorm2d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(nn.ReLU(), Activated(3))
    with pytest.raises(nr.NormRewriteError, match=r"^here: 1 can't .*Activated overrides forward"):
        manifest.replay(model, record_of(entry()), "here")
    assert type(model[1]) is Activated
