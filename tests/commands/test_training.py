"""`normrewrite finetune` as people meet it: files in a folder, what it says, its exit code, what it leaves; and kill -9."""

import itertools
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import normrewrite as nr
from normrewrite.cli import console
from normrewrite.training import checkpoints
from normrewrite.training.loop import Step
from tests.conftest import ROOT, Command
from tests.ranks import start

ARCH = "--arch digits.py:digits_resnet"
TUNE = f"finetune twin.pt {ARCH} --data digits.npz"
STREAMS = """
import torch
from normrewrite.data import Batch
images, labels = torch.ones(20, 1, 8, 8), torch.arange(20) % 10

def of(*batches): return [(images, labels), (images, labels), *batches]
def nan(): return of((images * torch.nan, labels))
def labels_out_of_range(): return of((images, labels + 1))
def wrong_shape(): return of((images.repeat(1, 3, 1, 1), labels))
def raising():
    yield images, labels
    raise OSError("the disk is gone")
def empty(): return []
"""
LOSS = "def absolute(outputs, teacher, labels): return (outputs - teacher).abs().mean()\n"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network as a calibrated layer twin, and data of many kinds."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("digits.pt", "digits.npz", "digits.py"):
        shutil.copy(ROOT / "examples" / name, folder)
    arrays = np.load(folder / "digits.npz")
    images, labels = arrays["images"][:120], arrays["labels"][:120]
    arch = f"{folder / 'digits.py'}:digits_resnet"
    model = nr.load(folder / "digits.pt", arch=arch)
    nr.save(nr.calibrate(nr.convert(model, to="layer", offset=0), torch.from_numpy(images))[0], folder / "twin.pt")
    np.savez(folder / "few.npz", images=images, labels=labels)
    np.savez(folder / "unlabelled.npz", images=images)
    np.savez(folder / "colour.npz", images=np.zeros((4, 3, 8, 8), np.float32))
    np.savez(folder / "wrong.npz", images=images, labels=labels + 1)
    np.savez(folder / "nan.npz", images=np.where(np.arange(120)[:, None, None, None] == 7, np.nan, images))
    np.savez(folder / "infinite.npz", images=np.where(np.arange(120)[:, None, None, None] == 9, np.inf, images))
    np.save(folder / "nan.npy", np.where(np.arange(120)[:, None, None, None] == 7, np.nan, images))
    np.save(folder / "few.npy", images)
    np.save(folder / "flat.npy", images.reshape(120, 64))
    for name in ("few.npz", "few.npy"):
        (folder / f"cut-{name}").write_bytes((folder / name).read_bytes()[:2000])
    (folder / "loss.py").write_text(LOSS)
    (folder / "streams.py").write_text(STREAMS)
    (folder / "empty").mkdir()
    _pictures(folder / "coloured", 2, [(8, 8)])
    _pictures(folder / "mixed", 2, [(8, 8), (9, 8)])
    _pictures(folder / "damaged", 0, [])
    return folder


def _pictures(folder: Path, count: int, sizes: list[tuple[int, int]]) -> None:
    """`count` images of each size, and one that is none."""
    folder.mkdir()
    for i in range(count):
        for size in sizes:
            Image.fromarray(np.full((*size, 3), 40 * i, np.uint8)).save(folder / f"{i}-{size[0]}.png")
    (folder / "damaged.png").write_bytes(b"not a picture")


@pytest.fixture
def folder(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    inside = tmp_path / "inside"
    shutil.copytree(shelf, inside, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(inside)
    return inside


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__"}


def _weights(path: Path | str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return found


def _same(a: Path | str, b: Path | str) -> bool:
    return all(torch.equal(value, _weights(b)[name]) for name, value in _weights(a).items())


# --- from file to file ------------------------------------------------------------------------------------------------


def test_a_twin_is_repaired_and_its_way_back_told(run: Command, folder: Path) -> None:
    done = run(f"{TUNE} --epochs 2 --batch-size 128 -o tuned.pt")
    assert done.code == 0 and "steps on the original in fp32" in done.out and "wrote tuned.pt" in done.out
    assert "revert gives the nearest" in done.out and done.err == ""
    assert {path.name for path in (folder / "tuned.checkpoints").iterdir()} == {"run.json", "finished.json"}
    back = run(f"revert tuned.pt {ARCH}")
    assert back.code == 0 and "trained since the rewrite" in back.out
    again = run(f"finetune tuned.pt {ARCH} --data digits.npz")
    assert again.code == 2 and "was trained since the rewrite" in again.err and "--teacher" in again.err
    assert run(f"finetune tuned.pt {ARCH} --data few.npz --steps 1 --teacher digits.pt -q").code == 0


def test_best_and_last_are_written_with_a_log(run: Command, folder: Path) -> None:
    line = f"{TUNE} --labels --val few.npz --epochs 9 --lr 0.3 --schedule constant --patience 2 --log logs --json"
    done = run(line)
    assert done.code == 0 and done.json["stopped_early"] and done.json["best"] == len(done.json["epochs"]) - 2
    assert done.json["last"] == "twin.finetuned.last.pt" and not _same(done.json["output"], done.json["last"])
    assert all(run(f"inspect {done.json[which]} {ARCH} -q").code == 0 for which in ("output", "last"))
    assert list((folder / "logs").rglob("events.out.tfevents.*"))


def test_half_arithmetic_is_told(run: Command, folder: Path) -> None:
    line = f"{TUNE} --steps 2 --precision fp16-pure --accumulator half:32 --force"
    done = run(line)
    assert done.code == 0 and "in fp16-pure" in done.out and "norms' by half:32" in done.out
    record = run(f"{line} --json").json
    assert (record["accumulator"], record["nonfinite_batches"]) == ("half:32", 0)
    assert all(value.dtype != torch.float16 for value in _weights("twin.finetuned.pt").values())


def test_ranges_of_an_int8_training_reach_the_onnx_file(run: Command, folder: Path) -> None:
    nr.save(nr.convert(nr.load("digits.pt", arch=ARCH.split()[1])), "l1.pt")
    layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 10))
    # A pickled module, which has no room for a manifest.
    torch.save(nr.convert(torch.nn.Sequential(*layers).eval()), "whole.pt")
    options = "--data digits.npz --steps 2 --lr 1e-5 --val few.npz --precision int8 --int8-gradients --int8-keep last"
    for name, arch, kept, count in (("l1", ARCH, "head", 12), ("whole", "", "3", 1)):
        done = run(f"finetune {name}.pt {arch} {options} -o tuned.pt --force --json")
        assert done.code == 0 and done.json["precision"] == "int8" and done.json["ranges"]["kept"] == [kept], done.err
        exported = run(f"export tuned.pt {arch} --input-shape 1,1,8,8 --precision int8 -o tuned.onnx --force --json")
        assert exported.code == 0 and not exported.json["notes"], exported.err
        assert exported.json["nodes"]["QuantizeLinear"] == count, exported.json["nodes"]
        assert run(f"verify tuned.pt tuned.onnx {arch} --data digits.npz -q").code == 0
    bare = run(f"export l1.pt {ARCH} --input-shape 1,1,8,8 --precision int8 -o bare.onnx")
    assert bare.code == 2 and "give --calibrate DATA, or a network that finetune --precision int8" in bare.err


def test_losses_of_every_kind(run: Command, folder: Path) -> None:
    for loss in ("kl", "cross-entropy", "loss.py:absolute", "mse --features 'blocks.*'"):
        done = run(f"finetune twin.pt {ARCH} --data unlabelled.npz --steps 2 --loss {loss} --force --json")
        assert done.code == 0 and done.json["steps"] == 2, done.err


@pytest.mark.parametrize("role", ["--data", "--val"])
def test_one_damaged_image_among_many_is_left_out_and_told(role: str, run: Command, folder: Path) -> None:
    for name, damaged in (("sound", False), ("pictures", True)):
        for label in range(2):
            (folder / name / str(label)).mkdir(parents=True)
            for i in range(4):
                Image.fromarray(np.full((6, 6, 3), 40 * i, np.uint8)).save(folder / name / str(label) / f"{i}.png")
        if damaged:
            (folder / name / "0" / "2.png").write_bytes(b"not a picture")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    torch.save(model.append(torch.nn.Linear(64, 2)), "net.pt")
    data = "--data pictures" if role == "--data" else "--data sound --val pictures"
    line = f"finetune net.pt {data} --mean 0.5 --std 0.5 --labels --epochs 1 --batch-size 4 -o out.pt"
    strict = run(f"{line} --strict")
    assert strict.code == 2 and f"error: {role} pictures/0/2.png: can't be read as an image" in strict.err
    assert not {"out.pt", "out.checkpoints"} & _names(folder)
    done = run(f"{line} --json")
    assert done.code == 0 and done.json["inputs"] == (4 if role == "--data" else 8)
    assert done.json["notes"] == ["left out, as they can't be read: 1 files (pictures/0/2.png)"]


BAD_DATA = {
    "wrong shape": ("colour.npz", r"can't run on images \(2, 3, 8, 8\)"),
    "nan": ("nan.npz", "1 of 120 inputs hold NaN or infinity, the first is number 7"),
    "infinity": ("infinite.npz", "1 of 120 inputs hold NaN or infinity, the first is number 9"),
    "labels out of range": ("wrong.npz", "labels from 1 to 10, .* 10 classes"),
    "no labels": ("unlabelled.npz", "has no labels. Add them, or leave out"),
    "cut": ("cut-few.npz", r"can't be read as \.npz"),
    "npy of a wrong shape": ("flat.npy", r"can't run on images \(2, 64\)"),
    "npy with nan": ("nan.npy --no-labels", "1 of 120 inputs hold NaN or infinity, the first is number 7"),
    "npy": ("few.npy", "has no labels. Add them, or leave out"),
    "npy, cut": ("cut-few.npy", r"can't be read as \.npy"),
    "empty folder": ("empty", "no image in the folder"),
    "nothing but damaged images": ("damaged", "damaged.png: can't be read as an image"),
    "images of several sizes": ("mixed", "images of different sizes"),
    "images of another shape": ("coloured --no-labels", r"can't run on images \(2, 3, 8, 8\)"),
    "nothing there": ("nosuch", "there is no such file"),
    "an empty stream": ("streams.py:empty", "held no batch"),
}


@pytest.mark.parametrize("role", ["--data", "--val"])
@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_serve_are_one_message_and_no_file(
    case: str,
    role: str,
    run: Command,
    folder: Path,
) -> None:
    data, message = BAD_DATA[case]
    before = _names(folder)
    others = "" if role == "--data" else "--data few.npz"
    done = run(f"finetune twin.pt {ARCH} --labels {others} {role} {data} --mean 0.5 --std 0.5 --epochs 1")
    assert done.code == 2 and done.out == "" and re.search(message, done.err) and done.err.count("\n") == 1
    assert re.match("error: (the data|--data)" if role == "--data" else "error: (the validation data|--val)", done.err)
    assert _names(folder) == before


LATER = {
    "nan": "the validation data: images: 20 of 20 inputs hold NaN",
    "labels_out_of_range": "labels from 1 to 10, .* 10 classes",
    "raising": "raised OSError: the disk is gone",
    "wrong_shape": r"can't run on images \(20, 3, 8, 8\)",
}


@pytest.mark.parametrize("role", ["--data", "--val"])
@pytest.mark.parametrize("case", LATER)
def test_a_later_batch_of_a_stream_that_cannot_serve(case: str, role: str, run: Command, folder: Path) -> None:
    """It is met on the way. One that isn't finite costs its step, and is counted; nothing is written for the others."""
    others = "" if role == "--data" else "--data few.npz"
    done = run(f"finetune twin.pt {ARCH} --labels {others} {role} streams.py:{case} --epochs 1 -o out.pt --json")
    if (case, role) == ("nan", "--data"):
        assert done.code == 0 and done.json["skipped_steps"] == 1 and done.json["steps"] == 3
        assert all(bool(torch.isfinite(value).all()) for value in _weights("out.pt").values())
    else:
        assert done.code == 2 and re.search(LATER[case], done.err) and "Traceback" not in done.err
        assert "out.pt" not in _names(folder)


BAD = {
    "no teacher": (f"finetune digits.pt {ARCH} --data few.npz", "no original to learn from"),
    "teacher missing": (f"{TUNE} --teacher nosuch.pt", "nosuch.pt: there is no such file"),
    "output there": (f"{TUNE} -o digits.pt", "exists already. Choose another name"),
    "output there, resumed": (f"{TUNE} -o digits.pt --resume", "exists already. Choose another name"),
    "loss": (f"{TUNE} --loss huber", "there is no such loss"),
    "int8": (f"{TUNE} --int8-gradients", "go with --precision int8: add that"),
    "kept": (f"{TUNE} --precision int8 --int8-keep blocks.9", "'blocks.9' is to be kept, and no module is called so"),
    "lr": (f"{TUNE} --lr -1", "--lr -1.0: a number above zero"),
    "timeout": (f"{TUNE} --timeout 0", "--timeout 0.0: a number above zero"),
    "too large a rate": (f"{TUNE} --lr 1e30 --schedule constant --epochs 50", "not finite 20 times in a row"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_serve_is_one_message_and_no_file(case: str, run: Command, folder: Path) -> None:
    line, message = BAD[case]
    before = _names(folder)
    done = run(line)
    assert done.code == (1 if "rate" in case else 2) and done.out == ""
    assert re.search(message, done.err) and done.err.count("\n") == 1
    assert _names(folder) - before <= {"twin.finetuned.checkpoints"}


def test_the_bar_says_loss_accuracy_and_speed() -> None:
    step = Step(3, 10, 0.12345, 0.971, 512.4)
    assert console.in_words(step) == "loss 0.1235, 97.1 %, 512 inputs/s"
    with console.training(quiet=True) as each:
        each(step)


# --- what stands stays ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--val few.npz", "--val-split 0.5"])
def test_weights_of_the_last_epoch_replace_nothing(option: str, run: Command, folder: Path) -> None:
    Path("tuned.last.pt").write_text("precious")
    line = f"finetune twin.pt {ARCH} --data few.npz {option} --epochs 1 -o tuned.pt"
    done = run(line)
    assert done.code == 2 and "output tuned.last.pt exists already" in done.err
    assert Path("tuned.last.pt").read_text() == "precious" and not Path("tuned.checkpoints").exists()
    assert run(line.replace(option, "")).code == 0 and Path("tuned.last.pt").read_text() == "precious"


@pytest.mark.parametrize("option", ["--log out", "--val out", "--teacher out", "--data out"])
def test_the_output_is_no_other_file_of_the_command(option: str, run: Command, folder: Path) -> None:
    if "log" not in option:
        shutil.copy("few.npz", "out")
    before = _names(folder)
    done = run(f"finetune twin.pt {ARCH} --data few.npz {option} -o ./out --force")
    assert done.code == 2 and f"{option.split()[0]} is the same file" in done.err and _names(folder) == before


def test_the_second_of_two_at_once_says_so(run: Command, folder: Path) -> None:
    """Claimed by this process, as by one that trains; a killed one's claim is the system's to end."""
    line = f"finetune twin.pt {ARCH} --data few.npz --steps 1 -o tuned.pt"
    with checkpoints.claimed(Path("tuned.checkpoints"), Path("tuned.pt")):
        for option in ("", " --force", " --resume"):
            second = run(line + option)
            assert second.code == 2 and "another finetune is at work on it" in second.err
        assert not list(Path("tuned.checkpoints").iterdir())
    assert not Path("tuned.checkpoints").exists() and run(line).code == 0


def test_another_s_output_that_came_meanwhile_is_kept(
    run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def appear(step: Step) -> None:
        Path("tuned.pt").write_text("precious")

    monkeypatch.setattr(console, "training", lambda quiet: nullcontext(appear))
    done = run(f"finetune twin.pt {ARCH} --data few.npz --steps 1 -o tuned.pt")
    assert done.code == 2 and "exists already" in done.err and Path("tuned.pt").read_text() == "precious"
    assert list(Path("tuned.checkpoints").glob("step-*"))  # nothing of the training is lost


def test_where_a_twin_comes_from_stays_known(run: Command, folder: Path) -> None:
    assert run(f"convert digits.pt {ARCH} --to l1 -o l1.pt").code == 0
    line = f"finetune l1.pt {ARCH} --data few.npz --labels --steps 2 --lr 0.01 --seed 5 --val-split 0.2 -o tuned.pt"
    assert run(line).code == 0
    before, after = (torch.load(name, weights_only=True)["normrewrite"] for name in ("l1.pt", "tuned.pt"))
    assert all(after[name] == before[name] for name in ("original", "arch", "report"))
    assert after["steps"][:-1] == before["steps"]
    told = after["steps"][-1]
    words = f"finetune l1.pt {ARCH} --data few.npz --labels --steps 2 --lr 0.01 --val-split 0.2 --seed 5".split()
    assert sorted(told["command"]) == sorted(words) and told["seed"] == 5 and told["files"]["data"]["file"] == "few.npz"
    for options in ("", ARCH):
        audit = run(f"verify --manifest tuned.pt --original digits.pt {options}")
        assert audit.code == 0, audit.out
    assert run(f"verify --manifest tuned.pt --original l1.pt {ARCH}").code == 1


def test_report_of_a_trained_twin_is_against_the_original_or_says_that_it_is_not(run: Command, folder: Path) -> None:
    """Never against the nearest norms, which are the trained ones: that would always be the same function."""
    assert run(f"convert digits.pt {ARCH} --to l1 -o l1.pt").code == 0
    assert run(f"finetune l1.pt {ARCH} --data few.npz --labels --steps 2 --lr 0.05 -o tuned.pt").code == 0
    beside = run(f"report tuned.pt {ARCH} --data few.npz --json").json
    assert beside["original"] == "given" and beside["files"]["original"]["file"] == "digits.pt"
    assert not beside["network"]["ok"] and beside["network"]["outputs"][0]["max_abs"] > 0.1
    same = run(f"report tuned.pt {ARCH} --data few.npz --original digits.pt --json").json
    assert same["network"] == beside["network"]
    shutil.move("digits.pt", "elsewhere.pt")
    shutil.copy("l1.pt", "digits.pt")  # of that name, and not the original
    for options in ("", "-o page.html --text"):
        alone = run(f"report tuned.pt {ARCH} --data few.npz {options}")
        assert alone.code == 0 and "same function" not in alone.out and "give it as --original" in alone.out
    assert run(f"report tuned.pt {ARCH} --json").json["original"] == ""


# --- resumed ----------------------------------------------------------------------------------------------------------


def test_resume_starts_afresh_and_knows_what_is_finished(run: Command, folder: Path) -> None:
    line = f"{TUNE} --epochs 2 --batch-size 128 -o tuned.pt --resume"
    first = run(line)
    weights = Path("tuned.pt").read_bytes()
    second = run(line)
    assert first.code == second.code == 0 and "there is nothing to resume" in second.out
    assert Path("tuned.pt").read_bytes() == weights
    assert run(f"{line} --json").json["steps"] == 6
    longer = run(line.replace("--epochs 2", "--epochs 3"))
    assert longer.code == 2 and "holds another run: epochs 2 then, 3 now" in longer.err


@pytest.mark.parametrize(("at", "said"), [(1, ""), (5, ": --resume goes on from stopped.checkpoints/step-00000004")])
def test_ctrl_c_says_how_to_go_on(
    at: int, said: str, run: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(step: Step) -> None:
        if step.step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(console, "training", lambda quiet: nullcontext(stop))
    stopped = run(f"{TUNE} --batch-size 128 --epochs 2 --save-every 2 -o stopped.pt")
    assert (stopped.code, stopped.err.strip()) == (130, f"interrupted{said}") and not Path("stopped.pt").exists()


KILLED = f"finetune twin.pt {ARCH} --data few.npz --batch-size 8 --epochs 6 --flip --crop 1 --ema 0.9 --val-split 0.2"


@pytest.mark.parametrize("moments", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_to_the_same_bits(moments: int, run: Command, folder: Path) -> None:
    """Half of the moments come at any time, half while a checkpoint's file is being written."""
    assert run(f"{KILLED} -o whole.pt -q").code == 0
    line, draw = f"{KILLED} --save-every 2 --resume -o killed.pt", random.Random(moments)
    kills = moments // 2 * [_killed_at_any_time, _killed_in_a_write]
    draw.shuffle(kills)
    reached = [kill(line, folder, draw) for kill in kills]
    assert reached == sorted(reached) and 0 < reached[-1] < 72 and not Path("killed.pt").exists()
    done = run(f"{line} --json")
    assert done.code == 0 and done.json["steps"] == 72 and _same("killed.pt", "whole.pt")
    assert {path.name for path in (folder / "killed.checkpoints").iterdir()} == {"run.json", "finished.json"}


def _newest(folder: Path) -> int:
    return max((int(path.name[5:]) for path in folder.glob("killed.checkpoints/step-*[0-9]")), default=0)


def _killed_at_any_time(line: str, folder: Path, draw: random.Random) -> int:
    """Some milliseconds after some further checkpoint; the step of the newest then."""
    goal, patience = _newest(folder) + 2 * draw.randint(1, 3), time.monotonic() + 60
    command = start(line, folder / "log")
    while _newest(folder) < goal and command.process.is_alive() and time.monotonic() < patience:
        pass
    time.sleep(draw.uniform(0, 0.03))
    command.send(signal.SIGKILL)
    assert command.end() == -signal.SIGKILL, command.said
    assert _newest(folder) >= goal
    return _newest(folder)


def _killed_in_a_write(line: str, folder: Path, draw: random.Random) -> int:
    """With a file of a checkpoint cut at some byte: that checkpoint is lost, the one before it whole."""
    before, files = _newest(folder), 6  # model, optimiser, random states; schedule, progress, averaged weights
    at = draw.randint(1, 2 * files)
    command = start(line, folder / "log", partial(_dies_writing, at, draw.random()))
    assert command.end() == -signal.SIGKILL, command.said
    assert _newest(folder) == before + 2 * ((at - 1) // files)
    assert list(folder.glob("killed.checkpoints/step-*.tmp"))
    return _newest(folder)


def _dies_writing(at: int, share: float) -> None:
    """From here on: kill -9 at the `at`-th file, of which a part is there."""
    save, count = torch.save, itertools.count(1)

    def dying(content: object, path: str, *rest: object, **more: object) -> None:
        save(content, path, *rest, **more)  # type: ignore[arg-type]
        if next(count) == at:
            os.truncate(path, int(share * Path(path).stat().st_size))
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


@pytest.mark.parametrize("log", ["few.npz", "few.npz/logs", "/proc/logs"])
def test_a_log_that_is_no_folder_is_a_fault_of_the_request(run: Command, folder: Path, log: str) -> None:
    outcome = run(f"{TUNE} --epochs 1 --log {log}")
    assert outcome.code == 2 and f"--log {log}" in outcome.err, outcome
