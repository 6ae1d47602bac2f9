"""Checkpoints that can't be written."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import normrewrite as nr
from normrewrite.training.checkpoints import Checkpoints


@pytest.mark.parametrize(
    ("before", "said"),
    [(False, "There is none before it."), (True, "The checkpoint before it, step-00000002, is whole.")],
)
def test_a_full_disk_says_what_there_is(tmp_path: Path, before: bool, said: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    if before:
        (tmp_path / "step-00000002").mkdir()
    machine = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None, save_state=full)
    with pytest.raises(nr.NormRewriteError, match=said):
        Checkpoints(tmp_path, machine).save(4)
