"""Digests: SHA-256 of a file, of a tensor, of a record, so that any change of a byte is told.

>>> of_file(Path("model.pt"))
{'file': 'model.pt', 'bytes': 1115017, 'sha256': '1f3a...'}

A digest is no signature: who can write a file can write a digest that fits. It tells damage and mix-ups, and, compared with
one that was kept elsewhere, intent.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def of_file(path: Path) -> dict[str, Any]:
    """The file's own name, without its folder, its size in bytes, and the SHA-256 of what it holds."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest}


def of_tensors(state: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 by name, of dtype, shape and values."""
    return {name: of_tensor(tensor) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def of_tensor(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's dtype, shape and values in row-major order, whatever its strides and device."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if not tensor.is_meta:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    return plain(tensor).contiguous().resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).numpy()


def plain(tensor: Tensor) -> Tensor:
    """The values of any tensor, dense and on the CPU."""
    dense = tensor.detach().cpu() if tensor.layout is torch.strided else tensor.detach().cpu().to_dense()
    return dense.dequantize() if dense.is_quantized else dense


def of_record(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record as JSON with sorted keys, without its own `sha256`."""
    unsealed = {key: value for key, value in record.items() if key != "sha256"}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
