"""The README's Python is run as it stands, block after block in one namespace."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(block, namespace)
    assert Path("model.onnx").is_file() and namespace["result"].modified  # type: ignore[attr-defined]
