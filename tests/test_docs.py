"""The documentation: its blocks run, its links lead somewhere, its site builds without a warning."""

import copy
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import normrewrite as nr
from normrewrite import cli, norms, targets
from tests import browser
from tests.conftest import ROOT
from tests.pages import PAGES, Block, blocks, furnish, unsaid

NOT_RUN = {
    "README.md": ["installs, and the second runs the tests themselves"],
    "docs/deploy.md": [
        "needs TensorRT's headers; tests/plugins/test_library.py runs such",
        "trtexec, which needs full TensorRT and a GPU",
        "what the server's folder holds",
        "a server, which needs a GPU",
        "shown as py",
    ],
    "docs/index.md": ["installs; the tests run in what it makes"],
    "docs/kernels.md": ["train.py is yours"],
    "docs/machines.md": ["several processes; tests/test_launch.py runs such", "several machines"],
    "docs/migrate.md": ["shown as py", "shown as py"],  # Composer's and Opacus's own
    "docs/private.md": ["installs"],
    "docs/paper.md": ["installs, and its budgets take minutes and hours"],
    "docs/trust.md": [
        "ten thousand inputs; tests/benchmarks/test_fuzz.py runs a hundred",
        "mounts small disks and kills processes; tests/benchmarks/test_faults.py runs some",
    ],
    "docs/plugins.md": ["shown as py"],  # registers plugins where an engine runs, which needs a GPU
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with what the pages speak of. What they import, and add to the tables of norms and targets, is taken back."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    tables: list[dict[str, Any]] = [norms.METRICS, targets.TARGETS]
    before, modules = copy.deepcopy([list(table) for table in tables]), set(sys.modules)
    yield tmp_path
    for table, names in zip(tables, before, strict=True):
        for added in set(table) - set(names):
            del table[added]
    norms.metric.cache_clear()
    for module in set(sys.modules) - modules:
        if Path(getattr(sys.modules[module], "__file__", None) or ROOT).is_relative_to(tmp_path):
            del sys.modules[module]


class Reader:
    """Follows a page: `told` is what its commands have said since the last Python."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.patch, self.captured = monkeypatch, capsys
        self.namespace: dict[str, object] = {}
        self.told = ""

    def follow(self, block: Block) -> None:
        if block.language == "python" and not _lacks_opacus(block):
            block.run(self.namespace)
        elif block.language == "sh":
            self.told = "".join(self.command(words, code, block) for words, code in block.commands)
        elif block.language == "text" and self.told:
            assert not (missing := unsaid(block, self.told)), f"{name(block.page)}:{block.line}: {missing}\n{self.told}"

    def command(self, words: list[str], expected: int, block: Block) -> str:
        where = f"{name(block.page)}:{block.line}: {' '.join(words)}"
        assert words[0] == "normrewrite", f"{where}: mark what is not run"
        if words[1] == "build" and importlib.util.find_spec("tensorrt_rtx_bindings") is None:
            return ""
        self.patch.setattr(sys, "argv", words)
        self.captured.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as error:
            code = error.code
        said = self.captured.readouterr()
        assert code == expected, f"{where}\n{said.out}{said.err}"
        return said.out


def _lacks_opacus(block: Block) -> bool:
    return "import PrivacyEngine" in block.text and importlib.util.find_spec("opacus") is None


RUNNING = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=name)
def test_page_runs(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader(monkeypatch, capsys)
    for block in blocks(page):
        if block.why_not is None:
            reader.follow(block)


def test_what_is_not_run_is_listed() -> None:
    left = {name(page): [b.why_not for b in blocks(page) if b.why_not is not None] for page in PAGES}
    assert {page: reasons for page, reasons in left.items() if reasons} == NOT_RUN
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"python", "py", "sh", "text"}, "a block in another language is neither run nor listed"


@pytest.mark.parametrize(
    ("text", "raises"),
    [
        ("```python\nassert 1 == 2\n```", AssertionError),
        ("```sh\nnormrewrite convert model.pt --to nothing\n```", AssertionError),
        ("```sh\nnormrewrite inspect model.pt   # exit code 1: it is not\n```", AssertionError),
        (
            "```sh\nnormrewrite inspect model.pt\n```\n\n```text\nSequential: 1,000 parameters, 2 birds\n```",
            AssertionError,
        ),
        ("```sh\nls\n```", AssertionError),
    ],
    ids=["python", "command", "exit code", "output", "another program"],
)
def test_a_page_that_is_wrong_fails(
    text: str,
    raises: type[BaseException],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(globals(), "name", str)
    page = folder / "page.md"
    page.write_text(f"{text}\n")
    reader = Reader(monkeypatch, capsys)
    with pytest.raises(raises):
        for block in blocks(page):
            reader.follow(block)


def test_docstrings_become_markdown() -> None:
    pytest.importorskip("griffe", reason="MkDocs is not installed: pip install normrewrite[docs]")
    specification = importlib.util.spec_from_file_location("docstrings", ROOT / "docs" / "docstrings.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    text = "What it does.\n\n>>> f(x)\n1\n\nx, y: (N, C), of the\nsame size. z: a number.\nRaises NormRewriteError."
    lines = module.markdown(text).splitlines()
    assert [line for line in lines if line] == [
        *("What it does.", "```pycon", ">>> f(x)", "1", "```"),
        *("- **x, y**: (N, C), of the same size", "- **z**: a number.", "Raises NormRewriteError."),
    ]


# --- links, and the site ----------------------------------------------------------------------------------------------

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files(page: Path) -> None:
    links = [unquote(link) for link in _LINK.findall(page.read_text()) if not link.startswith("http")]
    missing = [link for link in links if not (page.parent / link).is_file()]
    assert not missing, missing


def test_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a warning is an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("MkDocs is not installed: pip install normrewrite[docs]")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return target


@pytest.mark.slow
def test_site_has_every_page_and_reads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES[1:]:
        html = (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text()
        assert not re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="https?:[^>]*', html), page
        assert "--8<--" not in html, page


@pytest.mark.slow
@pytest.mark.skipif(browser.found() is None, reason=f"no browser is here: one of {', '.join(browser.NAMES)}")
def test_pages_open_from_files_without_a_complaint(site: Path) -> None:
    with browser.Browser() as opened:
        page = opened.open(site / "reference" / "python.html", width=1280)
        assert not page.complaints and all(request.startswith(("file:", "data:")) for request in page.requests)


@pytest.mark.slow
def test_reference_has_every_public_name_and_every_command(site: Path) -> None:
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    public = [f"nr.{entry}" for entry in nr.__all__ if not entry.startswith("_")]
    objects = {f"nr.{entry}": getattr(nr, entry) for entry in nr.__all__} | {
        f"nr.{room}.{entry}": getattr(getattr(nr, room), entry)
        for room in ("nn", "passes")
        for entry in getattr(nr, room).__all__
        if entry != "PIPELINE"
    }
    missing = [
        entry
        for entry in [*public, *objects]
        if callable(objects[entry])
        and f'id="{objects[entry].__module__}.{objects[entry].__name__}"' not in pages
        and f'id="normrewrite.nn.{objects[entry].__name__}"' not in pages
    ]
    assert not missing, missing
    assert not [command for command in cli.app.commands if f'id="normrewrite-{command}' not in pages.replace("_", "-")]
