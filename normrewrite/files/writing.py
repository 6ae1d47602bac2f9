"""Model files that go out: written whole or not at all, and never over another without being told to.

>>> save(twin, "twin.pt")                                         # state_dict and manifest, for torch.load
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from normrewrite.files.layout import KEY, Layout
from normrewrite.files.outputs import write_atomically, written_first
from normrewrite.provenance import manifest
from normrewrite.provenance.history import History
from normrewrite.provenance.ranges import LearnedRanges
from normrewrite.provenance.report import Report

Form = Literal["state_dict", "safetensors", "module"]


def save(
    model: nn.Module,
    path: str | Path,
    *,
    form: Form = "state_dict",
    report: Report | None = None,
    learned: LearnedRanges | None = None,
    history: History | None = None,
    layout: Layout | None = None,
    force: bool = False,
) -> Form:
    """Write a model and its manifest; whole or not at all, and never over an existing file without `force`.

    >>> save(twin, "twin.pt", report=report)
    'state_dict'

    form: `state_dict` (one dict with `state_dict` and `normrewrite`, which torch.load reads with weights_only=True),
    `safetensors` (manifest in the metadata), or `module` (pickled; where it can't be, a state_dict is written).
    learned: ranges of an int8 training, for export; a pickled module then is a dict's `model`, beside the manifest.
    history: where the twin comes from, for the manifest. layout: of the file that it came in, to write another like it.
    Returns the form that was written. Raises NormRewriteError where the file exists or can't be written.
    """
    path, layout = Path(path), layout or Layout()
    state = dict(model.state_dict())
    record = manifest.describe(model, report, learned) | ({KEY: layout.told()} if layout.told() else {})
    record = manifest.seal(record, state, history)
    if path.suffix == ".safetensors" or form == "safetensors":  # the name decides, as it does when it is read
        form = "safetensors" if path.suffix == ".safetensors" else "state_dict"
    if form == "module" and not _needs_code(model):
        alone = learned is None and not layout.key
        place = layout if layout.key else Layout(("model",))
        whole = model if alone else place.content(model, record)
        try:
            write_atomically(path, lambda temporary: torch.save(whole, temporary), force)
            return form
        except (pickle.PicklingError, AttributeError, TypeError):
            pass  # a lambda, a local class: the tensors can still be had
    if form == "safetensors":
        metadata = {**layout.metadata, manifest.KEY: json.dumps(record)}
        write_tensors(layout.named(state), path, force, metadata)
    else:
        content = layout.content(state, record)
        form = "state_dict"
        write_atomically(path, lambda temporary: torch.save(content, temporary), force)
    return form


@contextmanager
def with_manifest(
    model: nn.Module, path: Path | None, report: Report | None, history: History, force: bool
) -> Iterator[None]:
    """The manifest of a model as a JSON file of its own, where one is asked for: put in place after the model's file, which is
    written inside, and written before it, so that a full disk leaves neither."""
    if path is None:
        yield
        return
    record = manifest.seal(manifest.describe(model, report), model.state_dict(), history)
    text = json.dumps(record, indent=1)
    with written_first(path, lambda temporary: Path(temporary).write_text(text), force) as put:
        yield
        put()


def write_tensors(state: Mapping[str, Tensor], path: Path, force: bool, metadata: dict[str, str] | None = None) -> None:
    """Plain tensors by name: .safetensors where the file is called so, else as torch.save writes them."""
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        write_atomically(path, lambda temporary: save_file(_apart(state), temporary, metadata), force)
    else:
        write_atomically(path, lambda temporary: torch.save(dict(state), temporary), force)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with memory of their own each, as safetensors wants them; copied only where they have not."""
    owners: set[int] = set()
    apart = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() not in owners and storage.nbytes() == tensor.nbytes
        owners.add(storage.data_ptr())
        apart[name] = tensor.detach().contiguous() if alone else tensor.detach().clone().contiguous()
    return apart


def _needs_code(model: nn.Module) -> bool:
    """Modules that pickle, but that only code can bring back: generated graphs and parametrised weights."""
    return any(isinstance(module, GraphModule) or is_parametrized(module) for module in model.modules())
