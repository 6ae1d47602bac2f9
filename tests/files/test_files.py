"""Model files: written whole or not at all, and read back as they were."""

import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normrewrite as nr
from normrewrite import files
from tests.conftest import TARGETS

Make = Callable[[], nn.Module]
FORMS: list[tuple[files.Form, str]] = [
    ("state_dict", ".pt"),
    ("state_dict", ".safetensors"),
    ("safetensors", ".safetensors"),
    ("safetensors", ".pt"),
    ("module", ".pt"),
    ("module", ".safetensors"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_bits(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> None:
    left, right = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and tensor.shape == right[name].shape, name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize("form", ["state_dict", "module"])
def test_what_was_loaded_outlives_its_file(form: files.Form, small: Make) -> None:
    """A file that is written over in place takes the memory of whoever has it mapped."""
    model = small()
    nr.save(model, "model.pt", form=form)
    loaded = nr.load("model.pt", arch=small if form == "state_dict" else None)
    os.truncate("model.pt", 0)
    assert_same_bits(loaded, model)


# --- writing ----------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[str], None]:
    """A writer that comes half-way."""

    def write(path: str) -> None:
        Path(path).write_bytes(b"half")
        raise error

    return write


@pytest.mark.parametrize("old", [b"old", None])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device. Nothing was written"),
        (RuntimeError("[enforce fail] unexpected pos 64 vs 0\nframe #0"), "unexpected pos 64 vs 0. Nothing was"),
        (OSError(), "Nothing was written"),  # an error without words
        (RuntimeError(""), "Nothing was written"),
        (ValueError("a fault of ours"), None),
        (KeyboardInterrupt(), None),
        (MemoryError(), None),
    ],
)
def test_failure_leaves_the_old_file_and_no_other(
    folder: Path, error: BaseException, said: str | None, old: bytes | None
) -> None:
    path = folder / "model.pt"
    if old is not None:
        path.write_bytes(old)
    before = listing(folder)
    with pytest.raises(type(error) if said is None else nr.NormRewriteError, match=said):
        files.write_atomically(path, failing(error), force=True)
    assert listing(folder) == before


def test_readers_see_the_old_file_until_the_new_one_is_whole(folder: Path) -> None:
    path = folder / "model.pt"
    path.write_bytes(b"old")

    def write(temporary: str) -> None:
        assert Path(temporary).parent == folder  # a rename is atomic within one file system alone
        Path(temporary).write_bytes(b"new")
        assert path.read_bytes() == b"old"

    files.write_atomically(path, write, force=True)
    assert listing(folder) == {"model.pt": b"new"}


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_permissions_follow_the_umask(small: Make, mask: int, name: str) -> None:
    before = os.umask(mask)
    try:
        nr.save(small(), name)
        assert os.umask(mask) == mask  # and the mask itself is left alone
    finally:
        os.umask(before)
    assert Path(name).stat().st_mode & 0o777 == 0o666 & ~mask


def on_folder(folder: Path) -> None:
    (folder / "out.pt").mkdir()


def on_file(folder: Path) -> None:
    (folder / "out.pt").write_bytes(b"old")


@pytest.mark.parametrize(
    ("path", "force", "prepare", "said"),
    [
        ("out.pt", False, on_file, "output out.pt exists already. Choose another name with -o, or .* --force"),
        ("out.pt", False, on_folder, "output out.pt is a folder. Name a file"),
        ("out.pt", True, on_folder, "output out.pt is a folder. Name a file"),
        ("nosuch/out.pt", True, None, "output nosuch/out.pt: there is no folder nosuch. Make it first"),
        ("out.pt/out.pt", True, on_file, "output out.pt/out.pt: there is no folder out.pt"),
        ("/proc/normrewrite.pt", True, None, "output /proc/normrewrite.pt: "),  # not even root may write there
        (f"{'x' * 300}.pt", False, None, "output x+.pt: "),
    ],
)
def test_where_nothing_can_be_written(
    folder: Path, small: Make, path: str, force: bool, prepare: Callable[[Path], None] | None, said: str
) -> None:
    if prepare is not None:
        prepare(folder)
    before = [(entry.name, entry.stat().st_mtime_ns) for entry in folder.iterdir()]
    with pytest.raises(nr.NormRewriteError, match=f"^{said}") as refused:
        nr.save(small(), path, force=force)
    assert refused.value.exit_code == 2
    assert [(entry.name, entry.stat().st_mtime_ns) for entry in folder.iterdir()] == before


def test_folder_that_is_not_writable(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(nr.NormRewriteError, match=r"the folder \. is not writable. Choose another place with -o"):
        nr.save(small(), "out.pt")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Files end at `limit` bytes: what a full disk does to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 3000])
@pytest.mark.parametrize(
    ("form", "name"), [("state_dict", "model.pt"), ("module", "model.pt"), ("safetensors", "model.safetensors")]
)
def test_full_disk(folder: Path, small: Make, form: files.Form, name: str, limit: int) -> None:
    (folder / name).write_bytes(b"old")
    with full_disk(limit), pytest.raises(nr.NormRewriteError, match=rf"output {name}: .*Nothing was written"):
        nr.save(small(), name, form=form, force=True)
    assert listing(folder) == {name: b"old"}


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [*TARGETS, None])
@pytest.mark.parametrize(("form", "suffix"), FORMS)
def test_round_trip(small: Make, form: files.Form, suffix: str, to: str | None) -> None:
    """A twin, or a network that was never rewritten, comes back with its bits, its structure and its way back.

    The suffix decides between torch and safetensors, in writing as in reading.
    """
    model = small()
    twin = model if to is None else nr.convert(model, to)
    path = f"model{suffix}"
    written = nr.save(twin, path, form=form)
    assert written == ("safetensors" if suffix == ".safetensors" else form.replace("safetensors", "state_dict"))
    back = files.read(path, None if written == "module" else small)
    assert back.form == written
    assert_same_bits(back.model, twin)
    assert str(back.model) == str(twin)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(back.model.eval()(x), twin.eval()(x), rtol=0, atol=0)
    if to is not None:
        assert_same_bits(nr.revert(back.model), model)


def test_report_travels_along(small: Make) -> None:
    twin, report = nr.plan(small(), "l1").apply()
    nr.save(twin, "model.pt", report=report)
    file = files.read("model.pt", small)
    assert file.manifest is not None and file.manifest["report"]["rewritten"] == 2
    assert [site["difference"] for site in file.manifest["sites"]] == [site.difference for site in report.rewritten]


def test_torch_reads_what_is_written(small: Make) -> None:
    """One dict of tensors and plain values: no code of ours is needed."""
    twin = nr.convert(small())
    nr.save(twin, "model.pt")
    nr.save(twin, "model.safetensors")
    content = torch.load("model.pt", weights_only=True)
    assert set(content) == {"state_dict", "normrewrite"}
    assert_same_bits(content["state_dict"], twin)
    with safe_open("model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(twin.state_dict()) and set(file.metadata()) == {"normrewrite"}


ARCHITECTURE = """
from torch import nn
def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
"""


@pytest.mark.parametrize("how", ["path", "callable", "module"])
def test_architecture_as_path_callable_or_module(small: Make, how: str) -> None:
    Path("zoo.py").write_text(ARCHITECTURE)
    twin = nr.convert(small())
    nr.save(twin, "model.pt")
    given: Any = {"path": "zoo.py:make", "callable": small, "module": small()}[how]
    back = nr.load("model.pt", arch=given)
    assert_same_bits(back, twin)
    assert back is not given


@pytest.mark.parametrize("arguments", [None, {"width": 6}])
def test_arguments_of_the_architecture(arguments: dict[str, int] | None) -> None:
    def make(width: int = 4) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    nr.save(make(6), "model.pt")
    if arguments:
        assert nr.load("model.pt", make, arch_args=arguments)[0].in_features == 6  # type: ignore[index]
    else:
        with pytest.raises(nr.NormRewriteError, match=r"doesn't fit --arch .*size mismatch for 0\.weight"):
            nr.load("model.pt", make)


@pytest.mark.parametrize("root", [nn.BatchNorm1d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm3d(3)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_norm_that_is_the_model(root: nn.Module, suffix: str) -> None:
    twin = nr.convert(root.eval())
    nr.save(twin, f"model{suffix}")
    back = nr.load(f"model{suffix}", lambda: type(root)(3, affine=root.weight is not None))
    assert type(back) is type(twin)
    assert_same_bits(back, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("form", "suffix"), [form for form in FORMS if form != ("safetensors", ".pt")])
@pytest.mark.parametrize("converted", [True, False])
def test_dtypes_stay(small: Make, form: files.Form, suffix: str, dtype: torch.dtype, converted: bool) -> None:
    model: Any = small().to(dtype)
    model[7].float()  # a head kept in fp32, as mixed checkpoints have it
    twin = nr.convert(model) if converted else model
    nr.save(twin, f"model{suffix}", form=form)
    back = nr.load(f"model{suffix}", small)
    assert_same_bits(back, twin)
    if converted:
        assert_same_bits(nr.revert(back), model)


class Tied(nn.Module):
    """Two names for one weight and for one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.again = self.norm
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.norm(self.embed(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("converted", [True, False])
def test_tied_parameters_stay_tied(suffix: str, dtype: torch.dtype, converted: bool) -> None:
    model = Tied().to(dtype).eval()
    twin = nr.convert(model) if converted else model
    nr.save(twin, f"model{suffix}")
    back: Any = nr.load(f"model{suffix}", Tied)
    assert back.head.weight is back.embed.weight and back.head.weight.dtype is dtype
    assert back.again is back.norm and isinstance(back.norm, nr.nn.BatchNorm) == converted
    assert_same_bits(back, twin)


def test_tied_parameters_of_a_pickled_module_stay_tied() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    norm = nn.BatchNorm1d(3)
    nr.save(nr.convert(nn.Sequential(first, norm, second, norm).eval()), "model.pt", form="module")
    back: Any = nr.load("model.pt")
    assert back[0].weight is back[2].weight and back[1] is back[3]


def with_lambda(model: nn.Module) -> nn.Module:
    model.act = lambda x: x  # type: ignore[assignment]
    return model


def of_a_local_class(model: Any) -> nn.Module:
    class Local(nn.Sequential):
        pass

    return Local(*model).eval()


def with_a_handle(model: nn.Module) -> nn.Module:
    model.log = sys.stdout  # type: ignore[assignment]
    return model


def parametrised(model: nn.Module) -> nn.Module:
    parametrizations.weight_norm(model[0])  # type: ignore[index]
    return model


UNPICKLABLE: list[Callable[[nn.Module], nn.Module]] = [
    with_lambda,
    of_a_local_class,
    with_a_handle,
    parametrised,
    torch.fx.symbolic_trace,
]


@pytest.mark.parametrize("change", UNPICKLABLE, ids=lambda change: change.__name__)
def test_what_can_not_be_pickled_is_saved_as_a_state_dict(
    folder: Path, small: Make, change: Callable[[nn.Module], nn.Module]
) -> None:
    twin = change(nr.convert(small()))
    assert nr.save(twin, "model.pt", form="module") == "state_dict"
    assert list(listing(folder)) == ["model.pt"]
    torch.testing.assert_close(torch.load("model.pt", weights_only=True)["state_dict"], dict(twin.state_dict()))


# --- reading ----------------------------------------------------------------------------------------------------------


def test_loading_leaves_the_file_and_random_state_alone(folder: Path, small: Make) -> None:
    nr.save(nr.convert(small()), "model.pt")
    before, state = listing(folder), torch.random.get_rng_state()

    def make() -> nn.Module:
        torch.rand(3)
        return small().requires_grad_(False)

    model = nr.load("model.pt", make)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert listing(folder) == before and torch.equal(torch.random.get_rng_state(), state)


def test_pickled_module_can_be_changed_without_changing_its_file(folder: Path, small: Make) -> None:
    """The file is mapped into memory, privately."""
    nr.save(small(), "model.pt", form="module")
    before = listing(folder)
    with torch.no_grad():
        for tensor in nr.load("model.pt").state_dict().values():
            tensor.zero_()
    assert listing(folder) == before


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: without(s, "7.bias"), "missing 7.bias. Is it the right architecture, with the right --arch-args"),
        (lambda s: {**s, "8.bias": torch.zeros(3)}, "unexpected 8.bias"),
        (lambda s: {f"net{len(k)}.{k}": v for k, v in s.items()}, "missing 0.weight, missing .* and 24 more"),
        (lambda s: {**s, "7.bias": torch.zeros(3)}, "size mismatch for 7.bias"),
        (lambda s: {**s, "1.running_mean": torch.zeros(3)}, "size mismatch for 1.running_mean"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_state_dict_that_does_not_fit(
    small: Make, suffix: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str
) -> None:
    state = change(small().state_dict())
    torch.save(state, "model.pt") if suffix == ".pt" else save_file(state, "model.safetensors")
    with pytest.raises(nr.NormRewriteError, match=f"model{suffix} doesn't fit --arch .*{said}"):
        nr.load(f"model{suffix}", small)


@pytest.mark.parametrize(
    ("content", "key", "said"),
    [
        ({}, None, "no state_dict under state_dict, model_state_dict, model, ema, net. Name it with --key"),
        ({"state_dict": {}}, None, "no state_dict"),
        ({"epoch": 3}, None, "keys: epoch"),
        ([], None, "holds a list, neither a module nor a state_dict"),
        (torch.zeros(3), None, "holds a Tensor, neither"),
        (3, None, "holds a int, neither"),
        ({"state_dict": {"w": torch.zeros(1)}}, "model", r"--key model: there is no 'model'. .*Keys: state_dict"),
        ({"ema": {"w": torch.zeros(1)}}, "eam", "Did you mean 'ema'"),
        ({"ema": {"w": torch.zeros(1)}}, "ema.w.x", "there is no 'x'"),
        ({"ema": {"w": torch.zeros(1)}}, "ema.w", "holds a Tensor"),
        ({"ema": 3}, "ema", "holds a int"),
        ({"ema": {"w": torch.zeros(1)}}, "", "there is no ''"),
        ({0: torch.zeros(1)}, None, "model.pt"),  # named by numbers
        ({"state_dict": {0: torch.zeros(1)}}, None, "model.pt"),
        ({3: "epoch"}, None, "keys: 3"),
    ],
)
def test_no_state_dict(small: Make, content: object, key: str | None, said: str) -> None:
    torch.save(content, "model.pt")
    with pytest.raises(nr.NormRewriteError, match=said):
        nr.load("model.pt", small, key=key)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_twin_needs_the_architecture_it_was_made_from(small: Make, suffix: str) -> None:
    nr.save(nr.convert(small()), f"model{suffix}")
    with pytest.raises(nr.NormRewriteError, match=r"its manifest rewrites '1', and the architecture has no norm"):
        nr.load(f"model{suffix}", lambda: nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("record", ["[]", "{", "3", '{"format": 2, "sites": []}', "[" * 100_000])
def test_safetensors_with_a_false_manifest(small: Make, record: str) -> None:
    save_file(small().state_dict(), "model.safetensors", {"normrewrite": record})
    with pytest.raises(nr.NormRewriteError, match=r"model\.safetensors"):
        nr.load("model.safetensors", small)


def test_views_and_strides_go_into_safetensors() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[0].weight = nn.Parameter(model[0].weight.detach().t())
    model[0].register_buffer("part", model[0].weight.detach()[1:3])
    nr.save(model, "model.safetensors")

    def make() -> nn.Module:
        fresh = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        fresh[0].register_buffer("part", torch.zeros(2, 4))
        return fresh

    assert_same_bits(nr.load("model.safetensors", make), model)
