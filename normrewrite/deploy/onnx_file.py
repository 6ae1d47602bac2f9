"""ONNX files: read with errors that say what to do, written whole or not at all, and fed with batches.

>>> proto = read("model.onnx")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from normrewrite.backends import onnx as nodes
from normrewrite.data import Batch
from normrewrite.deploy import onnx_bounds, precision
from normrewrite.errors import NormRewriteError, first_line, possible
from normrewrite.files import write_atomically

OLDEST_OPSET = 13  # from here on axes are inputs and Q/DQ goes by channel
_SCOPES = "pkg.torch.onnx.name_scopes"
LARGEST = 2**31 - 1  # bytes: protobuf's own limit, so the largest file without weights beside it


def require_file(path: Path) -> None:
    """Raises where there is none."""
    if not path.is_file():
        raise NormRewriteError(f"{path}: there is no such file.")


def read(path: str | Path) -> Any:
    """An onnx.ModelProto that has been checked. Raises NormRewriteError for what is no sound ONNX file."""
    import onnx

    path = Path(path)
    possible(path)
    require_file(path)
    try:
        proto = onnx.load(path)
        onnx_bounds.check(proto, str(path))
        onnx.checker.check_model(proto)
    except NormRewriteError:
        raise
    except Exception as error:  # protobuf, the checker and the loader of outside weights have classes of their own
        raise NormRewriteError(
            f"{path}: can't be read as ONNX ({first_line(error)}). It may be truncated, or no ONNX file at all; write it "
            "anew with normrewrite export."
        ) from error
    opset = opset_of(proto)
    if opset < OLDEST_OPSET:
        raise NormRewriteError(
            f"{path}: opset {opset} is too old, {OLDEST_OPSET} is needed at least. Export the model again, or raise it "
            "with onnx.version_converter."
        )
    nodes.check(proto)
    return proto


def has_open_loops(path: Path) -> bool:
    """Whether only running a file shows when its loops end. Raises NormRewriteError where it asks for too much."""
    import onnx

    try:
        return onnx_bounds.check(onnx.load(path, load_external_data=False), str(path))
    except NormRewriteError:
        raise
    except Exception:  # no ONNX file, which onnxruntime tells
        return False


def opset_of(proto: Any) -> int:
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def scopes(node: Any) -> list[str]:
    """The modules that a node came from, outermost first, by dotted name, as torch's exporter notes them."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    return [name.strip(" '\"") for name in noted.strip("[]").split(",")[:-1]]


def write(proto: Any, path: Path, force: bool) -> None:
    """One file with its weights inside. Raises NormRewriteError where it would be too large for that."""
    import onnx

    check_size(proto.ByteSize(), str(path))
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(proto.SerializeToString()), force)


def check_size(size: int, where: str) -> None:
    if size > LARGEST:
        raise NormRewriteError(
            f"{where}: {size / 1e9:.2f} GB, and one ONNX file holds less than {LARGEST / 1e9:.2f} GB. Export with "
            "--precision fp16 or int8, or in parts."
        )


def feed(batch: Batch, wanted: Sequence[str], where: object) -> dict[str, Any]:
    """A batch as onnxruntime takes it: by name where the names agree, else in order."""
    if len(batch.inputs) != len(wanted):
        raise NormRewriteError(
            f"{where} takes {len(wanted)} inputs ({', '.join(wanted)}), the data has {len(batch.inputs)}."
        )
    tensors = {name: tensor.detach().cpu() for name, tensor in batch.inputs.items()}
    arrays = {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in tensors.items()}
    return arrays if set(arrays) == set(wanted) else dict(zip(wanted, arrays.values(), strict=True))


def holds(path: Path, kind: str) -> bool:
    """Whether a file holds tensors of a precision, as fp16. False where it can't be read, which its reader tells better."""
    import onnx

    try:
        proto = onnx.load(path, load_external_data=False)
    except Exception:  # protobuf has classes of its own
        return False
    return kind in precision.present(proto)
