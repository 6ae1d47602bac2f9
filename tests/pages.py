"""The pages of the documentation, as what can be run: their blocks of Python, their commands, and what those should say.

>>> [block.language for block in blocks(ROOT / "README.md")]
['sh', 'sh', 'python', 'python']

A page is run from top to bottom: its Python in one namespace, its commands in one folder, as people would. A comment
`<!-- not run: REASON -->` above a block leaves that one out, and so does ```py in place of ```python. `# exit code 1: ...`
behind a command is what it has to end with. A ```text block is what the commands before it say, whatever their numbers.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tests.conftest import ROOT, randomise

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"^(?:<!-- not run: ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[\d.,]+(?:e[-+]\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block. line: of its first; why_not: the reason why it is not run, where there is one."""

    page: Path
    line: int
    language: str
    text: str
    why_not: str | None

    @property
    def commands(self) -> Iterator[tuple[list[str], int]]:
        """Each command as words, and the exit code that it should have."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            told = re.search(r"# exit code (\d)", line)
            if words:
                yield words, int(told[1]) if told else 0

    def run(self, namespace: dict[str, object]) -> None:
        """Python alone; a traceback names the page and its line."""
        exec(compile("\n" * (self.line - 1) + self.text, self.page, "exec"), namespace)


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[2], found[3], found[1] or _shown(found[2]))
        for found in _BLOCK.finditer(text)
    ]


def _shown(language: str) -> str | None:
    return "shown as py" if language == "py" else None


def unsaid(block: Block, output: str) -> list[str]:
    """The lines of a text block that are not in the output, numbers and spaces apart."""
    said = {_alike(line) for line in output.splitlines()}
    return [line for line in block.text.splitlines() if _alike(line) not in said]


def _alike(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


# --- the files that pages speak of ------------------------------------------------------------------------------------

MODELS = '''
from torch import nn

def layer(inside, outside, stride=1):
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))

class Block(nn.Module):
    def __init__(self, inside, outside, stride):
        super().__init__()
        self.body, self.relu = layer(inside, outside, stride), nn.ReLU()
        self.short = nn.Conv2d(inside, outside, 1, stride)
    def forward(self, x):
        return self.relu(self.body(x) + self.short(x))

def resnet20():
    """A short one: exporting takes its time by the node."""
    net = nn.Sequential()
    net.stem, net.blocks = layer(3, 4), nn.Sequential(Block(4, 4, 1), Block(4, 8, 2), Block(8, 16, 2))
    net.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return net
'''


def furnish(folder: Path) -> None:
    """What the pages take for granted: models.py and its weights, images with and without labels, a pickled network, examples."""
    import numpy as np

    namespace: dict[str, object] = {}
    exec(MODELS, namespace)
    (folder / "models.py").write_text(MODELS)
    for seed, name in enumerate(("weights.pt", "other.pt")):
        model = randomise(namespace["resnet20"](), seed)  # type: ignore[operator]
        torch.save(model.state_dict(), folder / name)
    torch.save(randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())).eval(), folder / "model.pt")
    for name, count in {"images": 64, "train": 128, "val": 32}.items():
        images, labels = torch.randn(count, 3, 32, 32), torch.randint(10, (count,))
        np.savez(folder / f"{name}.npz", images=images.numpy(), labels=labels.numpy())
    for path in (ROOT / "examples").glob("digits.*"):
        (folder / path.name).write_bytes(path.read_bytes())
