"""`normrewrite report` as people meet it."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import normrewrite as nr
from normrewrite.commands.report import report
from normrewrite.commands.source import Source
from normrewrite.options.fields import quiet
from normrewrite.options.report import Report
from normrewrite.reporting.columns import power, short
from normrewrite.reporting.printout import sparks
from normrewrite.reporting.terminal import drawn
from tests.conftest import ROOT, Command, RealNetwork, convert_file, enter_copy

ARCH = "--arch digits.py:digits_resnet"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    for name in ("digits.pt", "digits.py"):
        shutil.copy(ROOT / "examples" / name, folder)
    arrays = np.load(ROOT / "examples" / "digits.npz")
    np.savez(folder / "digits.npz", images=arrays["images"][:100], labels=arrays["labels"][:100])
    arch = f"{folder / 'digits.py'}:digits_resnet"
    convert_file(folder / "digits.pt", arch=arch, exclude=("stem.*",), output=folder / "twin.pt")
    torch.save(nr.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval()), folder / "pickled.pt")
    return folder


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_copy(shelf, tmp_path, monkeypatch)


def test_text(run: Command, folder: Path) -> None:
    outcome = run(f"report twin.pt {ARCH} --data digits.npz --batch-size 50")
    assert outcome.code == 0 and outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0].startswith("twin.pt: ") and lines[1].startswith("Same function. ")
    assert "in --exclude" in outcome.out and re.search(r"[▁▂▃▄▅▆▇█]{6}", outcome.out)
    assert f"normrewrite report twin.pt {ARCH} --data digits.npz --batch-size 50" in outcome.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "digits.npz",
        "digits.pt",
        "digits.py",
        "pickled.pt",
        "twin.pt",
    ]


def test_json(run: Command, folder: Path) -> None:
    told = run(f"report twin.pt {ARCH} --original digits.pt --data digits.npz --batch-size 50 --json").json
    assert told["rewritten"] == 8 and len(told["sites"]) == 9 and told["original"] == "given"
    assert told["network"]["outputs"][0]["top1"][0] == told["network"]["outputs"][0]["top1"][1] > 0.9
    assert told["manifest"] == json.loads(json.dumps(torch.load("twin.pt", weights_only=True)["normrewrite"]))
    advised = run(f"inspect digits.pt {ARCH} --advise digits.npz --batch-size 50 --json").json["advice"]["sites"]
    assert [site["advice"] for site in told["sites"]] == advised
    Path("report.json").write_text(json.dumps(told))
    assert run("verify twin.pt --manifest report.json").code == 0  # a report will do for a manifest


def test_page(run: Command, folder: Path) -> None:
    line = (
        f"report twin.pt {ARCH} --original digits.pt --data digits.npz --batch-size 50 --latency torch -o report.html"
    )
    outcome = run(line)
    assert outcome.code == 0 and outcome.out.rstrip().endswith("wrote report.html") and "Same function." in outcome.out
    page = (folder / "report.html").read_text()
    assert "Latency" in page and "What the norms are fed" in page and str(folder) not in page
    assert run(line).code == 2 and run(f"{line} --force --text").out.count("\n") > 20


@pytest.mark.parametrize(
    "line", ["report pickled.pt", f"report digits.pt {ARCH}", f"report digits.pt {ARCH} --data digits.npz"]
)
def test_what_is_no_file_of_ours(run: Command, folder: Path, line: str) -> None:
    outcome = run(f"{line} --json")
    assert outcome.code == 0 and (outcome.json["manifest"] is None) == ("digits" in line)
    assert run(f"{line} -o report.html -q").out == "" and (folder / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("report nosuch.pt", "there is no such file"),
        ("report twin.pt", "holds a state_dict.*names 'digits.py:digits_resnet', and nothing of that was imported"),
        (f"report twin.pt {ARCH} --original nosuch.pt", "there is no such file"),
        (f"report twin.pt {ARCH} --data nosuch.npz", "nosuch.npz"),
        (f"report twin.pt {ARCH} --latency torch", "--latency of what input"),
        (f"report twin.pt {ARCH} -o nosuch/report.html", "there is no folder"),
        (f"report twin.pt {ARCH} -o digits.npz", r"is the name of data, and this is a page. Call it .html"),
        (f"report twin.pt {ARCH} --original pickled.pt", "another network .* none of the sites, such as blocks.0"),
    ],
)
def test_what_can_t_serve(run: Command, folder: Path, line: str, said: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outcome = run(line)
    assert outcome.code == 2 and re.search(said, " ".join(outcome.err.split())), outcome
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_terminal(folder: Path) -> None:
    options = Report(model=folder / "twin.pt", arch="digits.py:digits_resnet", data="digits.npz", batch_size=50)
    told = report(Source.of(options), options, quiet)
    console = Console(record=True, width=250, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(drawn(told.summary(), console), crop=False)
    shown = console.export_text()
    console.file.close()
    for site in told.facts.sites:
        assert site.label in shown and sparks(site) in shown
    assert "Same function." in shown and "to do it again:" in shown


@pytest.mark.parametrize(
    ("value", "said"), [(2.4e-7, "2.4 × 10⁻⁷"), (0.0, "0"), (None, ""), (float("nan"), "nan"), (12345.0, "1.2 × 10⁴")]
)
def test_powers(value: float | None, said: str) -> None:
    assert power(value) == said


def test_short_figures() -> None:
    assert [short(value) for value in (0.0, 1.0, 0.12345, 1234.5, 1e-4, 1e7)] == [
        *("0", "1", "0.123", "1.23e+03", "1.0 × 10⁻⁴", "1.0 × 10⁷")
    ]


def test_a_real_network(run: Command, folder: Path, resnet20: RealNetwork) -> None:
    np.savez("few.npz", images=resnet20.inputs(128)[0].numpy())
    assert run(f"convert {resnet20.weights} --arch {resnet20.arch} --to l1 -o real.pt").code == 0
    outcome = run(
        f"report real.pt --arch {resnet20.arch} --original {resnet20.weights} --data few.npz --batch-size 64 --json"
    )
    told = outcome.json
    assert outcome.code == 0 and told["rewritten"] == len(told["sites"]) == 19
    assert all(site["kappa"] and site["weight_before"] and site["advice"]["fp16_sums"] for site in told["sites"])
    assert told["network"]["ok"]
