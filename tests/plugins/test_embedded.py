"""The kernels of the C++ library: which there are, and what the compiler makes of a few of them."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install normrewrite[triton]")

from normrewrite.plugins import OPS, embedded
from tests.conftest import ROOT

WORKER = """
import json, sys
from pathlib import Path
from normrewrite.plugins import embedded
known = embedded.recorded_kernels(("float16",), tuple(embedded.OPS))
asked = [next(key for key in known if key.startswith(name)) for name in ("apply", "select", "row_forward", "settle")]
made = [embedded.compiled_kernel(key, known[key], [80, 90]) for key in asked]
embedded.write(made, Path(sys.argv[1]))
kernels = [vars(each) | {"codes": {str(n): code.decode("latin1") for n, code in each.codes.items()}} for each in made]
json.dump({"keys": list(known), "made": kernels}, sys.stdout)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("embedded")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WORKER, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_few_kernels_serve_all_sizes(made: tuple[Path, dict[str, Any]]) -> None:
    keys = made[1]["keys"]
    assert len(keys) == len(set(keys)) < 200
    assert {key.split()[0] for key in keys} == {"moments", "deviations", "settle", "select", "apply", "row_forward"}


def test_a_kernel_takes_what_its_table_says(made: tuple[Path, dict[str, Any]]) -> None:
    """And two hidden pointers of Triton's, which the library gives as zeros."""
    kinds = {"p": ".u64 .ptr", "i": ".u32", "f": ".f32"}
    for kernel in made[1]["made"]:
        ptx = kernel["codes"]["80"]
        entry = re.search(rf"\.entry {kernel['entry']}\((.*?)\n\)", ptx, re.DOTALL)
        assert entry is not None
        parameters = re.findall(r"\.param (\.\w+(?: \.ptr)?)", entry[1])
        assert parameters == [kinds[each[-1]] for each in kernel["arguments"].split()] + 2 * [kinds["p"]], kernel["key"]
        assert re.search(r"\.version 8\.0\n\.target sm_80\n", ptx) and ptx.endswith("\0") and ".loc" not in ptx
        assert f".reqntid {kernel['threads']}" in ptx and kernel["shared"] <= 227 * 1024
        assert kernel["codes"]["90"].startswith("\x7fELF")


def test_codes_lie_where_the_table_says(made: tuple[Path, dict[str, Any]]) -> None:
    folder, found = made
    blob, text = (folder / "kernels.bin").read_bytes(), (folder / "tables.cpp").read_text()
    for kernel in found["made"]:
        told = re.search(rf'"{re.escape(kernel["key"])}".*\{{\{{80, true, (\d+)\}}, \{{90, false, (\d+)\}}\}}', text)
        assert told is not None
        for place, capability in zip(map(int, told.groups()), ("80", "90"), strict=True):
            code = kernel["codes"][capability].encode("latin1")
            assert place % 64 == 0 and blob[place : place + len(code)] == code
    assert struct.unpack_from("4s", blob, int(told[2]))[0] == b"\x7fELF"


def test_operators_are_the_specs(made: tuple[Path, dict[str, Any]]) -> None:
    text = (made[0] / "tables.cpp").read_text()
    for op in OPS.values():
        assert f'{{"{op.name}", "{op.base.family}", {str(op.int8).lower()}, {{' in text
        assert all(f'{{"{a.name}", ' in text and a.range.words in text for a in op.attributes)


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    from click.testing import CliRunner

    said = CliRunner().invoke(embedded.main, [str(tmp_path), "--dtypes", "float64"])
    assert said.exit_code == 2 and "'float64' is unknown. Known: float32, float16, int8." in said.output
