"""Registered once, on request, in a process of its own; what TensorRT's registry then knows."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, register
from tests.plugins.rtx import needs_rtx

IMPORTED = """
import sys, normrewrite.plugins
print(*(module for module in sys.modules if "tensorrt" in module))
"""
REGISTERED = """
import tensorrt_rtx_bindings as trt
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, register, registry
assert registry.known(trt.get_plugin_registry()) == []
def refused(**kind):
    try:
        register(**kind)
    except NormRewriteError as error:
        print(error)
refused(kind="ahead", runtime="rtx")
made = register("python", "rtx")
assert sorted(each.name for each in made) == sorted(registry.known(trt.get_plugin_registry())) == sorted(OPS)
refused(kind="python")
refused(kind="library", library=trt.__file__.replace("__init__.py", "tensorrt_rtx.so"))
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """By one process, as a runtime keeps what was registered once."""
    code = IMPORTED + (REGISTERED if find_spec("tensorrt_rtx_bindings") else "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_registers_nothing(said: list[str]) -> None:
    assert said[0] == ""


@needs_rtx
def test_rtx_has_no_plugins_ahead_of_time(said: list[str]) -> None:
    assert "has no plugins ahead of time; TensorRT has them. Use kind python." in said[1]


@needs_rtx
def test_a_second_registration_is_an_error(said: list[str]) -> None:
    _, _, first, second = said
    assert first == second and "registered already in this process. Register one kind, once." in first
    assert all(name in first for name in OPS)


@pytest.mark.parametrize(
    ("kind", "runtime", "library", "said"),
    [
        ("pyhton", "rtx", None, "plugins of kind 'pyhton' are unknown. Did you mean 'python'"),
        ("python", "openvino", None, "runtime 'openvino' is unknown. Known: rtx, tensorrt"),
        ("library", "rtx", None, "a path goes with plugins of kind library"),
        ("python", "rtx", Path("some.so"), "a path goes with plugins of kind library"),
    ],
)
def test_bad_requests(kind: str, runtime: str, library: Path | None, said: str) -> None:
    with pytest.raises(NormRewriteError, match=said):
        register(kind, runtime, library)


def test_no_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normrewrite.plugins.runtimes.find_spec", lambda name: None)
    with pytest.raises(
        NormRewriteError, match=r"TensorRT is not installed \(tensorrt\): pip install 'normrewrite\[tensorrt\]'"
    ):
        register("python", "tensorrt")
