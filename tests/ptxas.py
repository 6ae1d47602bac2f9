"""NVIDIA's assembler, as Triton brings it along."""

import subprocess
import tempfile

from triton import knobs


def assembled(ptx: str, capability: int) -> subprocess.CompletedProcess[str]:
    """What ptxas makes of it: .returncode, and its report of registers and spills in .stderr."""
    tool = knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas
    suffix = "a" if capability >= 90 else ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool.path, "-v", f"--gpu-name=sm_{capability}{suffix}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True)
