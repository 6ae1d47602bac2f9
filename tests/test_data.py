"""Data from .npz files, folders of images and code: what comes out, and what is said of the rest."""

import os
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from normrewrite import NormRewriteError, outside
from normrewrite.data import Batch, Data, argument_names, as_data, example, open_data

Arrays = dict[str, Any]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
FLOATS = np.random.default_rng(0).normal(size=(5, 3, 4, 6))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def only(data: Data) -> Batch:
    [batch] = data.batches(1000)
    return batch


def saved(arrays: Arrays, names: Sequence[str] = ("x",), **options: Any) -> Batch:
    np.savez("data.npz", **arrays)
    return only(open_data("data.npz", names, **options))


def by_hand(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """One number at a time, in float64."""
    out = torch.zeros(len(pixels), pixels.shape[3], *pixels.shape[1:3], dtype=torch.float64)
    for (n, h, w, c), value in np.ndenumerate(pixels):
        out[n, c, h, w] = (int(value) / 255 - mean[c % len(mean)]) / std[c % len(std)]
    return out


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, 250])
def test_batches_hold_every_row_once_and_in_order(size: int) -> None:
    data = Data(Batch({"x": torch.arange(5), "y": torch.arange(5) * 2}, torch.arange(5) * 3))
    for _ in range(2):  # again and again
        batches = list(data.batches(size))
        assert [len(batch) for batch in batches] == [min(size, 5 - start) for start in range(0, 5, size)]
        x, y = (torch.cat([batch.inputs[name] for batch in batches]) for name in "xy")
        labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
        assert x.tolist() == [0, 1, 2, 3, 4] and torch.equal(y, 2 * x) and torch.equal(labels, 3 * x)


def test_batches_of_nothing() -> None:
    assert list(Data().batches()) == []
    with pytest.raises(NormRewriteError, match="batch size 0: give a whole number from 1"):
        list(Data().batches(0))
    with pytest.raises(NormRewriteError, match=r"held no batch\. Give at least one input"):
        Data().first(2)


def test_the_first_inputs_of_a_stream_are_not_more_than_asked_for() -> None:
    data = as_data([(torch.arange(5), torch.arange(5))], ["x"])
    assert data.first(2).inputs["x"].tolist() == [0, 1] and data.first(9).inputs["x"].tolist() == [0, 1, 2, 3, 4]
    assert data.first(2).labels is None


class Positional(nn.Module):
    def forward(self, x: Tensor, /, mask: Tensor, scale: float = 1, *rest: Tensor, flag: bool = False) -> Tensor:
        return x


class Anything(nn.Module):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Linear(1, 1), ["input"]),
        (Positional(), ["x", "mask", "scale"]),
        (Anything(), []),
        (nn.Bilinear(1, 1, 1), None),
    ],
)
def test_argument_names(model: nn.Module, names: list[str] | None) -> None:
    assert argument_names(model) == (names or ["input1", "input2"] if names is None else names)


# --- .npz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 7, 2), (5, 3, 4, 6), (5, 1, 2, 3, 4)])
def test_floats_come_as_they_are(dtype: str, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x = saved({"images": values}).inputs["x"]
    assert x.dtype is torch.float32 and np.array_equal(x.numpy(), values.astype(np.float32))


@pytest.mark.parametrize(
    "values", [np.arange(6), np.arange(6, dtype=np.uint8), np.arange(6) > 2, np.arange(6, dtype="u4")]
)
def test_whole_numbers_are_indices(values: np.ndarray) -> None:
    x = saved({"x": values}).inputs["x"]
    assert x.dtype is torch.int64 and x.tolist() == values.tolist()


@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ([0.5], [0.25]), (MEAN, [1.0]), ([0.0], STD)])
@pytest.mark.parametrize("channels", [3, 1])
def test_pixels_are_normalised(mean: list[float], std: list[float], channels: int) -> None:
    pixels = PIXELS[..., :channels]
    mean, std = mean[: max(1, channels)], std[:channels]
    x = saved({"images": pixels}, mean=mean, std=std).inputs["x"]
    assert x.dtype is torch.float32 and x.is_contiguous()
    torch.testing.assert_close(x.double(), by_hand(pixels, mean, std), rtol=0, atol=2e-6)
    assert (x - by_hand(pixels, mean, [1.01 * s for s in std])).abs().max() > 1e-4  # the comparison can fail


@pytest.mark.parametrize(
    ("arrays", "names", "inputs"),
    [
        ({"images": 0}, ["x"], {"x": 0}),
        ({"x": 0}, ["x"], {"x": 0}),
        ({"images": 0}, ["images"], {"images": 0}),
        ({"images": 0}, ["images", "mask"], {"images": 0}),
        ({"images": 0}, [], {"images": 0}),  # two ONNX files: nothing is known of their arguments
        ({"mask": 1, "x": 0}, ["x", "mask"], {"x": 0, "mask": 1}),
        ({"mask": 1, "images": 0}, ["x", "mask"], {"x": 0, "mask": 1}),
        ({"mask": 1, "images": 0}, ["mask", "images"], {"mask": 1, "images": 0}),  # images by its own name
        ({"images": 0}, ["mask", "images"], {"images": 0}),
    ],
)
def test_arrays_go_by_the_names_of_arguments(arrays: Arrays, names: list[str], inputs: dict[str, int]) -> None:
    batch = saved({name: np.full((3, 2), float(value)) for name, value in arrays.items()}, names)
    assert {name: int(values[0, 0]) for name, values in batch.inputs.items()} == inputs
    assert batch.labels is None


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "float32"])
def test_labels(dtype: str) -> None:
    labels = saved({"images": FLOATS, "labels": np.array([3, 1, 4, 1, 5], dtype)}).labels
    assert labels is not None and labels.dtype is torch.int64 and labels.tolist() == [3, 1, 4, 1, 5]


class Effect:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("open('marker', 'w').close()",)


BAD_ARRAYS: list[tuple[Arrays, list[str], str]] = [
    ({}, ["x"], "arrays none; forward takes x. Name them so, or `images`"),
    ({"labels": np.arange(3)}, ["x"], "arrays none; forward takes x"),
    ({"y": FLOATS}, ["x"], "arrays y; forward takes x. Name them so"),
    ({"x": FLOATS, "y": FLOATS}, ["x"], "arrays x, y; forward takes x"),
    ({"x": FLOATS, "images": FLOATS}, ["x"], "arrays x, images; forward takes x"),  # which of them?
    ({"x": FLOATS, "labels": np.arange(4)}, ["x"], r"arrays of \[4, 5\] rows. All must have the same number"),
    ({"x": FLOATS, "mask": FLOATS[:2]}, ["x", "mask"], r"arrays of \[2, 5\] rows"),
    ({"x": FLOATS[:0]}, ["x"], r"arrays of \[0\] rows.*at least one"),
    ({"x": np.float32(3)}, ["x"], r"x: float32 of shape \(\), not an array of numbers by row"),
    ({"x": np.array(["a", "b"])}, ["x"], r"x: <U1 of shape \(2,\), not an array of numbers"),
    ({"x": FLOATS * 1j}, ["x"], "x: complex128"),
    ({"x": np.array(["2020-01-01"], "M8[D]")}, ["x"], "x: datetime64"),
    ({"x": np.zeros(3, [("a", "f4")])}, ["x"], "not an array of numbers"),
    ({"x": np.array([Effect(), Effect()])}, ["x"], "can't be read as .npz .*Object arrays cannot be loaded"),
    (
        {"x": FLOATS, "labels": np.array([Effect()] * 5)},
        ["x"],
        "can't be read as .npz .*Object arrays cannot be loaded",
    ),
    ({"x": FLOATS, "labels": np.array(list("abcde"))}, ["x"], "labels"),
    ({"x": FLOATS, "labels": np.int64(3)}, ["x"], "labels"),
    ({"x": FLOATS, "labels": np.eye(5)}, ["x"], "labels"),  # one-hot
    ({"x": FLOATS, "labels": np.array([0, 1, 2, 3, np.nan])}, ["x"], "labels"),
    ({"x": PIXELS}, ["x"], r"x is uint8: give the network's --mean and --std \(3 numbers each"),
]


@pytest.mark.parametrize(("arrays", "names", "said"), BAD_ARRAYS)
def test_bad_arrays(folder: Path, arrays: Arrays, names: list[str], said: str) -> None:
    with pytest.raises(NormRewriteError, match=f"--data data.npz: .*{said}"):
        saved(arrays, names)
    assert not (folder / "marker").exists()


def test_the_marker_can_appear(folder: Path) -> None:
    np.savez("data.npz", x=np.array([Effect()]))
    with np.load("data.npz", allow_pickle=True) as file:
        assert file["x"].shape == (1,)
    assert (folder / "marker").exists()


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        (None, None, "give the network's --mean and --std"),
        (MEAN, None, "give the network's --mean and --std"),
        (None, STD, "give the network's --mean and --std"),
        ([0.5, 0.5], STD, "has 3 channels; --mean and --std have 2 and 3 numbers"),
        (MEAN, [0.5, 0.5], "have 3 and 2 numbers"),
        ([], STD, "have 0 and 3 numbers"),
        (MEAN, [0.2, 0.0, 0.2], "--std"),
        (MEAN, [-1.0], "--std"),
        (MEAN, [float("nan")], "--std"),
    ],
)
def test_bad_normalisation(mean: list[float] | None, std: list[float] | None, said: str) -> None:
    with pytest.raises(NormRewriteError, match=f"data.npz.*{said}"):
        saved({"images": PIXELS}, mean=mean, std=std)


def whole() -> bytes:
    np.savez("whole.npz", x=FLOATS)
    return Path("whole.npz").read_bytes()


def damaged_values() -> bytes:
    """The sum of a compressed array no longer fits."""
    np.savez_compressed("whole.npz", x=np.zeros(5000))
    content = bytearray(Path("whole.npz").read_bytes())
    content[60:70] = b"\xff" * 10
    return bytes(content)


def single_array() -> bytes:
    np.save("single.npy", FLOATS)
    return Path("single.npy").read_bytes()


def other_members() -> bytes:
    with zipfile.ZipFile("other.zip", "w") as archive:
        archive.writestr("x", "no array")
    return Path("other.zip").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda: b"",
        lambda: b"text\n",
        lambda: b"PK\x03\x04",
        lambda: whole()[:300],
        lambda: whole()[:-30],
        lambda: whole()[1:],
        damaged_values,
        single_array,
        other_members,
    ],
)
def test_bad_npz(content: Callable[[], bytes]) -> None:
    Path("data.npz").write_bytes(content())
    with pytest.raises(NormRewriteError, match=r"--data data\.npz: (can't be read as \.npz .*Give a \.npz|x: )"):
        open_data("data.npz", ["x"])


def test_an_npy_holds_the_first_argument() -> None:
    np.save("data.npy", FLOATS)
    batch = only(open_data("data.npy", ["x", "mask"]))
    assert list(batch.inputs) == ["x"] and np.array_equal(batch.inputs["x"].numpy(), FLOATS.astype(np.float32))
    assert batch.labels is None


@pytest.mark.parametrize("content", [lambda: b"", lambda: whole(), lambda: single_array()[:100]])
def test_bad_npy(content: Callable[[], bytes]) -> None:
    Path("data.npy").write_bytes(content())
    with pytest.raises(NormRewriteError, match=r"--data data\.npy: can't be read as \.npy .*Give a \.npz"):
        open_data("data.npy", ["x"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nosuch.npz", "nosuch.npz: can't be read as .npz .*No such file"),
        ("nosuch", "nosuch: there is no such file. Give a .npz .*, a folder of images, or module:factory"),
        ("weights.pt", "weights.pt: not such data. Give a .npz"),
    ],
)
def test_no_such_data(source: str, said: str) -> None:
    Path("weights.pt").touch()
    with pytest.raises(NormRewriteError, match=f"--data {said}"):
        open_data(source, ["x"])


# --- folders of images ------------------------------------------------------------------------------------------------


def draw(path: str, index: int = 0, mode: str = "RGB") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(PIXELS[index]).convert(mode).save(path)


def opened(**options: Any) -> Batch:
    return only(open_data("images", ["x"], **({"mean": MEAN, "std": STD} | options)))


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["b.png", "a.png", "c.bmp"], None),
        (["cat/1.png", "cat/2.png", "dog/1.png"], [0, 0, 1]),
        (["dog/1.png", "ant/9.PNG", "cat/5.webp"], [2, 0, 1]),
        (["cat/1.png", "2.png"], None),  # not all in one
        (["cat/old/1.png", "cat/new/1.png", "dog/old/1.png"], [0, 0, 1]),  # the class is the folder of the first level
    ],
)
def test_folder_of_images(paths: list[str], labels: list[int] | None) -> None:
    """In the order of their paths, and classes in the order of their names."""
    for index, path in enumerate(paths):
        draw(f"images/{path}", index)
    Path("images/notes.txt").write_text("not an image")
    batch = opened()
    order = sorted(range(len(paths)), key=lambda index: Path(paths[index]))
    lossy = any(path.endswith("webp") for path in paths)
    torch.testing.assert_close(
        batch.inputs["x"].double(), by_hand(PIXELS[order], MEAN, STD), rtol=0, atol=9 if lossy else 2e-6
    )
    given = None if batch.labels is None else batch.labels.tolist()
    assert given == (None if labels is None else [labels[index] for index in order])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    draw("images/a.png", mode=mode)
    pixels = np.asarray(Image.open("images/a.png").convert("RGB"))[None]
    torch.testing.assert_close(opened().inputs["x"].double(), by_hand(pixels, MEAN, STD), rtol=0, atol=2e-6)


def nothing() -> None:
    Path("images").mkdir()


def no_image() -> None:
    nothing()
    Path("images/notes.txt").touch()


def two_sizes() -> None:
    draw("images/a.png")
    Image.fromarray(PIXELS[0][:2]).save("images/b.png")


def text() -> None:
    nothing()
    Path("images/a.png").write_text("not an image")


def a_folder() -> None:
    Path("images/a.png").mkdir(parents=True)


def cut(keep: float) -> Callable[[], None]:
    def make() -> None:
        draw("images/a.png")
        content = Path("images/a.png").read_bytes()
        Path("images/a.png").write_bytes(content[: int(keep * len(content))])

    return make


def garbled(at: int) -> Callable[[], None]:
    def make() -> None:
        draw("images/a.png")
        content = bytearray(Path("images/a.png").read_bytes())
        content[at : at + 4] = b"\xff\xff\xff\xff"
        Path("images/a.png").write_bytes(content)

    return make


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (nothing, {}, r"images: no image in the folder \(.bmp, .*Give a .npz"),
        (no_image, {}, "images: no image in the folder"),
        (two_sizes, {}, "images: images of different sizes. Resize them"),
        (text, {}, r"images/a.png: can't be read as an image"),
        (a_folder, {}, "images"),
        *((cut(keep), {}, r"images/a.png: can't be read as an image") for keep in (0, 0.1, 0.5)),
        *((garbled(at), {}, r"images/a.png: can't be read as an image") for at in (0, 8, 12, 16, 29, 37)),
        (lambda: draw("images/a.png"), {"mean": None}, r"images is uint8: give the network's --mean and --std"),
        (lambda: draw("images/a.png"), {"std": [1.0, 1.0]}, "images has 3 channels; .* have 3 and 2 numbers"),
    ],
)
def test_bad_folder(make: Callable[[], None], options: Arrays, said: str) -> None:
    make()
    with pytest.raises(NormRewriteError, match=f"--data {said}"):
        opened(**options)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    draw("images/a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(NormRewriteError, match=r"needs Pillow: pip install normrewrite\[images\]"):
        opened()


# --- code -------------------------------------------------------------------------------------------------------------

FACTORIES = """
import sys
import numpy as np, torch

def tensors():
    for start in (0, 2): yield torch.full((2, 3), float(start))
def pairs(): yield torch.zeros(2, 3), torch.tensor([1, 0])
def lists(): return [[torch.zeros(2, 3), torch.tensor([1, 0])]]
def named(): yield {"mask": torch.ones(2), "x": torch.zeros(2, 3), "labels": torch.tensor([1, 0])}
def unlabelled(): yield {"x": torch.zeros(2, 3)}
def loader():
    data = torch.utils.data.TensorDataset(torch.zeros(5, 3), torch.arange(5))
    return torch.utils.data.DataLoader(data, batch_size=2)
class Batches:
    def __iter__(self): return iter([torch.zeros(2, 3)])

answer = 42
def text(): yield "images"
def triple(): yield torch.zeros(2), torch.zeros(2), torch.zeros(2)
def arrays(): yield np.zeros((2, 3))
def named_arrays(): yield {"x": np.zeros((2, 3))}
def paired_arrays(): yield np.zeros((2, 3)), np.zeros(2)
def listed_labels(): yield torch.zeros(2, 3), [1, 0]
def text_labels(): yield {"x": torch.zeros(2, 3), "labels": ["a", "b"]}
def wrong_rows(): yield torch.zeros(2, 3), torch.tensor([1, 0, 1])
def one_hot(): yield torch.zeros(2, 3), torch.eye(2)
def uneven(): yield {"x": torch.zeros(2, 3), "mask": torch.zeros(4)}
def only_labels(): yield {"labels": torch.zeros(2)}
def scalar(): yield torch.tensor(3.0)
def none(): return None
def raises(): raise KeyError("no such split")
def raises_later():
    yield torch.zeros(2, 3)
    raise OSError("disk gone")
def exits(): sys.exit(0)
def argument(split): yield torch.zeros(2, 3)
"""


@pytest.fixture
def factories(folder: Path) -> Iterator[None]:
    (folder / "batches.py").write_text(FACTORIES)
    yield
    sys.modules.pop("batches", None)


@pytest.mark.parametrize(
    ("name", "inputs", "labels"),
    [
        ("tensors", [{"x": (2, 3)}, {"x": (2, 3)}], [None, None]),
        ("pairs", [{"x": (2, 3)}], [[1, 0]]),
        ("lists", [{"x": (2, 3)}], [[1, 0]]),
        ("named", [{"mask": (2,), "x": (2, 3)}], [[1, 0]]),
        ("unlabelled", [{"x": (2, 3)}], [None]),
        ("loader", [{"x": (2, 3)}, {"x": (2, 3)}, {"x": (1, 3)}], [[0, 1], [2, 3], [4]]),
        ("Batches", [{"x": (2, 3)}], [None]),
        ("uneven", [{"x": (2, 3), "mask": (4,)}], [None]),  # a graph's nodes and edges are one input
    ],
)
def test_batches_from_code(
    factories: None, name: str, inputs: list[dict[str, tuple[int, ...]]], labels: list[list[int] | None]
) -> None:
    data = open_data(f"batches.py:{name}", ["x", "mask"])
    for _ in range(2):  # the factory is called again for each pass
        batches = list(data.batches(1))
        assert [{key: tuple(values.shape) for key, values in batch.inputs.items()} for batch in batches] == inputs
        assert [None if batch.labels is None else batch.labels.tolist() for batch in batches] == labels


def test_module_comes_from_the_current_folder(factories: None) -> None:
    """As for --arch; the installed script has its own folder, not the current one, on sys.path."""
    assert len(list(open_data("batches:tensors", ["x"]).batches())) == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nosuch:factory", "can't import nosuch: ModuleNotFoundError"),
        ("nosuch.py:factory", "there is no file nosuch.py"),
        ("batches.py:tensor", "there is no 'tensor' in .*Did you mean 'tensors'"),
        ("batches.py:answer", "'answer' is a int, not a function or class"),
        ("batches.py:text", "gave a str; a batch is a tensor, .tensor, labels. or a dict"),
        ("batches.py:triple", "gave a tuple; a batch is"),
        ("batches.py:arrays", "gave a ndarray; a batch is"),
        *((f"batches.py:{name}", "tensor") for name in ("named_arrays", "paired_arrays", "only_labels", "scalar")),
        *((f"batches.py:{name}", "labels") for name in ("listed_labels", "text_labels", "wrong_rows", "one_hot")),
        ("batches.py:none", "raised TypeError: 'NoneType' object is not iterable"),
        ("batches.py:raises", "raised KeyError: 'no such split'"),
        ("batches.py:raises_later", "raised OSError: disk gone"),
        ("batches.py:exits", "SystemExit"),
        ("batches.py:argument", "raised TypeError: .*missing 1 required positional argument: 'split'"),
    ],
)
def test_bad_code(factories: None, source: str, said: str) -> None:
    with pytest.raises(NormRewriteError, match=f"^--data {source}: .*{said}"):
        list(open_data(source, ["x"]).batches())


X, LABELS = torch.zeros(2, 3), torch.tensor([1, 0])


@pytest.mark.parametrize(
    ("source", "names", "inputs"),
    [
        (X, ["x"], [{"x": X}]),
        (X, [], [{"input": X}]),  # nothing is known of the arguments
        (Data(Batch({"x": X})), ["y"], [{"x": X}]),
        ([X, (X, LABELS), [X, LABELS]], ["x"], [{"x": X}] * 3),
        ([{"y": X, "x": X, "labels": LABELS}, Batch({"x": X})], ["x", "y"], [{"y": X, "x": X}, {"x": X}]),
        ([], ["x"], []),
    ],
)
def test_data_from_python(source: Any, names: list[str], inputs: list[dict[str, Tensor]]) -> None:
    data = as_data(source, names)
    for _ in range(2):
        assert [list(batch.inputs) for batch in data.batches()] == [list(wanted) for wanted in inputs]
        assert all(
            values is X or torch.equal(values, X) for batch in data.batches() for values in batch.inputs.values()
        )


def test_generator_can_be_gone_through_again() -> None:
    data = as_data((batch for batch in [X, X]), ["x"])
    assert [len(list(data.batches())) for _ in range(2)] == [2, 2]


@pytest.mark.parametrize(
    ("batch", "said"), [("images", "gave a str"), (None, "gave a NoneType"), (np.zeros(3), "gave a ndarray")]
)
def test_bad_data_from_python(batch: object, said: str) -> None:
    with pytest.raises(NormRewriteError, match=f"{said}; a batch is a tensor"):
        as_data([batch], ["x"])


# --- random input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "sizes"), [("1,3,32,32", (1, 3, 32, 32)), ("7", (7,)), (" 2 , 3 ", (2, 3))])
def test_example(shape: str, sizes: tuple[int, ...]) -> None:
    before = torch.random.get_rng_state()
    x = example(shape)
    assert x.shape == sizes and x.dtype is torch.float32 and torch.equal(x, example(shape))
    assert not torch.equal(x, example(shape, seed=1))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "shape", ["", ",", "1,", "a", "1,3,32,x", "0,3", "-1,3", "1.5", "1;3", "1,,3", "1e3", "1x3x8x8"]
)
def test_bad_shape(shape: str) -> None:
    with pytest.raises(NormRewriteError, match=r"--input-shape .*: write whole numbers, as in 1,3,32,32"):
        example(shape)


@pytest.mark.parametrize("shape", ["1000000000000,3", "9" * 30, "99999999999,99999999999,99999999999"])
def test_shape_beyond_memory(shape: str) -> None:
    with pytest.raises(NormRewriteError, match="--input-shape"):
        example(shape)


# --- what would not end -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pipe.npz", "/dev/zero"])
def test_pipes_and_devices_are_refused(folder: Path, name: str) -> None:
    os.mkfifo("pipe.npz")
    with pytest.raises(NormRewriteError, match=f"--data {name} is a pipe, a socket or a device"):
        open_data(name, ["x"])


def test_a_pipe_among_images_is_damage(folder: Path) -> None:
    draw("images/a.png")
    os.mkfifo("images/b.png")
    with pytest.raises(NormRewriteError, match=r"images/b\.png: can't be read as an image \(it is no file"):
        opened()
    data = open_data("images", ["x"], mean=MEAN, std=STD, strict=False)
    assert data.skipped == ("images/b.png",) and len(only(data)) == 1


def test_an_archive_that_unpacks_without_bound_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "UNPACKED", 1 << 20)
    for values, fine in ((np.zeros((300, 3, 32, 32), np.float32), False), (np.zeros((9, 3, 32, 32), np.float32), True)):
        np.savez_compressed("a.npz", x=values)
        if fine:
            assert len(open_data("a.npz", ["x"]).first(99)) == 9
        else:
            with pytest.raises(NormRewriteError, match=r"a\.npz: [\d,]+ bytes that unpack to 3,68[\d,]+\."):
                open_data("a.npz", ["x"])
            np.savez("a.npz", x=values)  # as large on the disk
            assert len(open_data("a.npz", ["x"]).first(999)) == 300


def test_images_that_unpack_without_bound_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("images").mkdir()
    for name in "abc":
        Image.new("L", (600, 600)).save(f"images/{name}.png")
    assert len(opened()) == 3
    monkeypatch.setattr(outside, "UNPACKED", 1 << 21)
    with pytest.raises(NormRewriteError, match=r"images/b\.png: [\d,]+ bytes that unpack to 2,160,000"):
        opened()
    monkeypatch.setattr("normrewrite.files.images._MOST_PIXELS", 600 * 599)
    with pytest.raises(NormRewriteError, match=r"images/a\.png: can't be read as an image \(of 600 x 600 pixels\)"):
        opened()


@pytest.mark.parametrize("shape", ["9" * 5000, "1,3," + "9" * 30, "1,,2", "1e3"])
def test_shapes_without_bound(shape: str) -> None:
    with pytest.raises(NormRewriteError, match="--input-shape"):
        example(shape)
