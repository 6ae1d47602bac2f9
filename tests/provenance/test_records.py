"""Manifests as people meet them: digests and history in the file, verify --manifest, diff, convert --replay."""

import copy
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import normrewrite as nr
from normrewrite.commands import words
from normrewrite.commands.source import Source
from normrewrite.diagnostics.exactness import Probe, measured
from normrewrite.options.calibrate import Calibrate
from normrewrite.provenance import digests, manifest
from tests.conftest import ROOT, Command, convert_file, enter_copy

ARCH = "--arch digits.py:digits_resnet"
WHOLE = f"verify --manifest twin.pt --original digits.pt {ARCH}"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network, and its l1 twin as a file with everything that a manifest may hold."""
    folder = tmp_path_factory.mktemp("records")
    for name in ("digits.pt", "digits.py", "digits.npz"):
        shutil.copy(ROOT / "examples" / name, folder)
    torch.save(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval(), folder / "module.pt")
    convert_file(folder / "module.pt", output=folder / "pickled.pt", manifest=folder / "pickled.json")
    digits: Any = {"arch": f"{folder / 'digits.py'}:digits_resnet", "exclude": ("stem.*",)}
    convert_file(folder / "digits.pt", **digits, output=folder / "twin.pt", manifest=folder / "twin.json")
    convert_file(folder / "digits.pt", **digits, output=folder / "twin.safetensors")
    sys.modules.pop("normrewrite_arch_digits", None)
    return folder


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return enter_copy(shelf, tmp_path, monkeypatch)


def loaded(path: str = "twin.pt") -> Record:
    content: Record = torch.load(path, weights_only=True)
    return content


def saved(content: Record, path: str = "twin.pt") -> None:
    torch.save(content, path)


# --- what is in a manifest --------------------------------------------------------------------------------------------


def test_manifest_tells_where_the_twin_comes_from(folder: Path) -> None:
    record = loaded()["normrewrite"]
    original = (folder / "digits.pt").read_bytes()
    assert record["original"] == {
        "file": "digits.pt",
        "bytes": len(original),
        "sha256": hashlib.sha256(original).hexdigest(),
    }
    assert record["arch"] == "digits.py:digits_resnet"  # its folder is nobody's business
    (step,) = record["steps"]
    assert step["command"] == ["convert", "digits.pt", "--arch", record["arch"], "--to", "l1", "--exclude", "stem.*"]
    assert (
        step["seed"] == 0 and step["versions"]["torch"] == torch.__version__ and record["versions"] == step["versions"]
    )
    assert json.loads((folder / "twin.json").read_text()) == json.loads(json.dumps(record))


def test_digests_are_sha256_of_type_shape_and_bytes(folder: Path) -> None:
    content = loaded()
    weight = content["state_dict"]["stem.0.0.weight"]
    head = f"torch.float32 {tuple(weight.shape)}\n".encode()
    expected = hashlib.sha256(head + weight.numpy().tobytes()).hexdigest()
    assert content["normrewrite"]["tensors"]["stem.0.0.weight"] == expected
    assert content["normrewrite"]["tensors"].keys() == content["state_dict"].keys()


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3).half(),
        torch.zeros(3, 2),
        torch.full((2, 3), -0.0),
        torch.zeros(6),
        torch.zeros(2, 3).bfloat16(),
    ],
    ids=["type", "shape", "sign of zero", "rank", "other type of this width"],
)
def test_digest_tells_tensors_apart_that_compare_alike(other: torch.Tensor) -> None:
    assert digests.of_tensor(other) != digests.of_tensor(torch.zeros(2, 3))


def test_digest_does_not_depend_on_strides() -> None:
    x = torch.randn(4, 6)
    assert digests.of_tensor(x.T) == digests.of_tensor(x.T.contiguous()) != digests.of_tensor(x)
    for odd in (torch.zeros(()), torch.zeros(0), torch.ones(2, dtype=torch.complex64).conj(), torch.eye(2).to_sparse()):
        assert digests.of_tensor(odd) == digests.of_tensor(odd.clone())


@pytest.mark.parametrize("to", ["l1", "linf", "topk:2", "range", "renorm", "frozen"])
def test_error_is_that_of_a_float64_reference(small: Callable[[], nn.Module], to: str) -> None:
    """The reference is torch's own batch norm in float64; a scale that is one percent off shows."""
    model = small()
    twin, report = nr.plan(model, to).apply()
    for site in report.rewritten:
        old, new = (network.get_submodule(site.names[0]) for network in (model, twin))
        x = old.running_mean.view(1, -1, 1, 1) + torch.randn(64, 8, 1, 1)  # type: ignore[union-attr, operator]
        expected = copy.deepcopy(old).double()(x.double())
        apart = float((new.eval()(x) - expected).detach().abs().max() / max(1.0, expected.detach().abs().max()))
        assert site.error is not None and 0 < site.error < 3e-6 and abs(site.error - apart) < 1e-6
    assert [entry["error"] for entry in manifest.describe(twin)["sites"]] == [site.error for site in report.rewritten]


def test_error_of_a_false_norm_is_large(small: Callable[[], nn.Module]) -> None:
    model = small()
    new = nr.convert(model)[1]
    new.running_scale *= 1.01  # type: ignore[operator]
    difference, error = measured((None, model[1]), (None, new), "", Probe())  # type: ignore[index]
    assert difference is not None and error is not None and min(difference, error) > 1e-3


@pytest.mark.parametrize("to", ["bwn", "wn", "wn:mean-bn"])
def test_error_of_weight_norms(small: Callable[[], nn.Module], to: str) -> None:
    _, report = nr.plan(small().double(), to).apply()
    assert all(site.error is not None and site.error < 1e-13 for site in report.rewritten)
    _, report = nr.plan(small(), to).apply()
    assert all(site.error is not None and 1e-9 < site.error < 5e-6 for site in report.rewritten)


def test_history_grows_with_every_command(run: Command, folder: Path) -> None:
    assert run(f"calibrate twin.pt {ARCH} --data digits.npz --batch-size 100").code == 0
    record = loaded("twin.calibrated.pt")["normrewrite"]
    assert [step["command"][0] for step in record["steps"]] == ["convert", "calibrate"]
    assert record["steps"][1]["command"][-4:] == ["--data", "digits.npz", "--batch-size", "100"]
    assert record["steps"][1]["files"]["data"] == digests.of_file(folder / "digits.npz")
    assert record["original"]["file"] == "digits.pt"  # and not twin.pt
    assert all(entry["error"] is not None and entry["calibrated"] for entry in record["sites"])
    assert record["report"]["kept"] == 1
    assert run(f"verify --manifest twin.calibrated.pt --original digits.pt {ARCH}").code == 0
    assert run(f"revert twin.calibrated.pt {ARCH} -o back.pt").code == 0
    assert "report" not in loaded("back.pt")["normrewrite"]


def test_numbers_of_a_recorded_command_keep_their_digits(folder: Path) -> None:
    options = Calibrate(model=folder / "digits.pt", data="digits.npz", mean=[0.49139968, 0.5])
    step = words.step(Source.of(options), options)
    assert step["command"][-2:] == ["--mean", "0.49139968,0.5"]


# --- verify --manifest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "verify --manifest twin.pt",
        "verify --manifest twin.safetensors",
        "verify twin.pt --manifest twin.json",
        "verify twin.safetensors --manifest twin.pt",
        WHOLE,
        WHOLE.replace("twin.pt", "twin.safetensors"),
        "verify pickled.pt --manifest pickled.json --original module.pt",
    ],
)
def test_untouched_files_pass(run: Command, folder: Path, line: str) -> None:
    outcome = run(f"{line} --json")
    assert outcome.code == 0 and outcome.json["ok"] and outcome.json["checks"] > 10
    assert run(line).out.rstrip().splitlines()[-1].startswith("same: nothing that the manifest covers has changed")


def flip(content: Record, name: str) -> None:
    """The lowest bit of a tensor's first number."""
    content["state_dict"][name].view(-1)[:1].view(torch.uint8)[0] ^= 1


TENSORS = {
    "head.weight": "weights",
    "blocks.0.body.0.1.running_scale": "statistics",
    "blocks.0.body.0.1.running_mean": "statistics",
    "blocks.0.body.0.1.num_batches_tracked": "statistics",
    "blocks.0.body.0.1.origin.running_var": "kept of the original",
    "stem.0.1.running_var": "statistics",
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_flipped_bit_in_a_tensor_is_told(run: Command, folder: Path, name: str) -> None:
    content = loaded()
    flip(content, name)
    saved(content)
    outcome = run("verify --manifest twin.pt --json")
    told = [(row["what"], row["name"], row["told"]) for row in outcome.json["failed"]]
    assert outcome.code == 1 and told == [("tensor", name, f"{TENSORS[name]}: bytes differ")]
    assert name in run("verify --manifest twin.pt").out


@pytest.mark.parametrize("name", ["twin.pt", "twin.safetensors"])
def test_any_flipped_byte_of_the_file_is_told(run: Command, folder: Path, name: str) -> None:
    """Bytes drawn all over the file: a failed check or an error; unless it is padding, and every tensor is the same."""
    path = folder / name
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole), 24):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        code = run(f"verify --manifest {name}").code
        assert code in (1, 2) or (
            code == 0 and run(f"diff {name} {'twin.safetensors' if name == 'twin.pt' else 'twin.pt'}").code == 0
        )


FIELDS: dict[str, Callable[[Record], object]] = {
    "figure": lambda r: r["sites"][0].update(difference=1e-9),
    "error": lambda r: r["sites"][0].update(error=1e-9),
    "gain": lambda r: r["sites"][0].update(gain="paper"),
    "version": lambda r: r["versions"].update(torch="1.0"),
    "writer": lambda r: r.update(normrewrite="9.9"),
    "original": lambda r: r["original"].update(file="another.pt"),
    "seed": lambda r: r["steps"][0].update(seed=1),
    "command": lambda r: r["steps"][0]["command"].append("--trust"),
    "reason": lambda r: r["report"]["sites"][0].update(reason="none"),
    "new field": lambda r: r.update(verified=True),
    "digest": lambda r: r.update(sha256="0" * 64),
    "digest of a tensor": lambda r: r["tensors"].update({"head.weight": "0" * 64}),
    "forgotten tensor": lambda r: r["tensors"].pop("head.weight"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_field_of_the_manifest_is_told(run: Command, folder: Path, field: str) -> None:
    content = loaded()
    FIELDS[field](content["normrewrite"])
    saved(content)
    outcome = run("verify --manifest twin.pt --json")
    assert outcome.code == 1 and "manifest" in [row["what"] for row in outcome.json["failed"]]


def resealed(change: Callable[[Record], object]) -> None:
    """Tampering by one who knows the format: the record's digest fits again."""
    content = loaded()
    change(content["normrewrite"])
    content["normrewrite"]["sha256"] = digests.of_record(content["normrewrite"])
    saved(content)


DERIVED: dict[str, tuple[Callable[[Record], object], str, str]] = {
    "gain": (lambda r: r["sites"][0].update(calibrated=True), "", "doesn't fit --arch"),
    "class": (
        lambda r: r["sites"][0].update(was="BatchNorm3d"),
        "was 'BatchNorm3d', and the twin says 'BatchNorm2d'",
        "",
    ),
    "figure": (lambda r: r["sites"][0].update(difference=0.5), "0.5, measured again", ""),
    "error": (lambda r: r["sites"][0].update(error=0.5), "0.5, measured again", ""),
    "original": (
        lambda r: r["original"].update(sha256="0" * 64),
        "another file than 'digits.pt' that was rewritten",
        "",
    ),
    "no original": (lambda r: r.pop("original"), "the manifest names no original", ""),
}


@pytest.mark.parametrize("case", DERIVED)
def test_what_the_files_tell_otherwise_is_told_though_the_digest_fits(run: Command, folder: Path, case: str) -> None:
    change, said, error = DERIVED[case]
    resealed(change)
    outcome = run(f"{WHOLE} --json")
    if error:
        assert outcome.code == 2 and error in outcome.err
    else:
        assert outcome.code == 1 and said in str(outcome.json["failed"])
        assert "manifest" not in [row["what"] for row in outcome.json["failed"]]


def test_another_original_is_told(run: Command, folder: Path) -> None:
    state = torch.load("digits.pt", weights_only=True)
    state["stem.0.1.weight"][0] += 1e-3
    torch.save(state, "digits.pt")
    outcome = run(f"{WHOLE} --json")
    told = {(row["what"], row["name"]) for row in outcome.json["failed"]}
    assert outcome.code == 1 and told == {("original", "digits.pt"), ("original", "stem.0.1.weight")}


def test_trained_twin_says_that_its_original_is_gone(run: Command, folder: Path) -> None:
    twin = nr.load("twin.pt", arch="digits.py:digits_resnet")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter *= 1.01
    nr.save(twin, "trained.pt")
    assert run(f"verify --manifest trained.pt {ARCH}").code == 0
    outcome = run(f"verify --manifest trained.pt {ARCH} --original digits.pt --json")
    assert [row["told"] for row in outcome.json["failed"]] == ["the manifest names no original"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("verify --manifest digits.pt", "digits.pt: carries no manifest"),
        (
            "verify --manifest pickled.pt",
            "carries no manifest. .* a pickled module: those have theirs in a file of its own",
        ),
        ("verify --manifest twin.json", "is a manifest alone. Name the model .* verify MODEL --manifest twin.json"),
        ("verify --manifest nosuch.pt", "there is no such file"),
        ("verify twin.pt --manifest nosuch.json", "there is no such file"),
        ("verify twin.pt --manifest digits.py", "digits.py"),
        ("verify twin.pt --manifest old.json", "carries no digests"),
        ("verify twin.pt --manifest text.json", "can't be read as JSON"),
        ("verify twin.pt --manifest deep.json", "can't be read as JSON"),
        ("verify twin.pt --manifest list.json", "manifest is no record of sites"),
        ("verify --manifest twin.pt --original nosuch.pt", "nosuch.pt"),
        ("verify", "Missing argument 'MODEL'"),
        (f"verify twin.pt {ARCH}", "Missing argument 'OTHER', or option '--manifest'"),
        ("verify twin.pt digits.pt --manifest twin.json", "one of the two"),
    ],
)
def test_what_can_t_be_checked(run: Command, folder: Path, line: str, said: str) -> None:
    (folder / "old.json").write_text(json.dumps({"normrewrite": "0.1.0", "format": 1, "sites": []}))
    (folder / "text.json").write_text("no manifest")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "list.json").write_text("[1]")
    outcome = run(line)
    assert outcome.code == 2 and re.search(said, " ".join(outcome.err.split())), outcome.err


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        ("original", "digits.pt"),
        ("original", {"file": 3}),
        ("arch", ["os:system"]),
        ("arch_args", [1]),
        ("steps", {}),
        ("steps", [{"command": "rm -rf ."}]),
        ("steps", [{"command": ["convert"], "files": {"data": 5}}]),
        ("versions", {"torch": 2}),
        ("tensors", {"a": None}),
        ("sha256", 5),
        ("report", {"sites": [{"names": []}]}),
        ("sites", [{"names": ["1"], "to": "l1", "gain": "exact", "difference": "none"}]),
    ],
)
def test_fields_of_another_form_are_refused(field: str, odd: object) -> None:
    with pytest.raises(nr.NormRewriteError, match=r"^here: .*manifest"):
        manifest.check({"format": 1, "sites": [], field: odd}, "here")


# --- a manifest is not believed ---------------------------------------------------------------------------------------


def test_what_a_manifest_names_is_imported_by_trust_alone(run: Command, folder: Path) -> None:
    (folder / "evil.py").write_text(
        "from pathlib import Path\nPath('ran').touch()\nfrom digits import digits_resnet as net\n"
    )
    resealed(lambda record: record.update(arch="evil.py:net"))
    for line in (
        "verify --manifest twin.pt",
        f"{WHOLE}",
        "diff twin.pt twin.json",
        f"convert digits.pt {ARCH} --replay twin.pt",
    ):
        run(line)
        assert not (folder / "ran").exists()
    outcome = run("inspect twin.pt")
    assert outcome.code == 2 and not (folder / "ran").exists()
    assert "names 'evil.py:net', and nothing of that was imported" in outcome.err
    assert run("inspect twin.pt --trust").code == 0 and (folder / "ran").exists()


def test_arch_of_the_manifest_serves_by_trust(run: Command, folder: Path) -> None:
    unnamed = run("verify --manifest twin.pt --original digits.pt --trust")
    assert unnamed.code == 2  # digits.pt has no manifest to name it
    outcome = run("verify --manifest twin.pt --trust --json")
    assert outcome.code == 0 and outcome.json["unchecked"] == ["the original's file: give it as --original"]


def test_files_without_the_new_fields_still_load(run: Command, folder: Path) -> None:
    content = loaded()
    record = content["normrewrite"]
    content["normrewrite"] = {key: record[key] for key in ("normrewrite", "format", "torch", "sites", "report")}
    for entry in content["normrewrite"]["sites"]:
        del entry["error"]
    saved(content, "old.pt")
    assert run(f"verify digits.pt old.pt {ARCH} --data digits.npz").code == 0
    assert run("diff old.pt twin.pt").code == 0
    assert "carries no digests" in run("verify --manifest old.pt").err
    assert run(f"revert old.pt {ARCH} -o back.pt").code == 0 and run("diff back.pt digits.pt").code == 0


# --- diff -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b"),
    [("twin.pt", "twin.safetensors"), ("twin.pt", "twin.json"), ("twin.json", "twin.json"), ("digits.pt", "digits.pt")],
)
def test_diff_of_the_same(run: Command, folder: Path, a: str, b: str) -> None:
    outcome = run(f"diff {a} {b} --json")
    assert outcome.code == 0 and outcome.json["same"] and not outcome.json["tensors"]
    assert run(f"diff {a} {b}").out.startswith("same: ")


def test_diff_tells_how_much(run: Command, folder: Path) -> None:
    content = loaded()
    weight = content["state_dict"]["head.weight"]
    largest = float(weight.abs().max())
    weight.view(-1)[:3] += 0.5
    saved(content, "other.pt")
    outcome = run("diff twin.pt other.pt --json")
    (row,) = outcome.json["tensors"]
    assert outcome.code == 1 and (row["name"], row["elements"]) == ("head.weight", 3)
    assert row["largest"] == pytest.approx(0.5) and row["relative"] == pytest.approx(0.5 / float(weight.abs().max()))
    assert largest > 0 and "1 of 80 tensors" in run("diff twin.pt other.pt").out


def test_diff_of_targets(run: Command, folder: Path) -> None:
    assert run(f"convert digits.pt {ARCH} --to linf --rule stem.*=range --gain paper").code == 0
    outcome = run("diff twin.pt digits.linf.pt --json")
    sites = {row["name"]: (row["a"], row["b"]) for row in outcome.json["sites"]}
    assert outcome.code == 1 and len(sites) == 9
    assert sites["stem.0.1"] == (None, "BatchNorm2d -> range, gain paper")
    assert sites["blocks.0.body.0.1"] == ("BatchNorm2d -> l1", "BatchNorm2d -> linf, gain paper")
    assert run("diff twin.json digits.linf.pt").code == 1  # digests suffice to tell that


def test_diff_of_tensors_of_other_shapes_and_values(run: Command, folder: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.ones(1)}, "a.pt")
    torch.save({"a": torch.zeros(3), "b": torch.tensor([float("nan"), float("nan")]), "d": torch.ones(1)}, "b.pt")
    rows = {row["name"]: row for row in run("diff a.pt b.pt --json").json["tensors"]}
    assert rows["a"]["a"] == "float32 (2,)" and rows["a"]["b"] == "float32 (3,)" and rows["a"]["elements"] is None
    assert rows["b"]["elements"] == 1 and rows["b"]["largest"] is None  # infinite, which JSON has no word for
    assert rows["c"]["b"] == "–" and rows["d"]["a"] == "–"


def test_diff_refuses_code(run: Command, folder: Path) -> None:
    torch.save(nn.DataParallel(nn.Linear(2, 2)), "parallel.pt")
    outcome = run("diff parallel.pt digits.pt")
    assert outcome.code == 2 and "not on the allow-list" in outcome.err


# --- convert --replay -------------------------------------------------------------------------------------------------


@pytest.fixture
def other(folder: Path) -> str:
    """Another checkpoint of the same architecture."""
    state = torch.load("digits.pt", weights_only=True)
    torch.save({name: value * 1.5 if value.is_floating_point() else value for name, value in state.items()}, "other.pt")
    return f"convert other.pt {ARCH}"


@pytest.mark.parametrize("record", ["twin.pt", "twin.json", "twin.safetensors"])
def test_replay_is_the_same_rewrite(run: Command, other: str, record: str) -> None:
    assert run(f"{other} --to l1 --exclude stem.* -o by-hand.pt").code == 0
    outcome = run(f"{other} --replay {record} --input-shape 2,1,8,8 --json")
    assert (
        outcome.code == 0
        and outcome.json["rewritten"] == 8
        and outcome.json["kept"] == 1
        and outcome.json["network"]["ok"]
    )
    assert run("diff by-hand.pt other.replayed.pt").code == 0
    by_hand, replayed = (loaded(name)["normrewrite"]["sites"] for name in ("by-hand.pt", "other.replayed.pt"))
    assert by_hand == replayed
    assert loaded("other.replayed.pt")["normrewrite"]["steps"][0]["command"][4:6] == ["--replay", record]
    assert run(f"verify --manifest other.replayed.pt --original other.pt {ARCH}").code == 0
    assert run(f"revert other.replayed.pt {ARCH} -o back.pt").code == 0 and run("diff back.pt other.pt").code == 0


def test_replay_leaves_calibration_to_the_data(run: Command, other: str) -> None:
    assert run(f"calibrate twin.pt {ARCH} --data digits.npz").code == 0
    outcome = run(f"{other} --replay twin.calibrated.pt")
    assert outcome.code == 0 and "was calibrated, which is of its own weights" in outcome.out
    assert not any(entry["calibrated"] for entry in loaded("other.replayed.pt")["normrewrite"]["sites"])
    outcome = run(f"{other} --replay twin.calibrated.pt --calibrate digits.npz --force")
    assert outcome.code == 0 and "8 sites calibrated" in outcome.out


@pytest.mark.parametrize("to", ["bwn", "wn:mean-bn", "layer", "none", "renorm"])
def test_replay_of_every_kind_of_target(run: Command, other: str, to: str) -> None:
    assert run(f"convert digits.pt {ARCH} --to {to} --input-shape 1,1,8,8 -o digits.twin.pt").code == 0
    assert run(f"{other} --to {to} --input-shape 1,1,8,8 -o by-hand.pt").code == 0
    outcome = run(f"{other} --replay digits.twin.pt")
    assert outcome.code == 0, outcome
    assert run("diff by-hand.pt other.replayed.pt").code == 0


NET = """
from torch import nn
def wide(): return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6))
def flat(): return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4))
def deep(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
def short(): return nn.Sequential(nn.Conv2d(1, 4, 3))
"""


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("wide", "1 had 4 channels, here 6"),
        ("flat", "1 was BatchNorm2d, here BatchNorm1d"),
        ("deep", "3 is not in the manifest"),
        ("short", "rewrites '1', and the architecture has no norm of that name"),
    ],
)
def test_replay_refuses_sites_that_do_not_match(run: Command, folder: Path, net: str, said: str) -> None:
    (folder / "net.py").write_text(NET)
    namespace: Record = {}
    exec(NET, namespace)
    torch.save(namespace[net]().state_dict(), "net.pt")
    outcome = run(f"convert net.pt --arch net.py:{net} --replay pickled.json")
    assert outcome.code == 2 and said in outcome.err and not (folder / "net.replayed.pt").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--replay digits.pt", "carries no manifest"),
        ("--replay nosuch.json", "there is no such file"),
        ("--replay twin.json --to l1", "--to is for --to|Leave one"),
        ("--replay twin.json --rule stem.*=l1", "--rule is for --to"),
        ("--replay twin.json --gain paper", "--gain is for --to"),
        ("--replay twin.json --folded", "--folded is for --to"),
        ("--replay twin.json --expect 9", "expected 9 sites to be rewritten, found 8"),
        ("--replay twin.json -o twin.pt", "exists already"),
        ("--replay twin.json --manifest twin.json", "exists already"),
        ("", "Missing option '--to', or '--replay'"),
    ],
)
def test_replay_asks_for_what_it_needs(run: Command, folder: Path, options: str, said: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    outcome = run(f"convert digits.pt {ARCH} {options}")
    assert outcome.code == 2 and re.search(said, " ".join(outcome.err.split())), outcome.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
