"""What decides about the paper's claims: rules on made-up results, runs that resume, the page that follows from results."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normrewrite as nr
from benchmarks.figure import save
from benchmarks.norm_matters import __main__ as command
from benchmarks.norm_matters import data, decay, page, recipe
from benchmarks.norm_matters.claims import CLAIMS
from benchmarks.norm_matters.curves import learning
from benchmarks.norm_matters.judge import above, alike, verdict
from benchmarks.norm_matters.measure import MEASURES, Machine
from benchmarks.norm_matters.networks import NETWORKS, made, resnet
from benchmarks.norm_matters.run import Arms, Norm, Run, Study, Task
from benchmarks.norm_matters.runner import Results, carry_out, results_of
from normrewrite.norms import metric
from tests.conftest import ROOT

DIGITS = Task("digits", 16, 128, 64)
QUICK = {"optimizer": "sgd", "lr": 0.1, "batch_size": 64, "epochs": 1}
RUN = Run("train", "resnet8", DIGITS, Norm("l1"), QUICK, 0)


def records(*accuracies: float) -> list[dict[str, Any]]:
    epochs = [{"val_accuracy": share} for share in (0.2, 0.5)]
    more = {"stopped": "", "nonfinite_batches": 0, "seconds": 60.0}
    curve = [epoch | {"norm": 1.0, "step": 0.1, "turn": 9.0} for epoch in epochs]
    stamp = {"machine": "a machine", "date": "2026-01-01", "torch": "2"}
    return [more | {"accuracy": value / 100, "epochs": curve, "stamp": stamp} for value in accuracies]


# --- rules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "is_above", "is_alike"),
    [
        ((52, 53, 54), (50, 51, 51.9), True, False),
        ((52, 53, 54), (50, 51, 52), False, False),  # they touch, and are two points apart
        ((52, 53, 54), (51.5, 52.5, 53.2), False, True),
        ((52, 52.1, 52.2), (51.7, 51.8, 51.9), True, False),  # close, but not touching
        ((50, 51, 52), (52, 53, 54), False, False),
    ],
)
def test_rules(one: tuple[float, ...], other: tuple[float, ...], is_above: bool, is_alike: bool) -> None:
    found = {"a": records(*one), "b": records(*other)}
    assert above("a", "b")(found).holds == is_above
    assert alike("a", "b")(found).holds == alike("b", "a")(found).holds == is_alike


def test_a_verdict_waits_for_every_run_and_counts_the_papers_checks_alone() -> None:
    arms = {"a": Study("resnet8", DIGITS, QUICK, 3).arm(), "b": Study("resnet8", DIGITS, QUICK, 3).arm(Norm("l1"))}
    rules = (above("a", "b"), alike("a", "b", claimed=False))
    whole = {"a": records(52, 53, 54), "b": records(50, 51, 51.9)}
    assert verdict("cpu", arms, whole, rules)[0] == "reproduced"
    assert verdict("smoke", arms, whole, rules)[0] == "too small to support it"
    assert verdict("cpu", arms, whole | {"b": records(50, 51)}, rules) == ("not run", [])
    higher = whole | {"b": records(50, 51, 51.9 * 1.01)}
    assert verdict("cpu", arms, higher, rules)[0] == "not reproduced"


@pytest.mark.parametrize("name", CLAIMS)
def test_every_rule_knows_its_arms(name: str) -> None:
    """On made-up results of the arms' own names; conversion judges other records."""
    claim = CLAIMS[name]
    for budget in ("smoke", "cpu", "gpu"):
        arms = claim.arms(budget)
        found = {arm: records(*range(50, 50 + len(runs))) for arm, runs in arms.items()}
        if name != "conversion":
            assert len(verdict(budget, arms, found, claim.rules)[1]) == len(claim.rules)
        for run in (run for runs in arms.values() for run in runs):
            assert run.network in NETWORKS or run.measure == "convert"


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_result_is_filed_under_all_that_it_depends_on() -> None:
    others = [
        replace(RUN, measure="decay"),
        replace(RUN, network="resnet18"),
        replace(RUN, task=replace(DIGITS, train=129)),
        replace(RUN, norm=Norm("l1", times=4)),
        replace(RUN, norm=Norm("l1", gain="paper")),
        replace(RUN, recipe=QUICK | {"lr": 0.2}),
        replace(RUN, seed=1),
    ]
    assert len({run.file for run in (RUN, *others)}) == 1 + len(others)
    assert replace(RUN, recipe=dict(reversed(QUICK.items()))).file == RUN.file


def test_claims_share_runs() -> None:
    metrics, constant = (CLAIMS[name].arms("cpu") for name in ("metrics", "constant"))
    assert (
        constant["C × 1"] == metrics["L1"] and CLAIMS["int8"].arms("cpu")["range, fp32"] == metrics["range, exact gain"]
    )


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    done: list[Run] = []

    def measure(run: Run, machine: Machine) -> dict[str, Any]:
        done.append(run)
        return {"accuracy": 0.5, "loss": math.nan}

    monkeypatch.setitem(MEASURES, "train", measure)
    return done


def test_what_has_a_result_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, results = counted(monkeypatch), Results(tmp_path / "cpu")
    arms: Arms = {name: Study("resnet8", DIGITS, QUICK, 2).arm(Norm(name)) for name in ("l2", "l1")}
    machine = Machine(tmp_path, torch.device("cpu"), results.folder)
    for _ in range(2):
        for _, run in results.missing(arms):
            carry_out(run, machine, results)
    assert len(done) == 4 and len(results.by_arm(arms)["l1"]) == 2
    path = results.folder / done[3].file
    assert json.loads(path.read_text())["loss"] is None and json.loads(path.read_text())["stamp"]["torch"]
    path.rename(path.with_name(f"{path.name}.part"))  # as a run that was killed while it wrote
    assert [run for _, run in results.missing(arms)] == [done[3]]
    assert not results.of(replace(done[0], seed=7))


def test_time_runs_out_between_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    done = counted(monkeypatch)
    options = command._options(["--minutes", "1e-9", "--data", str(tmp_path)])
    command.run(options, {"constant": CLAIMS["constant"].arms("smoke")}, Results(tmp_path))
    assert not done and "out of time" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--budget", "gpu"]) == 2 and "no GPU" in capsys.readouterr().err


def test_a_training(tmp_path: Path) -> None:
    machine = Machine(tmp_path, torch.device("cpu"), tmp_path)
    record = MEASURES["train"](RUN, machine)
    assert len(record["epochs"]) == 1 and record["steps"] == 2 and not list(tmp_path.iterdir())
    assert MEASURES["train"](RUN, machine)["accuracy"] == record["accuracy"] == record["epochs"][0]["val_accuracy"]


def test_a_training_that_stops_has_an_accuracy(tmp_path: Path) -> None:
    run = replace(RUN, recipe=QUICK | {"lr": 1e30, "epochs": 20}, norm=Norm("wn:mean-bn"))
    record = MEASURES["train"](run, Machine(tmp_path, torch.device("cpu"), tmp_path))
    assert "not finite" in record["stopped"] and 0 <= record["accuracy"] <= 1


# --- networks, norms, data ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [0.25, 1.0, 4.0])
def test_times_is_the_constant_of_the_metric(times: float) -> None:
    """y = weight * d / (times * C * mean|d|) + bias, in float64 by hand."""
    model = made("resnet8", Norm("l1", times=times), 0)
    norm = next(module for module in model.modules() if isinstance(module, nr.nn.BatchNorm2d)).train()
    x = torch.randn(16, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    d = x.double() - x.double().mean((0, 2, 3), keepdim=True)
    expected = d / (times * metric("l1").gain(n=256) * d.abs().mean((0, 2, 3), keepdim=True))
    assert torch.allclose(norm(x).double(), expected, atol=1e-4)
    assert not torch.allclose(norm(x).double(), 1.01 * expected, atol=1e-4)


def test_a_seed_gives_every_norm_the_same_weights() -> None:
    weights = [made("resnet8", norm, 3).get_parameter("0.weight") for norm in (Norm(), Norm("l1", times=4))]
    assert torch.equal(*weights) and not torch.equal(weights[0], made("resnet8", Norm(), 4).get_parameter("0.weight"))


def test_parameters_are_those_of_the_papers_networks() -> None:
    """ResNet-18 and ResNet-50 on ImageNet have 11,689,512 and 25,557,032 parameters in torchvision."""
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in resnet(blocks, bottleneck=deep, classes=1000, imagenet=True).parameters())
            for blocks, deep in (((2, 2, 2, 2), False), ((3, 4, 6, 3), True))
        ]
    assert counts == [11_689_512, 25_557_032]


def test_cifar10_from_its_binary_version(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (3, 3073), dtype=np.uint8)
    drawn[:, 0] = (7, 1, 3)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        drawn.tofile(tmp_path / "cifar-10-batches-bin" / name)
    train, _ = data.open_task(Task("cifar10", 32, 2, 0, "pixels"), tmp_path)
    assert train.whole is not None and train.whole.labels is not None
    assert train.whole.labels.tolist() == [7, 1]
    assert train.whole.inputs["input"][1, 2, 5, 9] == drawn[1, 1 + 2 * 1024 + 5 * 32 + 9]
    half = data.open_task(Task("cifar10", 16, 2, 1, "pixels"), tmp_path)[0].whole
    assert half is not None
    assert half.inputs["input"][0, 0, 0, 0] == train.whole.inputs["input"][0, 0, :2, :2].mean()
    with pytest.raises(nr.NormRewriteError, match="9 images are needed, got 3"):
        data.open_task(Task("cifar10", 32, 9, 0), tmp_path)


def test_without_data_it_says_what_to_do(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "results_of", lambda budget: Results(tmp_path / "results"))
    assert command.main(["--budget", "cpu", "--only", "constant", "--data", str(tmp_path)]) == 2
    assert "cifar-10-binary.tar.gz" in capsys.readouterr().err


# --- weight decay -------------------------------------------------------------------------------------------------------


def test_those_that_follow_take_the_leaders_norms(tmp_path: Path) -> None:
    """Norms set to the leader's are the leader's; the follower runs its leader first where its norms are not there."""
    recipe = {"lr": 0.1, "weight_decay": 0.1, "rest": 0.0, "batch_size": 32, "flip": True, "crop": 2, "epochs": 2}
    run = Run("decay", "vgg11_eighth", DIGITS, Norm(), recipe | {"rule": "norms"}, 0)
    machine = Machine(tmp_path, torch.device("cpu"), tmp_path)
    record = MEASURES["decay"](run, machine)
    reference = torch.load(tmp_path / f"{decay.leader(run).key}.pt", weights_only=True)
    rows = [decay.geometric(decay.reference_row(reference, epoch)) for epoch in range(3)]
    assert [epoch["norm"] for epoch in record["epochs"]] == pytest.approx(rows[:2], rel=1e-5)
    assert rows[1] < rows[0] / 1.01  # they do shrink
    lrs = [epoch["step"] * row**2 for epoch, row in zip(record["epochs"], rows, strict=False)]
    assert lrs == pytest.approx([0.1, 0.01], rel=1e-4)  # 60 % of two epochs is one
    corrected = MEASURES["decay"](replace(run, recipe=recipe | {"rule": "correction"}), machine)
    assert corrected["epochs"][0]["step"] == record["epochs"][0]["step"] and record["epochs"][0]["turn"] > 0


def test_turns_are_angles() -> None:
    a = torch.eye(4)[:2].view(2, 4, 1, 1)
    assert decay._angle(a, 3 * torch.eye(4)[2:].view(2, 4, 1, 1)) == pytest.approx(90)
    assert decay._angle(a, 3 * a) == pytest.approx(0)


# --- recipes from a file ------------------------------------------------------------------------------------------------


def test_the_imagenet_recipe_has_the_papers_arms() -> None:
    arms = recipe.read(ROOT / "benchmarks" / "norm_matters" / "imagenet.toml")
    assert arms["ResNet-18, L1"][0].norm == Norm("l1") and arms["ResNet-50, BWN"][0].norm.initialise
    assert {run.network for runs in arms.values() for run in runs} == {"imagenet_resnet18", "imagenet_resnet50"}
    for runs in arms.values():
        nr.training.recipe.recipe(runs[0].recipe)  # type: ignore[attr-defined]


TOML = """
[task]
source = "digits"
side = 16
train = 64
test = 32
[recipe]
epochs = 1
[arms.one]
network = "resnet8"
norm = { to = "l1" }
"""


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("", "", ""),
        ("[arms.one]", "[arms.one", "Give a file like"),
        ("[recipe]\nepochs = 1", "", r"\[recipe\] is missing"),
        ("side = 16", "sides = 16", r"\[task\]: .*sides"),
        ('"resnet8"', '"resnet81"', "Did you mean 'resnet8'"),
        ("network", "netwerk", "Did you mean 'network'"),
        ("to =", "tu =", "norm: .*tu"),
    ],
)
def test_a_recipe_is_checked(old: str, new: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(TOML.replace(old, new) if old else TOML)
    if not told:
        assert recipe.read(path)["one"][0] == Run(
            "train", "resnet8", Task("digits", 16, 64, 32), Norm("l1"), {"epochs": 1}, 0
        )
        return
    with pytest.raises(nr.NormRewriteError, match=told):
        recipe.read(path)


def test_a_recipe_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    (tmp_path / "study.toml").write_text(TOML)
    assert command.main(["--recipe", str(tmp_path / "study.toml")]) == 0
    assert "| one | 1 |" in capsys.readouterr().out


# --- the page -----------------------------------------------------------------------------------------------------------


def kept(tmp_path: Path, values: Callable[[str], tuple[float, ...]]) -> dict[str, Results]:
    """Made-up results of claim 2."""
    results = {budget: Results(tmp_path / budget) for budget in ("cpu", "gpu")}
    for name, runs in CLAIMS["constant"].arms("cpu").items():
        for run, record in zip(runs, records(*values(name)), strict=True):
            results["cpu"].keep(run, record)
    return results


def test_the_page_follows_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install normrewrite[figures]")
    best = {"C × 1": (52.0, 53.0, 54.0)}
    results = kept(tmp_path, lambda name: best.get(name, (50.0, 51.0, 51.9)))
    path = page.write(tmp_path / "docs" / "paper.md", results)
    written = path.read_text()
    assert "| C × 1 | 3 | 53.00 (52.00 to 54.00) |" in written and "| **reproduced** | **not run** |" in written
    assert "- yes: `C × 1` above `C × 4`: by 2.03 points" in written
    assert "![" in written and "<svg" in (path.parent / "paper" / "cpu_constant.svg").read_text()
    assert "**cpu budget: not run (3 of 21 runs).**" in written  # claim 1 shares its L1
    worse = kept(
        tmp_path, lambda name: (50.0, 51.0, 51.9 * 1.01) if name == "C × 4" else best.get(name, (50.0, 51.0, 51.9))
    )
    assert "**not reproduced (1 of 2 checks)**" in page.text(path, worse)


def test_a_picture_of_the_same_results_has_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install normrewrite[figures]")
    found = {"a": records(50, 51), "b": records(52, 53)}
    first, again = (
        save(lambda figure: learning(figure, found), tmp_path / f"{name}.svg").read_bytes() for name in "12"
    )
    assert first == again


def test_the_page_is_that_of_the_results() -> None:
    results = {budget: results_of(budget) for budget in ("cpu", "gpu")}  # type: ignore[arg-type]
    assert page.PAGE.read_text() == page.text(page.PAGE, results), "run python -m benchmarks.norm_matters --page"


def test_smoke_on_one_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From nothing to a page; the next one begins anew."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install normrewrite[figures]")
    monkeypatch.setattr(command, "results_of", lambda budget: Results(tmp_path / budget))
    for _ in range(2):
        assert command.main(["--only", "conversion"]) == 0
        told = capsys.readouterr().out
        assert told.count("conversion  l1") == 1 and "too small to support it" in told
    assert "| bwn |" in (tmp_path / "smoke" / "paper.md").read_text()
