"""Registered once, on request, in a process of its own; what TensorRT's registry then knows."""

import subprocess
import sys
from pathlib import Path

import pytest

from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, register
from tests.plugins.rtx import needs_rtx

TWICE = """
import tensorrt_rtx_bindings as trt
from normrewrite.errors import NormRewriteError
from normrewrite.plugins import OPS, register, registry
assert registry.known(trt.get_plugin_registry()) == []
made = register("python", "rtx")
assert sorted(each.name for each in made) == sorted(registry.known(trt.get_plugin_registry())) == sorted(OPS)
for kind in ({"kind": "python"}, {"kind": "library", "library": trt.__file__.replace("__init__.py", "tensorrt_rtx.so")}):
    try:
        register(**kind)
    except NormRewriteError as error:
        print(error)
"""


@needs_rtx
def test_a_second_registration_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second and "registered already in this process. Register one kind, once." in first
    assert all(name in first for name in OPS)


def test_importing_registers_nothing() -> None:
    code = (
        "import sys, normrewrite.plugins; print([m for m in sys.modules if 'tensorrt' in m or m.startswith('triton')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "tensorrt" not in done.stdout


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
    monkeypatch.setattr("normrewrite.deployment.runtimes.find_spec", lambda name: None)
    with pytest.raises(
        NormRewriteError, match=r"TensorRT is not installed \(tensorrt\): pip install 'normrewrite\[tensorrt\]'"
    ):
        register("python", "tensorrt")
